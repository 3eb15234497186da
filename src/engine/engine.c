/* engine.c: see engine.h. The life of requests on rank 0, and the tick.
 *
 *   submit: check ─► copy (task_new) ─► take: sequences into the queue, or held for a shared thought
 *   tick:   sched_plan ─► assembly_make ─► step_send ─► step_forward ─► sched_computed ─► decide_row each
 *           or a step of a run (run.c), which lasts over many ticks
 *   end:    pages back, last event; the task is freed once all its sequences are done and no tick runs
 *
 * A callback may cancel anything at any time, so whoever holds a sequence across an event looks at
 * its state again; memory stays until the end of the tick. Thread: engine. Memory: all fixed arrays
 * in engine_new; a task per request, made before it is taken; a tick allocates nothing.
 */
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

#include "base/fault.h"
#include "engine/engine_parts.h"

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static enum status check_options(const struct engine_options *o, int vocab_rows) {
    if (o->max_seqs < 1)
        return fail(STATUS_USAGE, "--max-num-seqs is %d, must be at least 1", o->max_seqs);
    if (o->max_batched_tokens < 1)
        return fail(STATUS_USAGE, "--max-num-batched-tokens is %d, must be at least 1",
                    o->max_batched_tokens);
    if (o->page_count < 1)
        return fail(STATUS_USAGE, "the KV cache has %d pages: raise --kv-memory", o->page_count);
    if (o->max_model_len < 1 || o->max_model_len > CONFIG_POSITION_MAX)
        return fail(STATUS_USAGE, "--max-model-len is %lld, must be from 1 to %d",
                    (long long)o->max_model_len, CONFIG_POSITION_MAX);
    if (o->queue_max < 0 || o->vocab_count < 0 || o->vocab_count > vocab_rows)
        return fail(STATUS_USAGE, "queue limit %d or vocabulary size %d is impossible (%d rows)",
                    o->queue_max, o->vocab_count, vocab_rows);
    return STATUS_OK;
}

enum status engine_new(model *m, comm *c, const struct engine_options *options,
                       engine_event_fn on_event, void *user, engine **out) {
    *out = NULL;
    const struct model_config *config = model_get_config(m);
    TRY(check_options(options, config->vocab_rows));
    engine *e = calloc(1, sizeof *e);
    if (!e) return fail(STATUS_MEMORY, "no memory for the engine");
    enum status status = STATUS_OK;
    e->model = m;
    e->comm = c;
    e->options = step_options(options);
    if (e->options.vocab_count == 0) e->options.vocab_count = config->vocab_rows;
    e->on_event = on_event;
    e->user = user;
    uint64_t seed = 0; /* prefix keys only: results do not depend on it */
    if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed)
        seed = (uint64_t)(1e9 * now_seconds());
    TRY_GOTO(step_init(&e->rank, m, c, options), out);
    TRY_GOTO(
        sched_init(&e->sched, &e->rank.limits, e->options.max_seqs, e->options.prefix_cache, seed),
        out);
    TRY_GOTO(assembly_init(&e->assembly, &e->rank.limits), out);
    TRY_GOTO(run_init(&e->run, &e->rank.limits), out);
    const size_t vocab = (size_t)e->options.vocab_count;
    e->kept_records = malloc((size_t)comm_size(c) * step_records_bytes_max(&e->rank.limits));
    e->full_keys = malloc(2 * vocab * sizeof *e->full_keys);
    e->full_z = malloc(vocab * sizeof *e->full_z);
    e->full_id = malloc(vocab * sizeof *e->full_id);
    if (!e->kept_records || !e->full_keys || !e->full_z || !e->full_id) {
        status = fail(STATUS_MEMORY, "no memory for a row of %zu logits", vocab);
        goto out;
    }
    const shard_map *shard = model_get_shard(m);
    const int ranks = comm_size(c), slabs = shard->slabs;
    ASSERT_LE(ranks, MERGE_RANKS_MAX);
    for (int r = 0; r <= ranks; r++)
        e->vocab_begin[r] = shard_slab_begin(r * slabs / ranks, config->vocab_rows, slabs);
    if (ranks == 1) { /* all there is, or a share (model_options) that is all that is asked */
        e->vocab_begin[0] = shard->vocab_begin[0];
        e->vocab_begin[1] = shard->vocab_begin[shard->slab_count];
    }
    *out = e;
    return STATUS_OK;
out:
    engine_free(e);
    return status;
}

void engine_free(engine *e) {
    if (!e) return;
    while (e->tasks) {
        struct task *t = e->tasks;
        e->tasks = t->next;
        task_free(t);
    }
    sched_fini(&e->sched);
    assembly_fini(&e->assembly);
    run_fini(&e->run);
    step_fini(&e->rank);
    free(e->kept_records);
    free(e->full_keys);
    free(e->full_z);
    free(e->full_id);
    free(e);
}

