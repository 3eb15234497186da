/* f_backend.h: what the backend suites share: every level of this machine, awkward numbers, guarded
 * buffers.
 *
 * A level is an instruction set with a numeric class. Level 0 is the scalar reference; levels of
 * the fma class must give its bits, dpbf16 must give its own bits whatever the threads and the
 * batch. A level the
 * machine does not have is named once and left out.
 */
#ifndef SFUMATO_TESTS_F_BACKEND_H
#define SFUMATO_TESTS_F_BACKEND_H

#include "backend/backend.h"
#include "base/bf16.h"
#include "suite.h"

struct level {
    enum backend_isa isa;
    enum backend_numerics numerics;
};
static const struct level levels[] = {{ISA_SCALAR, NUMERICS_FMA},
                                      {ISA_AVX2, NUMERICS_FMA},
                                      {ISA_AVX512, NUMERICS_FMA},
                                      {ISA_AVX512BF16, NUMERICS_FMA},
                                      {ISA_AVX512BF16, NUMERICS_DPBF16}};
enum { LEVELS = sizeof levels / sizeof levels[0], U_BITS = 24 };
static const double unit_roundoff = 1.0 / (1 << U_BITS);

/* NULL when this machine lacks the level. */
static inline backend *level_open(int level, int threads, int rows_max) {
    static bool told[LEVELS];
    const struct backend_config config = {.isa = levels[level].isa,
                                          .numerics = levels[level].numerics,
                                          .threads = threads,
                                          .local_ranks = 1,
                                          .rows_max = rows_max,
                                          .logit_rows_max = rows_max,
                                          .probes_max = 64};
    backend *be = NULL;
    const bool open = cpu_open(&config, &be) == STATUS_OK;
    if (open && be->isa == levels[level].isa) return be;
    if (open) be->ops->close(be);
    if (!told[level])
        printf("\n    skipped: this machine has no %s %s\n", backend_isa_name(levels[level].isa),
               backend_numerics_name(levels[level].numerics));
    told[level] = true;
    return NULL;
}

/* Mostly ordinary values, some zeros of both signs, tiny, subnormal and large ones. */
static inline float awkward_float(uint64_t seed, uint32_t i) {
    const float x = suite_random_float(seed, i);
    switch (suite_random(seed + 77, i) % 64) {
        case 0:
            return 0.0f;
        case 1:
            return -0.0f;
        case 2:
            return x * 0x1p-130f;
        case 3:
            return x * 0x1p-60f;
        case 4:
            return x * 64.0f;
        default:
            return x;
    }
}
static inline void awkward_fill(uint64_t seed, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = awkward_float(seed, (uint32_t)i);
}
static inline float rounded(float x, enum backend_dtype dtype) {
    return dtype == BACKEND_F32 ? x : bf16_to_float(bf16_from_float(x));
}

/* n bytes between guards; guard_check frees and tells whether somebody wrote outside. */
enum { GUARD_BYTES = 256 };
static inline void *guard_new(size_t n) {
    unsigned char *p = malloc(n + 2 * GUARD_BYTES);
    memset(p, 0xA5, n + 2 * GUARD_BYTES);
    return p + GUARD_BYTES;
}
static inline int guard_check(void *buffer, size_t n) {
    unsigned char *p = (unsigned char *)buffer - GUARD_BYTES;
    int intact = 1;
    for (int i = 0; i < GUARD_BYTES; i++)
        intact &= p[i] == 0xA5 && p[GUARD_BYTES + n + (size_t)i] == 0xA5;
    free(p);
    return intact;
}

/* Activations [rows][cols] in the type of `dtype` weights, with NaN behind the last one. */
static inline void *activations_new(const float *x, int64_t n, enum backend_dtype dtype) {
    enum { BEHIND = 64 };
    if (dtype == BACKEND_F32) {
        float *out = malloc(sizeof(float) * (size_t)(n + BEHIND));
        memcpy(out, x, sizeof(float) * (size_t)n);
        for (int i = 0; i < BEHIND; i++) out[n + i] = NAN;
        return out;
    }
    bf16 *out = malloc(sizeof(bf16) * (size_t)(n + BEHIND));
    for (int64_t i = 0; i < n; i++) out[i] = bf16_from_float(x[i]);
    for (int i = 0; i < BEHIND; i++) out[n + i] = 0x7fc0;
    return out;
}

#endif
