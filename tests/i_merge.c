/* i_merge.c: ranks' records become one answer; impossible records are refused with the rank's name.
 */
#include "base/fmath.h"
#include "engine/merge.h"
#include "suite.h"

enum { K = 32, WATCH = 2, RANKS = 3, VOCAB = 12 };
/* rank 0: ids 0..3, rank 1: 4..7, rank 2: 8..11 */
static const int64_t vocab_begin[RANKS + 1] = {0, 4, 8, 12};

struct record {
    struct batch_record head;
    struct batch_pair pairs[K], watch[WATCH];
};

static const uint32_t watch_ids[WATCH] = {9, 2};
static const struct batch_probe probe = {.temperature = 1, .watch_count = WATCH};
static const struct batch batch = {.probe_count = 1,
                                   .candidate_count = K,
                                   .watch_max = WATCH,
                                   .probes = &probe,
                                   .watch_ids = watch_ids};

/* z of the twelve ids; -inf = masked. Ties between ranks and inside one. */
static const float row[VOCAB] = {1,         -2, 0.5f,           1,     /**/ 1, 3,
                                 -INFINITY, 0,  /**/ -INFINITY, 0.25f, 3,      -100};

/* What a rank would say, by double sums over its ids. */
static void make_record(const float *z, int rank, struct record *out) {
    memset(out, 0, sizeof *out);
    double m = -INFINITY, s = 0, q = 0;
    for (int64_t v = vocab_begin[rank]; v < vocab_begin[rank + 1]; v++) m = fmax(m, (double)z[v]);
    for (int64_t v = vocab_begin[rank]; v < vocab_begin[rank + 1]; v++) {
        if (z[v] == -INFINITY) continue;
        s += exp((double)z[v] - m);
        q += ((double)z[v] - m) * exp((double)z[v] - m);
        int at = out->head.count++;
        for (; at > 0 && out->pairs[at - 1].z < z[v]; at--) out->pairs[at] = out->pairs[at - 1];
        out->pairs[at] = (struct batch_pair){z[v], (uint32_t)v};
    }
    out->head.m = (float)m;
    out->head.s = (float)s;
    out->head.q = (float)q;
    for (int w = 0; w < WATCH; w++) {
        const bool mine = watch_ids[w] >= vocab_begin[rank] && watch_ids[w] < vocab_begin[rank + 1];
        out->watch[w] = (struct batch_pair){mine ? z[watch_ids[w]] : -INFINITY, watch_ids[w]};
    }
}

static struct record records[RANKS];
static struct merge_row got;

static enum status merge(int keep) {
    return merge_records(records, RANKS, &batch, 0, keep, vocab_begin, &got);
}

static void make_all(const float *z) {
    for (int r = 0; r < RANKS; r++) make_record(z, r, &records[r]);
}

static void test_merge(void) {
    CHECK_EQ(sizeof records[0], batch_record_bytes(K, WATCH));
    make_all(row);
    CHECK_EQ(merge(K), STATUS_OK);
    static const uint32_t order[] = {5, 10, 0, 3, 4, 2, 9, 7, 1, 11}; /* by hand: z desc, id asc */
    CHECK_EQ(got.count, 10);
    for (int i = 0; i < 10; i++) {
        CHECK_EQ(got.id[i], order[i]);
        CU_ASSERT(got.z[i] == row[order[i]]);
    }
    CU_ASSERT(got.watch_z[0] == 0.25f && got.watch_z[1] == 0.5f);
    double s = 0, q = 0;
    for (int v = 0; v < VOCAB; v++)
        if (row[v] > -INFINITY) {
            s += exp((double)row[v] - 3);
            q += ((double)row[v] - 3) * exp((double)row[v] - 3);
        }
    CU_ASSERT(got.m == 3);
    CHECK_NEAR(got.s, s, 1e-6);
    CHECK_NEAR(got.q, q, 1e-6);
    CHECK_NEAR(merge_logprob(&got, 1), 1 - 3 - log(s), 1e-6);
    CHECK_EQ(merge(4), STATUS_OK); /* a row's own width */
    CHECK_EQ(got.count, 4);
    CHECK_EQ(got.id[3], 3);
}

/* A rank without any id (all masked) is absent: the others' bits pass unchanged. */
static void test_absent(void) {
    float z[VOCAB];
    for (int v = 0; v < VOCAB; v++) z[v] = v / 4 == 1 ? row[v] : -INFINITY;
    make_all(z);
    CHECK_EQ(records[0].head.count, 0);
    CHECK_EQ(merge(K), STATUS_OK);
    CU_ASSERT(memcmp(&got.m, &records[1].head, 12) == 0);
    for (int v = 0; v < VOCAB; v++) z[v] = -INFINITY;
    make_all(z);
    CHECK_EQ(merge(K), STATUS_OK);
    CHECK_EQ(got.count, 0);
    CU_ASSERT(got.m == -INFINITY);
}

