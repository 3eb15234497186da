/* selftest_verbs.c: every verb of the chosen backend beside the scalar CPU code, on toy shapes.
 *
 * Both backends get the same numbers, already rounded to the type of the weights, so that only
 * arithmetic differs. What may differ is computed here, element by element (u = 2^-24):
 *
 *   products       12 sqrt(K) u A, A = sum |w x| of the element, in double (8 for the tensor cores
 *                  against a true sum, 4 for the reference's own chain)
 *   SwiGLU         both factors' errors through the product, and one step of the activation type
 *   norms          2^-20 of the value, and one step of the activation type; x itself: equal
 *   embed_mix      4 u sum |w e|
 *   q, attention   squared error over squared value: 1e-9; attention with bf16 KV: 2e-5
 *   candidates     maximum, lists and watched values: equal; entropy: 1e-5
 *
 * and 0 for all of them where the backend promises the reference's bits. Shapes: 1, 5, 7 and 8 query
 * heads a kv head, QKV bias, QK norm, uneven slabs (one of them empty), padded vocabularies.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/bf16.h"
#include "cmd/selftest.h"

enum { SLABS = 8, ROWS_MAX = 37, SUBJECT = 0, REFERENCE = 1, PAGE_COUNT = 8, POSITIONS = 512 };
static const double unit = 1.0 / (1 << 24);

static const struct shape {
    int heads, kv_heads, head_dim, hidden, ffn, vocab;
    bool bias, qk_norm;
} shapes[] = {
    {4, 4, 32, 288, 384, 640, false, false},
    {5, 1, 128, 320, 864, 1003, true, false},
    {14, 2, 64, 448, 608, 1511, true, false},
    {8, 1, 128, 192, 320, 997, false, true},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static const int row_counts[] = {1, 3, 5, 16, ROWS_MAX};
enum { ROW_COUNTS = sizeof row_counts / sizeof *row_counts };

/* Worst error so far of each kind of check, over shapes and rows. */
struct worst {
    double memory, row_product, product, gate_up, residual, norm, norm_rows, mixture, q, attention;
    double lists, entropy, whole_row;
    bool rows_alone;
};

/* One shape and type of weights, on both backends. */
struct lab {
    struct selftest *t;
    const struct shape *s;
    enum backend_dtype dtype;
    backend *be[2];
    struct worst *w;
};

static void keep(double *worst, double error) {
    if (!(error <= *worst)) *worst = error;
}

/* ---- numbers going in and out ---- */

static float rounded(const struct lab *l, float x) {
    return l->dtype == BACKEND_F32 ? x : bf16_to_float(bf16_from_float(x));
}

/* n random floats that the type of the weights can hold. */
static float *numbers(const struct lab *l, uint64_t seed, int64_t n, float scale) {
    float *out = selftest_memory(l->t, sizeof *out * (size_t)n);
    for (int64_t i = 0; i < n; i++) out[i] = rounded(l, scale * selftest_random(seed, i));
    return out;
}

static void *take(const struct lab *l, int side, size_t bytes) {
    void *out = l->be[side]->ops->alloc(l->be[side], bytes, "self-test");
    if (!out) selftest_must(l->t, STATUS_MEMORY);
    return out;
}

static void *put(const struct lab *l, int side, const void *host, size_t bytes) {
    void *out = take(l, side, bytes);
    selftest_must(l->t, l->be[side]->ops->write(l->be[side], out, host, bytes));
    return out;
}

/* Activations in the type of the weights. */
static void *put_activations(const struct lab *l, int side, const float *x, int64_t n) {
    if (l->dtype == BACKEND_F32) return put(l, side, x, sizeof *x * (size_t)n);
    bf16 *narrow = selftest_memory(l->t, sizeof *narrow * (size_t)n);
    for (int64_t i = 0; i < n; i++) narrow[i] = bf16_from_float(x[i]);
    void *out = put(l, side, narrow, sizeof *narrow * (size_t)n);
    free(narrow);
    return out;
}

