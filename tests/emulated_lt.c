/* emulated_lt.c: products of many rows by cuBLASLt, on the emulated GPU with the stub library, against
 * sums in double. The stub checks leading dimensions and types; here the numbers must be right, in
 * several chunks as in one, and everything must go on when the library refuses.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/bf16.h"
#include "base/fp8.h"
#include "suite.h"

extern size_t cuda_lt_scratch_bytes;

enum { ROWS = 150, SLABS = 3 };
static const int64_t slabs[SLABS + 1] = {0, 40, 40, 75}; /* one is empty, two end inside a tile */

static float rounded(float v) { return bf16_to_float(bf16_from_float(v)); }

/* One matrix on a backend of its own. */
struct subject {
    backend *be;
    matrix *m;
    enum matrix_kind kind;
    int64_t rows, cols;
    float *weights, *inputs; /* as the device has them: bf16 */
    void *in, *out;
    int64_t workspace; /* scratch there should be once it is ready, in and out apart */
};

static const struct kv_spec pool = {.layers = 1,
                                    .heads = 1,
                                    .kv_heads = 1,
                                    .head_dim = 16,
                                    .positions_max = 64,
                                    .page_count = 2,
                                    .dtype = BACKEND_BF16};

/* A column matrix of up to 256 columns as codes, one scale for each 128 rows and columns. */
static void send_fp8(const struct subject *s) {
    const struct backend_upload *upload = s->be->ops->upload;
    const size_t rows_bytes = ((size_t)(s->rows * s->cols) + 15) / 16 * 16;
    size_t bytes = rows_bytes + 64;
    void *slot[BACKEND_SLOTS];
    CHECK_EQ(upload->begin(s->be, &bytes, slot), STATUS_OK);
    fp8 *codes = slot[0];
    float *scales = (float *)(void *)((char *)slot[0] + rows_bytes);
    for (int i = 0; i < 4; i++) scales[i] = 0.01f * (float)(i + 1);
    for (int64_t i = 0; i < s->rows * s->cols; i++)
        codes[i] = fp8_quantise(s->weights[i], scales[i / s->cols / 128 * 2 + i % s->cols / 128]);
    upload->rows(s->be, s->m, 0, 0, s->rows, codes, scales);
    upload->wait(s->be, 0);
    upload->end(s->be);
}

static void open_typed(struct subject *s, enum backend_dtype dtype, enum matrix_kind kind,
                       int64_t rows, int64_t cols, enum backend_gemm gemm) {
    const struct backend_config config = {
        .local_ranks = 1, .rows_max = ROWS, .logit_rows_max = ROWS, .probes_max = 1, .gemm = gemm};
    const int parts = kind == MATRIX_GATE_UP ? 2 : 1;
    const uint64_t seed = 7 + (uint64_t)kind;
    uint32_t next = 0;
    *s = (struct subject){.kind = kind, .rows = rows, .cols = cols};
    CHECK_EQ(cuda_open(&config, &s->be), STATUS_OK);
    const struct matrix_spec spec = {.kind = kind,
                                     .dtype = dtype,
                                     .rows = rows,
                                     .cols = cols,
                                     .slab_count = kind == MATRIX_ROW ? SLABS : 0,
                                     .slab_begin = kind == MATRIX_ROW ? slabs : NULL};
    s->workspace =
        (int64_t)s->be->scratch_bytes +
        s->be->ops->workspace_bytes(s->be, &(const struct matrix_spec *){&spec}, 1, &pool);
    CHECK_EQ(s->be->ops->matrix_new(s->be, &spec, &s->m), STATUS_OK);
    s->weights = calloc((size_t)(parts * rows * cols), sizeof *s->weights);
    s->inputs = calloc((size_t)(ROWS * cols), sizeof *s->inputs);
    uint16_t *bits = calloc((size_t)(ROWS * cols), sizeof *bits);
    for (int64_t i = 0; i < parts * rows * cols; i++)
        s->weights[i] = rounded(suite_random_float(seed, next++));
    for (int64_t i = 0; i < ROWS * cols; i++) {
        bits[i] = bf16_from_float(suite_random_float(seed, next++));
        s->inputs[i] = bf16_to_float(bits[i]);
    }
    if (dtype == BACKEND_FP8) send_fp8(s);
    for (int p = 0; p < parts && dtype == BACKEND_BF16; p++)
        s->be->ops->matrix_load(s->be, s->m, p, 0, rows, s->weights + p * rows * cols);
    s->in = s->be->ops->alloc(s->be, (size_t)(ROWS * cols) * 2, "inputs");
    s->out = s->be->ops->alloc(s->be, (size_t)(ROWS * rows) * 4, "outputs");
    CHECK_EQ(s->be->ops->write(s->be, s->in, bits, (size_t)(ROWS * cols) * 2), STATUS_OK);
    free(bits);
}

