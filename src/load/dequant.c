/* dequant.c: see dequant.h. Block layouts, byte offsets on the left (d, m, dmin are fp16):
 *
 *   Q8_0   0 d          2 q[32] int8                                  x = d*q
 *   Q4_0   0 d          2 q[16]                                       x = d*(q-8)
 *   Q4_1   0 d   2 m    4 q[16]                                       x = d*q + m
 *   Q5_0   0 d          2 high[4]   6 q[16]                           x = d*(q-16)
 *   Q5_1   0 d   2 m    4 high[4]   8 q[16]                           x = d*q + m
 *          byte i of q: column i in the low nibble, column i+16 in the high one; bit i of high is
 *          the fifth bit of column i.
 *
 *   Q4_K   0 d   2 dmin 4 scale[12] 16 q[128]                         x = (d*sc)*q - dmin*mn
 *   Q5_K   0 d   2 dmin 4 scale[12] 16 high[32]  48 q[128]            x = (d*sc)*q - dmin*mn
 *          8 groups of 32 columns; scale[12] packs eight 6-bit pairs (sc, mn), see scale_min. Groups
 *          2i and 2i+1 are the low and high nibbles of q[32i..32i+31]; bit g of high[l] is the fifth
 *          bit of column l of group g.
 *
 *   Q6_K   0 low[128] 128 high[64] 192 scale[16] int8 208 d           x = (d*scale)*(q-32)
 *          two halves of 128 columns; in each, q of columns l, l+32, l+64, l+96 is low nibbles of
 *          low[l], low[l+32], then high nibbles of the same bytes, with two more bits from high[l].
 */
#include "load/dequant.h"

#include <string.h>

#include "base/bf16.h"
#include "base/fp8.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "weight files are little-endian");

static uint16_t load16(const uint8_t *p) {
    uint16_t out;
    memcpy(&out, p, sizeof out);
    return out;
}

static uint32_t load32(const uint8_t *p) {
    uint32_t out;
    memcpy(&out, p, sizeof out);
    return out;
}

/* Shifts the magnitude into fp32's place and fixes the exponent bias by an exact product;
 * subnormals come out right by the same product. No branch, so that loops over it vectorise. */
static inline float f16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff)
                                                                       << 13;
    float value;
    uint32_t out;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    memcpy(&out, &value, sizeof out);
    out = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : out) | sign; /* inf and NaN */
    memcpy(&value, &out, sizeof value);
    return value;
}

float dequant_f16(uint16_t bits) { return f16(bits); }

static void decode_f32(const uint8_t *blocks, size_t block_count, float *out) {
    memcpy(out, blocks, block_count * sizeof *out);
}

static void decode_f16(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t i = 0; i < block_count; i++) out[i] = f16(load16(blocks + 2 * i));
}

static void decode_bf16(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t i = 0; i < block_count; i++) out[i] = bf16_to_float(load16(blocks + 2 * i));
}

static void decode_fp8(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t i = 0; i < block_count; i++) out[i] = fp8_to_float(blocks[i]);
}

static void decode_q8_0(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 34, out += 32) {
        const float d = f16(load16(blocks));
        for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)blocks[2 + i];
    }
}

static void decode_q4_0(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 18, out += 32) {
        const float d = f16(load16(blocks));
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)((blocks[2 + i] & 15) - 8);
            out[i + 16] = d * (float)((blocks[2 + i] >> 4) - 8);
        }
    }
}

static void decode_q4_1(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 20, out += 32) {
        const float d = f16(load16(blocks)), m = f16(load16(blocks + 2));
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(blocks[4 + i] & 15) + m;
            out[i + 16] = d * (float)(blocks[4 + i] >> 4) + m;
        }
    }
}

/* The five-bit value of column i (0..15: low nibble, 16..31: high nibble). */
static inline int five_bits(const uint8_t *q, uint32_t high, int i) {
    const int nibble = i < 16 ? q[i] & 15 : q[i - 16] >> 4;
    return nibble | (int)(high >> i & 1) << 4;
}

static void decode_q5_0(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 22, out += 32) {
        const float d = f16(load16(blocks));
        const uint32_t high = load32(blocks + 2);
        for (int i = 0; i < 32; i++) out[i] = d * (float)(five_bits(blocks + 6, high, i) - 16);
    }
}

static void decode_q5_1(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 24, out += 32) {
        const float d = f16(load16(blocks)), m = f16(load16(blocks + 2));
        const uint32_t high = load32(blocks + 4);
        for (int i = 0; i < 32; i++) out[i] = d * (float)five_bits(blocks + 8, high, i) + m;
    }
}

/* Scale and minimum of group g: groups 0-3 sit in the low six bits of bytes g and g+4; groups 4-7
 * have their low four bits in byte g+4 (scale low, minimum high nibble) and two high bits atop
 * 0-3's. */
