/* f_ops.c: products, SwiGLU, norms and the embedding mixture of every instruction set.
 *
 * Three things are compared: the scalar reference with plain double arithmetic (bounds of
 * verification.md §7), its order of additions with chains and trees written out here, and every
 * other level, thread count and batch size with the scalar reference, bit for bit.
 */
#include "f_backend.h"

enum { M_MAX = 33, THREADS_MAX = 4, SLABS_MAX = 8 };
static const int batch_sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 33};

struct shape {
    int64_t rows, cols;
    int slab_count;
    int64_t border[SLABS_MAX + 1];
};
/* tails of the panel, odd K, empty and odd slabs, K beyond one block of 256 */
static const struct shape shapes[] = {
    {32, 64, 8, {0, 8, 16, 24, 32, 40, 48, 56, 64}},
    {1, 2, 1, {0, 2}},
    {33, 63, 3, {0, 21, 21, 63}},
    {47, 95, 5, {0, 1, 32, 32, 63, 95}},
    {48, 130, 8, {0, 0, 0, 33, 66, 66, 66, 129, 130}},
    {63, 127, 7, {0, 32, 33, 64, 65, 96, 126, 127}},
    {16, 1, 2, {0, 0, 1}},
    {96, 576, 6, {0, 128, 192, 256, 384, 512, 576}},
    {31, 1030, 2, {0, 515, 1030}},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static matrix *matrix_make(backend *be, const struct shape *s, enum matrix_kind kind,
                           enum backend_dtype dtype, const float *a, const float *b) {
    const struct matrix_spec spec = {.kind = kind,
                                     .dtype = dtype,
                                     .rows = s->rows,
                                     .cols = s->cols,
                                     .slab_count = s->slab_count,
                                     .slab_begin = s->border};
    matrix *m = NULL;
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
    for (int64_t r = 0, n; r < s->rows;
         r += n) { /* pieces of uneven height, as a loader brings them */
        n = s->rows - r < 13 ? s->rows - r : 13;
        be->ops->matrix_load(be, m, 0, r, n, a + r * s->cols);
        if (b) be->ops->matrix_load(be, m, 1, r, n, b + r * s->cols);
    }
    return m;
}

/* One of the three products of `rows` rows; out: fp32 or act in the type of dtype. */
static void product(backend *be, enum matrix_kind kind, const matrix *m, int rows, const void *x,
                    void *out) {
    if (kind == MATRIX_COLUMN) be->ops->logits(be, rows, m, x, out);
    if (kind == MATRIX_ROW) be->ops->row_matmul(be, rows, m, x, out);
    if (kind == MATRIX_GATE_UP) be->ops->gate_up(be, rows, m, x, out);
}

static size_t output_bytes(enum matrix_kind kind, enum backend_dtype dtype) {
    return kind == MATRIX_GATE_UP && dtype == BACKEND_BF16 ? 2 : 4;
}

/* Dot product in double, and A = sum |w x|. */
static double dot(const float *w, const float *x, int64_t n, enum backend_dtype dtype,
                  double *magnitude) {
    double sum = 0.0;
    *magnitude = 0.0;
    for (int64_t k = 0; k < n; k++) {
        const double term = (double)rounded(w[k], dtype) * (double)rounded(x[k], dtype);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

static double chain_bound(int64_t k, double magnitude) {
    return 4.0 * sqrt((double)k) * unit_roundoff * magnitude + (double)k * 0x1p-126;
}

static void check_double(const struct shape *s, enum matrix_kind kind, enum backend_dtype dtype,
                         const float *a, const float *b, const float *x, const void *out,
                         double factor) {
    for (int r = 0; r < M_MAX; r++)
        for (int64_t n = 0; n < s->rows; n++) {
            double mag_a, mag_b;
            const double z = dot(a + n * s->cols, x + r * s->cols, s->cols, dtype, &mag_a);
            const int64_t at = r * s->rows + n;
            if (kind != MATRIX_GATE_UP) {
                CHECK_NEAR(((const float *)out)[at], z,
                           factor * chain_bound(s->cols + SLABS_MAX, mag_a));
                continue;
            }
            const double up = dot(b + n * s->cols, x + r * s->cols, s->cols, dtype, &mag_b);
            const double silu = z / (1.0 + exp(-z)), want = silu * up;
            /* |silu'| <= 1.1; the errors of both sums reach the product */
            double bound = factor * (1.1 * fabs(up) * chain_bound(s->cols, mag_a) +
                                     fabs(silu) * chain_bound(s->cols, mag_b)) +
                           fabs(want) * 0x1p-20 + 0x1p-100;
            if (dtype == BACKEND_BF16) bound += fabs(want) * 0x1p-8;
            const double got = dtype == BACKEND_BF16
                                   ? (double)bf16_to_float(((const bf16 *)out)[at])
                                   : (double)((const float *)out)[at];
            CHECK_NEAR(got, want, bound);
        }
}

/* One shape's operands, and the bits expected of each numeric class. */
struct reference {
    float *a, *b, *x;
    void *in;
    unsigned char *fma, *dpbf16;
    bool have_fma, have_dpbf16;
};

static void check_shape(backend *be, const struct shape *s, enum matrix_kind kind,
                        enum backend_dtype dtype, struct reference *ref) {
    const size_t row_bytes = output_bytes(kind, dtype) * (size_t)s->rows;
    matrix *m = matrix_make(be, s, kind, dtype, ref->a, kind == MATRIX_GATE_UP ? ref->b : NULL);
    const bool own_bits = be->numerics == NUMERICS_DPBF16 && dtype == BACKEND_BF16;
    unsigned char *want = own_bits ? ref->dpbf16 : ref->fma;
    bool *have = own_bits ? &ref->have_dpbf16 : &ref->have_fma;
    if (!*have) { /* the first backend is the scalar one */
        CU_ASSERT(own_bits || be->isa == ISA_SCALAR);
        product(be, kind, m, M_MAX, ref->in, want);
        check_double(s, kind, dtype, ref->a, ref->b, ref->x, want, own_bits ? 2.0 : 1.0);
        *have = true;
    }
    for (size_t k = 0; k < sizeof batch_sizes / sizeof batch_sizes[0]; k++) {
        const int rows = batch_sizes[k];
        if (be->isa == ISA_SCALAR && be->threads > 1 && rows != 3) continue; /* slow */
        void *out = guard_new(row_bytes * (size_t)rows);
        product(be, kind, m, rows, ref->in, out);
        CU_ASSERT(suite_equal_bytes("rows of a batch", out, want, row_bytes * (size_t)rows));
        /* the last row alone: a row's bits do not depend on its place */
        const int64_t last = (M_MAX - 1) * s->cols * (dtype == BACKEND_F32 ? 4 : 2);
        product(be, kind, m, 1, (char *)ref->in + last, out);
        CU_ASSERT(
            suite_equal_bytes("last row alone", out, want + (M_MAX - 1) * row_bytes, row_bytes));
        CU_ASSERT(guard_check(out, row_bytes * (size_t)rows));
    }
}

static void check_products(enum matrix_kind kind, enum backend_dtype dtype) {
    struct reference refs[SHAPES];
    for (int i = 0; i < SHAPES; i++) {
        const struct shape *s = &shapes[i];
        const int64_t weights = s->rows * s->cols, inputs = M_MAX * s->cols;
        const size_t out_bytes = output_bytes(kind, dtype) * (size_t)s->rows * M_MAX;
        struct reference *r = &refs[i];
        *r = (struct reference){.a = malloc(sizeof(float) * (size_t)weights),
                                .b = malloc(sizeof(float) * (size_t)weights),
                                .x = malloc(sizeof(float) * (size_t)inputs),
                                .fma = malloc(out_bytes),
                                .dpbf16 = malloc(out_bytes)};
        awkward_fill(1000 + (uint64_t)i, r->a, weights);
        awkward_fill(2000 + (uint64_t)i, r->b, weights);
        awkward_fill(3000 + (uint64_t)i, r->x, inputs);
        r->in = activations_new(r->x, inputs, dtype);
    }
    for (int level = 0; level < LEVELS; level++)
        for (int threads = 1; threads <= THREADS_MAX; threads++) {
            backend *be = level_open(level, threads, M_MAX);
            if (!be) break;
            for (int i = 0; i < SHAPES; i++) check_shape(be, &shapes[i], kind, dtype, &refs[i]);
            be->ops->close(be);
        }
    for (int i = 0; i < SHAPES; i++) {
        struct reference *r = &refs[i];
        free(r->a), free(r->b), free(r->x), free(r->in), free(r->fma), free(r->dpbf16);
    }
}

static void test_column_f32(void) { check_products(MATRIX_COLUMN, BACKEND_F32); }
static void test_column_bf16(void) { check_products(MATRIX_COLUMN, BACKEND_BF16); }
static void test_row_f32(void) { check_products(MATRIX_ROW, BACKEND_F32); }
static void test_row_bf16(void) { check_products(MATRIX_ROW, BACKEND_BF16); }
static void test_gate_f32(void) { check_products(MATRIX_GATE_UP, BACKEND_F32); }
static void test_gate_bf16(void) { check_products(MATRIX_GATE_UP, BACKEND_BF16); }

/* The tree level by level: adjacent pairs, an odd one moves up; absent ones pass the other on. */
static float tree(float *v, bool *present, int n) {
    while (n > 1) {
        int m = 0;
        for (int i = 0; i < n; i += 2, m++) {
            const bool right = i + 1 < n && present[i + 1];
            v[m] = present[i] && right ? v[i] + v[i + 1] : right ? v[i + 1] : v[i];
            present[m] = present[i] || right;
        }
        n = m;
    }
    return n && present[0] ? v[0] : -0.0f;
}

/* Chains and tree of a row-parallel product, written out. The data is order-sensitive: a single
 * chain over K gives other bits somewhere. */
static void test_row_order(void) {
    const struct shape *s = &shapes[4];
    float a[48 * 130], x[130], out[48];
    awkward_fill(11, a, 48 * 130);
    awkward_fill(12, x, 130);
    backend *be = level_open(0, 1, 1);
    CU_ASSERT_FATAL(be != NULL);
    matrix *m = matrix_make(be, s, MATRIX_ROW, BACKEND_F32, a, NULL);
    be->ops->row_matmul(be, 1, m, x, out);
    int differ = 0;
    for (int n = 0; n < 48; n++) {
        float v[SLABS_MAX], whole = 0.0f;
        bool present[SLABS_MAX];
        for (int slab = 0; slab < 8; slab++) {
            v[slab] = 0.0f;
            present[slab] = s->border[slab] < s->border[slab + 1];
            for (int64_t k = s->border[slab]; k < s->border[slab + 1]; k++)
                v[slab] = fmaf(a[n * 130 + k], x[k], v[slab]);
            v[slab] += 0.0f;
        }
        for (int k = 0; k < 130; k++) whole = fmaf(a[n * 130 + k], x[k], whole);
        const float want = tree(v, present, 8);
        CU_ASSERT(suite_equal_bytes("tree", &out[n], &want, sizeof want));
        differ += memcmp(&whole, &want, sizeof want) != 0;
    }
    CU_ASSERT(differ > 0);
    be->ops->close(be);
}

/* Products that vanish leave a chain at -0, the sign of an absent slab: a present one is +0. */
static void test_row_zero(void) {
    const struct shape s = {.rows = 3, .cols = 2, .slab_count = 3, .border = {0, 0, 2, 2}};
    float a[6], x[2] = {0x1p-100f, 0x1p-100f};
    for (int i = 0; i < 6; i++) a[i] = -0x1p-100f;
    for (int dtype = BACKEND_F32; dtype <= BACKEND_BF16; dtype++)
        for (int level = 0; level < LEVELS; level++) {
            backend *be = level_open(level, 1, 1);
            if (!be) continue;
            matrix *m = matrix_make(be, &s, MATRIX_ROW, (enum backend_dtype)dtype, a, NULL);
            void *in = activations_new(x, 2, (enum backend_dtype)dtype);
            float out[3] = {1.0f, 1.0f, 1.0f};
            be->ops->row_matmul(be, 1, m, in, out);
            for (int n = 0; n < 3; n++) CU_ASSERT(out[n] == 0.0f && !signbit(out[n]));
            free(in);
            be->ops->close(be);
        }
}

/* A rank without columns brings -0, the identity, and leaves the guards alone. */
static void test_row_absent(void) {
    static const int64_t borders[3] = {0, 0, 0};
    for (int level = 0; level < LEVELS; level++) {
        backend *be = level_open(level, 2, 4);
        if (!be) continue;
        const struct matrix_spec spec = {.kind = MATRIX_ROW,
                                         .dtype = BACKEND_BF16,
                                         .rows = 37,
                                         .slab_count = 2,
                                         .slab_begin = borders};
        matrix *m = NULL;
        CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
        float *out = guard_new(sizeof(float) * 4 * 37);
        bf16 nothing[1] = {0x7fc0};
        be->ops->row_matmul(be, 4, m, nothing, out);
        for (int i = 0; i < 4 * 37; i++) CU_ASSERT(out[i] == 0.0f && signbit(out[i]));
        CU_ASSERT(guard_check(out, sizeof(float) * 4 * 37));
        be->ops->close(be);
    }
}

static void check_norm(int hidden, enum backend_dtype dtype) {
    enum { ROWS = 5 };
    const int n = ROWS * hidden;
    const size_t h_bytes = (size_t)n * (dtype == BACKEND_F32 ? 4 : 2);
    float *sum = malloc(sizeof(float) * (size_t)n), *x0 = malloc(sizeof(float) * (size_t)n);
    float *weight = malloc(sizeof(float) * (size_t)hidden),
          *x_want = malloc(sizeof(float) * (size_t)n);
    void *h_want = malloc(h_bytes);
    awkward_fill(21, sum, n);
    awkward_fill(22, x0, n);
    awkward_fill(23, weight, hidden);
    for (int first = 0; first < 2; first++)
        for (int level = 0; level < LEVELS; level++) {
            backend *be = level_open(level, 1 + level % 3, ROWS);
            if (!be) continue;
            /* scratch for rows of this width comes with the matrices */
            const struct matrix_spec spec = {.dtype = BACKEND_F32, .rows = 1, .cols = hidden};
            matrix *m;
            CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
            float *x = guard_new(sizeof(float) * (size_t)n);
            void *h = guard_new(h_bytes);
            memcpy(x, x0, sizeof(float) * (size_t)n);
            be->ops->add_norm(be, ROWS, hidden, first, 3.5f, sum, x, weight, 1e-5f, dtype, h);
            if (level == 0) {
                memcpy(x_want, x, sizeof(float) * (size_t)n);
                memcpy(h_want, h, h_bytes);
                for (int r = 0; r < ROWS; r++) {
                    double squares = 0.0;
                    for (int k = 0; k < hidden; k++) {
                        const int i = r * hidden + k;
                        const float v = first ? 3.5f * sum[i] : x0[i] + sum[i];
                        CU_ASSERT(memcmp(&v, &x[i], sizeof v) == 0);
                        squares += (double)v * (double)v;
                    }
                    for (int k = 0; k < hidden; k++) {
                        const int i = r * hidden + k;
                        const double want =
                            (double)x[i] / sqrt(squares / hidden + 1e-5f) * (double)weight[k];
                        const double got = dtype == BACKEND_F32
                                               ? (double)((float *)h)[i]
                                               : (double)bf16_to_float(((bf16 *)h)[i]);
                        CHECK_NEAR(
                            got, want,
                            fabs(want) * (dtype == BACKEND_F32 ? 0x1p-20 : 0x1p-8) + 0x1p-120);
                    }
                }
            }
            CU_ASSERT(suite_equal_bytes("x", x, x_want, sizeof(float) * (size_t)n));
            CU_ASSERT(suite_equal_bytes("h", h, h_want, h_bytes));
            if (!first) { /* chosen rows: the same bits, and x is left alone */
                static const int32_t rows[] = {1, 4};
                const size_t row_bytes = h_bytes / ROWS;
                void *some = guard_new(2 * row_bytes);
                be->ops->add_norm_rows(be, rows, 2, hidden, sum, x0, weight, 1e-5f, dtype, some);
                CU_ASSERT(suite_equal_bytes("row 1", some, (char *)h_want + row_bytes, row_bytes));
                CU_ASSERT(suite_equal_bytes("row 4", (char *)some + row_bytes,
                                            (char *)h_want + 4 * row_bytes, row_bytes));
                CU_ASSERT(guard_check(some, 2 * row_bytes));
            }
            CU_ASSERT(guard_check(x, sizeof(float) * (size_t)n));
            CU_ASSERT(guard_check(h, h_bytes));
            be->ops->close(be);
        }
    free(sum), free(x0), free(weight), free(x_want), free(h_want);
}

static void test_norm(void) {
    static const int widths[] = {1, 15, 16, 33, 576, 4097};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        check_norm(widths[i], BACKEND_F32);
        check_norm(widths[i], BACKEND_BF16);
    }
}

/* The mixture against its definition: chains per slab in the order of the record, tree. */
static void test_embed(void) {
    enum { V = 131, D = 301, ROWS = 4, SLABS = 5, FIRST = 1000 };
    static const int64_t vocab_begin[SLABS + 1] = {FIRST,      FIRST + 26, FIRST + 26,
                                                   FIRST + 80, FIRST + 81, FIRST + V};
    /* row 0: all over, also ids of other ranks; 1: one-hot; 2: none here; 3: two of one slab */
    static const uint32_t ids[] = {1100, 1003, 5,    1130, 1004, 1080,
                                   1027, 9000, 1129, 7,    1081, 1082};
    static const float weights[] = {0.3f,  0.2f,  0.1f, 0.1f, 0.1f,  0.1f,
                                    0.05f, 0.05f, 1.0f, 1.0f, 0.75f, 0.25f};
    static const int32_t mix_begin[ROWS + 1] = {0, 8, 9, 10, 12};
    const struct batch batch = {
        .row_count = ROWS, .mix_begin = mix_begin, .mix_ids = ids, .mix_weights = weights};
    static float e[V * D];
    awkward_fill(31, e, V * D);
    for (int dtype = BACKEND_F32; dtype <= BACKEND_BF16; dtype++)
        for (int level = 0; level < LEVELS; level++)
            for (int threads = 1; threads <= THREADS_MAX; threads++) {
                backend *be = level_open(level, threads, ROWS);
                if (!be) break;
                const struct shape s = {.rows = V, .cols = D};
                matrix *m = matrix_make(be, &s, MATRIX_COLUMN, (enum backend_dtype)dtype, e, NULL);
                float *out = guard_new(sizeof(float) * ROWS * D);
                be->ops->embed_mix(be, &batch, m, SLABS, vocab_begin, out);
                for (int r = 0; r < ROWS; r++)
                    for (int k = 0; k < D; k++) {
                        float v[SLABS];
                        bool present[SLABS] = {false};
                        for (int slab = 0; slab < SLABS; slab++)
                            for (int i = mix_begin[r]; i < mix_begin[r + 1]; i++) {
                                if (ids[i] < vocab_begin[slab] || ids[i] >= vocab_begin[slab + 1])
                                    continue;
                                const float w =
                                    rounded(e[(ids[i] - FIRST) * D + k], (enum backend_dtype)dtype);
                                v[slab] =
                                    present[slab] ? fmaf(weights[i], w, v[slab]) : weights[i] * w;
                                present[slab] = true;
                            }
                        float want = tree(v, present, SLABS);
                        if (r == 1) want = rounded(e[129 * D + k], (enum backend_dtype)dtype);
                        CU_ASSERT(
                            suite_equal_bytes("mixture", &out[r * D + k], &want, sizeof want));
                    }
                CU_ASSERT(guard_check(out, sizeof(float) * ROWS * D));
                be->ops->close(be);
            }
}

/* What is counted as the bytes of a step, and that a level below the machine's is honoured. */
static void test_accounts(void) {
    backend *be = level_open(0, 2, 4);
    CU_ASSERT_FATAL(be != NULL);
    CHECK_EQ(be->isa, ISA_SCALAR);
    CHECK_EQ(be->numerics, NUMERICS_FMA);
    const struct matrix_spec spec = {.dtype = BACKEND_BF16, .rows = 70, .cols = 33};
    struct matrix_spec lookup = spec;
    lookup.lookup_only = true;
    matrix *m;
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &lookup, &m) == STATUS_OK);
    const struct kv_spec kv = {
        .layers = 3, .kv_heads = 2, .head_dim = 16, .page_count = 5, .dtype = BACKEND_BF16};
    CU_ASSERT_FATAL(be->ops->kv_new(be, &kv) == STATUS_OK);
    CHECK_EQ(cpu_matrix_bytes(&spec), 3 * 32 * 34 * 2); /* 3 panels, one column of padding */
    CHECK_EQ(be->weight_bytes, 2 * 3 * 32 * 34 * 2);
    CHECK_EQ(be->kv_bytes, 3 * 2 * 5 * 64 * 2 * 16 * 2);
    int64_t bytes = 0;
    CU_ASSERT(be->ops->read_sweep(be, 65, &bytes) > 0.0);
    CHECK_EQ(bytes,
             3 * 32 * 34 * 2 + 3 * 2 * 2 * 64 * 2 * 16 * 2); /* one matrix, two pages a layer */
    CU_ASSERT(be->ops->peak_flops(be, 0.01) > 1e6);
    be->ops->close(be);
}

const struct suite_case suite_cases[] = {
    {"column-parallel product, f32", test_column_f32},
    {"column-parallel product, bf16", test_column_bf16},
    {"row-parallel product, f32", test_row_f32},
    {"row-parallel product, bf16", test_row_bf16},
    {"gate and up with SwiGLU, f32", test_gate_f32},
    {"gate and up with SwiGLU, bf16", test_gate_bf16},
    {"chains and tree of a row-parallel product", test_row_order},
    {"a chain that ends at -0 is present", test_row_zero},
    {"a rank without columns is absent", test_row_absent},
    {"residual and norm", test_norm},
    {"embedding mixture", test_embed},
    {"bytes are counted, levels honoured", test_accounts},
    {NULL, NULL}};
