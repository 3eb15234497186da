/* dequant.h: number formats of weight files -> fp32.
 *
 * A format is a block of `elements` consecutive columns in `bytes` bytes; F32, F16, BF16 and
 * F8_E4M3 are blocks of one (the scales of fp8 weights are tensors of their own: tensor_table.h). Decoding follows the order of operations of ggml's reference (one product, then
 * the minimum, in fp32), so values equal those of ggml and of the Python package gguf bit for bit.
 * The layouts are drawn in dequant.c. Input may be unaligned and must be little-endian, as this
 * machine is. Pure functions: no memory, any thread.
 */
#ifndef SFUMATO_LOAD_DEQUANT_H
#define SFUMATO_LOAD_DEQUANT_H

#include <stddef.h>
#include <stdint.h>

enum { DEQUANT_BLOCK_ELEMENTS_MAX = 256 };

struct dequant_type {
    const char *name; /* as ggml writes it: "Q4_K" */
    int ggml_id;      /* enum ggml_type of the GGUF specification; -1: not in it */
    int elements, bytes;
    /* out[block_count * elements] */
    void (*decode)(const uint8_t *blocks, size_t block_count, float *out);
};

/* NULL when there is no such format here. */
const struct dequant_type *dequant_find_ggml(uint32_t ggml_id);
const struct dequant_type *dequant_find_name(const char *name);
/* The name of any format the GGUF specification knows, for messages; NULL for unknown numbers. */
const char *dequant_ggml_name(uint32_t ggml_id);

float dequant_f16(uint16_t bits);

#endif
