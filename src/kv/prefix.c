/* prefix.c: see prefix.h. A chain of SipHash-2-4-128 (Aumasson, Bernstein: "SipHash: a fast
 * short-input PRF", 2012; the 128-bit variant of its reference code).
 *
 * The digest before a position is the key, the position's (id, weight bits) pairs are the message,
 * eight bytes a pair; the tag is the digest after it. A keyed PRF, because prompts are chosen by
 * strangers and a collision would show one user's KV to another: without the process's seed nobody
 * can compute digests, and finding a pair by chance needs about 2^64 blocks. An id costs about 100 ns.
 */
#include "kv/prefix.h"

#include <string.h>

struct sip {
    uint64_t a, b, c, d;
};

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static void sip_rounds(struct sip *s, int rounds) {
    for (int i = 0; i < rounds; i++) {
        s->a += s->b;
        s->c += s->d;
        s->b = rotate(s->b, 13) ^ s->a;
        s->d = rotate(s->d, 16) ^ s->c;
        s->a = rotate(s->a, 32);
        s->c += s->b;
        s->a += s->d;
        s->b = rotate(s->b, 17) ^ s->c;
        s->d = rotate(s->d, 21) ^ s->a;
        s->c = rotate(s->c, 32);
    }
}

static void sip_word(struct sip *s, uint64_t word) {
    s->d ^= word;
    sip_rounds(s, 2);
    s->a ^= word;
}

static struct sip sip_start(struct kv_digest key) {
    struct sip s = {key.word[0] ^ 0x736f6d6570736575ULL, key.word[1] ^ 0x646f72616e646f6dULL ^ 0xee,
                    key.word[0] ^ 0x6c7967656e657261ULL, key.word[1] ^ 0x7465646279746573ULL};
    return s;
}

static struct kv_digest sip_end(struct sip *s, uint64_t message_bytes) {
    struct kv_digest out;
    sip_word(s, message_bytes << 56);
    s->c ^= 0xee;
    sip_rounds(s, 4);
    out.word[0] = s->a ^ s->b ^ s->c ^ s->d;
    s->b ^= 0xdd;
    sip_rounds(s, 4);
    out.word[1] = s->a ^ s->b ^ s->c ^ s->d;
    return out;
}

struct kv_digest kv_digest_start(uint64_t seed) {
    const struct kv_digest key = {{seed, ~seed}};
    struct sip s = sip_start(key);
    return sip_end(&s, 0);
}

struct kv_digest kv_digest_next(struct kv_digest before, const uint32_t *ids, const float *weights,
                                int count) {
    struct sip s = sip_start(before);
    for (int i = 0; i < count; i++) {
        const float weight = weights ? weights[i] : 1.0f;
        uint32_t bits;
        memcpy(&bits, &weight, sizeof bits);
        sip_word(&s, (uint64_t)bits << 32 | ids[i]);
    }
    return sip_end(&s, 8 * (uint64_t)count);
}
