/* bench_step.c: `sfumato bench step`, a decode step against the time it takes just to read its bytes.
 *
 *   round: [multiply-add peak 50 ms] ─► read sweep (all ranks at once) ─► n decode steps ─► next round
 *
 * The sweep reads what a step reads, weights and KV, in the best order: the floor. floor_ratio = floor time /
 * step time of the same round. The step is the whole path: plan, broadcast, forward, gather, think_step, with
 * B soft-thinking sequences of random prompts at the given context. Other ranks are told what to do by
 * one-word orders over comm_bcast; inside ORDER_FOLLOW the engine's own plans rule.
 * Every run ends with a hash of the decisions of all warm-up steps, whose number does not depend on the
 * clock: speed work must not move it.
 *
 * --rank-of R/N: one process holds what rank R of N would (shapes, slabs, pages), and nobody else is
 * there. Its ids are those of its own vocabulary rows, and a collective is a wait of --collective-us.
 * So it measures the local part of a step on N ranks; what it decides means nothing.
 * --compare-hard: after the soft rounds the same prompts with thinking off, against floors of their own.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/log.h"
#include "base/rng.h"
#include "cmd/bench.h"
#include "engine/engine.h"

enum { BATCHES_MAX = 16, WARM_STEPS = 4, STEPS_MAX = 32, ROUND_TARGET_MS = 60 };
enum { AHEAD_MAX = 8, TICKS_A_STEP = 8 }; /* steps of a run that are under way when a round ends */

enum order_kind { ORDER_SWEEP = 1, ORDER_FOLLOW, ORDER_END };
struct order {
    int32_t kind, repeats;
    int64_t kv_tokens;
};
struct sweep_answer {
    double peak_flops, seconds;
    int64_t bytes, weight_bytes, peak_rss_bytes;
};

struct batch_result {
    int batch, steps_per_round, discarded;
    bool hard; /* thinking off */
    bool inconclusive;
    struct bench_series step_ms, ratio, tokens_per_s, gbs;
    double comm_share, sampling_share;
    int64_t bytes; /* of one sweep, all ranks */
};

struct step_bench {
    struct host *host;
    engine *engine;
    int batches[BATCHES_MAX], batch_count;
    int64_t context, steps_room;
    double best_peak;
    struct bench_series floor_gbs;
    int64_t weight_bytes, peak_rss_bytes;
    int64_t tokens;         /* step events so far */
    uint64_t decision_hash; /* of warm-up steps */
    /* The ids of prompts: the vocabulary, or what there is of it. */
    uint32_t first_id, id_count;
};

/* ---- all ranks ---- */

/* The mean of some sweeps: as many as the round has steps, since one sweep of a small model is too short. */
static struct sweep_answer own_sweep(struct host *h, int64_t kv_tokens, int repeats) {
    struct sweep_answer a = {.weight_bytes = (int64_t)h->backend->weight_bytes,
                             .peak_rss_bytes = host_peak_bytes()};
    a.peak_flops = h->backend->ops->peak_flops(h->backend, 0.05);
    comm_gather(h->comm, &a.peak_flops,
                sizeof a.peak_flops); /* so that the sweeps start together */
    for (int i = 0; i < repeats; i++) {
        a.seconds += h->backend->ops->read_sweep(h->backend, kv_tokens, &a.bytes) / repeats;
    }
    return a;
}

static void obey(struct host *h) {
    for (;;) {
        const void *bytes;
        struct order order = {0};
        if (comm_bcast(h->comm, NULL, 0, &bytes) == sizeof order)
            memcpy(&order, bytes, sizeof order);
        if (order.kind == ORDER_SWEEP) {
            const struct sweep_answer a = own_sweep(h, order.kv_tokens, order.repeats);
            comm_gather(h->comm, &a, sizeof a);
        } else if (order.kind == ORDER_FOLLOW) {
            engine_follow(h->model, h->comm, &h->engine_options);
        } else {
            return;
        }
    }
}

/* ---- rank 0 ---- */

static void give_order(struct host *h, enum order_kind kind, int64_t kv_tokens, int repeats) {
    const struct order order = {.kind = kind, .repeats = repeats, .kv_tokens = kv_tokens};
    comm_bcast(h->comm, &order, sizeof order, NULL);
}

