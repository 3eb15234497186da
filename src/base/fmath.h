/* fmath.h: exp and log with the same bits on every machine and in every instruction set.
 *
 * libm picks CPU-dependent variants at load time, so results that must agree across ranks, ISA levels
 * and hosts never use it. fmath_exp is a fixed sequence of fp32 operations with explicit fma; the
 * vector kernels (backend/cpu_*.c) perform the same sequence lane by lane and are bit-equal to it.
 * fmath_log is scalar only and works in double without fma. Compile with -ffp-contract=off.
 *
 * Accuracy (tests/base_fmath.c): exp <= 2 ulp over [-87, 0], exp(0) = 1, monotone; log <= 1 ulp.
 */
#ifndef SFUMATO_BASE_FMATH_H
#define SFUMATO_BASE_FMATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "base/rng.h" /* SFUMATO_DEVICE */

/* Range: x < FMATH_EXP_MIN gives exactly 0 (no subnormals), x > FMATH_EXP_MAX acts as FMATH_EXP_MAX. */
#define FMATH_EXP_MIN (-87.0f)
#define FMATH_EXP_MAX 88.0f
#define FMATH_LOG2E 1.44269504088896341f
#define FMATH_LN2_HIGH 0.693145751953125f /* 15 bits: n * LN2_HIGH is exact for |n| < 2^9 */
#define FMATH_LN2_LOW 1.428606765330187045e-06f
#define FMATH_ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */
/* e^r on |r| <= ln2/2: 1 + r + r^2 (C2 + r (C3 + ... + r C7)); coefficients as in Cephes expf (Moshier) */
#define FMATH_EXP_C2 5.0000001201e-1f
#define FMATH_EXP_C3 1.6666665459e-1f
#define FMATH_EXP_C4 4.1665795894e-2f
#define FMATH_EXP_C5 8.3334519073e-3f
#define FMATH_EXP_C6 1.3981999507e-3f
#define FMATH_EXP_C7 1.9875691500e-4f

static inline SFUMATO_DEVICE float fmath_exp(float x) {
    if (!(x >= FMATH_EXP_MIN)) return x != x ? x : 0.0f;
    if (x > FMATH_EXP_MAX) x = FMATH_EXP_MAX;
    const float shifted = fmaf(x, FMATH_LOG2E, FMATH_ROUND_MAGIC);
    const float n = shifted - FMATH_ROUND_MAGIC;
    float r = fmaf(n, -FMATH_LN2_HIGH, x);
    r = fmaf(n, -FMATH_LN2_LOW, r);
    float p = fmaf(FMATH_EXP_C7, r, FMATH_EXP_C6);
    p = fmaf(p, r, FMATH_EXP_C5);
    p = fmaf(p, r, FMATH_EXP_C4);
    p = fmaf(p, r, FMATH_EXP_C3);
    p = fmaf(p, r, FMATH_EXP_C2);
    p = fmaf(p, r * r, r);
    p = p + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* 2^n, n in [-126, 127] */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* ln x = 2 atanh s + exponent ln 2 of a normal double x > 0: s = (m - 1) / (m + 1) with m in
 * (sqrt 1/2, sqrt 2], so |s| <= 0.172. */
static inline SFUMATO_DEVICE double fmath_log_split(double x, int *exponent) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    *exponent = (int)(bits >> 52 & 0x7ff) - 1023;
    bits = (bits & 0xfffffffffffffULL) | 0x3ff0000000000000ULL;
    double m;
    memcpy(&m, &bits, sizeof m); /* [1, 2) */
    if (m > 1.4142135623730951) {
        m *= 0.5;
        ++*exponent;
    }
    return (m - 1.0) / (m + 1.0);
}
#define FMATH_LN2 0.69314718055994530942

/* Natural logarithm of x > 0; -inf at 0, NaN below. */
static inline SFUMATO_DEVICE float fmath_log(float x) {
    if (!(x > 0.0f)) return x == 0.0f ? -INFINITY : NAN;
    if (x == INFINITY) return x;
    int exponent;
    const double s = fmath_log_split((double)x, &exponent), t = s * s; /* subnormal floats too */
    double sum = 1.0 / 17; /* the tail after it is below 2^-40 */
    sum = sum * t + 1.0 / 15;
    sum = sum * t + 1.0 / 13;
    sum = sum * t + 1.0 / 11;
    sum = sum * t + 1.0 / 9;
    sum = sum * t + 1.0 / 7;
    sum = sum * t + 1.0 / 5;
    sum = sum * t + 1.0 / 3;
    sum = sum * t + 1.0;
    return (float)(2.0 * s * sum + exponent * FMATH_LN2);
}

#endif
