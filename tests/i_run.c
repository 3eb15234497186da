/* i_run.c: runs on the emulated GPU: the engine over a toy model, with decisions on the device and
 * without.
 *
 * The kernels are the product's, on the fibre emulation; the CUDA runtime is tests/stub, where a
 * captured launch is not done but written down, and memory taken after "ready" ends the program. A
 * mixed set of requests must say the same, byte for byte, however many steps a run has, however far it
 * is launched ahead, alone and beside others, by graphs and kernel by kernel (what comes through the
 * host, as with two ranks and messages, is never captured). Whatever a request can end by happens in
 * the middle of runs. The reference is the same engine with ordinary steps, whose decisions
 * i_engine.c compares with transformers'.
 *
 * Arguments: none (what ranks exchange passes the host), or "nccl" (the stub of NCCL) or "fused" (the
 * product's own kernels), both inside the graphs.
 */
#include "base/log.h"
#include "comm/comm.h"
#include "cuda_runtime_api.h"
#include "engine/engine.h"
#include "ranks.h"

enum {
    ROWS = 24,
    SEQS = 5,
    PAGES = 40,
    LENGTH = 192,
    VOCAB = 96,
    REQUESTS = 10,
    STEPS_MAX = 64,
    CLOSE = 5,
    EOS = 7
};

static comm *job;
static backend *be;
static model *toy;
static source *src;

static struct engine_options options_of(int seqs, int run_steps, int ahead) {
    return (struct engine_options){.max_seqs = seqs,
                                   .max_batched_tokens = ROWS,
                                   .max_model_len = LENGTH,
                                   .page_count = PAGES,
                                   .prefix_cache = true,
                                   .run_steps = run_steps,
                                   .launch_ahead = ahead};
}

static enum comm_kind kind_of(const char *name) {
    return strcmp(name, "nccl") == 0    ? COMM_NCCL
           : strcmp(name, "fused") == 0 ? COMM_FUSED
                                        : COMM_AUTO;
}

static long watched;
static void count_watches(void *user, double waited_seconds) {
    (void)user, (void)waited_seconds;
    watched++;
}

int suite_setup(int *argc, char ***argv) {
    static struct model_config config;
    log_init(LOG_WARN, false);
    must(comm_open(argc, argv, &job));
    config_init(&config);
    config.arch = ARCH_QWEN3;
    config.layers = 1;
    config.hidden = 64;
    config.ffn = 64;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 16;
    config.vocab_rows = VOCAB;
    config.qk_norm = true;
    config.max_positions = 4096;
    must(synthetic_open(&config, 3, &src));
    const struct engine_options o = options_of(SEQS, 32, RUN_AHEAD_MAX);
    const struct backend_config backend_config = {.rows_max = ROWS,
                                                  .logit_rows_max = engine_logit_rows_max(&o),
                                                  .probes_max = engine_probes_max(&o),
                                                  .local_rank = comm_local_rank(job),
                                                  .local_ranks = comm_local_size(job),
                                                  .deterministic = true,
                                                  .batch = engine_batch_limits(&o),
                                                  .run_rows = engine_run_rows_max(&o),
                                                  .positions_max = LENGTH,
                                                  .rank = comm_rank(job),
                                                  .ranks = comm_size(job)};
    const struct model_options model_options = {.weight_dtype = BACKEND_BF16,
                                                .kv_dtype = BACKEND_BF16,
                                                .slabs = 2,
                                                .rows_max = ROWS,
                                                .logit_rows_max = engine_logit_rows_max(&o),
                                                .max_positions = LENGTH,
                                                .vocab_count = VOCAB};
    must(cuda_open(&backend_config, &be));
    must(model_open(src, &model_options, be, job, NULL, NULL, &toy));
    struct comm_config sizes = {.slot_floats = ROWS * 64,
                                .timeout_seconds = 100,
                                .device = be,
                                .tree_sums = true,
                                .kind = kind_of(*argc > 1 ? (*argv)[1] : "mpi")};
    engine_comm_needs(&o, &sizes.bcast_bytes_max, &sizes.gather_bytes_max,
                      model_vocab_local_max(toy));
    must(comm_setup(job, &sizes));
    must(model_kv_new(toy, PAGES));
    if (!be->watch) be->watch = count_watches;
    return 0;
}

unsigned suite_total_failures(unsigned mine) { return ranks_failures(job, mine); }

void suite_teardown(void) {
    model_close(toy);
    source_close(src);
    comm_close(job);
    be->ops->close(be);
}

/* ---- requests ---- */

static struct told {      /* of one choice */
    int count, cancel_at; /* cancelled by its own event of that step; 0: not */
    struct think_decision steps[STEPS_MAX];
    bool finished;
    enum finish finish;
    bool stopped_by_id;
    enum think_end thinking_end;
    double mean_entropy;
    struct request_usage usage;
} want[REQUESTS], got[REQUESTS], *now;

