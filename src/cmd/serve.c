/* serve.c: `sfumato serve`: the engine on the main thread, the service on the net thread of rank 0.
 *
 *   listeners ─► net thread ─► model files ─► weights ─► engine ─► ready ─► work ─► drained ─► leave
 *
 * The work loop reads what the net thread asks for, runs one step, leaves the step's events and
 * numbers where the net thread finds them, and sleeps when there is nothing to do; the other ranks
 * sleep in their wait for a plan. Everything a client sees is in serve/. Thread: engine thread.
 */
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc_watch.h"
#include "base/log.h"
#include "cmd/commands.h"
#include "cmd/watch.h"
#include "kv/pages.h"
#include "serve/net.h"

struct serving {
    struct host *host;
    net *net;
    struct wires *wires;
    struct metrics *metrics;
    engine *engine;
    struct engine_counters counters; /* after the last step */
    struct comm_times times;
    char fingerprint[64];
};

void cmd_serve_before(void) { net_block_signals(); }

/* ---- what a step leaves for /metrics ---- */

static void publish(struct serving *s) {
    enum { SCHEDULE, FORWARD, ALL_REDUCE, SAMPLE, BROADCAST };
    enum { FREE, CACHED, USED };
    struct metrics *m = s->metrics;
    const struct engine_counters before = s->counters;
    const struct comm_times times_before = s->times;
    struct engine_counters *now = &s->counters;
    engine_counters_get(s->engine, now);
    comm_times_get(s->host->comm, &s->times);
    atomic_store_explicit(&s->wires->running, now->running, memory_order_relaxed);
    atomic_store_explicit(&s->wires->step, now->steps, memory_order_relaxed);
    metric_set(m, METRIC_pages, FREE, now->pages_free);
    metric_set(m, METRIC_pages, CACHED, now->pages_cached);
    metric_set(m, METRIC_pages, USED, now->pages_used);
    const double all = (double)now->pages_free + now->pages_cached + now->pages_used;
    metric_set(m, METRIC_kv_usage, 0, all > 0 ? now->pages_used / all : 0);
    if (now->steps == before.steps) return;
    metric_set_total(m, METRIC_preemptions, 0, now->preemptions);
    metric_set_total(m, METRIC_prefix_queries, 0, now->prompt_tokens);
    metric_set_total(m, METRIC_prefix_hits, 0, now->cached_tokens);
    metric_set_total(m, METRIC_full_fetches, 0, now->full_fetches);
    metric_observe(m, METRIC_step_time, SCHEDULE, now->plan_seconds - before.plan_seconds);
    metric_observe(m, METRIC_step_time, BROADCAST,
                   now->broadcast_seconds - before.broadcast_seconds);
    metric_observe(m, METRIC_step_time, FORWARD, now->forward_seconds - before.forward_seconds);
    metric_observe(m, METRIC_step_time, SAMPLE, now->sample_seconds - before.sample_seconds);
    metric_observe(m, METRIC_step_time, ALL_REDUCE,
                   s->times.wait_seconds + s->times.move_seconds - times_before.wait_seconds -
                       times_before.move_seconds);
    metric_observe(
        m, METRIC_iteration_tokens, 0,
        (double)(now->prompt_tokens - now->cached_tokens + now->generated_tokens) -
            (double)(before.prompt_tokens - before.cached_tokens + before.generated_tokens));
}

/* ---- work ---- */

static void on_event(void *user, const struct engine_event *event) {
    struct serving *s = user;
    up_event(s->wires->up, event);
}

/* False: the net thread wants the engine to stop. */
static bool obey(struct serving *s, const struct down_message *m) {
    switch (m->kind) {
        case DOWN_SUBMIT:
            if (engine_take(s->engine, m->task) != STATUS_OK) {
                up_refused(s->wires->up, m->request->id, fail_last());
            }
            return true;
        case DOWN_CANCEL:
            engine_cancel(s->engine, m->id, m->choice, false);
            return true;
        case DOWN_STOP:
            return false;
    }
    return false;
}

