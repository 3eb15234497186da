/* l_fp8.c: fp8 weights on the GPU kernels, run by the fibre emulation (or a device: l_kernels.c).
 *
 * What lies in memory after packing is read back by the picture in kernels.h and compared, byte for
 * byte, with the quantiser of base/fp8.h (a_fp8.c proves that one); products are compared with sums
 * in double over the numbers the bytes stand for.
 */
#include "base/fp8.h"
#include "f_backend.h"
#include "kernel_suite.h"

enum { SLABS = 8, ROWS_MAX = 65, WORKSPACE_TILES = 64, GROUP = 128 };

struct shape {
    int64_t rows, cols;
    int slab_count;
    int64_t border[SLABS + 1];
};
static const struct shape shapes[] = {
    {40, 1024, 8, {0, 128, 256, 384, 512, 640, 768, 896, 1024}},
    {136, 256, 1, {0, 256}},        /* two groups of rows */
    {17, 352, 3, {0, 96, 96, 352}}, /* slabs that are no multiple of 128, an empty one */
    {9, 63, 2, {0, 21, 63}},        /* odd borders */
    {24, 640, 5, {0, 32, 160, 416, 608, 640}},
};
enum {
    SHAPES = sizeof shapes / sizeof shapes[0],
    MANY = 1 /* shapes tried with every row count */
};

/* The borders of blocks of columns: every 128 from each part's first column. */
static int blocks_of(const struct shape *s, enum kernels_kind kind, int64_t *begin) {
    int count = 0;
    const int parts = kind == KERNELS_ROW ? s->slab_count : 1;
    for (int p = 0; p < parts; p++) {
        const int64_t from = kind == KERNELS_ROW ? s->border[p] : 0;
        const int64_t to = kind == KERNELS_ROW ? s->border[p + 1] : s->cols;
        for (int64_t c = from; c < to; c += FP8_BLOCK) begin[count++] = c;
    }
    begin[count] = s->cols;
    return count;
}

static int block_of(const int64_t *begin, int64_t column) {
    int b = 0;
    while (column >= begin[b + 1]) b++;
    return b;
}

/* A matrix and the numbers it stands for. */
struct weights {
    struct kernels_matrix m;
    float *scales[2]; /* [rows][cols] */
    fp8 *codes[2];
    size_t bytes;
};

static void weights_new(struct weights *w, const struct shape *s, enum kernels_kind kind,
                        const float *const source[2]) {
    int64_t begin[64];
    const int blocks = blocks_of(s, kind, begin);
    CU_ASSERT_FATAL(
        kernels_matrix_shape(KERNELS_FP8, kind, s->rows, s->cols, s->slab_count, s->border, &w->m));
    w->bytes = kernels_matrix_bytes(&w->m);
    w->m.data = guard_new(w->bytes);
    memset(w->m.data, 0, w->bytes);
    for (int part = 0; part <= (kind == KERNELS_GATE_UP); part++) {
        const size_t n = (size_t)(s->rows * s->cols);
        w->scales[part] = malloc(n * sizeof(float));
        w->codes[part] = malloc(n);
        float all_scales[2 * 64] = {0}, *scales = all_scales;
        for (int64_t r = 0, count; r < s->rows; r += count, scales += blocks) {
            count = s->rows - r < GROUP ? s->rows - r : GROUP;
            for (int64_t i = r; i < r + count; i++)
                for (int64_t k = 0; k < s->cols; k++) {
                    float *largest = &scales[block_of(begin, k)];
                    *largest = fmaxf(*largest, fabsf(source[part][i * s->cols + k]));
                }
            for (int b = 0; b < blocks; b++) scales[b] = fp8_scale(scales[b]);
            for (int64_t i = r; i < r + count; i++)
                for (int64_t k = 0; k < s->cols; k++) {
                    const int64_t at = i * s->cols + k;
                    w->scales[part][at] = scales[block_of(begin, k)];
                    w->codes[part][at] = fp8_quantise(source[part][at], w->scales[part][at]);
                }
        }
        LAUNCH(kernels_pack_fp8(NULL, &w->m, part, 0, s->rows, w->codes[part], all_scales));
    }
}

static void weights_free(struct weights *w, enum kernels_kind kind) {
    CU_ASSERT(guard_check(w->m.data, w->bytes));
    for (int part = 0; part <= (kind == KERNELS_GATE_UP); part++)
        free(w->scales[part]), free(w->codes[part]);
}