static engine *live;
static int open_count;

static void on_event(void *user, const struct engine_event *ev) {
    struct told *t = &now[ev->request_id - 1];
    CU_ASSERT(user == now && !t->finished);
    if (ev->kind == ENGINE_STEP) {
        CHECK_EQ(ev->step, t->count);
        t->steps[t->count++] = *ev->decision;
        if (t->count == t->cancel_at) engine_cancel(live, ev->request_id, 0, false);
        return;
    }
    t->finished = true;
    t->finish = ev->finish;
    t->stopped_by_id = ev->stopped_by_id;
    t->thinking_end = ev->thinking_end;
    t->mean_entropy = ev->mean_entropy;
    t->usage = ev->usage;
    open_count--;
}

static uint32_t prompts[REQUESTS][40];

static struct request request_of(int i) {
    static const enum think_mode modes[] = {THINK_SOFT, THINK_GUMBEL, THINK_DIRICHLET, THINK_OFF};
    static const struct request_bias bias[] = {{20, 2.0f}, {31, -1.0f}};
    const int length = 3 + 4 * i;
    for (int k = 0; k < length; k++)
        prompts[i][k] = suite_random(9, (uint32_t)(64 * i + k)) % VOCAB;
    struct request r = {.id = (uint64_t)i + 1,
                        .prompt = {.count = length, .ids = prompts[i]},
                        .choices = 1,
                        .max_tokens = 14 + i,
                        .repetition_penalty = 1,
                        .think = {.mode = modes[i % 4],
                                  .max_topk = 3 + 2 * i,
                                  .thinking = {0.8f, 30, 0.95f, 0.001f},
                                  .answer = {0.7f, 20, 0.9f, 0},
                                  .cold_stop_length = 1,
                                  .start = START_FIRST_TOKEN,
                                  .gumbel_temperature = 0.5f,
                                  .dirichlet_alpha = 1,
                                  .seed = 11 + (uint64_t)i,
                                  .open_id = -1,
                                  .close_id = CLOSE,
                                  .eos_count = 1,
                                  .eos_ids = {EOS}}};
    struct think_params *t = &r.think;
    t->ignore_eos = i % 3 != 0;
    if (i == 1 || i == 6) { /* cold stop, then a forced text */
        t->cold_stop = true;
        t->cold_stop_entropy = 2.5f;
        t->cold_stop_length = 3;
        t->close_text_count = 3;
        t->close_text[0] = 40, t->close_text[1] = 41, t->close_text[2] = 42;
    }
    if (i == 2 || i == 5) t->budget = 3 + i;
    if (i == 3) { /* end ids masked while it thinks, and until it is old enough */
        t->mode = THINK_SOFT;
        t->on_eos = ON_EOS_MASK;
        t->budget = 6;
        r.min_tokens = 9;
    }
    if (i == 4) { /* greedy answer with ids to stop at */
        t->budget = 3;
        r.stop_id_count = 24;
        for (uint32_t k = 0; k < 24; k++) r.stop_ids[k] = 8 + 3 * k;
    }
    if (i == 7) r.bias_count = 2, r.bias = bias;
    if (i == 8)
        t->thinking.top_k = 0, t->thinking.top_p = 1, t->max_topk = 64; /* lists too short */
    if (i == 9) t->thinking.top_k = 60, t->max_topk = 64;               /* 64 candidates */
    return r;
}

/* One tick. A step that decided on the device is watched before anybody acts on it. */
static bool tick(void) {
    struct engine_counters before, after;
    const long watches = watched;
    engine_counters_get(live, &before);
    const bool more = engine_tick(live);
    engine_counters_get(live, &after);
    if (be->watch == count_watches && after.run_steps > before.run_steps)
        CU_ASSERT(watched > watches);
    return more;
}

/* Runs requests [from, to) and closes the engine. */
static struct engine_counters run(int from, int to, int seqs, int steps, int ahead,
                                  struct told *into) {
    const struct engine_options o = options_of(seqs, steps, ahead);
    struct engine_counters counters = {0};
    if (comm_rank(job) != 0) {
        engine_follow(toy, job, &o);
        return counters;
    }
    now = into;
    must(engine_new(toy, job, &o, on_event, into, &live));
    cuda_stub_seal(1); /* ready */
    open_count = to - from;
    for (int i = from; i < to; i++) {
        const struct request r = request_of(i);
        into[i] = (struct told){.cancel_at = i == 0 ? 9 : 0};
        must(engine_submit(live, &r));
    }
    while (open_count > 0 && tick()) continue;
    engine_stop(live);
    cuda_stub_seal(0);
    engine_counters_get(live, &counters);
    CHECK_EQ(counters.pages_used, 0);
    engine_free(live);
    return counters;
}

