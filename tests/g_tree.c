/* g_tree.c: the sum over ranks is the documented tree, bit for bit, whatever the width of the
 * vectors. */
#include "comm/comm_tree.h"
#include "suite.h"
#include "tree_reference.h"

enum { COUNT = 1037, RANKS = 8 }; /* odd: whole vectors and a rest */

/* Cancelling magnitudes: any other order of additions gives other bits somewhere. */
static float sample(uint64_t seed, int rank, int i) {
    static const float scales[] = {1.0f, 3e7f, 1e-5f, 4096.0f};
    const uint32_t at = (uint32_t)(rank * 100000 + i);
    return suite_random_float(seed, at) * scales[suite_random(seed + 1, at) % 4];
}

static float data[RANKS][COUNT + 8];
static const float *slots[RANKS];
static float sum[COUNT + 8];

static void fill(uint64_t seed) {
    for (int r = 0; r < RANKS; r++) {
        slots[r] = data[r];
        for (int i = 0; i < COUNT; i++) data[r][i] = sample(seed, r, i);
    }
}

static void column(float x[RANKS], int i) {
    for (int r = 0; r < RANKS; r++) x[r] = slots[r][i];
}

static void test_reference(void) {
    fill(11);
    for (int ranks = 1; ranks <= RANKS; ranks++) {
        float expected[COUNT], x[RANKS];
        for (int i = 0; i < COUNT; i++) {
            column(x, i);
            expected[i] = tree_reference(x, ranks);
        }
        comm_tree_sum(slots, ranks, COUNT, sum);
        CU_ASSERT(suite_equal_bytes("tree", sum, expected, sizeof expected));
    }
}

/* In float 1e8 + 1 is 1e8, so a 1 survives only where the tree lets it meet small numbers first. By
 * hand: 4 ranks: (1e8 + 1) + (-1e8 + 1) = 0, while from left to right it would be 1. */
static void test_known_values(void) {
    static const float values[8] = {1e8f, 1.0f, -1e8f, 1.0f, 1e8f, 1.0f, 1.0f, -1e8f};
    static const float expected[9] = {0, 1e8f, 1e8f, 0, 0, 1e8f, 1e8f, 1e8f, 0};
    const float *one[8];
    for (int r = 0; r < 8; r++) one[r] = &values[r];
    for (int ranks = 1; ranks <= 8; ranks++) {
        comm_tree_sum(one, ranks, 1, sum);
        CHECK_NEAR(sum[0], expected[ranks], 0);
    }
}

static void test_permuted_differs(void) {
    fill(12);
    for (int ranks = 3; ranks <= RANKS; ranks++) {
        comm_tree_sum(slots, ranks, COUNT, sum);
        const float *swapped[RANKS];
        memcpy(swapped, slots, sizeof swapped);
        swapped[0] = slots[ranks - 1];
        swapped[ranks - 1] = slots[0];
        float other[COUNT];
        comm_tree_sum(swapped, ranks, COUNT, other);
        CU_ASSERT(memcmp(sum, other, sizeof other) != 0);
        float sequential[COUNT];
        for (int i = 0; i < COUNT; i++) {
            sequential[i] = slots[0][i];
            for (int r = 1; r < ranks; r++) sequential[i] += slots[r][i];
        }
        if (ranks > 3) CU_ASSERT(memcmp(sum, sequential, sizeof sequential) != 0);
    }
}

/* An absent rank brings -0.0f: the sum is bit for bit what the tree of the others gives, also for
 * ±0, and for one rank present its own value. */
