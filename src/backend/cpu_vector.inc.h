/* cpu_vector.inc.h: the heavy kernels in vectors, written once for all levels.
 *
 * The including file (cpu_avx2.c, cpu_avx512.c) defines a native vector `vec` of W floats with its
 * operations vec_*, and the shapes of product tiles:
 *
 *   FULL_ROWS                  rows x VECS vectors: as wide as the panel (VECS = 32 / W)
 *   TILE_ROWS_MAX, TILE_VECS   the tile for more rows than that
 *
 * A tile is rows x vectors of accumulators, all in registers, both numbers compile-time constants.
 * At batch 1 it is one row x the whole panel, which reads the panel as one stream of consecutive
 * bytes. When the rows do not fit one full-width tile, K is cut into blocks whose slice of the
 * panel stays in
 * L1 while all tiles go over it, and accumulators rest in acc between blocks. Neither changes the
 * chain of
 * an output, which is one fma after the other over k, whatever the tile.
 */
#include "backend/cpu_rows.inc.h"

#define INLINE static inline __attribute__((always_inline))

/* ---- products ---- */

/* Rows of 128 bytes of a panel in one block of K. Few rows wait for memory: a short block lets the
 * next bytes arrive while the tiles go over it (measured on AVX2, 8 rows: 0.49 of the read floor
 * against
 * 0.33 with long blocks). Many rows are bound by arithmetic: a long block (16 KiB) loads
 * accumulators less
 * often. */
enum { BLOCK_SHORT = 8, BLOCK_LONG = 128 };
/* Bytes of the stream asked for ahead; across the end of a panel this is the next one. */
enum { AHEAD_BYTES = 4096 };

/* What a step of 128 bytes of a panel means: an input (f32) or a pair of inputs (bf16). */
enum operand { OPERAND_F32, OPERAND_BF16, OPERAND_DPBF16 };

/* `steps` steps for `rows` rows x `count` vectors: acc[r][v] continues, or starts at +0 when fresh.
 * w_step: bytes from step to step; ahead: bytes to prefetch ahead of w, 0 = none. */
INLINE void tile(const enum operand operand, const int rows, const int count,
                 const unsigned char *w, const size_t w_step, const unsigned char *x,
                 size_t x_stride, int64_t steps, float *acc, const int acc_stride, bool fresh,
                 const size_t ahead) {
    vec sum[TILE_ROWS_MAX][VECS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < count; v++)
            sum[r][v] = fresh ? vec_zero() : vec_load(acc + r * acc_stride + v * W);
    for (int64_t k = 0; k < steps; k++, w += w_step) {
        if (ahead) {
            __builtin_prefetch(w + ahead);
            __builtin_prefetch(w + ahead + 64);
        }
        if (operand == OPERAND_F32) {
            vec a[VECS];
#pragma GCC unroll 4
            for (int v = 0; v < count; v++) a[v] = vec_load((const float *)w + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const vec b = vec_set1(*((const float *)(x + r * x_stride) + k));
#pragma GCC unroll 4
                for (int v = 0; v < count; v++) sum[r][v] = vec_fma(a[v], b, sum[r][v]);
            }
        } else if (operand == OPERAND_BF16) {
            vec a[VECS];
#pragma GCC unroll 4
            for (int v = 0; v < count; v++) a[v] = vec_even(w + v * W * 4);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const vec b = vec_set1(*((const float *)(x + r * x_stride) + 2 * k));
#pragma GCC unroll 4
                for (int v = 0; v < count; v++) sum[r][v] = vec_fma(a[v], b, sum[r][v]);
            }
#pragma GCC unroll 4
            for (int v = 0; v < count; v++) a[v] = vec_odd(w + v * W * 4);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                const vec b = vec_set1(*((const float *)(x + r * x_stride) + 2 * k + 1));
#pragma GCC unroll 4
                for (int v = 0; v < count; v++) sum[r][v] = vec_fma(a[v], b, sum[r][v]);
            }
        } else {
#ifdef VEC_DPBF16
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < count; v++)
                    sum[r][v] = vec_dpbf16(sum[r][v], w + v * W * 4, x + r * x_stride + 4 * k);
#endif
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < count; v++) vec_store(acc + r * acc_stride + v * W, sum[r][v]);
}