static float *get(const struct lab *l, int side, const void *device, int64_t n) {
    float *out = selftest_memory(l->t, sizeof *out * (size_t)n);
    l->be[side]->ops->read(l->be[side], out, device, sizeof *out * (size_t)n);
    return out;
}

static float *get_activations(const struct lab *l, int side, const void *device, int64_t n) {
    float *out = get(l, side, device, l->dtype == BACKEND_F32 ? n : (n + 1) / 2);
    if (l->dtype == BACKEND_F32) return out;
    float *wide = selftest_memory(l->t, sizeof *wide * (size_t)(n + 1));
    for (int64_t i = 0; i < n; i++) wide[i] = bf16_to_float(((const bf16 *)out)[i]);
    free(out);
    return wide;
}

/* One step of the activation type, at most, beside a value. */
static double act_step(const struct lab *l, double x) {
    return l->dtype == BACKEND_F32 ? 0.0 : fabs(x) * 0x1p-7;
}

/* Squared error over squared value, as a share of what is allowed. */
static double nmse_error(const struct lab *l, const float *got, const float *want, int64_t n,
                         double allowed) {
    double error = 0.0, power = 0.0;
    for (int64_t i = 0; i < n; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        power += (double)want[i] * want[i];
    }
    if (l->t->exact) return selftest_error(error, 0.0, 0.0);
    return selftest_error(error / (power > 0 ? power : 1), 0.0, allowed);
}

/* ---- memory ---- */

static void check_memory(const struct lab *l) {
    enum { FLOATS = 1000 };
    const struct backend_ops *ops = l->be[SUBJECT]->ops;
    float *want = numbers(l, 1, FLOATS, 1.0f);
    char *fresh = take(l, SUBJECT, sizeof *want * FLOATS + 4);
    float *zeros = get(l, SUBJECT, fresh, FLOATS);
    for (int i = 0; i < FLOATS; i++) keep(&l->w->memory, selftest_error(zeros[i], 0, 0));
    if ((uintptr_t)fresh % 128 != 0) keep(&l->w->memory, INFINITY);
    float *device = put(l, SUBJECT, want, sizeof *want * FLOATS);
    ops->copy(l->be[SUBJECT], fresh, device, sizeof *want * FLOATS);
    float *got = get(l, SUBJECT, fresh, FLOATS);
    for (int i = 0; i < FLOATS; i++) keep(&l->w->memory, selftest_error(got[i], want[i], 0));
    free(want), free(zeros), free(got);
}

/* ---- products ---- */

struct product_case {
    enum matrix_kind kind;
    int64_t rows, cols;         /* N (F), K */
    int64_t borders[SLABS + 1]; /* ROW */
    float *a, *b;               /* [N][K] */
    matrix *m[2];
};

/* Slabs of uneven width; the fourth has no columns. */
static void cut(int64_t columns, int64_t borders[SLABS + 1]) {
    for (int s = 0; s <= SLABS; s++) borders[s] = columns * s / SLABS;
    borders[3] = borders[4];
}

static void load_matrix(const struct lab *l, struct product_case *c, enum matrix_kind kind,
                        int64_t rows, int64_t cols, uint64_t seed) {
    *c = (struct product_case){.kind = kind, .rows = rows, .cols = cols};
    const float scale = 1.7f / sqrtf((float)cols);
    cut(cols, c->borders);
    c->a = numbers(l, seed, rows * cols, scale);
    c->b = kind == MATRIX_GATE_UP ? numbers(l, seed + 1, rows * cols, scale) : NULL;
    const struct matrix_spec spec = {.kind = kind,
                                     .dtype = l->dtype,
                                     .rows = rows,
                                     .cols = cols,
                                     .slab_count = kind == MATRIX_ROW ? SLABS : 0,
                                     .slab_begin = kind == MATRIX_ROW ? c->borders : NULL};
    for (int side = 0; side < 2; side++) {
        backend *be = l->be[side];
        selftest_must(l->t, be->ops->matrix_new(be, &spec, &c->m[side]));
        for (int64_t r = 0, n; r < rows; r += n) { /* as a loader brings them */
            n = rows - r < 100 ? rows - r : 100;
            be->ops->matrix_load(be, c->m[side], 0, r, n, c->a + r * cols);
            if (c->b) be->ops->matrix_load(be, c->m[side], 1, r, n, c->b + r * cols);
        }
    }
}

