/* cpu_scalar.c: the reference kernels: what every result means, in plain C.
 *
 * Slow on purpose of being readable: fmaf is a library call here. The vector levels must equal
 * these bit for bit (tests/f_ops.c, f_attention.c, f_candidates.c compare them), and these are
 * compared with plain double arithmetic by tolerance. Rules of order: cpu_kernels.h and cpu.md §3.
 */
#include "backend/cpu_rows.inc.h"

static void panel_f32(const void *panel, const void *x, int64_t x_stride, int64_t k_count, int rows,
                      float *acc) {
    const float *w = panel, *in = x;
    for (int r = 0; r < rows; r++, acc += PANEL_ROWS) {
        for (int lane = 0; lane < PANEL_ROWS; lane++) acc[lane] = 0.0f;
        for (int64_t k = 0; k < k_count; k++)
            for (int lane = 0; lane < PANEL_ROWS; lane++)
                acc[lane] = fmaf(w[k * PANEL_ROWS + lane], in[r * x_stride + k], acc[lane]);
    }
}

/* k_count is even: slabs are padded (cpu_pack.h). Both factors are bf16 values, so a product is
 * exact. */
static void panel_bf16(const void *panel, const void *x, int64_t x_stride, int64_t k_count,
                       int rows, float *acc) {
    const bf16 *w = panel;
    const float *in = x;
    for (int r = 0; r < rows; r++, acc += PANEL_ROWS) {
        for (int lane = 0; lane < PANEL_ROWS; lane++) acc[lane] = 0.0f;
        for (int64_t k = 0; k < k_count; k++) {
            const bf16 *pair = w + k / 2 * 2 * PANEL_ROWS + k % 2;
            for (int lane = 0; lane < PANEL_ROWS; lane++)
                acc[lane] = fmaf(bf16_to_float(pair[2 * lane]), in[r * x_stride + k], acc[lane]);
        }
    }
}

static void swiglu(const float *acc, float *act) {
    for (int i = 0; i < GATE_ROWS; i++) {
        const float gate = acc[i];
        act[i] = gate / (1.0f + fmath_exp(-gate)) * acc[GATE_ROWS + i];
    }
}

static float block_key(const struct attention_block *b, int d, int token) {
    if (b->dtype == BACKEND_F32) return ((const float *)b->keys)[d * KV_BLOCK_TOKENS + token];
    const bf16 *pair = (const bf16 *)b->keys + d / 2 * 2 * KV_BLOCK_TOKENS;
    return bf16_to_float(pair[2 * token + d % 2]);
}

static float block_value(const struct attention_block *b, int d, int token) {
    const int i = token * b->dim_stride + d;
    return b->dtype == BACKEND_F32 ? ((const float *)b->values)[i]
                                   : bf16_to_float(((const bf16 *)b->values)[i]);
}

static void attention_block(const struct attention_block *b) {
    /* keys come in pairs: the pad of an odd hd takes part in the chain, as in the vector kernels */
    const int dims = b->dtype == BACKEND_F32 ? b->head_dim : b->head_dim + b->head_dim % 2;
    for (int h = 0; h < b->heads; h++) {
        const float *q = b->q + h * b->dim_stride;
        float *p = b->score + h * KV_BLOCK_TOKENS;
        float *o = b->o + h * b->dim_stride;
        float m = -INFINITY;
        for (int t = 0; t < b->visible; t++) {
            float dot = 0.0f;
            for (int d = 0; d < dims; d++) dot = fmaf(block_key(b, d, t), q[d], dot);
            p[t] = dot * b->scale;
            m = p[t] > m ? p[t] : m;
        }
        float lane[LANES] = {0};
        for (int t = 0; t < b->visible; t++) {
            p[t] = fmath_exp(p[t] - m);
            lane[t % LANES] += p[t];
        }
        b->m[h] = m;
        b->l[h] = lanes_sum(lane);
        for (int d = 0; d < b->head_dim; d++) {
            o[d] = 0.0f;
            for (int t = 0; t < b->visible; t++) o[d] = fmaf(p[t], block_value(b, d, t), o[d]);
        }
    }
}

static void attention_join(float *m, float *l, float *o, float m_b, float l_b, const float *o_b,
                           int n) {
    const float top = *m > m_b ? *m : m_b;
    const float c = fmath_exp(*m - top), c_b = fmath_exp(m_b - top);
    *m = top;
    *l = fmaf(c_b, l_b, c * *l);
    for (int d = 0; d < n; d++) o[d] = fmaf(c_b, o_b[d], c * o[d]);
}

static void slab_stats(const float *z, int64_t n, float *m, float *s, float *q) {
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
    *m = top;
    *s = *q = 0.0f;
    if (top == -INFINITY) return;
    float s_lane[LANES] = {0}, q_lane[LANES] = {0};
    for (int64_t i = 0; i < n; i++) {
        const float d = z[i] - top, e = fmath_exp(d);
        if (e == 0.0f) continue; /* z = -inf among them: never 0 * inf */
        s_lane[i % LANES] += e;
        q_lane[i % LANES] = fmaf(d, e, q_lane[i % LANES]);
    }
    *s = lanes_sum(s_lane);
    *q = lanes_sum(q_lane);
}

static int64_t above(const float *z, int64_t begin, int64_t n, float threshold, uint32_t *found,
                     int room, int *count) {
    int64_t i = begin;
    for (; i < n && *count + LANES <= room; i++)
        if (z[i] > threshold) found[(*count)++] = (uint32_t)i;
    return i;
}

static uint64_t sweep(const void *bytes, size_t n) {
    uint64_t sum = 0, word;
    for (size_t i = 0; i + sizeof word <= n; i += sizeof word) {
        memcpy(&word, (const unsigned char *)bytes + i, sizeof word);
        sum += word;
    }
    return sum;
}

static double peak(bool dpbf16, int64_t rounds) {
    (void)dpbf16;
    float a[8] = {0};
    for (int64_t i = 0; i < rounds; i++)
        for (int j = 0; j < 8; j++) a[j] = fmaf(a[j], 0.5f, 1.0f);
    volatile float sink = lanes_sum((float[LANES]){a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]});
    (void)sink;
    return 2.0 * 8 * (double)rounds;
}

const struct cpu_kernels cpu_kernels_scalar = {
    .isa = ISA_SCALAR,
    .panel_f32 = panel_f32,
    .panel_bf16 = panel_bf16,
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