/* Adjacent pairs, an odd one out moves up: ((0+1)+2), bit for bit, and order matters in this data.
 */
static void test_tree(void) {
    int differs = 0;
    for (uint32_t seed = 0; seed < 50; seed++) {
        float z[VOCAB], m[RANKS], s[RANKS], q[RANKS];
        for (uint32_t v = 0; v < VOCAB; v++) z[v] = 3 * suite_random_float(seed, v);
        make_all(z);
        for (int r = 0; r < RANKS; r++) {
            m[r] = records[r].head.m;
            s[r] = records[r].head.s;
            q[r] = records[r].head.q;
        }
        CHECK_EQ(merge(K), STATUS_OK);
        float a = m[0], b = s[0], c = q[0], x = m[1], y = s[1], w = q[1];
        batch_stats_join(&a, &b, &c, m[1], s[1], q[1]);
        batch_stats_join(&a, &b, &c, m[2], s[2], q[2]);
        CU_ASSERT(a == got.m && b == got.s && c == got.q);
        batch_stats_join(&x, &y, &w, m[2], s[2], q[2]);
        batch_stats_join(&m[0], &s[0], &q[0], x, y, w);
        differs += s[0] != got.s || q[0] != got.q;
    }
    CU_ASSERT(differs > 0);
}

#define REFUSED(change)                                        \
    do {                                                       \
        make_all(row);                                         \
        change;                                                \
        CHECK_EQ(merge(K), STATUS_COMM);                       \
        CU_ASSERT(strstr(fail_text(), "rank 1 gave") != NULL); \
    } while (0)

static void test_impossible(void) {
    REFUSED(records[1].head.count = K + 1);
    REFUSED(records[1].head.count = -1);
    REFUSED(records[1].head.count = 0);
    REFUSED(records[1].head.m = NAN);
    REFUSED(records[1].head.m = INFINITY);
    REFUSED(records[1].head.m = -INFINITY);
    REFUSED(records[1].head.m = 4);
    REFUSED(records[1].head.s = 0.5f);
    REFUSED(records[1].head.s = NAN);
    REFUSED(records[1].head.q = 1);
    REFUSED(records[1].head.q = NAN);
    REFUSED(records[1].pairs[1].z = 5);
    REFUSED(records[1].pairs[1].z = NAN);
    REFUSED(records[1].pairs[1].id = 3);  /* rank 0's */
    REFUSED(records[1].pairs[1].id = 12); /* nobody's */
    REFUSED(records[1].pairs[1] = records[1].pairs[0]);
    REFUSED(records[1].watch[0].z = NAN);
}

static void test_full(void) {
    enum { N = 5000, STRIDE = 2600 };
    static float gathered[2 * STRIDE], z[N];
    static uint32_t id[N];
    static uint64_t scratch[2 * N];
    static const int64_t begin[] = {0, 2500, 5010};             /* ten padding rows */
    for (uint32_t i = 0; i < 2 * STRIDE; i++) gathered[i] = 99; /* padding: must not be listed */
    int masked = 0;
    for (uint32_t v = 0; v < N; v++) {
        float x = suite_random_float(3, v);
        if (v % 10 == 0) x = floorf(x); /* many ties, zeros of both signs */
        if (v % 10 == 1) x = -0.0f;
        if (v % 97 == 5) x = -INFINITY;
        masked += x == -INFINITY;
        gathered[v < 2500 ? v : STRIDE + v - 2500] = x;
    }
    const int64_t n = merge_full(gathered, 2, STRIDE, begin, N, scratch, z, id);
    CHECK_EQ(n, N - masked);
    static bool seen[N];
    for (int64_t i = 0; i < n; i++) {
        CU_ASSERT(id[i] < N && !seen[id[i]]);
        seen[id[i]] = true;
        CU_ASSERT(z[i] == gathered[id[i] < 2500 ? id[i] : STRIDE + id[i] - 2500]);
        if (i > 0) CU_ASSERT(z[i] < z[i - 1] || (z[i] == z[i - 1] && id[i] > id[i - 1]));
    }
}

const struct suite_case suite_cases[] = {{"pairs, statistics, watched ids", test_merge},
                                         {"absent ranks", test_absent},
                                         {"the tree over ranks", test_tree},
                                         {"impossible records name the rank", test_impossible},
                                         {"a whole row is sorted", test_full},
                                         {NULL, NULL}};
