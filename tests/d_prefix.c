/* d_prefix.c: digests: the published function, and what must and must not share a name. */
#include "kv/prefix.h"
#include "suite.h"

static int same(struct kv_digest a, struct kv_digest b) { return memcmp(&a, &b, sizeof a) == 0; }

static struct kv_digest hard(struct kv_digest before, uint32_t id) {
    const float one = 1;
    return kv_digest_next(before, &id, &one, 1);
}

/* SipHash-2-4-128 of the bytes 00 01 ... under the key 00 01 ... 0f: vectors 8 and 16 of the
 * reference implementation's list (also from: openssl mac -macopt hexkey:... -macopt size:16
 * SIPHASH). */
static void test_published_vectors(void) {
    const struct kv_digest key = {{0x0706050403020100ULL, 0x0f0e0d0c0b0a0908ULL}};
    const uint32_t ids[] = {0x03020100, 0x0b0a0908}, bits[] = {0x07060504, 0x0f0e0d0c};
    float weights[2];
    memcpy(weights, bits, sizeof weights);
    static const unsigned char want8[16] = {0x3b, 0x62, 0xa9, 0xba, 0x62, 0x58, 0xf5, 0x61,
                                            0x0f, 0x83, 0xe2, 0x64, 0xf3, 0x14, 0x97, 0xb4};
    struct kv_digest got = kv_digest_next(key, ids, weights, 1);
    CU_ASSERT(suite_equal_bytes("8 bytes", &got, want8, 16));
    static const unsigned char want16[16] = {0x6e, 0xe2, 0xa4, 0xca, 0x67, 0xb0, 0x54, 0xbb,
                                             0xfd, 0x33, 0x15, 0xbf, 0x85, 0x23, 0x05, 0x77};
    got = kv_digest_next(key, ids, weights, 2);
    CU_ASSERT(suite_equal_bytes("16 bytes", &got, want16, 16));
}

static void test_hard_and_one_hot(void) {
    const struct kv_digest start = kv_digest_start(7);
    const uint32_t id = 123;
    const float one = strtof("1.00000000e0", NULL);
    CU_ASSERT(same(hard(start, 123), kv_digest_next(start, &id, &one, 1)));
    CU_ASSERT(same(hard(start, 123), kv_digest_next(start, &id, NULL, 1)));
    CU_ASSERT(!same(hard(start, 123), hard(start, 124)));
    CU_ASSERT(!same(hard(hard(start, 1), 2), hard(hard(start, 2), 1)));
    CU_ASSERT(!same(start, kv_digest_start(8)));
    CU_ASSERT(!same(hard(start, 123), hard(kv_digest_start(8), 123)));
}

static void test_soft_positions(void) {
    const struct kv_digest start = kv_digest_start(7);
    const uint32_t ids[] = {5, 9}, swapped[] = {9, 5};
    const float w[] = {0.75f, 0.25f}, other[] = {nextafterf(0.75f, 1), 0.25f},
                nearly = nextafterf(1, 0);
    const struct kv_digest soft = kv_digest_next(start, ids, w, 2);
    CU_ASSERT(same(soft, kv_digest_next(start, ids, w, 2)));
    CU_ASSERT(!same(soft, hard(start, 5))); /* never by its trace id */
    CU_ASSERT(!same(soft, kv_digest_next(start, ids, other, 2)));
    CU_ASSERT(!same(soft, kv_digest_next(start, swapped, w, 2)));
    CU_ASSERT(!same(soft, hard(hard(start, 5), 9)));
    CU_ASSERT(!same(hard(start, 5), kv_digest_next(start, ids, &nearly, 1)));
}

/* Digests of related inputs, all different: 64 bits of each in a hash set. */
static void test_no_collisions(void) {
    enum { COUNT = 1 << 19, SLOTS = 1 << 21 };
    uint64_t *set = calloc(SLOTS, sizeof *set);
    CU_ASSERT_FATAL(set != NULL);
    int collisions = 0;
    struct kv_digest chain = kv_digest_start(0);
    for (uint32_t i = 0; i < COUNT; i++) {
        const uint32_t pair[] = {i & 1023, i >> 10};
        const float w[] = {0.5f, 0.5f};
        struct kv_digest d =
            i & 1 ? hard(kv_digest_start(0), i) : kv_digest_next(kv_digest_start(0), pair, w, 2);
        if (i % 4 == 3) d = chain = hard(chain, 0);
        uint64_t slot = d.word[i & 2 ? 1 : 0] % SLOTS;
        while (set[slot] && set[slot] != d.word[0]) slot = (slot + 1) % SLOTS;
        collisions += set[slot] != 0;
        set[slot] = d.word[0];
    }
    free(set);
    CHECK_EQ(collisions, 0);
}

const struct suite_case suite_cases[] = {
    {"published SipHash-2-4-128 vectors", test_published_vectors},
    {"hard ids, one-hot tokens, order, seed", test_hard_and_one_hot},
    {"soft positions: by ids and weight bits", test_soft_positions},
    {"half a million related inputs", test_no_collisions},
    {NULL, NULL}};