static void test_absent_is_exact(void) {
    static float absent[COUNT];
    static const float special[] = {0.0f, -0.0f, 1.5f, -3.25f, 1e-45f, -1e-45f, 3.4e38f, INFINITY};
    for (int i = 0; i < COUNT; i++) absent[i] = -0.0f;
    for (int ranks = 1; ranks <= RANKS; ranks++) {
        for (int present = 0; present < ranks; present++) {
            fill(13);
            for (int i = 0; i < 8; i++) data[present][i] = special[i];
            const float *some[RANKS];
            for (int r = 0; r < ranks; r++) some[r] = r == present ? data[r] : absent;
            comm_tree_sum(some, ranks, COUNT, sum);
            CU_ASSERT(suite_equal_bytes("one present", sum, data[present], COUNT * sizeof *sum));
        }
    }
    const float *none[] = {absent, absent, absent};
    comm_tree_sum(none, 3, COUNT, sum);
    CU_ASSERT(suite_equal_bytes("all absent", sum, absent, sizeof absent));
    fill(14); /* 3 of 8 absent: (0+1) + 3, then 6 */
    const float *five[] = {slots[0], slots[1], absent, slots[3], absent, absent, slots[6], absent};
    float expected[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const volatile float left = slots[0][i] + slots[1][i], right = left + slots[3][i];
        expected[i] = right + slots[6][i];
    }
    comm_tree_sum(five, 8, COUNT, sum);
    CU_ASSERT(suite_equal_bytes("some absent", sum, expected, sizeof expected));
}

/* 8 slabs on 1, 2, 4, 8 ranks: the tree inside each rank, then over ranks, is the one tree over
 * slabs. */
static void test_ranks_agree(void) {
    fill(15);
    float expected[COUNT], x[RANKS];
    for (int i = 0; i < COUNT; i++) {
        column(x, i);
        expected[i] = tree_reference(x, 8);
    }
    for (int ranks = 1; ranks <= 8; ranks *= 2) {
        static float partial[RANKS][COUNT];
        const float *partials[RANKS];
        const int run = 8 / ranks;
        for (int r = 0; r < ranks; r++) {
            comm_tree_sum(slots + r * run, run, COUNT, partial[r]);
            partials[r] = partial[r];
        }
        comm_tree_sum(partials, ranks, COUNT, sum);
        CU_ASSERT(suite_equal_bytes("slabs over ranks", sum, expected, sizeof expected));
    }
}

static void test_range_and_place(void) {
    fill(16);
    float whole[COUNT];
    for (int ranks = 1; ranks <= RANKS; ranks++) {
        comm_tree_sum(slots, ranks, COUNT, whole);
        for (int begin = 0; begin < 7; begin++) { /* unaligned pieces of any length */
            for (size_t n = 0; n < 40; n++) {
                const float *shifted[RANKS];
                for (int r = 0; r < ranks; r++) shifted[r] = slots[r] + begin;
                memset(sum, 0x7f, sizeof sum);
                comm_tree_sum(shifted, ranks, n, sum + 3);
                CU_ASSERT(suite_equal_bytes("piece", sum + 3, whole + begin, n * sizeof *sum));
                CU_ASSERT(memcmp(&sum[3 + n], "\x7f\x7f\x7f\x7f", 4) == 0);
            }
        }
        for (int r = 0; r < ranks; r++) { /* into a slot */
            fill(16);
            comm_tree_sum(slots, ranks, COUNT, data[r]);
            CU_ASSERT(suite_equal_bytes("in place", data[r], whole, sizeof whole));
        }
        fill(16);
    }
}

/* Above 8 the reference is the definition in small: pair up until one is left. */
static void test_many_ranks(void) {
    static float x[64], y[64];
    const float *many[64];
    for (int ranks = 9; ranks <= 64; ranks++) {
        for (int r = 0; r < ranks; r++) {
            x[r] = y[r] = sample(17, r, ranks);
            many[r] = &x[r];
        }
        int left = ranks;
        while (left > 1) {
            int kept = 0;
            for (int i = 0; i + 1 < left; i += 2) {
                volatile float pair = y[i] + y[i + 1];
                y[kept++] = pair;
            }
            if (left & 1) y[kept++] = y[left - 1];
            left = kept;
        }
        comm_tree_sum(many, ranks, 1, sum);
        CU_ASSERT(suite_equal_bytes("many ranks", sum, y, sizeof(float)));
    }
}

const struct suite_case suite_cases[] = {
    {"1 to 8 ranks against the tree written out", test_reference},
    {"known values", test_known_values},
    {"another order gives other bits", test_permuted_differs},
    {"an absent operand (-0) changes nothing", test_absent_is_exact},
    {"slabs inside a rank, then ranks: one tree for 1, 2, 4, 8", test_ranks_agree},
    {"any range, any place, in place", test_range_and_place},
    {"9 to 64 ranks", test_many_ranks},
    {NULL, NULL},
};
