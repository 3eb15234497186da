/* f_pack.c: packing of weights: every number is where cpu_pack.h draws it, everything else is zero.
 *
 * The places are written out here from that drawing. Rows come in pieces of uneven heights, as fp32
 * and as bf16, so that whole blocks and what is left of them are both met.
 */
#include "backend/cpu_pack.h"
#include "f_backend.h"

enum { SLABS_MAX = 4 };
struct shape {
    enum matrix_kind kind;
    int64_t rows, cols;
    int slab_count;
    int64_t border[SLABS_MAX + 1];
};
/* panels that are not full, odd K, odd and empty slabs, K beyond one block of 256 columns */
static const struct shape shapes[] = {
    {MATRIX_COLUMN, 32, 16, 1, {0}},
    {MATRIX_COLUMN, 1, 1, 1, {0}},
    {MATRIX_COLUMN, 77, 601, 1, {0}},
    {MATRIX_GATE_UP, 16, 64, 1, {0}},
    {MATRIX_GATE_UP, 39, 261, 1, {0}},
    {MATRIX_ROW, 64, 96, 2, {0, 48, 96}},
    {MATRIX_ROW, 45, 645, 4, {0, 33, 33, 310, 645}},
};
static const int64_t heights[] = {1, 3, 4, 13, 16, 32, 100};

static struct matrix_spec spec_of(const struct shape *s, enum backend_dtype dtype) {
    return (struct matrix_spec){.kind = s->kind,
                                .dtype = dtype,
                                .rows = s->rows,
                                .cols = s->cols,
                                .slab_count = s->slab_count,
                                .slab_begin = s->border};
}

static float value_of(int part, int64_t row, int64_t k) {
    const float x = suite_random_float(5, (uint32_t)(part * 1000000 + row * 1000 + k));
    return x == 0.0f ? 1.0f : x;
}

/* Bytes from the start of the matrix, as cpu_pack.h says. */
static size_t place_of(const struct shape *s, enum backend_dtype dtype, int part, int64_t row,
                       int64_t k) {
    int64_t padded = 0, inputs = 0; /* of this column; of the panel */
    for (int slab = 0; slab < s->slab_count; slab++) {
        const int64_t begin = s->kind == MATRIX_ROW ? s->border[slab] : 0;
        const int64_t end = s->kind == MATRIX_ROW ? s->border[slab + 1] : s->cols;
        if (k >= begin && k < end) padded = inputs + k - begin;
        inputs += dtype == BACKEND_BF16 ? (end - begin + 1) / 2 * 2 : end - begin;
    }
    const int64_t panel = s->kind == MATRIX_GATE_UP ? row / 16 : row / 32;
    const int64_t lane = s->kind == MATRIX_GATE_UP ? row % 16 + 16 * part : row % 32;
    if (dtype == BACKEND_F32) return (size_t)(4 * (panel * inputs * 32 + padded * 32 + lane));
    return (size_t)(2 * (panel * inputs * 32 + padded / 2 * 64 + 2 * lane + padded % 2));
}

static void fill_rows(const struct shape *s, int part, int64_t row, int64_t n,
                      enum backend_dtype as, void *out) {
    for (int64_t i = 0; i < n * s->cols; i++) {
        const float x = value_of(part, row + i / s->cols, i % s->cols);
        if (as == BACKEND_F32)
            ((float *)out)[i] = x;
        else
            ((bf16 *)out)[i] = bf16_from_float(x);
    }
}

static void expect_places(const struct shape *s, enum backend_dtype dtype, const matrix *m) {
    const size_t bytes = (size_t)m->panel_count * m->panel_bytes;
    unsigned char *want = calloc(1, bytes);
    for (int part = 0; part < (s->kind == MATRIX_GATE_UP ? 2 : 1); part++) {
        for (int64_t i = 0; i < s->rows * s->cols; i++) {
            const float x = value_of(part, i / s->cols, i % s->cols);
            const bf16 short_x = bf16_from_float(x);
            const size_t at = place_of(s, dtype, part, i / s->cols, i % s->cols);
            const size_t size = dtype == BACKEND_F32 ? sizeof x : sizeof short_x;
            CU_ASSERT_FATAL(at + size <= bytes);
            memcpy(want + at, dtype == BACKEND_F32 ? (const void *)&x : &short_x, size);
        }
    }
    CU_ASSERT(memcmp(want, m->data, bytes) == 0);
    free(want);
}

static void pack_and_look(const struct shape *s, enum backend_dtype dtype, enum backend_dtype as,
                          int64_t height) {
    const struct matrix_spec spec = spec_of(s, dtype);
    backend *be = level_open(0, 1, 1);
    matrix *m;
    CU_ASSERT_FATAL(be && be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
    /* exactly as large as the rows, so that a sanitizer sees a read beyond them */
    for (int part = 0; part < (s->kind == MATRIX_GATE_UP ? 2 : 1); part++) {
        for (int64_t row = 0, n; row < s->rows; row += n) {
            n = s->rows - row < height ? s->rows - row : height;
            void *values = malloc((size_t)(n * s->cols) * backend_dtype_bytes(as));
            fill_rows(s, part, row, n, as, values);
            be->ops->pack->rows(be, m, part, row, n, &(struct matrix_rows){values, as});
            free(values);
        }
    }
    expect_places(s, dtype, m);
    be->ops->close(be);
}

static void test_places(void) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (size_t h = 0; h < sizeof heights / sizeof heights[0]; h++) {
            pack_and_look(&shapes[i], BACKEND_F32, BACKEND_F32, heights[h]);
            pack_and_look(&shapes[i], BACKEND_BF16, BACKEND_F32, heights[h]);
            pack_and_look(&shapes[i], BACKEND_BF16, BACKEND_BF16, heights[h]);
        }
    }
}

/* All rows belong to one thread each, and threads share no panel. */
static void test_shares(void) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const struct shape *s = &shapes[i];
        const struct matrix_spec spec = spec_of(s, BACKEND_BF16);
        const int64_t panel = s->kind == MATRIX_GATE_UP ? 16 : 32;
        for (int threads = 1; threads <= 5; threads++) {
            backend *be = level_open(0, threads, 1);
            matrix *m;
            int64_t next = 0;
            CU_ASSERT_FATAL(be && be->ops->matrix_new(be, &spec, &m) == STATUS_OK);
            CU_ASSERT_FATAL(be->host_threads == threads);
            for (int t = 0; t < threads; t++) {
                int64_t begin, end;
                be->ops->pack->share(be, m, t, &begin, &end);
                CU_ASSERT(begin == next && begin <= end);
                CU_ASSERT(begin % panel == 0 || begin == s->rows);
                next = end;
            }
            CU_ASSERT(next == s->rows);
            be->ops->close(be);
        }
    }
}

const struct suite_case suite_cases[] = {
    {"every number in its place", test_places}, {"threads' shares", test_shares}, {NULL, NULL}};