/* ---- submit ---- */

static struct task *find_task(const engine *e, uint64_t id) {
    struct task *t = e->tasks;
    while (t && (t->request.id != id || t->live_count == 0)) t = t->next;
    return t;
}

static enum status check_length(const engine *e, const struct request *r) {
    const int64_t limit = e->options.max_model_len, prompt = r->prompt.count,
                  completion = r->max_tokens;
    if (completion <= limit && prompt <= limit - completion) return STATUS_OK;
    const char *param = prompt >= limit ? "prompt" : "max_tokens";
    return fail_param(
        STATUS_REQUEST, param, "context_length_exceeded",
        "This model's maximum context length is %lld tokens. However, you requested %lld tokens "
        "(%lld in the messages, %lld in the completion)",
        (long long)limit, (long long)(prompt + completion), (long long)prompt,
        (long long)completion);
}

static enum status check_queue(const engine *e, int n) {
    if (e->options.queue_max == 0) return STATUS_OK;
    const int64_t room = (int64_t)e->options.queue_max + e->options.max_seqs;
    if (n > room)
        return fail_param(STATUS_REQUEST, "n", NULL,
                          "n is %d, at most %lld sequences can be held at once", n,
                          (long long)room);
    if (e->sched.waiting_count + e->sched.running_count + e->held_count + n > room)
        return fail(STATUS_BUSY, "%d sequences are running and %d waiting: try again later",
                    e->sched.running_count, e->sched.waiting_count + e->held_count);
    return STATUS_OK;
}

static enum status check_room(const engine *e, const struct request *r) {
    TRY(check_length(e, r));
    TRY(check_queue(e, r->choices));
    if (find_task(e, r->id))
        return fail_param(STATUS_REQUEST, "request_id", NULL,
                          "a request with id %llu is still running", (unsigned long long)r->id);
    return STATUS_OK;
}

static void take(engine *e, struct task *t) {
    const double submitted = now_seconds();
    t->next = e->tasks;
    if (e->tasks) e->tasks->prev = t;
    e->tasks = t;
    for (int i = 0; i < t->sequence_count; i++) {
        struct sequence *s = &t->sequences[i];
        s->arrival = e->arrivals++;
        s->submitted = submitted;
        s->queue_seconds = -1;
        if (i > 0 && t->sharing != SHARING_NONE) {
            s->state = SEQUENCE_HELD;
            e->held_count++;
        } else {
            sched_enqueue(&e->sched, s);
        }
    }
}

enum status engine_take(engine *e, struct task *t) {
    const enum status status = check_room(e, &t->request);
    if (status == STATUS_OK) {
        take(e, t);
    } else {
        task_free(t);
    }
    return status;
}

enum status engine_submit(engine *e, const struct request *r) {
    struct task *t;
    TRY(request_check(r, e->options.vocab_count));
    TRY(check_room(e, r)); /* before memory is taken for it */
    TRY(task_new(r, e->options.vocab_count, &t));
    take(e, t);
    return STATUS_OK;
}

/* ---- ends ---- */

static void free_finished_tasks(engine *e) {
    if (e->in_tick || e->finished_tasks == 0) return;
    for (struct task *t = e->tasks, *next; t; t = next) {
        next = t->next;
        if (t->live_count > 0) continue;
        *(t->prev ? &t->prev->next : &e->tasks) = t->next;
        if (t->next) t->next->prev = t->prev;
        task_free(t);
    }
    e->finished_tasks = 0;
}

void engine_emit_step(engine *e, struct sequence *s, const struct step_report *report) {
    if (s->muted) return;
    const struct engine_event event = {.kind = ENGINE_STEP,
                                       .request_id = s->task->request.id,
                                       .choice = s->choice,
                                       .queue_seconds = s->queue_seconds,
                                       .step = report->step,
                                       .shared = report->shared,
                                       .decision = report->decision,
                                       .logprob = report->logprob,
                                       .top_count = report->top_count,
                                       .top = report->top};
    e->on_event(e->user, &event);
}

static void emit_finished(engine *e, const struct sequence *s, const struct ending *ending) {
    const struct think_state *thought = &s->thought;
    struct engine_event event = {.kind = ENGINE_FINISHED,
                                 .request_id = s->task->request.id,
                                 .choice = s->choice,
                                 .queue_seconds = s->queue_seconds,
                                 .finish = ending->finish,
                                 .loop_break = ending->loop_break,
                                 .stopped_by_id = ending->stopped_by_id,
                                 .stop_id = ending->stop_id,
                                 .thinking_end = thought->end,
                                 .mean_entropy = NAN};
    if (thought->thinking_steps > 0)
        event.mean_entropy = thought->entropy_sum / (double)thought->thinking_steps;
    sequence_usage(s, &event.usage);
    e->on_event(e->user, &event);
}