/* The floor of one round: the slowest rank's time, all ranks' bytes. False when the machine is busy. */
static bool sweep(struct step_bench *b, int64_t kv_tokens, int repeats, double *seconds,
                  int64_t *bytes) {
    struct host *h = b->host;
    double peak = 0;
    give_order(h, ORDER_SWEEP, kv_tokens, repeats);
    const struct sweep_answer mine = own_sweep(h, kv_tokens, repeats);
    const struct sweep_answer *all = comm_gather(h->comm, &mine, sizeof mine);
    *seconds = 0;
    *bytes = b->weight_bytes = 0;
    for (int r = 0; r < h->ranks; r++) {
        peak += all[r].peak_flops;
        *seconds = fmax(*seconds, all[r].seconds);
        *bytes += all[r].bytes;
        b->weight_bytes += all[r].weight_bytes;
        if (all[r].peak_rss_bytes > b->peak_rss_bytes) b->peak_rss_bytes = all[r].peak_rss_bytes;
    }
    b->best_peak = fmax(b->best_peak, peak);
    return peak >= BENCH_QUIET * b->best_peak;
}

static void on_event(void *user, const struct engine_event *e) {
    struct step_bench *b = user;
    if (e->kind == ENGINE_STEP) b->tokens++;
}

static uint64_t sequence_id(const struct batch_result *r, int i) {
    return (uint64_t)r->batch * 1024 + (r->hard ? 512 : 0) + (uint64_t)i;
}

static enum status submit(struct step_bench *b, const struct batch_result *r) {
    const int vocab = (int)b->id_count;
    uint32_t *ids = calloc((size_t)b->context, sizeof *ids);
    if (!ids) return fail(STATUS_MEMORY, "no memory for a prompt");
    enum status status = STATUS_OK;
    for (int i = 0; i < r->batch && status == STATUS_OK; i++) {
        const uint64_t id = sequence_id(r, i), prompt = (uint64_t)r->batch * 1024 + (uint64_t)i;
        for (int64_t t = 0; t < b->context; t++) {
            ids[t] = b->first_id + rng_draw((uint64_t)b->host->params.seed + prompt, (uint32_t)t, 0,
                                            RNG_CATEGORICAL, 0, 0)
                                           .word[0] %
                                       b->id_count;
        }
        const struct request request = {
            .id = id,
            .prompt = {.count = b->context, .ids = ids},
            .choices = 1,
            .max_tokens = b->host->engine_options.max_model_len - b->context,
            .repetition_penalty = 1,
            .think = {.mode = r->hard ? THINK_OFF : THINK_SOFT,
                      .max_topk = 10,
                      .thinking = {0.6f, vocab < 30 ? vocab : 30, 0.95f, 0.001f},
                      .answer = {0.6f, vocab < 30 ? vocab : 30, 0.95f, 0},
                      .budget = INT32_MAX,
                      .start = START_FIRST_TOKEN,
                      .ignore_eos = true,
                      .gumbel_temperature = 0.5f,
                      .dirichlet_alpha = 1,
                      .seed = id,
                      .open_id = -1,
                      .close_id = -1},
        };
        status = engine_submit(b->engine, &request);
    }
    free(ids);
    return status;
}

/* n decode steps of `batch` rows; the other ranks are told to follow for these. A tick is a step, but
 * where runs are launched ahead it may only start one: what counts is what has been said. Steps that
 * are under way at the end come after the clock has stopped. Negative: they do not come. */
static double run_steps(struct step_bench *b, int n, int batch) {
    const int64_t want = b->tokens + (int64_t)n * batch;
    give_order(b->host, ORDER_FOLLOW, 0, 0);
    const double start = progress_clock();
    for (int ticks = 0; b->tokens < want && ticks < TICKS_A_STEP * n; ticks++)
        engine_tick(b->engine);
    const double seconds = progress_clock() - start;
    const bool done = b->tokens == want;
    engine_stop(b->engine);
    return done ? seconds : -1;
}

static void add_round(struct step_bench *b, struct batch_result *r, double floor, int64_t bytes,
                      double seconds) {
    const double step = seconds / r->steps_per_round;
    bench_add(&r->step_ms, 1e3 * step);
    bench_add(&r->ratio, floor / step);
    bench_add(&r->tokens_per_s, r->batch / step);
    bench_add(&r->gbs, 1e-9 * (double)bytes / step);
    bench_add(&b->floor_gbs, 1e-9 * (double)bytes / floor);
    r->bytes = bytes;
}