static void open_subject(struct subject *s, enum matrix_kind kind, int64_t rows, int64_t cols,
                         enum backend_gemm gemm) {
    open_typed(s, BACKEND_BF16, kind, rows, cols, gemm);
}

static enum status ready(struct subject *s) { return s->be->ops->kv_new(s->be, &pool); }

static void close_subject(struct subject *s) {
    s->be->ops->close(s->be);
    free(s->weights);
    free(s->inputs);
}

static double dot(const struct subject *s, int64_t row, int64_t weight_row) {
    double sum = 0;
    for (int64_t k = 0; k < s->cols; k++)
        sum += (double)s->inputs[row * s->cols + k] * s->weights[weight_row * s->cols + k];
    return sum;
}

static void check_rows(struct subject *s, int T) {
    const struct backend_ops *ops = s->be->ops;
    const size_t count = (size_t)(T * s->rows);
    float *got = calloc(count, sizeof *got);
    uint16_t *act = calloc(count, sizeof *act);
    double worst = 0;
    if (s->kind == MATRIX_COLUMN) ops->logits(s->be, T, s->m, s->in, s->out);
    if (s->kind == MATRIX_ROW) ops->row_matmul(s->be, T, s->m, s->in, s->out);
    if (s->kind == MATRIX_GATE_UP) ops->gate_up(s->be, T, s->m, s->in, s->out);
    ops->read(s->be, s->kind == MATRIX_GATE_UP ? (void *)act : (void *)got, s->out,
              count * (s->kind == MATRIX_GATE_UP ? 2 : 4));
    for (int t = 0; t < T; t++)
        for (int64_t n = 0; n < s->rows; n++) {
            const double first = dot(s, t, n);
            double want = first, value = got[t * s->rows + n],
                   allowed = 1e-5 * sqrt((double)s->cols);
            if (s->kind == MATRIX_GATE_UP) {
                want = first / (1 + exp(-first)) * dot(s, t, s->rows + n);
                value = bf16_to_float(act[t * s->rows + n]);
                allowed = fabs(want) / 200 + 1e-4; /* rounded to bf16 */
            }
            if (!(fabs(value - want) <= allowed)) worst = fmax(worst, fabs(value - want));
        }
    if (worst > 0) printf("    %d rows of %lld: off by %g\n", T, (long long)s->rows, worst);
    CU_ASSERT(worst == 0);
    free(got);
    free(act);
}

/* Products by the library, as it says when it goes. */
static long products_of(struct subject *s, void (*work)(struct subject *s)) {
    char line[128] = "";
    FILE *f = tmpfile();
    const int saved = dup(STDERR_FILENO);
    long count = -1;
    work(s);
    fflush(stderr);
    dup2(fileno(f), STDERR_FILENO);
    setenv("CUBLASLT_STUB_COUNT", "1", 1);
    close_subject(s);
    unsetenv("CUBLASLT_STUB_COUNT");
    dup2(saved, STDERR_FILENO);
    close(saved);
    rewind(f);
    if (fgets(line, sizeof line, f)) sscanf(line, "cublaslt_stub: %ld products", &count);
    fclose(f);
    return count;
}