/* `rows` (1 .. TILE_ROWS_MAX) picks the compiled tile. */
INLINE void tile_rows(const enum operand operand, int rows, const int count, const unsigned char *w,
                      const size_t w_step, const unsigned char *x, size_t x_stride, int64_t steps,
                      float *acc, const int acc_stride, bool fresh, const size_t ahead) {
    switch (rows) {
#define TILE(n)                                                                                \
    case n:                                                                                    \
        tile(operand, n, count, w, w_step, x, x_stride, steps, acc, acc_stride, fresh, ahead); \
        break;
        TILE(1)
        TILE(2)
        TILE(3)
        TILE(4)
#if TILE_ROWS_MAX > 4
        TILE(5)
        TILE(6)
        TILE(7)
        TILE(8)
        TILE(9)
        TILE(10)
        TILE(11)
        TILE(12)
#endif
#undef TILE
    }
}

/* All rows over one slab of a panel. */
INLINE void panel(const enum operand operand, const unsigned char *w, const unsigned char *x,
                  size_t x_stride, int64_t steps, int rows, float *acc) {
    const size_t w_step = PANEL_ROWS * 4; /* 32 floats or 32 pairs */
    const size_t x_step = operand == OPERAND_BF16 ? 8 : 4;
    if (rows <= FULL_ROWS) { /* one tile as wide as the panel: a single pass, no blocks */
        tile_rows(operand, rows, VECS, w, w_step, x, x_stride, steps, acc, PANEL_ROWS, true,
                  AHEAD_BYTES);
        return;
    }
    const int64_t block = rows <= 4 * TILE_ROWS_MAX ? BLOCK_SHORT : BLOCK_LONG;
    for (int64_t k = 0; k < steps; k += block, w += (size_t)block * w_step) {
        const int64_t n = steps - k < block ? steps - k : block;
        for (int r = 0; r < rows; r += TILE_ROWS_MAX) {
            const int m = rows - r < TILE_ROWS_MAX ? rows - r : TILE_ROWS_MAX;
            const unsigned char *in = x + (size_t)r * x_stride + (size_t)k * x_step;
            float *out = acc + r * PANEL_ROWS;
            if (r == 0) /* the first tile fetches for all */
                tile_rows(operand, m, TILE_VECS, w, w_step, in, x_stride, n, out, PANEL_ROWS,
                          k == 0, AHEAD_BYTES);
            for (int v = r == 0 ? TILE_VECS : 0; v < VECS; v += TILE_VECS)
                tile_rows(operand, m, TILE_VECS, w + v * W * 4, w_step, in, x_stride, n,
                          out + v * W, PANEL_ROWS, k == 0, 0);
        }
    }
}

static void panel_f32(const void *w, const void *x, int64_t x_stride, int64_t k_count, int rows,
                      float *acc) {
    panel(OPERAND_F32, w, x, sizeof(float) * (size_t)x_stride, k_count, rows, acc);
}

static void panel_bf16(const void *w, const void *x, int64_t x_stride, int64_t k_count, int rows,
                       float *acc) {
    panel(OPERAND_BF16, w, x, sizeof(float) * (size_t)x_stride, k_count / 2, rows, acc);
}

#ifdef VEC_DPBF16
static void panel_dpbf16(const void *w, const void *x, int64_t x_stride, int64_t k_count, int rows,
                         float *acc) {
    panel(OPERAND_DPBF16, w, x, sizeof(bf16) * (size_t)x_stride, k_count / 2, rows, acc);
}
#endif

/* ---- exp, SwiGLU ---- */

/* fmath_exp lane by lane: the same operations in the same order. */
INLINE vec vec_exp(vec x) {
    const vec in = x;
    x = vec_min(vec_set1(FMATH_EXP_MAX), x); /* NaN stays NaN */
    const vec magic = vec_set1(FMATH_ROUND_MAGIC);
    const vec n = vec_sub(vec_fma(x, vec_set1(FMATH_LOG2E), magic), magic);
    vec r = vec_fma(n, vec_set1(-FMATH_LN2_HIGH), x);
    r = vec_fma(n, vec_set1(-FMATH_LN2_LOW), r);
    vec p = vec_fma(vec_set1(FMATH_EXP_C7), r, vec_set1(FMATH_EXP_C6));
    p = vec_fma(p, r, vec_set1(FMATH_EXP_C5));
    p = vec_fma(p, r, vec_set1(FMATH_EXP_C4));
    p = vec_fma(p, r, vec_set1(FMATH_EXP_C3));
    p = vec_fma(p, r, vec_set1(FMATH_EXP_C2));
    p = vec_fma(p, vec_mul(r, r), r);
    p = vec_add(p, vec_set1(1.0f));
    return vec_zero_below(in, vec_set1(FMATH_EXP_MIN), vec_mul(p, vec_power2(n)));
}