static void work(struct serving *s) {
    for (;;) {
        const struct down_message *m;
        size_t n;
        while ((m = mailbox_peek(s->wires->down, &n)) != NULL) {
            const bool go_on = obey(s, m);
            mailbox_pop(s->wires->down);
            if (!go_on) return;
        }
        const bool worked = engine_tick(s->engine);
        publish(s);
        mailbox_flush(s->wires->up);
        if (!worked) mailbox_wait(s->wires->down, -1);
    }
}

/* By the engine thread (comm_abort) or the one that watches: the last chance to tell clients. */
static void on_abort(void *user, int exit_code, const char *text) {
    struct serving *s = user;
    char host[64] = "?";
    gethostname(host, sizeof host - 1);
    log_error("rank 0 on %s ends the job at step %llu", host,
              (unsigned long long)atomic_load(&s->wires->step));
    net_engine_died(s->net, exit_code, text);
}

/* A broken invariant anywhere in this process, or a device fault: what is wrong has been printed. */
static net *net_to_tell;

static void on_bug(int exit_code) {
    net *n = net_to_tell;
    /* the net thread's own bugs close connections without a word: service.h */
    if (n && !net_is_this_thread(n)) net_engine_died(n, exit_code, "a bug in the server");
    /* the launcher ends the other ranks; any thread may come here, so not by MPI */
    _exit(exit_code);
}

/* ---- facts for clients ---- */

static void on_load(void *user, double ratio) { net_progress(user, ratio); }

/* Changes whenever bits of results may: serving.md §4.1. Powers of two ranks give the same bits where sums are
 * in slab order, on a GPU with --deterministic; without, how it multiplies and sums over ranks counts too. */
static void make_fingerprint(struct serving *s) {
    const struct host *h = s->host;
    const bool ordered = h->backend->numerics != NUMERICS_CUDA || h->params.deterministic;
    const bool any_ranks = !ordered || (h->ranks & (h->ranks - 1)) != 0;
    char text[256];
    const int n = snprintf(
        text, sizeof text, "%s|%s|%s|%s|%d|%d|%d|%d|%d|%s|%s", SFUMATO_VERSION,
        h->backend->ops->name, backend_isa_name(h->backend->isa),
        backend_numerics_name(h->backend->numerics), h->model_options.weight_dtype,
        h->model_options.kv_dtype, h->model_options.slabs, any_ranks ? h->ranks : 0, ordered,
        ordered ? "" : param_word(&h->params, PARAM_gemm), ordered ? "" : comm_path_name(h->comm));
    uint32_t digest = 0x811c9dc5u; /* FNV-1a */
    for (int i = 0; i < n; i++) digest = (digest ^ (unsigned char)text[i]) * 0x01000193u;
    snprintf(s->fingerprint, sizeof s->fingerprint, "sfumato-%s-%08x", SFUMATO_VERSION, digest);
}

static void report_start(struct serving *s) {
    const struct host *h = s->host;
    char labels[256];
    snprintf(labels, sizeof labels, "block_size=\"%d\",num_blocks=\"%d\",", KV_PAGE_TOKENS,
             h->engine_options.page_count);
    metrics_set_info(s->metrics, METRIC_cache_config, labels);
    const bool cpu = h->backend->numerics != NUMERICS_CUDA; /* whose instruction set counts */
    snprintf(labels, sizeof labels, "version=\"%s\",backend=\"%s%s%s\",tp=\"%d\",dtype=\"%s\",",
             SFUMATO_VERSION, h->backend->ops->name, cpu ? "-" : "",
             cpu ? backend_isa_name(h->backend->isa) : "", h->ranks,
             backend_dtype_name(h->model_options.weight_dtype));
    metrics_set_info(s->metrics, METRIC_build, labels);
    metric_set(s->metrics, METRIC_ranks, 0, h->ranks);
    metric_set(s->metrics, METRIC_load_time, 0, h->load_seconds);
    for (int r = 0; r < h->ranks && r < COMM_RANKS_MAX; r++) {
        const struct host_memory *m = &h->memory[r];
        const int64_t kinds[] = {m->weights, m->kv, m->workspace, m->free};
        for (int k = 0; k < 4; k++) {
            metric_set(s->metrics, METRIC_memory, 4 * r + k, (double)kinds[k]);
        }
    }
}

