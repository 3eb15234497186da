/* bf16.h: brain float <-> fp32, bit operations only, equal on every machine.
 *
 * bf16 is the upper half of an fp32. Rounding is to nearest, ties to even; NaN stays NaN.
 */
#ifndef SFUMATO_BASE_BF16_H
#define SFUMATO_BASE_BF16_H

#include <stdint.h>
#include <string.h>

#include "base/rng.h" /* SFUMATO_DEVICE */

typedef uint16_t bf16;

static inline SFUMATO_DEVICE float bf16_to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static inline SFUMATO_DEVICE bf16 bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)(bits >> 16 | 0x40u); /* quiet NaN */
    return (bf16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* to[count] = from[count], rounded. */
static inline void bf16_round(const float *from, int64_t count, bf16 *to) {
    enum { BLOCK = 256 }; /* a fixed count, so that the compiler vectorises it */
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK)
        for (int k = 0; k < BLOCK; k++) to[i + k] = bf16_from_float(from[i + k]);
    for (; i < count; i++) to[i] = bf16_from_float(from[i]);
}

#endif