static float *run_product(const struct lab *l, const struct product_case *c, int side, int rows,
                          const float *x) {
    backend *be = l->be[side];
    void *in = put_activations(l, side, x, rows * c->cols);
    const int64_t n = rows * c->rows;
    void *out = take(l, side, sizeof(float) * (size_t)n);
    if (c->kind == MATRIX_GATE_UP) {
        be->ops->gate_up(be, rows, c->m[side], in, out);
        return get_activations(l, side, out, n);
    }
    if (c->kind == MATRIX_ROW) be->ops->row_matmul(be, rows, c->m[side], in, out);
    if (c->kind == MATRIX_COLUMN) be->ops->logits(be, rows, c->m[side], in, out);
    return get(l, side, out, n);
}

/* The product in double, and its A. */
static double dot(const float *w, const float *x, int64_t n, double *magnitude) {
    double sum = 0.0;
    *magnitude = 0.0;
    for (int64_t k = 0; k < n; k++) {
        sum += (double)w[k] * x[k];
        *magnitude += fabs((double)w[k] * x[k]);
    }
    return sum;
}

static double allowed_of(const struct lab *l, const struct product_case *c, int64_t n,
                         const float *x) {
    if (l->t->exact) return 0.0;
    double a_size, b_size;
    const double chain = 12.0 * sqrt((double)c->cols) * unit;
    const double g = dot(c->a + n * c->cols, x, c->cols, &a_size);
    if (c->kind != MATRIX_GATE_UP) return chain * a_size + 1e-30;
    const double v = dot(c->b + n * c->cols, x, c->cols, &b_size);
    const double silu = g / (1.0 + exp(-g));
    return chain * (1.1 * a_size * fabs(v) + fabs(silu) * b_size) + 0x1p-20 * fabs(silu * v) +
           act_step(l, silu * v) + 1e-30;
}

static void check_product(const struct lab *l, enum matrix_kind kind, int64_t rows, int64_t cols,
                          double *worst) {
    struct product_case c;
    load_matrix(l, &c, kind, rows, cols, 10 + (uint64_t)kind);
    float *x = numbers(l, 3, ROWS_MAX * cols, 1.0f);
    for (int i = 0; i < ROW_COUNTS; i++) {
        const int T = row_counts[i];
        float *got = run_product(l, &c, SUBJECT, T, x), *want = run_product(l, &c, REFERENCE, T, x);
        for (int r = 0; r < T; r++) {
            for (int64_t n = 0; n < rows; n++) {
                const int64_t at = r * rows + n;
                if (got[at] == want[at]) continue;
                keep(worst, selftest_error(got[at], want[at], allowed_of(l, &c, n, x + r * cols)));
            }
        }
        float *alone = run_product(l, &c, SUBJECT, 1, x + (T - 1) * cols);
        if (memcmp(alone, got + (T - 1) * rows, sizeof *got * (size_t)rows) != 0)
            l->w->rows_alone = false;
        free(got), free(want), free(alone);
    }
    free(x), free(c.a), free(c.b);
}

/* ---- norms ---- */