static inline void scale_min(const uint8_t *scale, int g, int *sc, int *mn) {
    if (g < 4) {
        *sc = scale[g] & 63;
        *mn = scale[g + 4] & 63;
    } else {
        *sc = (scale[g + 4] & 15) | scale[g - 4] >> 6 << 4;
        *mn = scale[g + 4] >> 4 | scale[g] >> 6 << 4;
    }
}

static void decode_q4_k(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 144) {
        const float d = f16(load16(blocks)), dmin = f16(load16(blocks + 2));
        for (int g = 0; g < 8; g++, out += 32) {
            const uint8_t *q = blocks + 16 + g / 2 * 32;
            const int shift = g % 2 * 4;
            int sc, mn;
            scale_min(blocks + 4, g, &sc, &mn);
            const float scale = d * (float)sc, minimum = dmin * (float)mn;
            for (int i = 0; i < 32; i++) out[i] = scale * (float)(q[i] >> shift & 15) - minimum;
        }
    }
}

static void decode_q5_k(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 176) {
        const float d = f16(load16(blocks)), dmin = f16(load16(blocks + 2));
        for (int g = 0; g < 8; g++, out += 32) {
            const uint8_t *high = blocks + 16, *q = blocks + 48 + g / 2 * 32;
            const int shift = g % 2 * 4;
            int sc, mn;
            scale_min(blocks + 4, g, &sc, &mn);
            const float scale = d * (float)sc, minimum = dmin * (float)mn;
            for (int i = 0; i < 32; i++) {
                const int five = (q[i] >> shift & 15) | (high[i] >> g & 1) << 4;
                out[i] = scale * (float)five - minimum;
            }
        }
    }
}

static void decode_q6_k(const uint8_t *blocks, size_t block_count, float *out) {
    for (size_t b = 0; b < block_count; b++, blocks += 210) {
        const float d = f16(load16(blocks + 208));
        for (int half = 0; half < 2; half++, out += 128) {
            const uint8_t *low = blocks + 64 * half, *high = blocks + 128 + 32 * half;
            const uint8_t *scale = blocks + 192 + 8 * half; /* one for 16 columns */
            for (int i = 0; i < 128; i++) {
                const int l = i % 32, quarter = i / 32;
                const int nibble = low[l + quarter % 2 * 32] >> (quarter / 2 * 4) & 15;
                const int six = nibble | (high[l] >> (2 * quarter) & 3) << 4;
                out[i] = d * (float)(int8_t)scale[i / 16] * (float)(six - 32);
            }
        }
    }
}

static const struct dequant_type types[] = {
    {"F32", 0, 1, 4, decode_f32},        {"F16", 1, 1, 2, decode_f16},
    {"Q4_0", 2, 32, 18, decode_q4_0},    {"Q4_1", 3, 32, 20, decode_q4_1},
    {"Q5_0", 6, 32, 22, decode_q5_0},    {"Q5_1", 7, 32, 24, decode_q5_1},
    {"Q8_0", 8, 32, 34, decode_q8_0},    {"Q4_K", 12, 256, 144, decode_q4_k},
    {"Q5_K", 13, 256, 176, decode_q5_k}, {"Q6_K", 14, 256, 210, decode_q6_k},
    {"BF16", 30, 1, 2, decode_bf16},     {"F8_E4M3", -1, 1, 1, decode_fp8},
};
enum { TYPE_COUNT = sizeof types / sizeof types[0] };

const struct dequant_type *dequant_find_ggml(uint32_t ggml_id) {
    for (int i = 0; i < TYPE_COUNT; i++) {
        if (types[i].ggml_id >= 0 && (uint32_t)types[i].ggml_id == ggml_id) return &types[i];
    }
    return NULL;
}

const struct dequant_type *dequant_find_name(const char *name) {
    for (int i = 0; i < TYPE_COUNT; i++) {
        if (strcmp(types[i].name, name) == 0) return &types[i];
    }
    return NULL;
}

const char *dequant_ggml_name(uint32_t ggml_id) {
    static const char *const names[] = {
        "F32",   "F16",        "Q4_0",       "Q4_1",       "Q4_2",     "Q4_3",     "Q5_0",
        "Q5_1",  "Q8_0",       "Q8_1",       "Q2_K",       "Q3_K",     "Q4_K",     "Q5_K",
        "Q6_K",  "Q8_K",       "IQ2_XXS",    "IQ2_XS",     "IQ3_XXS",  "IQ1_S",    "IQ4_NL",
        "IQ3_S", "IQ2_S",      "IQ4_XS",     "I8",         "I16",      "I32",      "I64",
        "F64",   "IQ1_M",      "BF16",       "Q4_0_4_4",   "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",
        "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"};
    return ggml_id < sizeof names / sizeof names[0] ? names[ggml_id] : NULL;
}