static void swiglu(const float *acc, float *act) {
    for (int v = 0; v < GATE_ROWS; v += W) {
        const vec gate = vec_load(acc + v), up = vec_load(acc + GATE_ROWS + v);
        const vec e = vec_exp(vec_sub(vec_set1(-0.0f), gate)); /* -0 - g = -g, also for zeros */
        vec_store(act + v, vec_mul(vec_div(gate, vec_add(vec_set1(1.0f), e)), up));
    }
}

/* ---- attention ---- */

/* score[h][t] = key_t . q_h for all 64 tokens: the keys are a panel of 64 lanes. */
static void block_scores(const struct attention_block *b) {
    const size_t step = KV_BLOCK_TOKENS * 4;
    const bool f32 = b->dtype == BACKEND_F32;
    const int64_t steps = f32 ? b->head_dim : (b->head_dim + 1) / 2;
    for (int t = 0; t < KV_BLOCK_TOKENS && t < b->visible; t += TILE_VECS * W) {
        const unsigned char *keys = (const unsigned char *)b->keys + t * 4;
        for (int h = 0; h < b->heads; h += TILE_ROWS_MAX) {
            const int rows = b->heads - h < TILE_ROWS_MAX ? b->heads - h : TILE_ROWS_MAX;
            const unsigned char *q = (const unsigned char *)(b->q + h * b->dim_stride);
            const size_t q_stride = sizeof(float) * (size_t)b->dim_stride;
            float *score = b->score + h * KV_BLOCK_TOKENS + t;
            if (f32)
                tile_rows(OPERAND_F32, rows, TILE_VECS, keys, step, q, q_stride, steps, score,
                          KV_BLOCK_TOKENS, true, 0);
#ifdef VEC_DPBF16
            else if (b->q_bf16)
                tile_rows(OPERAND_DPBF16, rows, TILE_VECS, keys, step,
                          (const unsigned char *)(b->q_bf16 + h * b->dim_stride), q_stride / 2,
                          steps, score, KV_BLOCK_TOKENS, true, 0);
#endif
            else
                tile_rows(OPERAND_BF16, rows, TILE_VECS, keys, step, q, q_stride, steps, score,
                          KV_BLOCK_TOKENS, true, 0);
        }
    }
}