/* Byte and scale of an element, by the picture in kernels.h. */
static fp8 code_at(const struct kernels_matrix *m, int part, int64_t row, int64_t col,
                   float *scale) {
    static const int place[4] = {0, 2, 1, 3};
    const bool gated = m->kind == KERNELS_GATE_UP;
    const int64_t row_tile = gated ? row / 8 : row / 16;
    const int in_tile = gated ? (int)(row % 8) + 8 * part : (int)(row % 16);
    int p = 0;
    while (col >= m->part_begin[p + 1]) p++;
    const int64_t in_part = col - m->part_begin[p];
    const int64_t tile = m->part_tile[p] + in_part / 16, k = in_part % 16;
    const int64_t pairs = m->col_tiles / 2, tile_bytes = (int64_t)m->row_tiles * pairs * 512;
    const fp8 *lane = (const fp8 *)m->data + (row_tile * pairs + tile / 2) * 512 +
                      ((in_tile % 8) * 4 + k / 4) * 16;
    const float *scales = (const float *)(const void *)((const char *)m->data + tile_bytes);
    *scale = scales[(row_tile * (m->col_tiles / 8) + tile / 8) * 2 + in_tile / 8];
    return lane[tile % 2 * 8 + in_tile / 8 * 4 + place[k % 4]];
}

static void sources_new(const struct shape *s, uint64_t seed, float *source[2]) {
    for (int part = 0; part < 2; part++) {
        source[part] = malloc(sizeof(float) * (size_t)(s->rows * s->cols));
        awkward_fill(seed + 100 * (uint64_t)part, source[part], s->rows * s->cols);
    }
    if (s->cols > 200) /* a block of zeros has the scale 0 */
        for (int64_t r = 0; r < s->rows && r < GROUP; r++)
            memset(source[0] + r * s->cols + 128, 0, sizeof(float) * 72);
}

static void test_pack(void) {
    for (int i = 0; i < SHAPES; i++)
        for (int kind = KERNELS_COLUMN; kind <= KERNELS_ROW; kind++) {
            const struct shape *s = &shapes[i];
            struct weights w = {0};
            float *source[2];
            int wrong_codes = 0, wrong_scales = 0;
            int64_t set = 0;
            sources_new(s, 10 + (uint64_t)i, source);
            weights_new(&w, s, (enum kernels_kind)kind, (const float *const *)source);
            for (int part = 0; part <= (kind == KERNELS_GATE_UP); part++)
                for (int64_t r = 0; r < s->rows; r++)
                    for (int64_t k = 0; k < s->cols; k++) {
                        float scale;
                        const fp8 code = code_at(&w.m, part, r, k, &scale);
                        wrong_codes += code != w.codes[part][r * s->cols + k];
                        wrong_scales += scale != w.scales[part][r * s->cols + k];
                        set += code != 0;
                    }
            CHECK_EQ(wrong_codes, 0);
            CHECK_EQ(wrong_scales, 0);
            int64_t bytes_set = 0; /* nothing but the elements: the padding is still zero */
            for (int64_t b = 0; b < (int64_t)w.m.row_tiles * w.m.col_tiles * 256; b++)
                bytes_set += ((const fp8 *)w.m.data)[b] != 0;
            CHECK_EQ(bytes_set, set);
            weights_free(&w, (enum kernels_kind)kind);
            free(source[0]), free(source[1]);
        }
}

