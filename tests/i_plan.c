/* i_plan.c: a plan survives the journey, and every broken rule is refused by name. */
#include "engine/plan.h"
#include "i_plan_sample.h"
#include "suite.h"

static _Alignas(8) unsigned char message[SAMPLE_BYTES];
static struct sample sample;
static struct plan_run run;

static enum status view(size_t n, enum plan_kind *kind, struct batch *out) {
    uint64_t step = 0;
    int probe = -1;
    return plan_view(message, n, &sample_limits, kind, &step, &probe, out, &run);
}

static void test_round_trip(void) {
    sample_make(&sample);
    const struct batch *b = &sample.batch;
    const size_t n = plan_encode(PLAN_FETCH, UINT64_C(1) << 40, b, 2, message, sizeof message);
    enum plan_kind kind;
    uint64_t step;
    int probe;
    struct batch got;
    CHECK_EQ(plan_view(message, n, &sample_limits, &kind, &step, &probe, &got, &run), STATUS_OK);
    CHECK_EQ(kind, PLAN_FETCH);
    CHECK_EQ(step, UINT64_C(1) << 40);
    CHECK_EQ(probe, 2);
    CHECK_EQ(got.row_count, 8);
    CHECK_EQ(got.segment_count, 3);
    CHECK_EQ(got.logit_row_count, 2);
    CHECK_EQ(got.probe_count, 3);
    CHECK_EQ(got.candidate_count, 32);
    CHECK_EQ(got.watch_max, 2);
#define SAME(field) \
    CU_ASSERT(suite_equal_bytes(#field, got.field, sample.field, sizeof sample.field))
    SAME(segments);
    SAME(pages);
    SAME(mix_begin);
    SAME(mix_ids);
    SAME(mix_weights);
    SAME(logit_rows);
    SAME(probes);
    SAME(edits);
    SAME(watch_ids);
#undef SAME
    /* equal plans are equal bytes, whatever was in the buffer before */
    static unsigned char other[SAMPLE_BYTES];
    memset(other, 0xaa, sizeof other);
    CHECK_EQ(plan_encode(PLAN_FETCH, UINT64_C(1) << 40, b, 2, other, sizeof other), n);
    CU_ASSERT(suite_equal_bytes("plan", message, other, n));
}

static void test_stop(void) {
    enum plan_kind kind;
    struct batch got;
    const size_t n = plan_encode(PLAN_STOP, 3, NULL, 0, message, sizeof message);
    CHECK_EQ(view(n, &kind, &got), STATUS_OK);
    CHECK_EQ(kind, PLAN_STOP);
    CHECK_EQ(got.row_count, 0);
}

/* The whole sample at its limits fits plan_bytes_max, and one less of anything does not pass. */
static void test_limits(void) {
    sample_make(&sample);
    const size_t n = plan_encode(PLAN_STEP, 1, &sample.batch, 0, message, sizeof message);
    const struct plan_limits exact = {8, 3, 2, 3, 10, 6, 3, 4, 50, 1000, 192, 0, 0, 0};
    CHECK_EQ(plan_bytes_max(&exact), n);
    for (int i = -1; i < 11; i++) {
        struct plan_limits l = exact;
        int32_t *const narrow[] = {&l.rows_max, &l.segments_max, &l.logit_rows_max, &l.probes_max};
        int64_t *const wide[] = {&l.mix_max, &l.pages_max, &l.edits_max, &l.watch_max};
        if (i >= 0 && i < 4) (*narrow[i])--;
        if (i >= 4 && i < 8) (*wide[i - 4])--;
        if (i == 8) l.page_count--;
        if (i == 9) l.vocab_count--;
        if (i == 10) l.position_max--;
        enum plan_kind kind;
        uint64_t step;
        int probe;
        struct batch got;
        CHECK_EQ(plan_view(message, n, &l, &kind, &step, &probe, &got, &run),
                 i < 0 ? STATUS_OK : STATUS_COMM);
    }
}

/* Breaks one thing in a copy of the sample; the text must contain `what`. */
#define REFUSED(change, what)                                                                     \
    do {                                                                                          \
        enum plan_kind kind;                                                                      \
        struct batch got;                                                                         \
        sample_make(&sample);                                                                     \
        change;                                                                                   \
        const size_t size = plan_encode(PLAN_STEP, 1, &sample.batch, 0, message, sizeof message); \
        CHECK_EQ(view(size, &kind, &got), STATUS_COMM);                                           \
        CU_ASSERT(strstr(fail_text(), what) != NULL);                                             \
        if (!strstr(fail_text(), what)) printf("\n    %s, want %s\n", fail_text(), what);         \
    } while (0)

static void test_broken_rules(void) {
    REFUSED(sample.segments[1].row_begin = 3, "segments must follow");
    REFUSED(sample.segments[2].row_count = 2, "rows without a segment");
    REFUSED(sample.segments[2].row_count = 4, "rows of a segment");
    REFUSED(sample.segments[0].row_count = 0, "rows of a segment");
    REFUSED(sample.segments[0].position = -1, "position");
    REFUSED(sample.segments[1].position = 500, "position");
    REFUSED(sample.segments[1].position = 192,
            "pages of a segment"); /* a fourth page would be needed */
    REFUSED(sample.segments[0].position = 60, "pages of a segment");
    REFUSED(sample.segments[1].page_begin = 1, "page tables");
    REFUSED(sample.pages[2] = 50, "page number");
    REFUSED(sample.pages[2] = -1, "page number");
    REFUSED(sample.mix_begin[0] = 1, "start at 0");
    REFUSED(sample.mix_begin[3] = 2, "entries of a mixture");
    REFUSED(sample.mix_begin[3] = 100, "");
    REFUSED(sample.mix_ids[4] = 1000, "id of a mixture");
    REFUSED(sample.mix_weights[6] = NAN, "weight of entry");
    REFUSED(sample.mix_weights[6] = INFINITY, "weight of entry");
    REFUSED(sample.mix_weights[6] = -0.1f, "weight of entry");
    REFUSED(sample.logit_rows[1] = 4, "must ascend");
    REFUSED(sample.logit_rows[1] = 8, "logit row");
    REFUSED(sample.logit_rows[0] = -1, "logit row");
    REFUSED(sample.probes[2].logit_row = 2, "logit row of a probe");
    REFUSED(sample.probes[0].temperature = 0, "temperature");
    REFUSED(sample.probes[0].temperature = NAN, "temperature");
    REFUSED(sample.probes[1].edit_begin = 1, "edits must follow");
    REFUSED(sample.probes[2].edit_begin = 0, "edits must follow");
    REFUSED(sample.probes[1].watch_begin = 0, "watched ids must follow");
    REFUSED(sample.edits[0].id = 1000, "id of an edit");
    REFUSED(sample.edits[1].id = 3, "edits must ascend");
    REFUSED(sample.edits[0].rep = 0, "factor");
    REFUSED(sample.edits[0].add = INFINITY, "addend");
    REFUSED(sample.edits[0].add = NAN, "addend");
    REFUSED(sample.watch_ids[3] = 1000, "watched id");
    REFUSED(sample.batch.watch_max = 3, "watch_max");
    REFUSED(sample.batch.watch_max = 1, "watch_max");
    REFUSED(sample.batch.candidate_count = 65, "candidate count");
    REFUSED(sample.batch.candidate_count = 0, "candidate count");
    REFUSED(sample.batch.row_count = 7, "");
}

static void test_cut_short(void) {
    sample_make(&sample);
    const size_t n = plan_encode(PLAN_STEP, 1, &sample.batch, 0, message, sizeof message);
    enum plan_kind kind;
    struct batch got;
    CHECK_EQ(view(n, &kind, &got), STATUS_OK);
    for (size_t cut = 0; cut < n; cut++) CHECK_EQ(view(cut, &kind, &got), STATUS_COMM);
    CHECK_EQ(view(n + 8, &kind, &got), STATUS_COMM);
}

/* A flipped bit is refused or changes a value within its range; never anything else. */
static void test_flipped_bits(void) {
    sample_make(&sample);
    const size_t n = plan_encode(PLAN_STEP, 1, &sample.batch, 0, message, sizeof message);
    int refused = 0;
    for (size_t bit = 0; bit < 8 * n; bit++) {
        enum plan_kind kind;
        struct batch got;
        message[bit / 8] ^= (unsigned char)(1 << bit % 8);
        if (view(n, &kind, &got) != STATUS_OK) {
            refused++;
        } else {
            for (int i = 0; i < got.row_count; i++)
                for (int e = got.mix_begin[i]; e < got.mix_begin[i + 1]; e++)
                    CU_ASSERT(got.mix_ids[e] < 1000 && isfinite(got.mix_weights[e]));
        }
        message[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    CU_ASSERT(refused > (int)(4 * n)); /* most bits matter */
}

static struct sample_run runs;

static size_t encode_runs(void) {
    return plan_encode_run(7, &runs.batch, &runs.run, message, sizeof message);
}

static void test_run(void) {
    enum plan_kind kind;
    struct batch got;
    sample_run_make(&runs);
    const size_t n = encode_runs();
    CHECK_EQ(view(n, &kind, &got), STATUS_OK);
    CHECK_EQ(kind, PLAN_RUN);
    CHECK_EQ(run.steps, 20);
    CHECK_EQ(run.ahead, 2);
    CU_ASSERT(suite_equal_bytes("rows", run.rows, runs.rows, sizeof runs.rows));
    CHECK_EQ(got.segments[1].page_count, 2); /* 60 + 19 positions: the pages of all steps */
    struct plan_limits none = sample_limits;
    none.run_rows_max = 0;
    uint64_t step;
    int probe;
    CHECK_EQ(plan_view(message, n, &none, &kind, &step, &probe, &got, &run), STATUS_COMM);
    for (size_t cut = 0; cut < n; cut++) CHECK_EQ(view(cut, &kind, &got), STATUS_COMM);
    sample_make(&sample); /* an ordinary plan is no run */
    CHECK_EQ(
        view(plan_encode(PLAN_STEP, 1, &sample.batch, 0, message, sizeof message), &kind, &got),
        STATUS_OK);
    CHECK_EQ(run.steps, 0);
    CU_ASSERT(run.rows == NULL);
}

#define RUN_REFUSED(change, what)                                                         \
    do {                                                                                  \
        enum plan_kind kind;                                                              \
        struct batch got;                                                                 \
        sample_run_make(&runs);                                                           \
        change;                                                                           \
        CHECK_EQ(view(encode_runs(), &kind, &got), STATUS_COMM);                          \
        CU_ASSERT(strstr(fail_text(), what) != NULL);                                     \
        if (!strstr(fail_text(), what)) printf("\n    %s, want %s\n", fail_text(), what); \
    } while (0)

static void test_broken_runs(void) {
    RUN_REFUSED(runs.run.steps = 33, "steps of a run");
    RUN_REFUSED(runs.run.ahead = 0, "launched ahead");
    RUN_REFUSED(runs.run.ahead = 5, "launched ahead");
    RUN_REFUSED(runs.rows[1].steps = 0, "steps of a run row");
    RUN_REFUSED(runs.rows[1].steps = 21, "steps of a run row");
    RUN_REFUSED(runs.rows[1].steps = 4, "pages of a segment"); /* 64 positions: one page too many */
    RUN_REFUSED(runs.segments[0].position = 120,
                "pages of a segment"); /* 140: a third is missing */
    RUN_REFUSED(runs.segments[0].position = 490, "position");
    RUN_REFUSED(runs.rows[0].phase_bound = 2, "bond");
    RUN_REFUSED(runs.rows[0].params.max_topk = 65, "max_topk");
    RUN_REFUSED(runs.rows[2].params.close_text_count = 257, "");
    RUN_REFUSED(runs.rows[2].params.close_text[1] = 1000, "close_text");
    RUN_REFUSED(runs.rows[0].params.eos_count = 17, "ends of run row");
    RUN_REFUSED(runs.rows[0].params.close_id = 1000, "markers");
    RUN_REFUSED(runs.rows[0].params.close_id = 6, "watched id");
    RUN_REFUSED(runs.rows[2].params.close_id = 6, "watched ids");
    RUN_REFUSED(memset(&runs.rows[0].params.cold_stop, 2, 1), "switches");
    RUN_REFUSED(memset(&runs.rows[0].state.thinking_done, 7, 1), "switches");
    RUN_REFUSED(runs.rows[0].state.phase = (enum think_phase)2, "phase");
    RUN_REFUSED(runs.rows[0].state.end = (enum think_end)7, "end of run row");
    RUN_REFUSED(runs.rows[0].state.forced_next = 2, "forced text");
    RUN_REFUSED(runs.rows[0].state.forced_next = -2, "forced text");
    RUN_REFUSED(runs.rows[0].state.thinking_steps = -1, "thinking steps");
    RUN_REFUSED(runs.rows[0].state.cold_count = INT64_MAX, "cold steps");
    RUN_REFUSED(runs.probes[1].logit_row = 2, "logit row");
    RUN_REFUSED((runs.segments[0].row_count = 2, runs.segments[1].row_begin = 2,
                 runs.batch.segment_count = 2),
                "other rows than decode rows");
}

const struct suite_case suite_cases[] = {{"what is written is read", test_round_trip},
                                         {"stop carries nothing", test_stop},
                                         {"limits are exact", test_limits},
                                         {"every broken rule is named", test_broken_rules},
                                         {"a message cut short", test_cut_short},
                                         {"a flipped bit", test_flipped_bits},
                                         {"a run is written and read", test_run},
                                         {"every broken rule of a run", test_broken_runs},
                                         {NULL, NULL}};