static void few_and_many(struct subject *s) {
    check_rows(s, 64); /* our own kernel */
    check_rows(s, 65);
    check_rows(s, 128);
    check_rows(s, ROWS);
}

static void numbers_are_right(void) {
    const struct {
        enum matrix_kind kind;
        int64_t rows, cols;
        long chunks; /* of a scratch of SMALL bytes */
    } cases[] = {
        {MATRIX_COLUMN, 300, 72, 2}, {MATRIX_ROW, 400, 75, 2}, {MATRIX_GATE_UP, 200, 48, 2}};
    enum { SMALL = 160 << 10, LARGE = 4 << 20 }; /* SMALL: 150 rows of up to 273 fp32 results */
    for (int i = 0; i < 3; i++)
        for (int small = 0; small < 2; small++) {
            struct subject s;
            cuda_lt_scratch_bytes = small ? SMALL : LARGE;
            open_subject(&s, cases[i].kind, cases[i].rows, cases[i].cols, GEMM_LT);
            CHECK_EQ(ready(&s), STATUS_OK);
            CHECK_EQ(s.be->scratch_bytes - (size_t)(ROWS * (2 * s.cols + 4 * s.rows)), s.workspace);
            /* five runs to time each of two buckets, then three products */
            const long chunks = small ? cases[i].chunks : 1;
            CHECK_EQ(products_of(&s, few_and_many), 2 * 5 + 3 * chunks);
        }
}

/* fp8: beside our own kernel, which does not round weight times scale to bf16. */
static void fp8_weights(void) {
    enum { T = 70, N = 150, K = 200 };
    float *out[2];
    for (int lt = 0; lt < 2; lt++) {
        struct subject s;
        cuda_lt_scratch_bytes = 4 << 20;
        open_typed(&s, BACKEND_FP8, MATRIX_COLUMN, N, K, lt ? GEMM_LT : GEMM_OWN);
        CHECK_EQ(ready(&s), STATUS_OK);
        out[lt] = calloc(T * N, sizeof(float));
        s.be->ops->logits(s.be, T, s.m, s.in, s.out);
        s.be->ops->read(s.be, out[lt], s.out, T * N * sizeof(float));
        close_subject(&s);
    }
    double apart = 0, size = 0;
    for (int i = 0; i < T * N; i++) {
        apart += fabs((double)out[0][i] - out[1][i]);
        size += fabs((double)out[0][i]);
    }
    CU_ASSERT(apart <= size / 512); /* a rounding of 2^-9 a weight, and many of them cancel */
    CU_ASSERT(apart > 0 && size > T * N);
    free(out[0]);
    free(out[1]);
}

/* The products of a layer all go to the library, q, k and v too. */
static void attention(struct subject *s) {
    static const int kv_of_head[] = {0};
    static const int32_t pages[] = {0, 1};
    const struct batch_segment segment = {.row_count = 70, .page_count = 2};
    int32_t mix_begin[71];
    uint32_t ids[70] = {0};
    float weights[70] = {0}, q[70 * 16];
    for (int i = 0; i <= 70; i++) mix_begin[i] = i;
    const struct batch batch = {.row_count = 70,
                                .segment_count = 1,
                                .segments = &segment,
                                .pages = pages,
                                .mix_begin = mix_begin,
                                .mix_ids = ids,
                                .mix_weights = weights};
    float *rope = s->be->ops->alloc(s->be, 70 * 8 * sizeof *rope, "tables of ones and zeros");
    float ones[70 * 8];
    for (int i = 0; i < 70 * 8; i++) ones[i] = 1;
    CHECK_EQ(s->be->ops->write(s->be, rope, ones, sizeof ones), STATUS_OK);
    const struct attention_spec spec = {
        .qkv = s->m,
        .heads = 1,
        .kv_heads = 1,
        .head_dim = 16,
        .kv_of_head = kv_of_head,
        .rope_cos = rope,
        .rope_sin = s->be->ops->alloc(s->be, 70 * 8 * sizeof *rope, "sines")};
    s->be->ops->begin(s->be, &batch);
    s->be->ops->qkv(s->be, &batch, &spec, s->in, s->out);
    s->be->ops->read(s->be, q, s->out, sizeof q);
    for (int t = 0; t < 70; t++)
        for (int i = 0; i < 16; i++) CU_ASSERT(fabs(q[t * 16 + i] - dot(s, t, i)) <= 1e-4);
}

