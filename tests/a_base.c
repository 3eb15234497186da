/* a_base.c: status texts, arena limits, Philox known answers, bf16 rounding. */
#include "base/arena.h"
#include "base/bf16.h"
#include "base/check.h"
#include "base/rng.h"
#include "suite.h"

static void test_fail(void) {
    CHECK_EQ(fail_param(STATUS_REQUEST, "soft_thinking.max_topk", "x", "bad %d\x1b[31m", 7),
             STATUS_REQUEST);
    CHECK_STR(fail_text(), "bad 7?[31m");
    CHECK_STR(fail_last()->param, "soft_thinking.max_topk");
    fail_prefix(STATUS_MODEL, "file %s", "f");
    CHECK_STR(fail_text(), "file f: bad 7?[31m");
}

static void test_arena(void) {
    arena a;
    arena_init(&a, 1 << 20);
    char *p = arena_alloc(&a, 100), *q = arena_alloc(&a, 200000);
    CU_ASSERT_FATAL(p && q);
    CHECK_EQ((uintptr_t)p % ARENA_ALIGN_BYTES, 0);
    for (int i = 0; i < 100; i++) CHECK_EQ(p[i], 0);
    memset(q, 1, 200000);
    CU_ASSERT(arena_alloc(&a, 1 << 20) == NULL);
    CHECK_EQ(fail_last()->status, STATUS_MEMORY);
    CU_ASSERT(arena_alloc_array(&a, SIZE_MAX / 2, 8) == NULL);
    CHECK_STR(arena_strndup(&a, "abcdef", 3), "abc");
    arena_fini(&a);
}

/* Known answers published with Random123 (kat_vectors, philox4x32 10). */
static void test_philox(void) {
    static const struct {
        rng_block counter;
        uint32_t key[2];
        rng_block want;
    } cases[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
    for (size_t i = 0; i < 3; i++) {
        const rng_block got = rng_philox(cases[i].counter, cases[i].key[0], cases[i].key[1]);
        CU_ASSERT(suite_equal_bytes("philox", &got, &cases[i].want, sizeof got));
    }
    CU_ASSERT(rng_uniform(0) > 0.0f && rng_uniform(~0u) < 1.0f);
}

static void test_bf16(void) {
    CHECK_EQ(bf16_from_float(1.0f), 0x3f80);
    CHECK_EQ(bf16_from_float(1.00390625f), 0x3f80); /* tie to even, down */
    CHECK_EQ(bf16_from_float(1.01171875f), 0x3f82); /* tie to even, up */
    CHECK_EQ(bf16_from_float(INFINITY), 0x7f80);
    CU_ASSERT(isnan(bf16_to_float(bf16_from_float(NAN))));
    CHECK_EQ(bf16_from_float(3.4e38f), 0x7f80); /* rounds to infinity as IEEE does */
    for (uint32_t b = 0; b < 0x10000; b++)
        if ((b & 0x7f80) != 0x7f80) CHECK_EQ(bf16_from_float(bf16_to_float((bf16)b)), b);
}

const struct suite_case suite_cases[] = {{"fail keeps text and field", test_fail},
                                         {"arena", test_arena},
                                         {"Philox known answers", test_philox},
                                         {"bf16 rounding", test_bf16},
                                         {NULL, NULL}};