static void check_norms(const struct lab *l) {
    enum { T = 16, CHOSEN = 3 };
    static const int32_t chosen[CHOSEN] = {0, 7, 15};
    const int64_t D = l->s->hidden, n = T * D;
    float *x = numbers(l, 20, n, 2.0f), *sum = numbers(l, 21, n, 3.0f);
    float *weight = numbers(l, 22, D, 1.5f);
    for (int form = 0; form < 3; form++) { /* first, later, chosen rows */
        const int64_t m = form == 2 ? CHOSEN * D : n;
        float *h[2], *x_out[2];
        for (int side = 0; side < 2; side++) {
            backend *be = l->be[side];
            float *xd = put(l, side, x, sizeof *x * (size_t)n);
            float *sd = put(l, side, sum, sizeof *sum * (size_t)n);
            float *wd = put(l, side, weight, sizeof *weight * (size_t)D);
            void *hd = take(l, side, sizeof(float) * (size_t)n);
            if (form == 2) {
                be->ops->add_norm_rows(be, chosen, CHOSEN, (int)D, sd, xd, wd, 1e-6f, l->dtype, hd);
            } else {
                be->ops->add_norm(be, T, (int)D, form == 0, 0.5f, sd, xd, wd, 1e-6f, l->dtype, hd);
            }
            h[side] = get_activations(l, side, hd, m);
            x_out[side] = get(l, side, xd, n);
        }
        double *worst = form == 2 ? &l->w->norm_rows : &l->w->norm;
        for (int64_t i = 0; i < m; i++) {
            const double want = h[REFERENCE][i];
            const double allowed =
                l->t->exact ? 0.0 : 0x1p-19 * fabs(want) + act_step(l, want) + 1e-30;
            keep(worst, selftest_error(h[SUBJECT][i], want, allowed));
        }
        for (int64_t i = 0; i < n; i++) {
            keep(&l->w->residual, selftest_error(x_out[SUBJECT][i], x_out[REFERENCE][i], 0));
        }
        for (int side = 0; side < 2; side++) free(h[side]), free(x_out[side]);
    }
    free(x), free(sum), free(weight);
}

/* ---- a batch ---- */

enum { SEQUENCES = 3, MIX_MAX = 10 };
static const int32_t page_list[PAGE_COUNT] = {5, 1, 7, 0, 2, 6, 3, 4};

struct script {
    struct batch batch;
    struct batch_segment segments[SEQUENCES];
    int32_t mix_begin[ROWS_MAX + 1], logit_rows[SEQUENCES];
    uint32_t ids[ROWS_MAX * MIX_MAX];
    float weights[ROWS_MAX * MIX_MAX];
};

/* Rows of three sequences that go on from `positions`; 1, 3 or 10 ids a row, some beyond the vocabulary
 * of this rank. */
static void script_fill(struct script *s, const int rows_of[SEQUENCES], int positions[SEQUENCES],
                        int vocab, uint64_t seed) {
    static const int widths[] = {1, 3, MIX_MAX, 1}, first_page[] = {0, 4, 6}, pages[] = {4, 2, 2};
    int n = 0, row = 0;
    memset(s, 0, sizeof *s);
    for (int q = 0; q < SEQUENCES; q++) {
        s->segments[q] = (struct batch_segment){.row_begin = row,
                                                .row_count = rows_of[q],
                                                .position = positions[q],
                                                .page_begin = first_page[q],
                                                .page_count = pages[q]};
        positions[q] += rows_of[q];
        for (int i = 0; i < rows_of[q]; i++, row++) {
            const int width = widths[row % 4];
            s->mix_begin[row] = n;
            for (int k = 0; k < width; k++, n++) {
                const float u = selftest_random(seed, n);
                s->ids[n] = (uint32_t)((u * u * 2.0f) * (float)vocab) + (uint32_t)k;
                s->weights[n] = width == 1 ? 1.0f : 1.0f / (float)(k + 2);
            }
        }
        s->logit_rows[q] = row - 1;
    }
    s->mix_begin[row] = n;
    s->batch = (struct batch){.row_count = row,
                              .segment_count = SEQUENCES,
                              .logit_row_count = SEQUENCES,
                              .candidate_count = 32,
                              .segments = s->segments,
                              .pages = page_list,
                              .mix_begin = s->mix_begin,
                              .mix_ids = s->ids,
                              .mix_weights = s->weights,
                              .logit_rows = s->logit_rows};
}