static void qkv_too(void) {
    struct subject s;
    cuda_lt_scratch_bytes = 4 << 20;
    open_subject(&s, MATRIX_COLUMN, 3 * 16, 32, GEMM_LT);
    CHECK_EQ(ready(&s), STATUS_OK);
    CHECK_EQ(products_of(&s, attention), 2 * 5 + 1);
}

/* auto: whoever is faster; right in either case. own, and --deterministic: never the library. */
static void choices_are_kept(void) {
    struct subject s;
    cuda_lt_scratch_bytes = 4 << 20;
    open_subject(&s, MATRIX_COLUMN, 50, 32, GEMM_AUTO);
    CHECK_EQ(ready(&s), STATUS_OK);
    check_rows(&s, 70);
    close_subject(&s);
    open_subject(&s, MATRIX_COLUMN, 50, 32, GEMM_OWN);
    CHECK_EQ(ready(&s), STATUS_OK);
    CHECK_EQ(s.be->scratch_bytes - (size_t)(ROWS * (2 * s.cols + 4 * s.rows)), s.workspace);
    CHECK_EQ(products_of(&s, few_and_many), -1);
    const struct backend_config exact = {.local_ranks = 1,
                                         .rows_max = ROWS,
                                         .logit_rows_max = 1,
                                         .probes_max = 1,
                                         .deterministic = true,
                                         .gemm = GEMM_AUTO};
    backend *be;
    CHECK_EQ(cuda_open(&exact, &be), STATUS_OK);
    be->ops->close(be);
}

static void refusals_are_survived(void) {
    struct subject s;
    backend *be;
    cuda_lt_scratch_bytes = 160 << 10;
    /* after the timing (10) and a chunk of the first product: the rest is our own kernel's */
    setenv("CUBLASLT_STUB", "late:11", 1);
    open_subject(&s, MATRIX_COLUMN, 300, 72, GEMM_LT);
    CHECK_EQ(ready(&s), STATUS_OK);
    CHECK_EQ(products_of(&s, few_and_many), 11);

    setenv("CUBLASLT_STUB", "none", 1);
    open_subject(&s, MATRIX_COLUMN, 50, 32, GEMM_AUTO);
    CHECK_EQ(ready(&s), STATUS_OK);
    CHECK_EQ(products_of(&s, few_and_many), 0);
    open_subject(&s, MATRIX_COLUMN, 50, 32, GEMM_LT);
    CHECK_EQ(ready(&s), STATUS_USAGE);
    CU_ASSERT(strstr(fail_text(), "--gemm cublaslt") != NULL);
    close_subject(&s);

    unsetenv("CUBLASLT_STUB"); /* it does not start */
    const struct backend_config config = {.local_ranks = 1, .rows_max = ROWS, .gemm = GEMM_LT};
    CHECK_EQ(cuda_open(&config, &be), STATUS_USAGE);
    CU_ASSERT(strstr(fail_text(), "--gemm cublaslt") != NULL);
    open_subject(&s, MATRIX_ROW, 130, 75, GEMM_AUTO);
    CHECK_EQ(ready(&s), STATUS_OK);
    CHECK_EQ(products_of(&s, few_and_many), -1);
    setenv("CUBLASLT_STUB", "on", 1);
}

const struct suite_case suite_cases[] = {
    {"the library's products are right, in one chunk or several", numbers_are_right},
    {"fp8 weights: the product of our own kernel, but for a rounding", fp8_weights},
    {"queries, keys and values", qkv_too},
    {"own kernels where they are asked for, and in deterministic mode", choices_are_kept},
    {"a library that refuses, late or from the start, is done without", refusals_are_survived},
    {NULL, NULL},
};
