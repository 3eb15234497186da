/* l_unpack.c: packed weights as plain rows again: every kind and type of matrix, any range of rows,
 * slabs that end inside a tile, and SwiGLU of plain results; against the rows that were packed. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/bf16.h"
#include "base/fp8.h"
#include "kernel_suite.h"

enum { BLOCK = 128 };

static void *zeroed(size_t n) {
    void *p = aligned_alloc(128, (n + 255) / 128 * 128);
    CU_ASSERT_FATAL(p != NULL);
    memset(p, 0, (n + 255) / 128 * 128);
    return p;
}

/* One scale a block of columns and 128 rows, as kernels_pack_fp8 takes them. */
static float scale_of(int64_t row, int block, int part) {
    return 0.01f * (float)(1 + (row / BLOCK * 7 + block * 3 + part) % 11);
}

/* The block of columns that holds column k: parts begin new ones. */
static int block_of(const struct kernels_matrix *m, int64_t k) {
    int p = 0;
    while (k >= m->part_begin[p + 1]) p++;
    return (m->part_tile[p] + (int)((k - m->part_begin[p]) / KERNELS_TILE)) /
           (BLOCK / KERNELS_TILE);
}

static void pack(struct kernels_matrix *m, float *weights) {
    const int parts = m->kind == KERNELS_GATE_UP ? 2 : 1;
    m->data = zeroed(kernels_matrix_bytes(m));
    for (int part = 0; part < parts; part++) {
        const float *rows = weights + part * m->rows * m->cols;
        if (m->dtype == KERNELS_BF16) {
            LAUNCH(kernels_pack(NULL, m, part, 0, m->rows, rows));
            continue;
        }
        float *scales = zeroed(sizeof(float) * (size_t)m->col_tiles);
        fp8 *codes = zeroed((size_t)(BLOCK * m->cols));
        for (int64_t r = 0; r < m->rows; r += BLOCK) {
            for (int b = 0; b < m->col_tiles / (BLOCK / KERNELS_TILE); b++)
                scales[b] = scale_of(r, b, part);
            const int64_t n = m->rows - r < BLOCK ? m->rows - r : BLOCK;
            for (int64_t i = 0; i < n * m->cols; i++)
                codes[i] = fp8_quantise(rows[r * m->cols + i], scales[block_of(m, i % m->cols)]);
            LAUNCH(kernels_pack_fp8(NULL, m, part, r, n, codes, scales));
        }
        free(scales), free(codes);
    }
}

static uint16_t expected(const struct kernels_matrix *m, const float *weights, int part,
                         int64_t row, int64_t k) {
    const float w = weights[(part * m->rows + row) * m->cols + k];
    if (m->dtype == KERNELS_BF16) return bf16_from_float(w);
    const float scale = scale_of(row, block_of(m, k), part);
    return bf16_from_float(fp8_to_float(fp8_from_float(w / scale)) * scale);
}

static void check_range(const struct kernels_matrix *m, const float *weights, int64_t begin,
                        int64_t n, int64_t pitch) {
    const int parts = m->kind == KERNELS_GATE_UP ? 2 : 1;
    const size_t count = (size_t)(parts * n * pitch);
    uint16_t *got = zeroed(2 * count + 2), *want = zeroed(2 * count + 2);
    memset(got, 0x5a, 2 * count + 2); /* nothing else is written */
    memset(want, 0x5a, 2 * count + 2);
    for (int part = 0; part < parts; part++)
        for (int64_t r = 0; r < n; r++)
            for (int64_t k = 0; k < m->cols; k++)
                want[(part * n + r) * pitch + k] = expected(m, weights, part, begin + r, k);
    LAUNCH(kernels_unpack(NULL, m, begin, n, got, pitch));
    CU_ASSERT(suite_equal_bytes("unpacked rows", got, want, 2 * count + 2));
    free(got);
    free(want);
}

static void test_unpack(void) {
    static const int64_t slabs[] = {0, 37, 37, 180, 301};
    static const struct {
        enum kernels_kind kind;
        int64_t rows, cols;
    } shapes[] = {{KERNELS_COLUMN, 70, 48},
                  {KERNELS_COLUMN, 33, 301},
                  {KERNELS_ROW, 50, 301},
                  {KERNELS_GATE_UP, 44, 136}};
    for (int dtype = KERNELS_BF16; dtype <= KERNELS_FP8; dtype++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            struct kernels_matrix m;
            const int64_t rows = shapes[i].rows, cols = shapes[i].cols;
            CU_ASSERT_FATAL(kernels_matrix_shape((enum kernels_dtype)dtype, shapes[i].kind, rows,
                                                 cols, 4, slabs, &m));
            float *weights = zeroed(sizeof(float) * (size_t)(2 * rows * cols));
            for (int64_t e = 0; e < 2 * rows * cols; e++)
                weights[e] = suite_random_float(5 + i, (uint32_t)e);
            pack(&m, weights);
            check_range(&m, weights, 0, rows, cols);
            check_range(&m, weights, 11, 21, cols + 3);
            check_range(&m, weights, 16, 16, (cols + 7) / 8 * 8);
            free(m.data);
            free(weights);
        }
}

static void test_swiglu(void) {
    enum { ROWS = 3, UNITS = 300, PITCH = 310 };
    float *in = zeroed(sizeof(float) * ROWS * 2 * UNITS);
    uint16_t *act = zeroed(2 * ROWS * PITCH);
    for (int i = 0; i < ROWS * 2 * UNITS; i++) in[i] = 3 * suite_random_float(9, (uint32_t)i);
    LAUNCH(kernels_swiglu(NULL, ROWS, UNITS, in, act, PITCH));
    for (int r = 0; r < ROWS; r++)
        for (int f = 0; f < PITCH; f++) {
            const double gate = f < UNITS ? in[r * 2 * UNITS + f] : 0;
            const double up = f < UNITS ? in[r * 2 * UNITS + UNITS + f] : 0;
            const double want = gate / (1 + exp(-gate)) * up;
            CHECK_NEAR(bf16_to_float(act[r * PITCH + f]), want, fabs(want) / 250 + 1e-6);
        }
    free(in);
    free(act);
}

const struct suite_case suite_cases[] = {
    {"unpacked rows are the packed ones, bf16 and fp8, and nothing around them", test_unpack},
    {"SwiGLU of plain results", test_swiglu},
    {NULL, NULL},
};