static void begin(const struct lab *l, int side, const struct batch *batch) {
    if (l->be[side]->ops->begin) l->be[side]->ops->begin(l->be[side], batch);
}

/* The rank holds ids [100, 100 + vocab): rows may mix ids of other ranks, or none of its own. */
static void check_mixture(const struct lab *l) {
    enum { FIRST_ID = 100 };
    static struct script s;
    const int64_t D = l->s->hidden, V = l->s->vocab;
    int positions[SEQUENCES] = {0}, rows_of[SEQUENCES] = {20, 10, 7};
    int64_t borders[SLABS + 1];
    struct product_case table;
    load_matrix(l, &table, MATRIX_COLUMN, V, D, 30);
    cut(V, borders);
    for (int i = 0; i <= SLABS; i++) borders[i] += FIRST_ID;
    script_fill(&s, rows_of, positions, l->s->vocab, 31);
    float *out[2];
    const int64_t n = s.batch.row_count * D;
    for (int side = 0; side < 2; side++) {
        backend *be = l->be[side];
        float *to = take(l, side, sizeof *to * (size_t)n);
        begin(l, side, &s.batch);
        be->ops->embed_mix(be, &s.batch, table.m[side], SLABS, borders, to);
        out[side] = get(l, side, to, n);
    }
    for (int64_t i = 0; i < n; i++) {
        double size = 0.0;
        for (int32_t k = s.mix_begin[i / D]; k < s.mix_begin[i / D + 1]; k++) {
            const int64_t row = (int64_t)s.ids[k] - FIRST_ID;
            if (row >= 0 && row < V) size += fabs((double)s.weights[k] * table.a[row * D + i % D]);
        }
        const double allowed = l->t->exact ? 0.0 : 4 * unit * size;
        keep(&l->w->mixture, selftest_error(out[SUBJECT][i], out[REFERENCE][i], allowed));
    }
    free(out[0]), free(out[1]), free(table.a);
}

/* ---- attention ---- */

struct attention_case {
    struct product_case qkv;
    struct attention_spec spec[2];
    int kv_of_head[16];
};

static void load_attention(const struct lab *l, struct attention_case *c) {
    const struct shape *s = l->s;
    const int64_t hd = s->head_dim, width = (s->heads + 2 * s->kv_heads) * hd, half = hd / 2;
    load_matrix(l, &c->qkv, MATRIX_COLUMN, width, s->hidden, 40);
    float *bias = numbers(l, 41, width, 0.3f), *norm = numbers(l, 42, hd, 1.0f);
    float *turn[2] = {selftest_memory(l->t, sizeof(float) * (size_t)(POSITIONS * half)),
                      selftest_memory(l->t, sizeof(float) * (size_t)(POSITIONS * half))};
    for (int64_t i = 0; i < POSITIONS * half; i++) {
        const double angle =
            (double)(i / half) * pow(10000.0, -2.0 * (double)(i % half) / (double)hd);
        turn[0][i] = (float)cos(angle);
        turn[1][i] = (float)sin(angle);
    }
    for (int h = 0; h < s->heads; h++) c->kv_of_head[h] = h / (s->heads / s->kv_heads);
    for (int side = 0; side < 2; side++) {
        backend *be = l->be[side];
        const size_t turn_bytes = sizeof(float) * (size_t)(POSITIONS * half);
        const size_t norm_bytes = sizeof(float) * (size_t)hd;
        c->spec[side] = (struct attention_spec){
            .qkv = c->qkv.m[side],
            .bias = s->bias ? put(l, side, bias, sizeof *bias * (size_t)width) : NULL,
            .q_norm = s->qk_norm ? put(l, side, norm, norm_bytes) : NULL,
            .k_norm = s->qk_norm ? put(l, side, norm, norm_bytes) : NULL,
            .norm_eps = 1e-6f,
            .heads = s->heads,
            .kv_heads = s->kv_heads,
            .head_dim = s->head_dim,
            .kv_of_head = c->kv_of_head,
            .rope_cos = put(l, side, turn[0], turn_bytes),
            .rope_sin = put(l, side, turn[1], turn_bytes),
            .layer = 1};
        selftest_must(l->t, be->ops->kv_new(be, &(struct kv_spec){.layers = 2,
                                                                  .heads = s->heads,
                                                                  .kv_heads = s->kv_heads,
                                                                  .head_dim = s->head_dim,
                                                                  .positions_max = POSITIONS,
                                                                  .page_count = PAGE_COUNT,
                                                                  .dtype = l->dtype}));
    }
    free(bias), free(norm), free(turn[0]), free(turn[1]);
}

