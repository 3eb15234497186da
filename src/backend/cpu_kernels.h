/* cpu_kernels.h: the inner loops of the CPU backend, one table of them per instruction set.
 *
 * A kernel works on one panel, one row, one KV block or one vocabulary slab, on one thread; who
 * calls it with what is decided in cpu_dense.c, cpu_attention.c and cpu_candidates.c, which hold no
 * intrinsics.
 *
 *   cpu_scalar.c      the reference: plain loops, what a result *means*
 *   cpu_vector.inc.h  the same in vectors of 16 lanes, included by cpu_avx2.c, cpu_avx512.c,
 * cpu_avx512bf16.c cpu_rows.inc.h    short row loops in plain C, included by all four (the compiler
 * vectorises them)
 *
 * Contract: every table gives equal bits, except panel_dpbf16 and the scores of keys with q_bf16
 * set, which are of the numeric class of their own (cpu.md §3.2). So no kernel may choose an order
 * of additions:
 *  - a product is one chain of fmaf over k ascending, from +0;
 *  - a sum over a row uses 16 lanes, lane j takes elements j, j + 16, ...; then j and j + 8, +4,
 * +2, +1;
 *  - exp has the steps of base/fmath.h; square root and division are the exact IEEE ones.
 */
#ifndef SFUMATO_BACKEND_CPU_KERNELS_H
#define SFUMATO_BACKEND_CPU_KERNELS_H

#include "backend/cpu_pack.h"
#include "base/bf16.h"

enum {
    KV_BLOCK_TOKENS = 64, /* = the page size (kv/pages.h) */
    ATTENTION_TILE = 8,   /* query heads that go over a KV block together */
    LANES = 16,
};

/* acc[rows][32] = products of k_count inputs (of one slab) with the 32 lanes of a panel, from +0.
 * x: [rows][x_stride]; fp32 for panel_f32 and panel_bf16 (widened bf16), bf16 for panel_dpbf16. */
typedef void panel_product(const void *panel, const void *x, int64_t x_stride, int64_t k_count,
                           int rows, float *acc);

/* One KV block for up to 8 query heads of one row that read the same kv head.
 *   keys    [ceil(hd / 2)][64][2] bf16, or [hd][64] f32          lanes = tokens
 *   values  [64][hd rounded up to 16]                            lanes = dims */
struct attention_block {
    const void *keys, *values;
    enum backend_dtype dtype;
    int head_dim;       /* hd */
    int dim_stride;     /* hd rounded up to 16: rows of values, q and o */
    int visible;        /* tokens 0 .. visible - 1 count, the others may be garbage */
    int heads;          /* 1 .. 8 */
    float scale;        /* 1 / sqrt(hd) */
    const float *q;     /* [heads][dim_stride], rounded if the keys are bf16, zero beyond hd */
    const bf16 *q_bf16; /* the same as bf16: use vdpbf16ps for the scores; NULL: fma */
    const unsigned char *next; /* the block that comes after this one, to prefetch; or NULL */
    size_t next_bytes;
    float *score;     /* [8][64] scratch */
    float *m, *l, *o; /* out: [heads], [heads], [heads][dim_stride] */
};

/* A row of the embedding mixture, columns [k_begin, k_end). */
struct embed_row {
    const struct matrix *embed;
    const uint32_t *ids; /* global */
    const float *weights;
    int count;
    int slab_count;
    const int64_t *vocab_begin; /* [slab_count + 1] */
    int64_t k_begin, k_end;
    float *out; /* [D] */
};

/* x = first ? scale * sum : x + sum; h = (x * (1 / sqrt(mean(x^2) + eps))) * weight. */
struct norm_row {
    const float *sum, *weight;
    float *x;
    bool first;
    float scale, eps;
    int hidden;
    enum backend_dtype dtype;
    void *h;
};

struct cpu_kernels {
    enum backend_isa isa;
    panel_product *panel_f32, *panel_bf16;
    panel_product *panel_dpbf16; /* NULL: this level has no such instruction */
    /* act[16] = silu(acc[0..15]) * acc[16..31] */
    void (*swiglu)(const float *acc, float *act);
    void (*attention_block)(const struct attention_block *b);
    /* Triple (m, l, o[n]) joined with the next block's: n = max, l = fma(c', l', c l), o likewise.
     */
    void (*attention_join)(float *m, float *l, float *o, float m_b, float l_b, const float *o_b,
                           int n);
    /* m = max z, s = sum e^(z-m), q = sum (z-m) e^(z-m) over z > -inf; absent: -inf, 0, 0. No NaN,
     * no +inf. */
    void (*slab_stats)(const float *z, int64_t n, float *m, float *s, float *q);
    /* Appends to found[] the indices i in [begin, n) with z[i] > threshold, ascending, while there
     * is room for 16 more; returns where to go on. */
    int64_t (*above)(const float *z, int64_t begin, int64_t n, float threshold, uint32_t *found,
                     int room, int *count);
    /* Reads n bytes; the result means nothing. */
    uint64_t (*sweep)(const void *bytes, size_t n);
    /* Multiply-adds at full speed; returns the number of operations. */
    double (*peak)(bool dpbf16, int64_t rounds);

    /* cpu_rows.inc.h */
    void (*widen)(const bf16 *x, int64_t n, float *out);
    void (*round)(const float *x, int64_t n, bf16 *out);
    void (*add)(float *a, const float *b, int64_t n, bool plus_zero); /* a += b, or a += +0.0f */
    void (*norm_row)(const struct norm_row *job);
    /* One head in place: + bias, RMSNorm, rotation of (i, i + hd / 2); each NULL = left out. */
    void (*head_row)(float *x, int n, const float *bias, const float *norm, float eps,
                     const float *cos, const float *sin);
    void (*embed_row)(const struct embed_row *job);
    /* z' = z / temperature, made ordinary: NaN -> -inf, +inf -> FLT_MAX, -0 -> +0. */
    void (*divide)(const float *z, int64_t n, float temperature, float *out);
};

extern const struct cpu_kernels cpu_kernels_scalar, cpu_kernels_avx2, cpu_kernels_avx512,
    cpu_kernels_avx512bf16;

#endif