static enum status run_rounds(struct step_bench *b, struct batch_result *r) {
    const int rounds = (int)b->host->params.rounds;
    double exchange = 0, sampling = 0, wall = 0;
    while (r->step_ms.count < rounds) {
        double floor;
        int64_t bytes;
        if (!sweep(b, b->context * r->batch, r->steps_per_round, &floor, &bytes) &&
            r->discarded < rounds) {
            r->discarded++;
            continue;
        }
        struct comm_times t0, t1;
        struct engine_counters c0, c1;
        comm_times_get(b->host->comm, &t0);
        engine_counters_get(b->engine, &c0);
        const double seconds = run_steps(b, r->steps_per_round, r->batch);
        if (seconds < 0) {
            return fail(STATUS_BUG,
                        "a decode step did not move every sequence: context or memory too small");
        }
        comm_times_get(b->host->comm, &t1);
        engine_counters_get(b->engine, &c1);
        exchange += t1.wait_seconds - t0.wait_seconds + t1.move_seconds - t0.move_seconds;
        sampling += c1.sample_seconds - c0.sample_seconds;
        wall += seconds;
        add_round(b, r, floor, bytes, seconds);
    }
    r->comm_share = exchange / wall;
    r->sampling_share = sampling / wall;
    r->inconclusive = r->discarded >= rounds;
    return STATUS_OK;
}

static uint64_t decisions_so_far(const struct step_bench *b) {
    struct engine_counters c;
    engine_counters_get(b->engine, &c);
    return c.decision_hash;
}

static enum status run_batch(struct step_bench *b, struct batch_result *r) {
    TRY(submit(b, r));
    const uint64_t before = decisions_so_far(b);
    give_order(b->host, ORDER_FOLLOW, 0, 0);
    const int64_t first = b->tokens + r->batch, want = first + (int64_t)r->batch * WARM_STEPS;
    double start = progress_clock();
    while (b->tokens < want) { /* prompts, then a few steps to warm up */
        if (b->tokens <= first) start = progress_clock();
        if (!engine_tick(b->engine)) break;
    }
    const double step = (progress_clock() - start) / WARM_STEPS;
    engine_stop(b->engine);
    b->decision_hash += decisions_so_far(b) - before;
    const int64_t room = b->steps_room / (b->host->params.rounds + 1) - AHEAD_MAX;
    double n = fmax(1, fmin(STEPS_MAX, ROUND_TARGET_MS * 1e-3 / (step + 1e-9)));
    r->steps_per_round = (int)fmin(n, (double)room);
    const enum status status = run_rounds(b, r);
    for (int i = 0; i < r->batch; i++) {
        engine_cancel(b->engine, sequence_id(r, i), -1, true);
    }
    return status;
}

/* ---- report ---- */

static void print_result(const struct batch_result *r) {
    const struct bench_summary step = bench_summarise(&r->step_ms),
                               ratio = bench_summarise(&r->ratio),
                               tokens = bench_summarise(&r->tokens_per_s),
                               gbs = bench_summarise(&r->gbs);
    printf(
        "batch %-3d%s  %8.3f ms a step (%.3f..%.3f)  %8.1f tokens/s  %6.2f GB/s  floor/step %.3f "
        "(%.3f..%.3f)  comm %.1f %%  sampling %.1f %%%s\n",
        r->batch, r->hard ? " hard" : "", step.median, step.min, step.max, tokens.median,
        gbs.median, ratio.median, ratio.min, ratio.max, 100 * r->comm_share,
        100 * r->sampling_share, r->inconclusive ? "  INCONCLUSIVE: the machine is busy" : "");
    fflush(stdout);
}

/* What soft thinking adds to a step, as a share: both against the floor of their own rounds. */
static double soft_cost(const struct batch_result *soft, const struct batch_result *hard) {
    const double ratio = bench_summarise(&soft->ratio).median;
    return ratio > 0 ? bench_summarise(&hard->ratio).median / ratio - 1 : 0;
}

