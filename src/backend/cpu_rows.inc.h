/* cpu_rows.inc.h: row loops in plain C, compiled once per instruction set by being included there.
 *
 * Each is one pass over a row with no choice of order left to the compiler (-ffp-contract=off,
 * explicit fmaf, 16 named lanes), so all copies give equal bits; with -mavx2 or -mavx512f the
 * compiler turns them into vector code. They take well under 1 % of a step. Everything is static:
 * include it in one file per level.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "backend/cpu_kernels.h"
#include "base/fmath.h"

/* Lanes j and j + 8, then +4, +2, +1. */
static inline float lanes_sum(float lane[LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

static void row_widen(const bf16 *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = bf16_to_float(x[i]);
}

static void row_round(const float *x, int64_t n, bf16 *out) {
    for (int64_t i = 0; i < n; i++) out[i] = bf16_from_float(x[i]);
}

static void row_add(float *a, const float *b, int64_t n, bool plus_zero) {
    if (plus_zero)
        for (int64_t i = 0; i < n; i++) a[i] += 0.0f;
    else
        for (int64_t i = 0; i < n; i++) a[i] += b[i];
}

/* Sum of squares of n values, 16 lanes. */
static float row_square_sum(const float *x, int n) {
    float lane[LANES] = {0};
    int k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = fmaf(x[k + j], x[k + j], lane[j]);
    for (int j = 0; k + j < n; j++) lane[j] = fmaf(x[k + j], x[k + j], lane[j]);
    return lanes_sum(lane);
}

static float row_norm_scale(const float *x, int n, float eps) {
    return 1.0f / sqrtf(row_square_sum(x, n) / (float)n + eps);
}

enum { ROW_CHUNK = 256 };

static void row_norm(const struct norm_row *job) {
    const int n = job->hidden;
    float *x = job->x;
    if (job->first)
        for (int i = 0; i < n; i++) x[i] = job->scale * job->sum[i];
    else
        for (int i = 0; i < n; i++) x[i] = x[i] + job->sum[i];
    const float r = row_norm_scale(x, n, job->eps);
    if (job->dtype == BACKEND_F32) {
        float *h = job->h;
        for (int i = 0; i < n; i++) h[i] = (x[i] * r) * job->weight[i];
    } else {
        bf16 *h = job->h;
        for (int i = 0; i < n; i++) h[i] = bf16_from_float((x[i] * r) * job->weight[i]);
    }
}

static void row_head(float *x, int n, const float *bias, const float *norm, float eps,
                     const float *cos, const float *sin) {
    if (bias)
        for (int i = 0; i < n; i++) x[i] += bias[i];
    if (norm) {
        const float r = row_norm_scale(x, n, eps);
        for (int i = 0; i < n; i++) x[i] = (x[i] * r) * norm[i];
    }
    if (cos) {
        const int half = n / 2;
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = fmaf(a, cos[i], -(b * sin[i]));
            x[i + half] = fmaf(b, cos[i], a * sin[i]);
        }
    }
}

/* Columns [k, k + n) of a row of the packed embedding: strided reads, one cache line per pair of
 * columns. */
static void embed_columns(const struct matrix *m, int64_t row, int64_t k, int n, float *out) {
    const int lane = (int)(row % PANEL_ROWS);
    if (m->dtype == BACKEND_F32) {
        const float *in = (const float *)matrix_panel(m, row / PANEL_ROWS) + k * PANEL_ROWS + lane;
        for (int i = 0; i < n; i++) out[i] = in[i * PANEL_ROWS];
        return;
    }
    const bf16 *in = (const bf16 *)matrix_panel(m, row / PANEL_ROWS) + k * PANEL_ROWS + 2 * lane;
    for (int i = 0; i < n; i++) out[i] = bf16_to_float(in[(i / 2) * 2 * PANEL_ROWS + i % 2]);
}

/* Per slab a chain over its ids in the order given (the first term a plain product), slabs along
 * the tree by a binary counter: entry i of the stack is the sum of 2^level[i] neighbouring slabs.
 */
static void row_embed(const struct embed_row *job) {
    float stack[8][ROW_CHUNK], column[ROW_CHUNK];
    int level[8];
    for (int64_t k = job->k_begin; k < job->k_end; k += ROW_CHUNK) {
        const int n = (int)(job->k_end - k < ROW_CHUNK ? job->k_end - k : ROW_CHUNK);
        int top = -1;
        for (int s = 0; s < job->slab_count; s++) {
            float *acc = stack[++top];
            level[top] = 0;
            for (int i = 0; i < n; i++) acc[i] = -0.0f; /* absent: the identity of addition */
            bool first = true;
            for (int c = 0; c < job->count; c++) {
                const int64_t id = job->ids[c];
                if (id < job->vocab_begin[s] || id >= job->vocab_begin[s + 1]) continue;
                embed_columns(job->embed, id - job->vocab_begin[0], k, n, column);
                const float w = job->weights[c];
                if (first)
                    for (int i = 0; i < n; i++) acc[i] = w * column[i];
                else
                    for (int i = 0; i < n; i++) acc[i] = fmaf(w, column[i], acc[i]);
                first = false;
            }
            for (; top > 0 && level[top] == level[top - 1]; top--) {
                row_add(stack[top - 1], stack[top], n, false);
                level[top - 1]++;
            }
        }
        for (; top > 0; top--) row_add(stack[top - 1], stack[top], n, false);
        if (top == 0)
            memcpy(job->out + k, stack[0], sizeof(float) * (size_t)n);
        else
            for (int i = 0; i < n; i++) job->out[k + i] = -0.0f;
    }
}

static void row_divide(const float *z, int64_t n, float temperature, float *out) {
    for (int64_t i = 0; i < n; i++) {
        float v = z[i] / temperature + 0.0f;
        v = v <= FLT_MAX ? v : v > FLT_MAX ? FLT_MAX : -INFINITY;
        out[i] = v;
    }
}