/* Prompts in chunks, then single rows, over page borders. */
static void check_attention(const struct lab *l) {
    static const int steps[][SEQUENCES] = {
        {30, 5, 2}, {33, 1, 1}, {1, 1, 1}, {35, 1, 1}, {1, 30, 1}};
    static struct script s;
    struct attention_case c;
    int positions[SEQUENCES] = {0};
    load_attention(l, &c);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        script_fill(&s, steps[i], positions, l->s->vocab, 50);
        const int64_t T = s.batch.row_count, n = T * l->s->heads * l->s->head_dim;
        float *h = numbers(l, 51 + i, T * l->s->hidden, 1.0f), *q[2], *o[2];
        for (int side = 0; side < 2; side++) {
            backend *be = l->be[side];
            void *hd = put_activations(l, side, h, T * l->s->hidden);
            float *qd = take(l, side, sizeof *qd * (size_t)n);
            void *od = take(l, side, sizeof(float) * (size_t)n);
            begin(l, side, &s.batch);
            be->ops->qkv(be, &s.batch, &c.spec[side], hd, qd);
            be->ops->attention(be, &s.batch, &c.spec[side], qd, l->dtype, od);
            q[side] = get(l, side, qd, n);
            o[side] = get_activations(l, side, od, n);
        }
        keep(&l->w->q, nmse_error(l, q[SUBJECT], q[REFERENCE], n, 1e-9));
        keep(&l->w->attention,
             nmse_error(l, o[SUBJECT], o[REFERENCE], n, l->dtype == BACKEND_F32 ? 1e-9 : 2e-5));
        for (int side = 0; side < 2; side++) free(q[side]), free(o[side]);
        free(h);
    }
    free(c.qkv.a);
}

/* ---- candidates ---- */

static double entropy_of(const struct batch_record *r) {
    return log((double)r->s) - (double)r->q / (double)r->s;
}

static void compare_records(const struct lab *l, const struct batch *batch,
                            const unsigned char *got, const unsigned char *want) {
    const size_t stride = (size_t)batch_record_bytes(batch->candidate_count, batch->watch_max);
    for (int p = 0; p < batch->probe_count; p++) {
        const struct batch_record *a = (const void *)(got + (size_t)p * stride);
        const struct batch_record *b = (const void *)(want + (size_t)p * stride);
        const struct batch_pair *x = (const void *)(a + 1), *y = (const void *)(b + 1);
        const double h = entropy_of(b), allowed = l->t->exact ? 0 : 1e-5 * fmax(1.0, h);
        keep(&l->w->lists, selftest_error(a->m, b->m, 0));
        keep(&l->w->lists, selftest_error(a->count, b->count, 0));
        keep(&l->w->entropy, selftest_error(entropy_of(a), h, allowed));
        for (int i = 0; i < batch->candidate_count + batch->probes[p].watch_count; i++) {
            if (i >= b->count && i < batch->candidate_count) continue;
            keep(&l->w->lists, selftest_error(x[i].z, y[i].z, 0));
            keep(&l->w->lists, selftest_error(x[i].id, y[i].id, 0));
        }
    }
}