/* hard: beside results, NULL unless compared. */
static void write_json(const struct step_bench *b, const struct batch_result *results,
                       const struct batch_result *hard, struct json_writer *w) {
    const struct host *h = b->host;
    char text[32];
    json_begin(w, '{');
    json_key(w, "model");
    json_write_text(w, h->model_name);
    json_key(w, "dtype");
    json_write_text(w, backend_dtype_name(h->model_options.weight_dtype));
    json_key(w, "isa");
    json_write_text(w, backend_isa_name(h->backend->isa));
    json_key(w, "numerics");
    json_write_text(w, backend_numerics_name(h->backend->numerics));
    json_key(w, "ranks");
    json_write_int(w, h->ranks);
    if (h->params.rank_of) {
        json_key(w, "rank_of");
        json_write_text(w, h->params.rank_of);
        json_key(w, "collective_us");
        json_write_real(w, h->params.collective_us);
    }
    json_key(w, "threads");
    json_write_int(w, h->backend->threads);
    json_key(w, "context");
    json_write_int(w, b->context);
    json_key(w, "weight_bytes");
    json_write_int(w, b->weight_bytes);
    bench_write_summary(w, "floor_gbs", bench_summarise(&b->floor_gbs));
    json_key(w, "batches");
    json_begin(w, '[');
    for (int i = 0; i < b->batch_count; i++) {
        const struct batch_result *r = &results[i];
        json_begin(w, '{');
        json_key(w, "batch");
        json_write_int(w, r->batch);
        bench_write_summary(w, "step_ms", bench_summarise(&r->step_ms));
        bench_write_summary(w, "floor_ratio", bench_summarise(&r->ratio));
        bench_write_summary(w, "tokens_per_s", bench_summarise(&r->tokens_per_s));
        if (hard) {
            bench_write_summary(w, "hard_step_ms", bench_summarise(&hard[i].step_ms));
            bench_write_summary(w, "hard_floor_ratio", bench_summarise(&hard[i].ratio));
            json_key(w, "soft_cost");
            json_write_real(w, soft_cost(r, &hard[i]));
        }
        json_key(w, "comm_share");
        json_write_real(w, r->comm_share);
        json_key(w, "sampling_share");
        json_write_real(w, r->sampling_share);
        json_key(w, "rounds");
        json_write_int(w, r->step_ms.count);
        json_key(w, "busy_rounds");
        json_write_int(w, r->discarded);
        json_key(w, "inconclusive");
        json_write_bool(w, r->inconclusive);
        json_end(w, '}');
    }
    json_end(w, ']');
    json_key(w, "peak_rss_bytes");
    json_write_int(w, b->peak_rss_bytes);
    json_key(w, "decision_hash");
    snprintf(text, sizeof text, "%016llx", (unsigned long long)b->decision_hash);
    json_write_text(w, text);
    json_end(w, '}');
    json_write_bytes(w, "\n", 1);
}

static enum status run_all(struct step_bench *b) {
    struct batch_result *results = calloc(2 * (size_t)b->batch_count, sizeof *results);
    struct batch_result *hard = b->host->params.compare_hard ? results + b->batch_count : NULL;
    struct rusage before, after;
    if (!results) return fail(STATUS_MEMORY, "no memory for results");
    enum status status = STATUS_OK;
    getrusage(RUSAGE_SELF, &before);
    for (int i = 0; i < b->batch_count && status == STATUS_OK; i++) {
        results[i].batch = b->batches[i];
        status = run_batch(b, &results[i]);
        if (status == STATUS_OK) print_result(&results[i]);
        if (!hard || status != STATUS_OK) continue;
        hard[i] = (struct batch_result){.batch = b->batches[i], .hard = true};
        status = run_batch(b, &hard[i]);
        if (status != STATUS_OK) continue;
        print_result(&hard[i]);
        printf("batch %-3d  soft thinking costs %.2f %%\n", b->batches[i],
               100 * soft_cost(&results[i], &hard[i]));
    }
    getrusage(RUSAGE_SELF, &after);
    if (status == STATUS_OK) {
        char rss[32];
        printf(
            "read floor %.2f GB/s, peak memory of a rank %s, %ld involuntary switches, decisions "
            "%016llx\n",
            bench_summarise(&b->floor_gbs).median, progress_bytes((double)b->peak_rss_bytes, rss),
            after.ru_nivcsw - before.ru_nivcsw, (unsigned long long)b->decision_hash);
        if (b->host->params.json) {
            struct json_writer w;
            json_writer_init(&w);
            write_json(b, results, hard, &w);
            fwrite(w.bytes, 1, w.n, stdout);
            json_writer_fini(&w);
        }
    }
    free(results);
    return status;
}

/* ---- set-up ---- */

static enum status read_batches(struct step_bench *b, const char *list) {
    for (const char *p = list; *p;) {
        char *end;
        const long n = strtol(p, &end, 10);
        if (end == p || n < 1 || n > 512 || b->batch_count == BATCHES_MAX ||
            (*end && *end != ',')) {
            return fail(STATUS_USAGE,
                        "--batch %s: it must be up to %d sizes of 1..512 with commas between", list,
                        BATCHES_MAX);
        }
        b->batches[b->batch_count++] = (int)n;
        p = *end ? end + 1 : end;
    }
    return b->batch_count ? STATUS_OK : fail(STATUS_USAGE, "--batch: no batch size given");
}

