/* f_candidates.c: statistics and candidates of logits against a full sort and double arithmetic. */
#include "f_backend.h"

enum {
    V = 1003,
    FIRST = 500,
    SLABS = 5,
    ROWS = 3,
    KNOWN = FIRST + V - 11 /* ids from here on are padding */
};
/* one empty slab, one of a single id, one that is all padding beyond KNOWN */
static const int64_t vocab_begin[SLABS + 1] = {FIRST,       FIRST + 300,   FIRST + 300,
                                               FIRST + 301, FIRST + V - 8, FIRST + V};

static const struct batch_edit edits[] = {
    {FIRST + 3, 1.0f, -INFINITY}, {FIRST + 7, 1.3f, 0.0f},
    {FIRST + 8, 1.3f, 0.0f},      {FIRST + 9, 1.0f, 50.0f},
    {FIRST + V - 1, 1.0f, 99.0f}, {3, 1.0f, 99.0f}, /* padding; not ours */
    {FIRST + 300, 2.0f, -1.0f}};
static const uint32_t watch[] = {FIRST + 3, FIRST + 9, 3, FIRST + V - 1, FIRST + 300, FIRST + 999};
static const struct batch_probe probes[] = {{0, 1.0f, 0, 0, 0, 6},
                                            {0, 0.6f, 0, 7, 0, 3},
                                            {1, 1.7f, 3, 2, 2, 4},
                                            {2, 0.05f, 0, 7, 5, 1},
                                            {2, 1.0f, 0, 0, 0, 0}};
enum { PROBES = sizeof probes / sizeof probes[0], WATCH_MAX = 6 };

static float edited(const float *logits, const struct batch_probe *p, int64_t id) {
    float z = logits[p->logit_row * V + id - FIRST];
    for (int e = p->edit_begin; e < p->edit_begin + p->edit_count; e++)
        if (edits[e].id == id) z = (z > 0 ? z / edits[e].rep : z * edits[e].rep) + edits[e].add;
    z /= p->temperature;
    if (isnan(z)) z = -INFINITY;
    if (z == INFINITY) z = 3.402823466e38f;
    return z;
}