static void check_candidates(const struct lab *l) {
    enum { PROBES = 4, FIRST_ID = 64 };
    static struct script s;
    static const int rows_of[SEQUENCES] = {1, 1, 1};
    static const struct batch_edit edits[] = {{FIRST_ID + 3, 1.3f, 0.5f},
                                              {FIRST_ID + 200, 1.0f, 9.0f},
                                              {5, 1.0f, 2.0f}, /* another rank's */
                                              {FIRST_ID + 77, 1.0f, -INFINITY}};
    static const uint32_t watch[] = {FIRST_ID + 77, FIRST_ID + 1, 2};
    static const struct batch_probe probes[PROBES] = {{0, 1.0f, 0, 4, 0, 3},
                                                      {1, 0.6f, 0, 0, 0, 0},
                                                      {2, 2.5f, 1, 2, 1, 2},
                                                      {0, 0.01f, 0, 0, 0, 1}};
    int positions[SEQUENCES] = {0};
    int64_t borders[SLABS + 1];
    const int64_t V = l->s->vocab, count = FIRST_ID + V - 5; /* the last five rows are padding */
    script_fill(&s, rows_of, positions, l->s->vocab, 60);
    s.batch.probe_count = PROBES;
    s.batch.watch_max = 3;
    s.batch.probes = probes;
    s.batch.edits = edits;
    s.batch.watch_ids = watch;
    cut(V, borders); /* check_product has made a matrix of V rows: rooms are sized by these */
    for (int i = 0; i <= SLABS; i++) borders[i] += FIRST_ID;
    float *logits = selftest_memory(l->t, sizeof *logits * (size_t)(SEQUENCES * V));
    selftest_fill(61, logits, SEQUENCES * V);
    for (int64_t i = 0; i < SEQUENCES * V; i++) {
        logits[i] *= i % 97 == 0 ? 12.0f : 4.0f;
        if (i % 41 == 0) logits[i] = 3.75f; /* ties: the lower id comes first */
    }
    const size_t bytes = PROBES * (size_t)batch_record_bytes(32, 3);
    unsigned char *records[2];
    float *row[2];
    for (int side = 0; side < 2; side++) {
        backend *be = l->be[side];
        float *device = put(l, side, logits, sizeof *logits * (size_t)(SEQUENCES * V));
        records[side] = selftest_memory(l->t, bytes);
        row[side] = selftest_memory(l->t, sizeof *logits * (size_t)V);
        begin(l, side, &s.batch);
        be->ops->candidates(be, &s.batch, device, SLABS, borders, count, records[side]);
        be->ops->probe_logits(be, &s.batch, 2, device, SLABS, borders, count, row[side]);
    }
    compare_records(l, &s.batch, records[SUBJECT], records[REFERENCE]);
    for (int64_t i = 0; i < V; i++)
        keep(&l->w->whole_row, selftest_error(row[SUBJECT][i], row[REFERENCE][i], 0));
    for (int side = 0; side < 2; side++) free(records[side]), free(row[side]);
    free(logits);
}

/* ---- all of them ---- */

static void check_speed(const struct lab *l) {
    backend *be = l->be[SUBJECT];
    int64_t bytes = 0;
    double best = 0;
    for (int i = 0; i < 5; i++) {
        const double seconds = be->ops->read_sweep(be, PAGE_COUNT * 64, &bytes);
        best = fmax(best, 1e-9 * (double)bytes / (seconds > 0 ? seconds : 1e-9));
    }
    selftest_check_true(l->t, "read_sweep", "reads the weights and keys it says", bytes > 0);
    selftest_note(l->t, "read, multiply-add",
                  "%.2f GB/s of %.1f MB (toy matrices), %.1f GFLOP/s, %d threads", best,
                  1e-6 * (double)bytes, 1e-9 * be->ops->peak_flops(be, 0.05), be->threads);
}

