/* f_attention.c: qkv and attention of every instruction set.
 *
 * To compare attention alone, keys and values must be known exactly: the qkv matrix is the identity
 * and the rotation is none, so that a row's "hidden state" is its q, k and v side by side. Every
 * byte
 * of the pool is NaN before the real tokens arrive, in pages picked in random order: a NaN that
 * leaks is seen at
 * once. The scalar reference is compared with double arithmetic, all else with it, bit for bit.
 */
#include "f_backend.h"

enum {
    ROWS_MAX = 128,
    CONTEXT_MAX = 2240,
    PAGES_MAX = 40,
    SEQUENCES_MAX = 3,
    ROTATION_POSITIONS = 80
};

struct shape {
    int heads, kv_heads, head_dim;
    int kv_of_head[16];
};
static const struct shape shapes[] = {
    {2, 1, 16, {0, 0}},
    {6, 2, 32, {0, 0, 0, 1, 1, 1}},
    {11, 2, 48, {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}}, /* more than one tile of 8 heads */
    {3, 3, 20, {0, 1, 2}},
    {3, 1, 7, {0, 0, 0}}, /* odd: keys are padded */
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static int width_of(const struct shape *s) { return (s->heads + 2 * s->kv_heads) * s->head_dim; }

/* A backend with an identity qkv matrix and an empty pool full of NaN. */
struct bench {
    backend *be;
    const struct shape *shape;
    enum backend_dtype dtype;
    struct attention_spec spec;
    float *cos, *sin;
};

static void *narrowed(const float *x, int64_t n, enum backend_dtype dtype) {
    return activations_new(x, n, dtype);
}

/* Rows [0, count) of x as positions [position, ...) of one sequence, through qkv and attention. */
static void run_rows(struct bench *t, const float *x, int count, int position, const int32_t *pages,
                     void *o) {
    const int width = width_of(t->shape), o_width = t->shape->heads * t->shape->head_dim;
    const size_t unit = t->dtype == BACKEND_F32 ? 4 : 2;
    float *q = malloc(sizeof(float) * ROWS_MAX * (size_t)o_width);
    for (int done = 0, n; done < count; done += n) {
        n = count - done < ROWS_MAX ? count - done : ROWS_MAX;
        const struct batch_segment segment = {
            .row_count = n, .position = position + done, .page_count = PAGES_MAX};
        const struct batch batch = {
            .row_count = n, .segment_count = 1, .segments = &segment, .pages = pages};
        void *h = narrowed(x + (int64_t)done * width, (int64_t)n * width, t->dtype);
        t->be->ops->qkv(t->be, &batch, &t->spec, h, q);
        if (o)
            t->be->ops->attention(t->be, &batch, &t->spec, q, t->dtype,
                                  (char *)o + (size_t)done * (size_t)o_width * unit);
        free(h);
    }
    free(q);
}

static bool bench_open(struct bench *t, int level, int threads, const struct shape *shape,
                       enum backend_dtype dtype) {
    *t = (struct bench){.be = level_open(level, threads, ROWS_MAX), .shape = shape, .dtype = dtype};
    if (!t->be) return false;
    const int width = width_of(shape), half = shape->head_dim / 2;
    float *identity = calloc((size_t)width * (size_t)width, sizeof(float));
    for (int i = 0; i < width; i++) identity[i * width + i] = 1.0f;
    const struct matrix_spec spec = {.dtype = dtype, .rows = width, .cols = width};
    matrix *m = NULL;
    CU_ASSERT_FATAL(t->be->ops->matrix_new(t->be, &spec, &m) == STATUS_OK);
    t->be->ops->matrix_load(t->be, m, 0, 0, width, identity);
    free(identity);
    const struct kv_spec kv = {.layers = 2,
                               .kv_heads = shape->kv_heads,
                               .head_dim = shape->head_dim,
                               .page_count = PAGES_MAX,
                               .dtype = dtype};
    CU_ASSERT_FATAL(t->be->ops->kv_new(t->be, &kv) == STATUS_OK);
    t->cos = malloc(sizeof(float) * (size_t)(CONTEXT_MAX * half));
    t->sin = calloc((size_t)(CONTEXT_MAX * half), sizeof(float));
    for (int i = 0; i < CONTEXT_MAX * half; i++) t->cos[i] = 1.0f;
    t->spec = (struct attention_spec){.qkv = m,
                                      .heads = shape->heads,
                                      .kv_heads = shape->kv_heads,
                                      .head_dim = shape->head_dim,
                                      .kv_of_head = shape->kv_of_head,
                                      .rope_cos = t->cos,
                                      .rope_sin = t->sin,
                                      .layer = 1};
    return true;
}

/* Pages in use for a context: one more than it needs. */
static int pool_pages(int context) { return (context + 63) / 64 + 1; }

static void bench_fill_nan(struct bench *t, int context) {
    const int width = width_of(t->shape);
    int32_t pages[PAGES_MAX];
    for (int i = 0; i < PAGES_MAX; i++) pages[i] = i;
    float *nan = malloc(sizeof(float) * ROWS_MAX * (size_t)width);
    for (int i = 0; i < ROWS_MAX * width; i++) nan[i] = NAN;
    for (int p = 0; p < pool_pages(context); p++) run_rows(t, nan, 64, p * 64, pages, NULL);
    free(nan);
}

static void bench_close(struct bench *t) {
    t->be->ops->close(t->be);
    free(t->cos);
    free(t->sin);
}

static void shuffled_pages(uint64_t seed, int count, int32_t pages[PAGES_MAX]) {
    for (int i = 0; i < PAGES_MAX; i++) pages[i] = i % count;
    for (int i = count - 1; i > 0; i--) {
        const int j = (int)(suite_random(seed, (uint32_t)i) % (uint32_t)(i + 1));
        const int32_t swap = pages[i];
        pages[i] = pages[j], pages[j] = swap;
    }
}

/* softmax(q k / sqrt(hd)) v of one row in double, o[H][hd]. */
static void attention_double(const struct shape *s, enum backend_dtype dtype, const float *x,
                             int row, double *o) {
    const int width = width_of(s), hd = s->head_dim;
    double p[CONTEXT_MAX];
    for (int h = 0; h < s->heads; h++) {
        const float *q = x + (int64_t)row * width + h * hd;
        double top = -INFINITY, sum = 0.0;
        for (int t = 0; t <= row; t++) {
            const float *k = x + (int64_t)t * width + (s->heads + s->kv_of_head[h]) * hd;
            p[t] = 0.0;
            for (int d = 0; d < hd; d++)
                p[t] += (double)rounded(q[d], dtype) * (double)rounded(k[d], dtype);
            p[t] /= sqrt(hd);
            top = p[t] > top ? p[t] : top;
        }
        for (int t = 0; t <= row; t++) sum += p[t] = exp(p[t] - top);
        for (int d = 0; d < hd; d++) {
            o[h * hd + d] = 0.0;
            for (int t = 0; t <= row; t++)
                o[h * hd + d] +=
                    p[t] / sum *
                    (double)rounded(x[(int64_t)t * width +
                                      (s->heads + s->kv_heads + s->kv_of_head[h]) * hd + d],
                                    dtype);
        }
    }
}

/* Normalised mean square error of row `row` of o. The output is rounded to bf16 when dtype is. */
static void check_row(const struct shape *s, enum backend_dtype dtype, const float *x, int row,
                      const void *o, double bound) {
    double want[16 * 64], error = 0.0, power = 0.0;
    const int n = s->heads * s->head_dim;
    attention_double(s, dtype, x, row, want);
    for (int i = 0; i < n; i++) {
        const int64_t at = (int64_t)row * n + i;
        const double got = dtype == BACKEND_F32 ? (double)((const float *)o)[at]
                                                : (double)bf16_to_float(((const bf16 *)o)[at]);
        error += (got - want[i]) * (got - want[i]);
        power += want[i] * want[i];
    }
    CHECK_NEAR(error / power, 0.0, bound);
}

static float *tokens_new(const struct shape *s, uint64_t seed, int count) {
    float *x = malloc(sizeof(float) * (size_t)count * (size_t)width_of(s));
    for (int i = 0; i < count * width_of(s); i++)
        x[i] = 1.5f * suite_random_float(seed, (uint32_t)i);
    return x;
}

/* Every row of a context as one prompt, then in chunks, then only the last row by itself. */
static void check_context(const struct shape *s, enum backend_dtype dtype, int context) {
    const int width = width_of(s), o_width = s->heads * s->head_dim;
    const size_t row_bytes = (size_t)o_width * (dtype == BACKEND_F32 ? 4 : 2);
    float *x = tokens_new(s, 40 + (uint64_t)context, context);
    unsigned char *fma = malloc(row_bytes * (size_t)context),
                  *dpbf16 = malloc(row_bytes * (size_t)context);
    bool have_dpbf16 = false;
    for (int level = 0; level < LEVELS; level++)
        for (int threads = 1; threads <= 4; threads++) {
            struct bench t;
            if (level == 0 && threads == 2) break;      /* the reference is slow */
            if (context > 200 && threads > 2) continue; /* 2 threads: windows of 32 blocks */
            if (!bench_open(&t, level, threads, s, dtype)) break;
            const bool own_bits = t.be->numerics == NUMERICS_DPBF16 && dtype == BACKEND_BF16;
            unsigned char *want = own_bits ? dpbf16 : fma;
            int32_t pages[PAGES_MAX];
            shuffled_pages((uint64_t)(level * 8 + threads), pool_pages(context), pages);
            bench_fill_nan(&t, context);
            unsigned char *o = guard_new(row_bytes * (size_t)context);
            run_rows(&t, x, context, 0, pages, o);
            if (level == 0 || (own_bits && !have_dpbf16)) {
                memcpy(want, o, row_bytes * (size_t)context);
                have_dpbf16 |= own_bits;
                const double bound =
                    dtype == BACKEND_F32 ? 1e-11 : 1e-5; /* bf16: rounding of o itself */
                for (int row = 0; row < context; row += row < 66 ? 1 : 97)
                    check_row(s, dtype, x, row, o, bound);
                check_row(s, dtype, x, context - 1, o, bound);
            }
            CU_ASSERT(suite_equal_bytes("prompt", o, want, row_bytes * (size_t)context));
            if (level > 0) {
                const int chunk = 1 + (threads * 17) % 64;
                for (int begin = 0, n; begin < context && context <= 200; begin += n) {
                    n = context - begin < chunk ? context - begin : chunk;
                    run_rows(&t, x + (int64_t)begin * width, n, begin, pages,
                             o + row_bytes * (size_t)begin);
                }
                CU_ASSERT(suite_equal_bytes("chunks", o, want, row_bytes * (size_t)context));
            }
            unsigned char *last = guard_new(row_bytes);
            run_rows(&t, x + (int64_t)(context - 1) * width, 1, context - 1, pages, last);
            CU_ASSERT(suite_equal_bytes("last row alone", last,
                                        want + (size_t)(context - 1) * row_bytes, row_bytes));
            CU_ASSERT(guard_check(last, row_bytes));
            CU_ASSERT(guard_check(o, row_bytes * (size_t)context));
            bench_close(&t);
        }
    free(x), free(fma), free(dpbf16);
}

static void test_short_contexts(void) {
    static const int contexts[] = {1, 63, 64, 65, 127};
    for (int s = 0; s < SHAPES; s++)
        for (size_t c = 0; c < sizeof contexts / sizeof contexts[0]; c++) {
            if (s >= 2 && contexts[c] != 1 && contexts[c] != 65) continue;
            check_context(&shapes[s], BACKEND_BF16, contexts[c]);
            if (s != 1) check_context(&shapes[s], BACKEND_F32, contexts[c]);
        }
}

static void test_long_context(void) { check_context(&shapes[0], BACKEND_BF16, 1000); }

/* Beyond 2048 tokens a single row's blocks are shared out over threads; one thread never does. */
static void test_shared_blocks(void) { check_context(&shapes[0], BACKEND_BF16, 2113); }

/* Rows of several sequences in one step, decode and chunks mixed, equal each alone. */
static void test_mixed_segments(void) {
    const struct shape *s = &shapes[1];
    const int width = width_of(s), o_width = s->heads * s->head_dim;
    static const int before[SEQUENCES_MAX] = {70, 0, 5}, rows[SEQUENCES_MAX] = {1, 9, 3};
    static const int32_t pages[PAGES_MAX] = {7, 3, 0, 0, 9, 9, 4};
    static const int page_begin[SEQUENCES_MAX] = {0, 4, 6}, page_count[SEQUENCES_MAX] = {2, 1, 1};
    float *x[SEQUENCES_MAX];
    for (int i = 0; i < SEQUENCES_MAX; i++) x[i] = tokens_new(s, 90 + (uint64_t)i, 128);
    for (int level = 0; level < LEVELS; level++) {
        struct bench t;
        if (!bench_open(&t, level, 2, s, BACKEND_BF16)) continue;
        bf16 alone[13 * 192], together[80 * 192]; /* o rows are 6 x 32 wide */
        float h[13 * 512], q[13 * 16 * 64];
        struct batch_segment segments[SEQUENCES_MAX];
        int row = 0;
        for (int i = 0; i < SEQUENCES_MAX; i++) {
            run_rows(&t, x[i], before[i] + rows[i], 0, pages + page_begin[i], together);
            memcpy(alone + row * o_width, together + before[i] * o_width,
                   sizeof(bf16) * (size_t)(rows[i] * o_width));
            memcpy(h + row * width, x[i] + before[i] * width,
                   sizeof(float) * (size_t)(rows[i] * width));
            segments[i] =
                (struct batch_segment){row, rows[i], before[i], page_begin[i], page_count[i]};
            row += rows[i];
        }
        const struct batch batch = {
            .row_count = row, .segment_count = SEQUENCES_MAX, .segments = segments, .pages = pages};
        void *in = activations_new(h, row * width, BACKEND_BF16);
        t.be->ops->qkv(t.be, &batch, &t.spec, in, q);
        t.be->ops->attention(t.be, &batch, &t.spec, q, BACKEND_BF16, together);
        CU_ASSERT(suite_equal_bytes("mixed step", together, alone,
                                    sizeof(bf16) * (size_t)(row * o_width)));
        free(in);
        bench_close(&t);
    }
    for (int i = 0; i < SEQUENCES_MAX; i++) free(x[i]);
}

/* Bias, QK norm and rotation against double arithmetic, seen in q; keys get the same treatment,
 * seen in the attention over one's own token only (o = v + bias) and over two. */
static void test_head_steps(void) {
    const struct shape *s = &shapes[1];
    const int width = width_of(s), hd = s->head_dim, half = hd / 2, H = s->heads;
    float *x = tokens_new(s, 7, ROTATION_POSITIONS), *want_q = NULL;
    float bias[512], q_norm[64], k_norm[64];
    awkward_fill(8, bias, width);
    awkward_fill(9, q_norm, hd);
    awkward_fill(10, k_norm, hd);
    const int32_t pages[PAGES_MAX] = {1, 0};
    const size_t q_bytes = sizeof(float) * (size_t)(ROTATION_POSITIONS * H * hd);
    for (int level = 0; level < LEVELS; level++) {
        struct bench t;
        if (!bench_open(&t, level, 1 + level % 2, s, BACKEND_F32)) continue;
        for (int p = 0; p < ROTATION_POSITIONS; p++)
            for (int i = 0; i < half; i++) {
                const double angle = p * pow(10000.0, -2.0 * i / hd);
                t.cos[p * half + i] = (float)cos(angle);
                t.sin[p * half + i] = (float)sin(angle);
            }
        t.spec.bias = bias, t.spec.q_norm = q_norm, t.spec.k_norm = k_norm, t.spec.norm_eps = 1e-6f;
        const struct batch_segment segment = {.row_count = ROTATION_POSITIONS, .page_count = 2};
        const struct batch batch = {.row_count = ROTATION_POSITIONS,
                                    .segment_count = 1,
                                    .segments = &segment,
                                    .pages = pages};
        float *q = guard_new(q_bytes);
        float *o = guard_new(q_bytes);
        t.be->ops->qkv(t.be, &batch, &t.spec, x, q);
        t.be->ops->attention(t.be, &batch, &t.spec, q, BACKEND_F32, o);
        if (level == 0) {
            want_q = malloc(q_bytes);
            memcpy(want_q, q, q_bytes);
            double *heads = malloc(sizeof(double) * (size_t)(ROTATION_POSITIONS * width));
            for (int p = 0; p < ROTATION_POSITIONS; p++)
                for (int h = 0; h < H + 2 * s->kv_heads; h++) {
                    double v[64], squares = 0.0;
                    double *out = heads + p * width + h * hd;
                    for (int d = 0; d < hd; d++) {
                        v[d] = (double)x[p * width + h * hd + d] + (double)bias[h * hd + d];
                        squares += v[d] * v[d];
                    }
                    const float *norm = h < H ? q_norm : k_norm;
                    if (h < H + s->kv_heads)
                        for (int d = 0; d < hd; d++)
                            v[d] = v[d] / sqrt(squares / hd + 1e-6) * (double)norm[d];
                    for (int d = 0; d < hd; d++) out[d] = v[d];
                    for (int i = 0; i < half && h < H + s->kv_heads; i++) {
                        const double angle = p * pow(10000.0, -2.0 * i / hd);
                        out[i] = v[i] * cos(angle) - v[i + half] * sin(angle);
                        out[i + half] = v[i + half] * cos(angle) + v[i] * sin(angle);
                    }
                }
            for (int p = 0; p < ROTATION_POSITIONS; p++)
                for (int h = 0; h < H; h++) {
                    const double *qd = heads + p * width + h * hd;
                    double sum = 0.0, want[64] = {0};
                    for (int d = 0; d < hd; d++)
                        CHECK_NEAR(q[(p * H + h) * hd + d], qd[d], 64 * 0x1p-20);
                    for (int u = 0; u <= p; u++) {
                        const double *k = heads + u * width + (H + s->kv_of_head[h]) * hd;
                        const double *v = k + s->kv_heads * hd;
                        double score = 0.0;
                        for (int d = 0; d < hd; d++) score += qd[d] * k[d] / sqrt(hd);
                        /* scores here stay far below the range of exp in double */
                        const double e = exp(score);
                        sum += e;
                        for (int d = 0; d < hd; d++) want[d] += e * v[d];
                    }
                    double error = 0.0, power = 1e-12;
                    for (int d = 0; d < hd; d++) {
                        const double diff = (double)o[(p * H + h) * hd + d] - want[d] / sum;
                        error += diff * diff;
                        power += want[d] / sum * (want[d] / sum);
                    }
                    CHECK_NEAR(error / power, 0.0, 1e-6);
                }
            free(heads);
        }
        CU_ASSERT(suite_equal_bytes("q", q, want_q, q_bytes));
        CU_ASSERT(guard_check(q, q_bytes));
        CU_ASSERT(guard_check(o, q_bytes));
        bench_close(&t);
    }
    free(x), free(want_q);
}

const struct suite_case suite_cases[] = {
    {"contexts around a page, NaN everywhere else", test_short_contexts},
    {"a long context", test_long_context},
    {"blocks shared out over threads", test_shared_blocks},
    {"several sequences in one step", test_mixed_segments},
    {"bias, QK norm, rotation", test_head_steps},
    {NULL, NULL}};