static int order(const void *a, const void *b) {
    const struct batch_pair *x = a, *y = b;
    if (x->z != y->z) return x->z > y->z ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static void check_record(const float *logits, const struct batch_probe *p, int k,
                         const struct batch_record *r) {
    static struct batch_pair all[V];
    int n = 0;
    double top = -INFINITY, s = 0.0, q = 0.0;
    for (int64_t id = FIRST; id < KNOWN; id++) {
        const float z = edited(logits, p, id);
        if (z == -INFINITY) continue;
        all[n++] = (struct batch_pair){z, (uint32_t)id};
        top = (double)z > top ? (double)z : top;
    }
    qsort(all, (size_t)n, sizeof all[0], order);
    const struct batch_pair *pairs = (const struct batch_pair *)(r + 1);
    CHECK_EQ(r->count, n < k ? n : k);
    for (int i = 0; i < r->count; i++) {
        CHECK_EQ(pairs[i].id, all[i].id);
        CU_ASSERT(pairs[i].z == all[i].z);
    }
    if (n == 0) {
        CU_ASSERT(r->m == -INFINITY && r->s == 0.0f && r->q == 0.0f);
    } else {
        for (int i = 0; i < n; i++) {
            const double d = (double)all[i].z - top;
            s += exp(d);
            q += d < -700 ? 0.0 : d * exp(d);
        }
        CU_ASSERT((double)r->m == top);
        CHECK_NEAR(r->s, s, s * 1e-6);
        CHECK_NEAR(log((double)r->s) - (double)(r->q / r->s), log(s) - q / s,
                   1e-5 * (1.0 + log(s) - q / s));
    }
    for (int w = 0; w < WATCH_MAX; w++) {
        const struct batch_pair pair = pairs[k + w];
        float want = -INFINITY;
        if (w < p->watch_count) {
            const uint32_t id = watch[p->watch_begin + w];
            CHECK_EQ(pair.id, id);
            if (id >= FIRST && id < KNOWN) want = edited(logits, p, id);
        }
        CU_ASSERT(pair.z == want);
    }
}

static void check_logits(const float *logits) {
    static const int widths[] = {32, 64};
    for (int w = 0; w < 2; w++) {
        const int k = widths[w];
        const struct batch batch = {.logit_row_count = ROWS,
                                    .probe_count = PROBES,
                                    .candidate_count = k,
                                    .watch_max = WATCH_MAX,
                                    .probes = probes,
                                    .edits = edits,
                                    .watch_ids = watch};
        const size_t stride = (size_t)batch_record_bytes(k, WATCH_MAX), bytes = stride * PROBES;
        unsigned char *want = NULL;
        for (int level = 0; level < LEVELS; level++)
            for (int threads = 1; threads <= 4; threads++) {
                backend *be = level_open(level, threads, 4);
                if (!be) break;
                const struct matrix_spec spec = {.dtype = BACKEND_BF16, .rows = V, .cols = 2};
                matrix *m; /* the output matrix: scratch for rows of this width comes with it */
                CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
                float *copy = guard_new(sizeof(float) * ROWS * V);
                memcpy(copy, logits, sizeof(float) * ROWS * V);
                unsigned char *records = guard_new(bytes);
                be->ops->candidates(be, &batch, copy, SLABS, vocab_begin, KNOWN, records);
                if (!want) {
                    want = malloc(bytes);
                    memcpy(want, records, bytes);
                    for (int p = 0; p < PROBES; p++)
                        check_record(logits, &probes[p], k,
                                     (const void *)(records + (size_t)p * stride));
                }
                CU_ASSERT(suite_equal_bytes("records", records, want, bytes));
                CU_ASSERT(
                    suite_equal_bytes("logits untouched", copy, logits, sizeof(float) * ROWS * V));
                float *z = guard_new(sizeof(float) * V);
                be->ops->probe_logits(be, &batch, 1, copy, SLABS, vocab_begin, KNOWN, z);
                for (int64_t id = FIRST; id < FIRST + V; id++)
                    CU_ASSERT(z[id - FIRST] ==
                              (id < KNOWN ? edited(logits, &probes[1], id) : -INFINITY));
                CU_ASSERT(guard_check(z, sizeof(float) * V));
                CU_ASSERT(guard_check(records, bytes));
                CU_ASSERT(guard_check(copy, sizeof(float) * ROWS * V));
                be->ops->close(be);
            }
        free(want);
    }
}

static float logits[ROWS * V];

static void test_ordinary(void) {
    for (int i = 0; i < ROWS * V; i++) logits[i] = 6.0f * suite_random_float(5, (uint32_t)i);
    check_logits(logits);
}

/* Few distinct values: equals are in order of id, across slabs and refills of the buffer. */
static void test_ties(void) {
    for (int i = 0; i < ROWS * V; i++) {
        const uint32_t r = suite_random(6, (uint32_t)i);
        logits[i] = r % 4 == 0 ? -0.0f : (float)(r % 3);
    }
    check_logits(logits);
    for (int i = 0; i < ROWS * V; i++) logits[i] = 1.0f;
    check_logits(logits);
    for (int i = 0; i < ROWS * V; i++) logits[i] = (float)(i % V); /* each beats all before it */
    check_logits(logits);
}

static void test_odd_values(void) {
    for (int i = 0; i < ROWS * V; i++) {
        const uint32_t r = suite_random(7, (uint32_t)i) % 8;
        logits[i] = r == 0   ? NAN
                    : r == 1 ? -INFINITY
                    : r == 2 ? -3e38f
                    : r == 3 ? 1e-40f
                             : (float)r;
    }
    check_logits(logits);
    logits[5] = INFINITY, logits[V + 400] = INFINITY, logits[2 * V + 300] = 3e38f;
    check_logits(logits);
    for (int i = 0; i < V; i++) logits[i] = i % 2 ? NAN : -INFINITY; /* nothing at all in row 0 */
    check_logits(logits);
}

/* Joining two halves of a row gives the statistics of the row. */
static void test_join(void) {
    float m = 1.0f, s = 2.0f, q = -0.5f;
    batch_stats_join(&m, &s, &q, -INFINITY, 0.0f, 0.0f);
    CU_ASSERT(m == 1.0f && s == 2.0f && q == -0.5f);
    float m0 = -INFINITY, s0 = 0.0f, q0 = 0.0f;
    batch_stats_join(&m0, &s0, &q0, m, s, q);
    CU_ASSERT(m0 == 1.0f && s0 == 2.0f && q0 == -0.5f);
    /* {0, -1} and {1}: s = 1 + e^-1 + e^-2, q = -e^-1 - 2 e^-2 */
    m = 0.0f, s = 1.0f + expf(-1.0f), q = -expf(-1.0f);
    batch_stats_join(&m, &s, &q, 1.0f, 1.0f, 0.0f);
    CHECK_NEAR(s, 1.0 + exp(-1.0) + exp(-2.0), 1e-6);
    CHECK_NEAR(q, -exp(-1.0) - 2.0 * exp(-2.0), 1e-6);
    m = -3e38f, s = 1.0f, q = 0.0f; /* the difference overflows */
    batch_stats_join(&m, &s, &q, 3e38f, 1.0f, 0.0f);
    CU_ASSERT(m == 3e38f && s == 1.0f && q == 0.0f);
}

const struct suite_case suite_cases[] = {{"ordinary logits", test_ordinary},
                                         {"ties", test_ties},
                                         {"NaN, infinities, extremes", test_odd_values},
                                         {"joining statistics", test_join},
                                         {NULL, NULL}};
