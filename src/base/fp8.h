/* fp8.h: e4m3 <-> fp32, operations that are exact or rounded once, equal on every machine.
 *
 *   s eeee mmm    value = (-1)^s 2^(e - 7) (1 + m / 8), e = 0: (-1)^s 2^-6 m / 8
 *
 * This is e4m3fn of "FP8 Formats for Deep Learning" (Micikevicius et al. 2022): no infinity, NaN is
 * 0x7f and 0xff, the largest value is 448, the smallest above zero 2^-9. Rounding is to nearest,
 * ties to even; what is larger than 448 becomes 448, NaN stays NaN. Also compiles as CUDA C++.
 */
#ifndef SFUMATO_BASE_FP8_H
#define SFUMATO_BASE_FP8_H

#include <stdint.h>
#include <string.h>

#include "base/rng.h" /* SFUMATO_DEVICE */

typedef uint8_t fp8;

#define FP8_MAX 448.0f
enum {
    FP8_BLOCK = 128, /* weights: rows and columns that share a scale */
};

/* The magnitude goes to fp32's place; one exact product fixes the exponent bias, of subnormals as
 * well. No branch, so that loops over it vectorise. */
static inline SFUMATO_DEVICE float fp8_to_float(fp8 x) {
    const uint32_t sign = (uint32_t)(x & 0x80u) << 24, magnitude = (uint32_t)(x & 0x7fu);
    const uint32_t small = magnitude << 20;
    float value;
    uint32_t bits;
    memcpy(&value, &small, sizeof value);
    value *= 0x1p120f;
    memcpy(&bits, &value, sizeof bits);
    bits = (magnitude == 0x7fu ? 0x7fc00000u : bits) | sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline SFUMATO_DEVICE fp8 fp8_from_float(float x) {
    uint32_t bits, sum_bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 24 & 0x80u;
    bits &= 0x7fffffffu;
    const uint32_t nan = bits > 0x7f800000u;
    if (bits > 0x43e00000u) bits = 0x43e00000u; /* 448 */
    /* below 2^-6 the grid is 2^-9, which is the last bit of numbers from 2^14 on */
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0x1p14f;
    memcpy(&sum_bits, &magnitude, sizeof sum_bits);
    const uint32_t subnormal = sum_bits - 0x46800000u;
    /* above, 20 bits of the mantissa go, and 120 from the exponent */
    const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    const uint32_t out = nan ? 0x7fu : bits < 0x3c800000u ? subnormal : normal;
    return (fp8)(sign | out);
}

/* The scale of a block whose largest magnitude is `largest`, and one of its values in it. */
static inline SFUMATO_DEVICE float fp8_scale(float largest) { return largest / FP8_MAX; }
static inline SFUMATO_DEVICE fp8 fp8_quantise(float x, float scale) {
    return scale > 0.0f ? fp8_from_float(x / scale) : (fp8)0;
}

#endif
