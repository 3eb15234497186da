/* cublaslt_stub.c: a cuBLASLt for the emulated program: column-major products as the manual defines
 * them, in double, and checks of what it is given: sizes that fit one another, leading dimensions,
 * types, alignment, alpha 1 and beta 0. A breach ends the program with a message.
 *
 * Three algorithms are offered, of which the first is refused when it is used, the second wants more
 * workspace than there is, and the third works. CUBLASLT_STUB=on; =none: no algorithms; =late:N: every
 * product after the N-th is refused; otherwise the library does not start.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublasLt.h"

enum { ALGO_REFUSED = 1, ALGO_HUNGRY, ALGO_GOOD };

struct cublasLtContext {
    long products;
};
struct cublasLtDesc {
    cublasOperation_t turned; /* of A; B stays as it is */
};
struct cublasLtLayout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t pitch;
};
struct cublasLtPreference {
    uint64_t workspace;
};

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "cublaslt_stub: %s\n", what);
    abort();
}
static const char *scenario(void) {
    const char *text = getenv("CUBLASLT_STUB");
    return text ? text : "";
}
static void *own(size_t bytes) {
    void *p = calloc(1, bytes);
    expect(p != NULL, "no memory");
    return p;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    if (!*scenario()) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = own(sizeof **handle);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    if (getenv("CUBLASLT_STUB_COUNT"))
        fprintf(stderr, "cublaslt_stub: %ld products\n", handle->products);
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion(void) { return 130000; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType scale) {
    expect(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F, "sums must be fp32");
    *desc = own(sizeof **desc);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    free(desc);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t what,
                                              const void *value, size_t bytes) {
    expect(what == CUBLASLT_MATMUL_DESC_TRANSA && bytes == sizeof desc->turned,
           "an attribute's size");
    memcpy(&desc->turned, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = own(sizeof **preference);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t what,
                                                    const void *value, size_t bytes) {
    expect(
        what == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && bytes == sizeof preference->workspace,
        "a preference's size");
    memcpy(&preference->workspace, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t pitch) {
    *layout = own(sizeof **layout);
    **layout = (struct cublasLtLayout){type, rows, cols, pitch};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t what,
                                                const void *value, size_t bytes) {
    void *const to = what == CUBLASLT_MATRIX_LAYOUT_ROWS   ? (void *)&layout->rows
                     : what == CUBLASLT_MATRIX_LAYOUT_COLS ? (void *)&layout->cols
                     : what == CUBLASLT_MATRIX_LAYOUT_LD   ? (void *)&layout->pitch
                                                           : NULL;
    expect(to != NULL && bytes == 8, "a layout's attribute");
    memcpy(to, value, 8);
    return CUBLAS_STATUS_SUCCESS;
}

/* m x n = op(A) [m x k] times B [k x n]; all column-major. */
static void check(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                  cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
    expect(a->type == CUDA_R_16BF && b->type == CUDA_R_16BF && c->type == CUDA_R_32F &&
               d->type == CUDA_R_32F,
           "bf16 times bf16 to fp32");
    const uint64_t m = desc->turned == CUBLAS_OP_T ? a->cols : a->rows;
    const uint64_t k = desc->turned == CUBLAS_OP_T ? a->rows : a->cols;
    expect(b->rows == k && d->rows == m && d->cols == b->cols, "sizes that do not fit");
    expect(c->rows == d->rows && c->cols == d->cols && c->pitch == d->pitch, "C unlike D");
    const cublasLtMatrixLayout_t all[] = {a, b, d};
    for (int i = 0; i < 3; i++) {
        expect(all[i]->rows > 0 && all[i]->cols > 0, "an empty matrix");
        expect(all[i]->pitch >= (int64_t)all[i]->rows, "a leading dimension below the rows");
    }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results,
                                              int *count) {
    (void)handle;
    check(desc, a, b, c, d);
    expect(wanted >= 32, "at least 32 algorithms shall be tried");
    *count = 0;
    if (strcmp(scenario(), "none") == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (int i = ALGO_REFUSED; i <= ALGO_GOOD; i++) {
        results[*count] = (cublasLtMatmulHeuristicResult_t){.state = CUBLAS_STATUS_SUCCESS};
        results[*count].workspaceSize = i == ALGO_HUNGRY ? preference->workspace + 1 : 256;
        results[(*count)++].algo.data[0] = (uint64_t)i;
    }
    return CUBLAS_STATUS_SUCCESS;
}

static double bf16(const void *p, int64_t at) {
    uint16_t bits;
    memcpy(&bits, (const char *)p + 2 * at, 2);
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream) {
    float one, zero;
    memcpy(&one, alpha, sizeof one);
    memcpy(&zero, beta, sizeof zero);
    check(desc, a_layout, b_layout, c_layout, d_layout);
    expect(one == 1.0f && zero == 0.0f && c == d, "D = A B");
    expect(stream != NULL, "work on the default stream");
    expect(workspace != NULL && workspace_bytes >= 256, "no workspace");
    expect((uintptr_t)workspace % 16 == 0 && (uintptr_t)a % 16 == 0, "alignment");
    expect(algo->data[0] != ALGO_HUNGRY, "an algorithm without room for its workspace");
    if (algo->data[0] != ALGO_GOOD) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (strncmp(scenario(), "late:", 5) == 0 && handle->products >= atol(scenario() + 5))
        return CUBLAS_STATUS_INVALID_VALUE;
    handle->products++;
    const int turned = desc->turned == CUBLAS_OP_T;
    const int64_t m = (int64_t)d_layout->rows, n = (int64_t)d_layout->cols,
                  k = (int64_t)b_layout->rows;
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < m; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += bf16(a, turned ? l + i * a_layout->pitch : i + l * a_layout->pitch) *
                       bf16(b, l + j * b_layout->pitch);
            ((float *)d)[i + j * d_layout->pitch] = (float)sum;
        }
    return CUBLAS_STATUS_SUCCESS;
}
