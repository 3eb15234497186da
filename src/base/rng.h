/* rng.h: counter-based random numbers, the only source of randomness in sfumato.
 *
 * Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
 * A draw is a pure function of (seed, step, choice, purpose, slot, attempt): it depends neither on the
 * batch, nor on ranks, preemption or time (soft-thinking.md §6). No state, no memory, any thread.
 * Header-only and plain C so that the same code compiles as CUDA C++ (SFUMATO_DEVICE).
 */
#ifndef SFUMATO_BASE_RNG_H
#define SFUMATO_BASE_RNG_H

#include <stdint.h>

#ifdef __CUDACC__
#define SFUMATO_DEVICE __host__ __device__
#else
#define SFUMATO_DEVICE
#endif

enum rng_purpose { RNG_CATEGORICAL = 1, RNG_GUMBEL = 2, RNG_DIRICHLET = 3 };

typedef struct rng_block {
    uint32_t word[4];
} rng_block;

static inline SFUMATO_DEVICE rng_block rng_philox(rng_block counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * counter.word[0];
        const uint64_t b = (uint64_t)0xCD9E8D57u * counter.word[2];
        rng_block next;
        next.word[0] = (uint32_t)(b >> 32) ^ counter.word[1] ^ key0;
        next.word[1] = (uint32_t)b;
        next.word[2] = (uint32_t)(a >> 32) ^ counter.word[3] ^ key1;
        next.word[3] = (uint32_t)a;
        counter = next;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/* slot: place in the sorted candidate list (0..65535); attempt: try of a rejection sampler. */
static inline SFUMATO_DEVICE rng_block rng_draw(uint64_t seed, uint32_t step, uint32_t choice,
                                                enum rng_purpose purpose, uint32_t slot,
                                                uint32_t attempt) {
    rng_block counter;
    counter.word[0] = step;
    counter.word[1] = choice;
    counter.word[2] = (uint32_t)purpose;
    counter.word[3] = slot | attempt << 16;
    return rng_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* Uniform on the open interval (0,1), exact in fp32, never 0 and never 1. */
static inline SFUMATO_DEVICE float rng_uniform(uint32_t word) {
    return ((float)(word >> 9) + 0.5f) * 0x1p-23f;
}

#endif