static void check_told(int from, int to) {
    for (int i = from; i < to && comm_rank(job) == 0; i++) {
        const struct told *a = &want[i], *b = &got[i];
        CHECK_EQ(b->count, a->count);
        CU_ASSERT(suite_equal_bytes("decisions", b->steps, a->steps,
                                    (size_t)a->count * sizeof *a->steps));
        CHECK_EQ(b->finish, a->finish);
        CHECK_EQ(b->stopped_by_id, a->stopped_by_id);
        CHECK_EQ(b->thinking_end, a->thinking_end);
        CU_ASSERT(b->mean_entropy == a->mean_entropy ||
                  (isnan(b->mean_entropy) && isnan(a->mean_entropy)));
        CU_ASSERT(suite_equal_bytes("usage", &b->usage, &a->usage, sizeof a->usage));
    }
}

/* ---- tests ---- */

static bool capturable(void) { return comm_capturable(job); }

static void test_reference(void) {
    run(0, REQUESTS, SEQS, 0, 1, want);
    if (comm_rank(job) != 0) return;
    int ends[END_WATCHDOG + 1] = {0}, finishes[FINISH_REASON_ERROR + 1] = {0}, soft = 0;
    for (int i = 0; i < REQUESTS; i++) {
        ends[want[i].thinking_end]++;
        finishes[want[i].finish]++;
        soft += (int)want[i].usage.soft_steps;
    }
    CU_ASSERT(ends[END_COLD_STOP] > 0 && ends[END_BUDGET] > 0); /* the set is worth running */
    CU_ASSERT(finishes[FINISH_REASON_STOP] > 0 && finishes[FINISH_REASON_LENGTH] > 0 &&
              finishes[FINISH_REASON_ABORT] == 1);
    CU_ASSERT(soft > 30);
    CU_ASSERT(want[4].stopped_by_id);
}

static void test_batch(void) {
    static const int ways[][3] = {{SEQS, 8, 2}, {SEQS, 8, 1}, {3, 16, 4}, {SEQS, 5, 3}};
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        long graphs_before, nodes, graphs;
        cuda_stub_launches(&graphs_before, &nodes);
        const struct engine_counters k = run(0, REQUESTS, ways[w][0], ways[w][1], ways[w][2], got);
        cuda_stub_launches(&graphs, &nodes);
        check_told(0, REQUESTS);
        CU_ASSERT(comm_rank(job) != 0 || k.run_steps > 10);
        CU_ASSERT(!capturable() || w == 0 || graphs - graphs_before > 10);
        CU_ASSERT(capturable() || graphs == 0);
    }
}

static void test_alone(void) {
    for (int i = 0; i < REQUESTS; i += 2) {
        run(i, i + 1, SEQS, 32, 2, got);
        check_told(i, i + 1);
    }
}

/* The last rank's device has no memory for graphs: it queues what the others launch. */
static void test_no_graphs(void) {
    const bool mine = comm_rank(job) == comm_size(job) - 1;
    for (int where = 1; where <= 2; where++) {
        long before, after, nodes;
        be->ops->run->forget(be);
        cuda_stub_launches(&before, &nodes);
        if (mine) cuda_stub_refuse_graphs(where);
        run(0, REQUESTS, SEQS, 8, 2, got);
        cuda_stub_refuse_graphs(0);
        cuda_stub_launches(&after, &nodes);
        check_told(0, REQUESTS);
        CU_ASSERT(mine ? after == before : !capturable() || after > before);
    }
    be->ops->run->forget(be);
}

/* It goes through all three ways of a step of a run and leaves nothing behind. */
static void test_warm_up(void) {
    const struct engine_options o = options_of(SEQS, 8, 2);
    long before, after, nodes;
    be->ops->run->forget(be);
    cuda_stub_launches(&before, &nodes);
    if (comm_rank(job) == 0) {
        struct engine_counters counters;
        const struct engine_counters none = {.pages_free = PAGES};
        must(engine_new(toy, job, &o, on_event, NULL, &live));
        engine_warm_up(live);
        engine_counters_get(live, &counters);
        CU_ASSERT(suite_equal_bytes("counters", &counters, &none, sizeof none));
        CU_ASSERT(!engine_tick(live));
        engine_stop(live);
        engine_free(live);
    } else {
        engine_follow(toy, job, &o);
    }
    cuda_stub_launches(&after, &nodes);
    CHECK_EQ(after - before, capturable() ? 2 : 0);
    run(0, 4, SEQS, 8, 2, got);
    check_told(0, 4);
}

const struct suite_case suite_cases[] = {{"the set, decided on the host", test_reference},
                                         {"decided on the device, beside one another", test_batch},
                                         {"decided on the device, alone", test_alone},
                                         {"a rank without graphs", test_no_graphs},
                                         {"warm-up", test_warm_up},
                                         {NULL, NULL}};