void engine_end(engine *e, struct sequence *s, const struct ending *ending, bool quiet) {
    struct task *t = s->task;
    if (s->state == SEQUENCE_HELD) e->held_count--;
    run_forget(e, s);
    sched_remove(&e->sched,
                 s); /* state DONE: whoever cancels it from the event below finds it gone */
    if (--t->live_count == 0) e->finished_tasks++;
    if (!quiet && !s->muted) emit_finished(e, s, ending);
}

static void cancel_one(engine *e, struct sequence *s, bool quiet) {
    static const struct ending aborted = {.finish = FINISH_REASON_ABORT};
    if (s->state == SEQUENCE_DONE || s->muted) return;
    if (share_needs(s)) {
        s->muted = true;
        if (!quiet) emit_finished(e, s, &aborted);
    } else {
        engine_end(e, s, &aborted, quiet);
    }
    struct sequence *thinker = &s->task->sequences[0];
    if (thinker->muted && thinker->state != SEQUENCE_DONE && !share_needs(thinker))
        engine_end(e, thinker, &aborted, true);
}

void engine_cancel(engine *e, uint64_t request_id, int choice, bool quiet) {
    struct task *t = find_task(e, request_id);
    if (!t || choice >= t->sequence_count) return;
    const int first = choice >= 0 ? choice : 0, last = choice >= 0 ? choice : t->sequence_count - 1;
    const bool in_tick = e->in_tick;
    e->in_tick = true; /* keeps the task alive while it is walked: events may cancel as well */
    for (int i = last; i >= first; i--) cancel_one(e, &t->sequences[i], quiet);
    e->in_tick = in_tick;
    free_finished_tasks(e);
}

void engine_preempt(engine *e) {
    const struct sequence *victim = sched_preempt_youngest(&e->sched);
    if (victim) run_forget(e, victim);
}

/* ---- tick ---- */

/* How long sequences of this step waited for their first one. */
static void note_waits(const struct sched *sched, double now) {
    for (int i = 0; i < sched->work_count; i++) {
        struct sequence *s = sched->works[i].sequence;
        if (s->queue_seconds < 0) s->queue_seconds = now - s->submitted;
    }
}

/* Reads one step of a run. */
static void tick_run(engine *e, double begin) {
    run_tick(e);
    e->counters.run_steps++;
    e->counters.forward_seconds += now_seconds() - begin;
}

/* One ordinary step. */
static void tick_step(engine *e, double begin) {
    assembly_make(&e->assembly, e->sched.works, e->sched.work_count, false);
    const double assembled = now_seconds();
    step_send(&e->rank, PLAN_STEP, e->step, &e->assembly.batch, 0);
    const double planned = now_seconds();
    e->gathered = step_forward(&e->rank, &e->assembly.batch);
    e->gathered_bytes = (size_t)comm_size(e->comm) * step_records_bytes(&e->assembly.batch);
    const double computed = now_seconds();
    sched_computed(&e->sched);
    for (int i = 0; i < e->assembly.ask_count; i++) decide_row(e, &e->assembly.asks[i]);
    e->step++;
    e->counters.plan_seconds += planned - begin;
    e->counters.broadcast_seconds += planned - assembled;
    e->counters.forward_seconds += computed - planned;
    e->counters.sample_seconds += now_seconds() - computed;
}

bool engine_tick(engine *e) {
    if (!e->run.active && e->sched.waiting_count + e->sched.running_count == 0) return false;
    const double begin = now_seconds();
    e->in_tick = true;
    if (fault_every("preempt")) engine_preempt(e);
    bool run = e->run.active;
    if (!run) {
        sched_plan(&e->sched);
        ASSERT_LT(0, e->sched.work_count);
        note_waits(&e->sched, begin);
        run = run_start(e);
    }
    if (run) {
        tick_run(e, begin);
    } else {
        tick_step(e, begin);
    }
    e->in_tick = false;
    free_finished_tasks(e);
    return true;
}

void engine_stop(engine *e) {
    e->in_tick = true; /* tasks stay */
    run_stop(e);
    e->in_tick = false;
    step_send(&e->rank, PLAN_STOP, e->step, NULL, 0);
}

void engine_counters_get(const engine *e, struct engine_counters *out) {
    const kv_pool *pool = e->sched.pool;
    *out = e->counters;
    out->steps = e->step;
    out->preemptions = e->sched.preemptions;
    out->prompt_tokens = e->sched.prompt_tokens;
    out->cached_tokens = e->sched.cached_tokens;
    out->running = e->sched.running_count;
    out->waiting = e->sched.waiting_count + e->held_count;
    out->pages_used = kv_pool_used(pool);
    out->pages_cached = kv_pool_cached(pool);
    out->pages_free = kv_pool_available(pool) - out->pages_cached;
}