static void run_shape(struct selftest *t, const struct shape *s, enum backend_dtype dtype,
                      struct worst *w, bool last) {
    const struct backend_config scalar = {.isa = ISA_SCALAR,
                                          .numerics = NUMERICS_FMA,
                                          .threads = 1,
                                          .local_ranks = 1,
                                          .rows_max = t->h->backend_config.rows_max,
                                          .logit_rows_max = t->h->backend_config.logit_rows_max,
                                          .probes_max = t->h->backend_config.probes_max};
    struct lab l = {.t = t, .s = s, .dtype = dtype, .w = w};
    selftest_must(t, host_new_backend(t->h, &l.be[SUBJECT]));
    selftest_must(t, cpu_open(&scalar, &l.be[REFERENCE]));
    check_memory(&l);
    check_product(&l, MATRIX_ROW, s->hidden, s->ffn, &w->row_product);
    check_product(&l, MATRIX_COLUMN, s->vocab, s->hidden, &w->product);
    check_product(&l, MATRIX_GATE_UP, s->ffn, s->hidden, &w->gate_up);
    check_norms(&l);
    check_mixture(&l);
    check_attention(&l);
    check_candidates(&l);
    if (last) check_speed(&l);
    for (int side = 0; side < 2; side++) l.be[side]->ops->close(l.be[side]);
}

static void report(struct selftest *t, enum backend_dtype dtype, const struct worst *w) {
    char detail[64];
    snprintf(detail, sizeof detail, "%s weights, %d shapes, 1..%d rows",
             dtype == BACKEND_F32 ? "f32" : "bf16", (int)SHAPES, (int)ROWS_MAX);
    const struct {
        const char *name;
        double worst;
    } checks[] = {{"alloc, write, read", w->memory}, {"embed_mix", w->mixture},
                  {"add_norm: x", w->residual},      {"add_norm: h", w->norm},
                  {"add_norm_rows", w->norm_rows},   {"qkv", w->q},
                  {"attention", w->attention},       {"row_matmul", w->row_product},
                  {"gate_up", w->gate_up},           {"logits", w->product},
                  {"candidates: lists", w->lists},   {"candidates: entropy", w->entropy},
                  {"probe_logits", w->whole_row}};
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        selftest_check(t, checks[i].name, detail, checks[i].worst);
    /* a GPU promises this only in slab order */
    if (t->h->backend->numerics != NUMERICS_CUDA || t->h->params.deterministic)
        selftest_check_true(t, "a row's bits", "the same alone and in a batch", w->rows_alone);
}

void selftest_verbs(struct selftest *t) {
    const bool exact = t->exact;
    cpu_set_t pinned;
    const bool is_known = sched_getaffinity(0, sizeof pinned, &pinned) == 0;
    /* the machine's backend has taken its cores, which these here use in turn */
    if (is_known) sched_setaffinity(0, sizeof t->cores, &t->cores);
    for (int d = 0; d < t->dtype_count; d++) {
        struct worst w = {.rows_alone = true};
        /* the numeric class is of bf16 products only */
        const bool cpu = t->h->backend->numerics != NUMERICS_CUDA;
        t->exact = exact || (cpu && t->dtypes[d] == BACKEND_F32);
        for (int i = 0; i < SHAPES; i++)
            run_shape(t, &shapes[i], t->dtypes[d], &w, d + 1 == t->dtype_count && i + 1 == SHAPES);
        report(t, t->dtypes[d], &w);
    }
    if (is_known) sched_setaffinity(0, sizeof pinned, &pinned);
    t->exact = exact;
}