/* o[h .. h + heads) [d .. d + count vectors) = sum over visible tokens of p[h][t] value_t. */
INLINE void values_tile(const struct attention_block *b, const bool f32, const int heads,
                        const int count, int h, int d) {
    /* The first tile asks for the next block, a share with each token: pages lie anywhere in
     * memory, so the hardware cannot guess it, and asking for 16 KiB at once would stall. */
    const unsigned char *next = h == 0 && d == 0 ? b->next : NULL;
    const size_t share = b->next_bytes / KV_BLOCK_TOKENS;
    const float *p = b->score + h * KV_BLOCK_TOKENS;
    vec sum[VALUE_HEADS][2];
#pragma GCC unroll 4
    for (int i = 0; i < heads; i++)
#pragma GCC unroll 2
        for (int v = 0; v < count; v++) sum[i][v] = vec_zero();
    for (int t = 0; t < b->visible; t++) {
        if (next) {
            for (size_t line = 0; line < share; line += 64) __builtin_prefetch(next + line);
            next += share;
        }
        vec value[2];
#pragma GCC unroll 2
        for (int v = 0; v < count; v++) {
            const int at = t * b->dim_stride + d + v * W;
            value[v] = f32 ? vec_load((const float *)b->values + at)
                           : vec_bf16((const bf16 *)b->values + at);
        }
#pragma GCC unroll 4
        for (int i = 0; i < heads; i++) {
            const vec weight = vec_set1(p[i * KV_BLOCK_TOKENS + t]);
#pragma GCC unroll 2
            for (int v = 0; v < count; v++) sum[i][v] = vec_fma(weight, value[v], sum[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < heads; i++)
#pragma GCC unroll 2
        for (int v = 0; v < count; v++)
            vec_store(b->o + (h + i) * b->dim_stride + d + v * W, sum[i][v]);
}

INLINE void values_heads(const struct attention_block *b, const bool f32, const int count, int d) {
    for (int h = 0; h < b->heads; h += VALUE_HEADS) {
        switch (b->heads - h) {
            case 1:
                values_tile(b, f32, 1, count, h, d);
                break;
            case 2:
                values_tile(b, f32, 2, count, h, d);
                break;
            case 3:
                values_tile(b, f32, 3, count, h, d);
                break;
            default:
                values_tile(b, f32, 4, count, h, d);
                break;
        }
    }
}

static void block_values(const struct attention_block *b) {
    const bool f32 = b->dtype == BACKEND_F32;
    int d = 0;
    for (; d + 2 * W <= b->dim_stride; d += 2 * W) {
        if (f32)
            values_heads(b, true, 2, d);
        else
            values_heads(b, false, 2, d);
    }
    for (; d < b->dim_stride; d += W) {
        if (f32)
            values_heads(b, true, 1, d);
        else
            values_heads(b, false, 1, d);
    }
}

INLINE float vec_reduce_max(vec x) {
    float lane[W], top = -INFINITY;
    vec_store(lane, x);
    for (int j = 0; j < W; j++) top = lane[j] > top ? lane[j] : top;
    return top;
}

/* Scores to probabilities e^(s - m) of one head, with m and the sum. Invisible lanes become -inf
 * before anything is computed with them; their e^-inf = +0 leaves a sum, which is never -0, as it
 * is. */
static void block_softmax(const struct attention_block *b, int h) {
    float *p = b->score + h * KV_BLOCK_TOKENS;
    for (int t = b->visible; t < KV_BLOCK_TOKENS; t++) p[t] = -INFINITY;
    vec top = vec_set1(-INFINITY);
    for (int t = 0; t < KV_BLOCK_TOKENS; t += W) {
        const vec s = vec_mul(vec_load(p + t), vec_set1(b->scale));
        vec_store(p + t, s);
        top = vec_max(s, top);
    }
    const float m = vec_reduce_max(top);
    float sum[LANES];
    for (int j = 0; j < LANES; j += W) {
        vec l = vec_zero();
        for (int t = j; t < KV_BLOCK_TOKENS; t += LANES) {
            const vec e = vec_exp(vec_sub(vec_load(p + t), vec_set1(m)));
            vec_store(p + t, e);
            l = vec_add(l, e);
        }
        vec_store(sum + j, l);
    }
    b->m[h] = m;
    b->l[h] = lanes_sum(sum);
}

static void attention_block(const struct attention_block *b) {
    block_scores(b);
    for (int h = 0; h < b->heads; h++) block_softmax(b, h);
    block_values(b);
}

/* o has room up to a multiple of 16 dims. */
static void attention_join(float *m, float *l, float *o, float m_b, float l_b, const float *o_b,
                           int n) {
    const float top = *m > m_b ? *m : m_b;
    const float c = fmath_exp(*m - top), c_b = fmath_exp(m_b - top);
    *m = top;
    *l = fmaf(c_b, l_b, c * *l);
    for (int d = 0; d < n; d += W)
        vec_store(o + d,
                  vec_fma(vec_set1(c_b), vec_load(o_b + d), vec_mul(vec_set1(c), vec_load(o + d))));
}

/* ---- statistics and candidates of logits ---- */

/* 16 values from z + i, -inf beyond n. */
INLINE const float *lanes_at(const float *z, int64_t i, int64_t n, float padded[LANES]) {
    if (i + LANES <= n) return z + i;
    for (int j = 0; j < LANES; j++) padded[j] = i + j < n ? z[i + j] : -INFINITY;
    return padded;
}

static void slab_stats(const float *z, int64_t n, float *m, float *s, float *q) {
    float padded[LANES];
    vec top = vec_set1(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        const float *in = lanes_at(z, i, n, padded);
#pragma GCC unroll 2
        for (int v = 0; v < LANES; v += W) top = vec_max(vec_load(in + v), top);
    }
    *m = vec_reduce_max(top);
    *s = *q = 0.0f;
    if (*m == -INFINITY) return;
    vec s_lane[LANES / W], q_lane[LANES / W];
    for (int v = 0; v < LANES / W; v++) s_lane[v] = q_lane[v] = vec_zero();
    const vec shift = vec_set1(*m), least = vec_set1(-FLT_MAX);
    for (int64_t i = 0; i < n; i += LANES) {
        const float *in = lanes_at(z, i, n, padded);
#pragma GCC unroll 2
        for (int v = 0; v < LANES / W; v++) {
            const vec d = vec_sub(vec_load(in + v * W), shift), e = vec_exp(d);
            s_lane[v] = vec_add(s_lane[v], e);
            q_lane[v] = vec_fma(vec_max(d, least), e, q_lane[v]); /* never -inf * 0 */
        }
    }
    float lanes[LANES];
    for (int v = 0; v < LANES / W; v++) vec_store(lanes + v * W, s_lane[v]);
    *s = lanes_sum(lanes);
    for (int v = 0; v < LANES / W; v++) vec_store(lanes + v * W, q_lane[v]);
    *q = lanes_sum(lanes);
}

static int64_t above(const float *z, int64_t begin, int64_t n, float threshold, uint32_t *found,
                     int room, int *count) {
    int64_t i = begin;
    for (; i + W <= n && *count + LANES <= room; i += W) {
        for (unsigned bits = vec_above(vec_load(z + i), vec_set1(threshold)); bits;
             bits &= bits - 1)
            found[(*count)++] = (uint32_t)i + (uint32_t)__builtin_ctz(bits);
    }
    if (i + W > n)
        for (; i < n && *count + LANES <= room; i++)
            if (z[i] > threshold) found[(*count)++] = (uint32_t)i;
    return i;
}

/* ---- floors of the benchmarks ---- */

/* Reads everything once, as a product at batch 1 does; the value only keeps the reads alive. */
static uint64_t sweep(const void *bytes, size_t n) {
    enum { CHAINS = 8, CHUNK = CHAINS * sizeof(vec) };
    const unsigned char *in = bytes;
    vec top[CHAINS];
#pragma GCC unroll 8
    for (int j = 0; j < CHAINS; j++) top[j] = vec_zero();
    for (size_t i = 0; i + CHUNK <= n; i += CHUNK) {
#pragma GCC unroll 8
        for (size_t line = 0; line < CHUNK; line += 64)
            __builtin_prefetch(in + i + AHEAD_BYTES + line);
#pragma GCC unroll 8
        for (int j = 0; j < CHAINS; j++)
            top[j] = vec_max(vec_load((const float *)(in + i) + j * W), top[j]);
    }
    for (int j = 1; j < CHAINS; j++) top[0] = vec_max(top[j], top[0]);
    return (uint64_t)(vec_reduce_max(top[0]) > 0.0f);
}

enum { PEAK_CHAINS = 12 }; /* more than latency times throughput, fewer than registers */

static double peak(bool dpbf16, int64_t rounds) {
    vec sum[PEAK_CHAINS]; /* different values, or the compiler computes one chain only */
#pragma GCC unroll 12
    for (int j = 0; j < PEAK_CHAINS; j++) sum[j] = vec_set1((float)j);
    const vec a = vec_set1(0.5f), b = vec_set1(1.0f);
    float pairs[W];
    vec_store(pairs, a);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < PEAK_CHAINS; j++) {
#ifdef VEC_DPBF16
            if (dpbf16)
                sum[j] = vec_dpbf16(sum[j], (unsigned char *)pairs, (unsigned char *)pairs);
            else
#endif
                sum[j] = vec_fma(sum[j], a, b);
        }
    }
    for (int j = 1; j < PEAK_CHAINS; j++) sum[0] = vec_add(sum[0], sum[j]);
    volatile float sink = vec_reduce_max(sum[0]);
    (void)sink;
    return 2.0 * W * PEAK_CHAINS * (dpbf16 ? 2.0 : 1.0) * (double)rounds;
}

const struct cpu_kernels KERNELS_NAME = {
    .isa = KERNELS_ISA,
    .panel_f32 = panel_f32,
    .panel_bf16 = panel_bf16,
#ifdef VEC_DPBF16
    .panel_dpbf16 = panel_dpbf16,
#endif
    .swiglu = swiglu,
    .attention_block = attention_block,
    .attention_join = attention_join,
    .slab_stats = slab_stats,
    .above = above,
    .sweep = sweep,
    .peak = peak,
    .widen = row_widen,
    .round = row_round,
    .add = row_add,
    .norm_row = row_norm,
    .head_row = row_head,
    .embed_row = row_embed,
    .divide = row_divide,
};
