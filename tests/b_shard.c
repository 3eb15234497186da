/* b_shard.c: slab arithmetic, exhaustively (verification.md §3, "Slab map"). */
#include "load/shard.h"
#include "suite.h"

static void check_one(const struct shard_dims *dims, int slabs, int ranks) {
    const int group_heads = dims->heads / dims->kv_heads;
    int64_t vocab = 0, ffn = 0;
    int head = 0;
    for (int r = 0; r < ranks; r++) {
        shard_map m;
        shard_map_init(&m, dims, slabs, ranks, r);
        CU_ASSERT(m.vocab_begin[0] == vocab && m.ffn_begin[0] == ffn && m.head_begin[0] == head);
        for (int i = 0; i < m.slab_count; i++) {
            CU_ASSERT(m.vocab_begin[i] <= m.vocab_begin[i + 1]);
            CU_ASSERT(m.ffn_begin[i] <= m.ffn_begin[i + 1]);
            for (int h = m.head_begin[i]; h < m.head_begin[i + 1]; h++) {
                CU_ASSERT(shard_head_slab(h, dims->heads, dims->kv_heads, slabs) ==
                          m.slab_begin + i);
                CU_ASSERT(h / group_heads >= m.kv_begin && h / group_heads < m.kv_end);
            }
        }
        vocab = m.vocab_begin[m.slab_count];
        ffn = m.ffn_begin[m.slab_count];
        head = m.head_begin[m.slab_count];
    }
    CU_ASSERT(vocab == dims->vocab_rows && ffn == dims->ffn && head == dims->heads);
}

static void test_every_unit_once(void) {
    for (int kv = 1; kv <= 64; kv++)
        for (int group = 1; group <= 16; group++)
            for (int slabs = 8; slabs <= 16; slabs *= 2)
                for (int ranks = 1; ranks <= slabs; ranks++) {
                    const struct shard_dims dims = {1000 + kv, 32 * (kv + group) + 7, kv * group,
                                                    kv, 64};
                    check_one(&dims, slabs, ranks);
                }
}

static void test_balance(void) {
    for (int64_t n = 1; n < 300; n++)
        for (int slabs = 8; slabs <= 16; slabs *= 2)
            for (int s = 0; s < slabs; s++) {
                const int64_t count =
                    shard_slab_begin(s + 1, n, slabs) - shard_slab_begin(s, n, slabs);
                CU_ASSERT(count == n / slabs || count == (n + slabs - 1) / slabs);
                for (int64_t i = shard_slab_begin(s, n, slabs);
                     i < shard_slab_begin(s + 1, n, slabs); i++)
                    CU_ASSERT(shard_slab_of(i, n, slabs) == s);
            }
}

/* The examples of cpu.md §3.1, written there by hand. */
static void test_examples(void) {
    static const struct {
        int kv, group, want[8];
    } cases[] = {{3, 3, {2, 1, 1, 1, 1, 1, 1, 1}},
                 {2, 7, {2, 2, 2, 1, 2, 2, 2, 1}},
                 {8, 5, {5, 5, 5, 5, 5, 5, 5, 5}}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        int count[8] = {0};
        for (int h = 0; h < cases[c].kv * cases[c].group; h++)
            count[shard_head_slab(h, cases[c].kv * cases[c].group, cases[c].kv, 8)]++;
        for (int s = 0; s < 8; s++) CHECK_EQ(count[s], cases[c].want[s]);
    }
}

static void test_refusals(void) {
    const struct shard_dims dims = {768, 384, 8, 4, 32};
    CHECK_EQ(shard_check(&dims, 8, 8), STATUS_OK);
    CHECK_EQ(shard_check(&dims, 16, 9), STATUS_USAGE);
    CU_ASSERT(strstr(fail_text(), "1, 2, 3, 4, 5, 6, 7, 8") != NULL);
    CHECK_EQ(shard_check(&dims, 12, 4), STATUS_USAGE);
    CHECK_EQ(shard_check(&dims, 4, 8), STATUS_USAGE);
    CHECK_EQ(shard_default_slabs(9), 16);
    CHECK_EQ(shard_default_slabs(1), 8);
}

const struct suite_case suite_cases[] = {
    {"every unit is in exactly one slab", test_every_unit_once},
    {"slabs are balanced and agree with shard_slab_of", test_balance},
    {"hand-written examples", test_examples},
    {"impossible counts are refused", test_refusals},
    {NULL, NULL}};