/* ---- the command ---- */

static enum status start_net(struct serving *s) {
    const struct params *p = &s->host->params;
    if (p->positional) return fail(STATUS_USAGE, "%s: unexpected argument", p->positional);
    if (s->host->rank > 0) return STATUS_OK;
    char path[PATH_MAX];
    TRY(host_find_model(s->host, path)); /* /metrics names the model from the first scrape */
    TRY(net_open(p, s->host->model_name, s->host->ranks, &s->net));
    s->wires = net_wires(s->net);
    s->metrics = net_metrics(s->net);
    s->wires->page_tokens = KV_PAGE_TOKENS;
    s->host->on_load = on_load;
    s->host->on_load_user = s->net;
    comm_on_abort(s->host->comm, on_abort, s);
    watch_on_end(on_abort, s);
    net_to_tell = s->net;
    check_on_bug(on_bug);
    return net_start(s->net);
}

/* Options that requests depend on: a wrong one ends the job before the weights load. */
static enum status check_early(struct serving *s) {
    struct host *h = s->host;
    if (h->rank > 0) return STATUS_OK;
    if (h->params.served_model_name) h->facts.model_names = h->params.served_model_name;
    return body_facts_check(&h->facts);
}

static enum status open_engine(struct serving *s) {
    struct host *h = s->host;
    TRY(engine_new(h->model, h->comm, &h->engine_options, on_event, s, &s->engine));
    make_fingerprint(s);
    h->facts.fingerprint = s->fingerprint;
    h->facts.created = (int64_t)time(NULL);
    report_start(s);
    return STATUS_OK;
}

/* Everything is there: what engine threads allocate from now on is counted. */
static void start_work(struct serving *s) {
    engine_warm_up(s->engine);
    host_phase_alone(s->host, "warm-up", NULL);
    host_log_ready(s->host);
    publish(s);
    alloc_watch_thread(true);
    alloc_watch_begin();
}

/* After the last step, on every rank. */
static void report_allocations(const struct host *h) {
    const int64_t own = alloc_watch_end();
    alloc_watch_thread(false);
    const int64_t *all = comm_gather(h->comm, &own, sizeof own);
    char text[256] = "";
    int64_t sum = 0;
    for (int r = 0; all && r < h->ranks; r++) {
        const size_t n = strlen(text);
        snprintf(text + n, sizeof text - n, "%s%lld", r ? ", " : "", (long long)all[r]);
        sum += all[r] > 0 ? all[r] : 0;
    }
    if (!all) return;
    if (own < 0) {
        log_info("allocations by engine threads are not counted in this build");
    } else {
        log_line(sum > 0 ? LOG_WARN : LOG_INFO,
                 "allocations by engine threads from ready to drain, by rank: %s", text);
    }
}

enum status cmd_serve(struct host *h) {
    struct serving s = {.host = h};
    enum status status;
    TRY_GOTO(comm_agree(h->comm, start_net(&s)), out);
    TRY_GOTO(host_open_text(h), out);
    TRY_GOTO(comm_agree(h->comm, check_early(&s)), out);
    TRY_GOTO(host_open_model(h), out);
    if (h->rank > 0) {
        alloc_watch_thread(true);
        engine_follow(h->model, h->comm, &h->engine_options);
        report_allocations(h);
        return STATUS_OK;
    }
    if (open_engine(&s) != STATUS_OK) comm_abort(h->comm, STATUS_MEMORY, fail_text());
    start_work(&s);
    net_ready(s.net, &h->facts);
    work(&s);
    engine_stop(s.engine);
    report_allocations(h);
out:
    if (s.net && net_join(s.net) && status == STATUS_OK) {
        status = fail(STATUS_PARTIAL, "requests were aborted");
    }
    comm_on_abort(h->comm, NULL, NULL);
    watch_on_end(NULL, NULL);
    net_to_tell = NULL;
    net_free(s.net);
    engine_free(s.engine);
    return status;
}