static double dot(const struct weights *w, int part, int64_t row, int64_t cols, const bf16 *x,
                  double *magnitude) {
    double sum = 0.0;
    *magnitude = 0.0;
    for (int64_t k = 0; k < cols; k++) {
        const int64_t at = row * cols + k;
        const double term = (double)fp8_to_float(w->codes[part][at]) * (double)w->scales[part][at] *
                            (double)bf16_to_float(x[k]);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

static void product_check(const struct weights *w, const bf16 *in, int rows, const void *out) {
    const int64_t cols = w->m.cols, n_rows = w->m.rows;
    int wrong = 0;
    for (int r = 0; r < rows; r++)
        for (int64_t n = 0; n < n_rows; n++) {
            double mag, mag_up;
            const double z = dot(w, 0, n, cols, in + r * cols, &mag);
            const double u = 8.0 * sqrt((double)cols + 8) * unit_roundoff;
            if (w->m.kind != KERNELS_GATE_UP) {
                const double got = (double)((const float *)out)[r * n_rows + n];
                wrong += !(fabs(got - z) <= u * mag + 1e-37);
                continue;
            }
            const double up = dot(w, 1, n, cols, in + r * cols, &mag_up);
            const double want = z / (1.0 + exp(-z)) * up;
            const double got = (double)bf16_to_float(((const bf16 *)out)[r * n_rows + n]);
            const double error = 1.2 * u * mag * fabs(up) + u * mag_up * fabs(z);
            wrong += !(fabs(got - want) <= error + fabs(want) * 0x1p-8 + 1e-37);
        }
    CHECK_EQ(wrong, 0);
}

static void test_products(void) {
    static const int counts[] = {1, 2, 3, 4, 5, 8, 16, 33, 64};
    void *workspace = calloc(1, kernels_product_workspace_bytes(WORKSPACE_TILES));
    const int sm_count = kernels_sm_count;
    kernels_sm_count = 2; /* a block then works on several row tiles, and shares some */
    for (int i = 0; i < SHAPES; i++)
        for (int kind = KERNELS_COLUMN; kind <= KERNELS_ROW; kind++) {
            const struct shape *s = &shapes[i];
            struct weights w = {0};
            float *source[2], *x = malloc(sizeof(float) * (size_t)(ROWS_MAX * s->cols));
            sources_new(s, 30 + (uint64_t)i, source);
            weights_new(&w, s, (enum kernels_kind)kind, (const float *const *)source);
            awkward_fill(50 + (uint64_t)i, x, ROWS_MAX * s->cols);
            bf16 *in = activations_new(x, ROWS_MAX * s->cols, BACKEND_BF16);
            const size_t size = kind == KERNELS_GATE_UP ? sizeof(bf16) : sizeof(float);
            const int most = i < MANY ? (int)ROWS_MAX : 9;
            const size_t bytes = size * (size_t)(most * s->rows);
            void *whole = guard_new(bytes);
            kernel_product(KERNELS_DETERMINISTIC, most, &w.m, in, whole, workspace);
            product_check(&w, in, most, whole);
            for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                if (counts[c] > most || (i >= MANY && counts[c] % 3 == 2)) continue; /* time */
                const size_t part = size * (size_t)(counts[c] * s->rows);
                void *out = guard_new(part);
                kernel_product(KERNELS_DETERMINISTIC, counts[c], &w.m, in, out, workspace);
                CU_ASSERT(suite_equal_bytes("rows of a smaller step", out, whole, part));
                if (counts[c] <= 16) { /* beyond, fast mode has the same kernel and pieces */
                    kernel_product(KERNELS_FAST, counts[c], &w.m, in, out, workspace);
                    product_check(&w, in, counts[c], out);
                }
                CU_ASSERT(guard_check(out, part));
            }
            CU_ASSERT(guard_check(whole, bytes));
            weights_free(&w, (enum kernels_kind)kind);
            free(source[0]), free(source[1]), free(x), free(in);
        }
    const uint32_t *counters =
        (const uint32_t *)workspace + kernels_product_workspace_bytes(0) / sizeof(uint32_t);
    for (int i = 0; i < WORKSPACE_TILES; i++) CHECK_EQ(counters[i], 0);
    free(workspace);
    kernels_sm_count = sm_count;
}

/* Ranks with 8, 4, 2, 1 slabs, added along the tree, give the bits of one rank. */
static void test_tensor_parallel(void) {
    static const struct shape cases[] = {
        {20, 1024, 8, {0, 128, 256, 384, 512, 640, 768, 896, 1024}},
        {20, 1120, 8, {0, 160, 288, 416, 576, 704, 832, 992, 1120}}, /* borders off the blocks */
    };
    enum { ROWS = 3 };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        const struct shape *s = &cases[c];
        float *source[2], *x = malloc(sizeof(float) * (size_t)(ROWS * s->cols));
        sources_new(s, 70, source);
        awkward_fill(71, x, ROWS * s->cols);
        const size_t n = (size_t)(ROWS * s->rows);
        float *want = malloc(sizeof(float) * n), *sum = malloc(sizeof(float) * n),
              *parts = malloc(sizeof(float) * n * SLABS);
        for (int ranks = 1; ranks <= SLABS; ranks *= 2) {
            for (int r = 0; r < ranks; r++) {
                const int first = r * SLABS / ranks, count = SLABS / ranks;
                const int64_t from = s->border[first], cols = s->border[first + count] - from;
                struct shape mine = {s->rows, cols, count, {0}};
                for (int i = 0; i <= count; i++) mine.border[i] = s->border[first + i] - from;
                float *own = malloc(sizeof(float) * (size_t)(mine.rows * cols));
                bf16 *in = malloc(sizeof(bf16) * (size_t)(ROWS * cols));
                for (int64_t i = 0; i < mine.rows; i++)
                    memcpy(own + i * cols, source[0] + i * s->cols + from,
                           sizeof(float) * (size_t)cols);
                for (int64_t i = 0; i < ROWS; i++)
                    for (int64_t k = 0; k < cols; k++)
                        in[i * cols + k] = bf16_from_float(x[i * s->cols + from + k]);
                struct weights w = {0};
                weights_new(&w, &mine, KERNELS_ROW, (const float *const[2]){own, NULL});
                kernel_product(KERNELS_DETERMINISTIC, ROWS, &w.m, in, parts + (size_t)r * n, NULL);
                weights_free(&w, KERNELS_ROW);
                free(own), free(in);
            }
            LAUNCH(kernels_rank_tree(NULL, (int64_t)n, ranks, parts, sum));
            if (ranks == 1) memcpy(want, sum, sizeof(float) * n);
            CU_ASSERT(suite_equal_bytes("partials of ranks along the tree", sum, want,
                                        sizeof(float) * n));
        }
        free(source[0]), free(source[1]), free(x), free(want), free(sum), free(parts);
    }
}

const struct suite_case suite_cases[] = {
    {"packed bytes and scales are the quantiser's, at the places of the picture", test_pack},
    {"products: every kind, shape and row count against double, rows equal in every step size",
     test_products},
    {"the ranks' partials along the tree are the bits of one rank", test_tensor_parallel},
    {NULL, NULL},
};