/* --rank-of R/N: what the host then holds. */
static enum status read_rank_of(struct host *h) {
    const struct params *p = &h->params;
    int rank, ranks, used = 0;
    if (!p->rank_of) {
        return p->collective_us > 0
                   ? fail(STATUS_USAGE,
                          "--collective-us is for --rank-of: other ranks take their own")
                   : STATUS_OK;
    }
    if (sscanf(p->rank_of, "%4d/%4d%n", &rank, &ranks, &used) != 2 || p->rank_of[used] != '\0' ||
        rank < 0 || rank >= ranks || ranks > SHARD_RANKS_MAX) {
        return fail(STATUS_USAGE, "--rank-of %s: it must be R/N with 0 <= R < N <= %d", p->rank_of,
                    (int)SHARD_RANKS_MAX);
    }
    if (h->ranks > 1)
        return fail(STATUS_USAGE, "--rank-of is for a process alone, not under mpirun");
    h->shard_rank = rank;
    h->shard_ranks = ranks;
    return STATUS_OK;
}

/* --dims: a model of that shape with weights made from a hash. */
static enum status open_synthetic(struct host *h) {
    struct model_config config;
    if (h->params.model) return fail(STATUS_USAGE, "--dims contradicts --model");
    TRY(config_from_dims(&config, h->params.dims));
    if (h->params.layers > 0) config.layers = (int)h->params.layers;
    snprintf(h->model_name, sizeof h->model_name, "%s", h->params.dims);
    return synthetic_open(&config, 1, &h->source);
}

static enum status plan_bench(struct step_bench *b) {
    struct params *p = &b->host->params;
    const int64_t positions = b->host->source->config.max_positions;
    int64_t largest = 1;
    for (int i = 0; i < b->batch_count; i++) {
        if (b->batches[i] > largest) largest = b->batches[i];
    }
    b->context = p->context;
    const int64_t before = p->context + 1 + WARM_STEPS + AHEAD_MAX + 64;
    const int64_t wanted = before + (p->rounds + 1) * (STEPS_MAX + AHEAD_MAX);
    const int64_t length = wanted < positions ? wanted : positions;
    b->steps_room = length - before;
    if (b->steps_room < (p->rounds + 1) * (1 + AHEAD_MAX)) {
        return fail(
            STATUS_USAGE,
            "--context %lld: with %lld rounds it does not fit into the model's %lld positions",
            (long long)p->context, (long long)p->rounds, (long long)positions);
    }
    p->max_model_len = length;
    p->max_num_seqs = largest;
    return STATUS_OK;
}

static enum status prepare(struct step_bench *b) {
    struct host *h = b->host;
    TRY(read_batches(b, h->params.batch));
    TRY(read_rank_of(h));
    if (h->params.layers > 0 && !h->params.dims)
        return fail(STATUS_USAGE, "--layers is for --dims");
    return h->params.dims ? open_synthetic(h) : STATUS_OK;
}

enum status bench_step(struct host *h) {
    struct step_bench b = {.host = h};
    TRY(comm_agree(h->comm, prepare(&b)));
    if (!h->params.dims) TRY(host_open_text(h));
    TRY(comm_agree(h->comm, plan_bench(&b)));
    TRY(host_open_model(h));
    if (h->rank > 0) {
        obey(h);
        return STATUS_OK;
    }
    const int64_t known = h->engine_options.vocab_count;
    int64_t begin = 0, end = known;
    if (h->params.rank_of) { /* a rank that is alone knows only its own */
        const shard_map *shard = model_get_shard(h->model);
        begin = shard->vocab_begin[0];
        end = begin + shard_vocab_count(shard);
    }
    b.first_id = (uint32_t)begin;
    b.id_count = (uint32_t)((end < known ? end : known) - begin);
    if (begin >= known) {
        return fail(STATUS_USAGE, "--rank-of %s: this rank's vocabulary rows are all padding",
                    h->params.rank_of);
    }
    enum status status = engine_new(h->model, h->comm, &h->engine_options, on_event, &b, &b.engine);
    if (status == STATUS_OK) status = run_all(&b);
    give_order(h, ORDER_END, 0, 0);
    engine_free(b.engine);
    return status;
}
