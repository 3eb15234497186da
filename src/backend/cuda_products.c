/* cuda_products.c: products of activations with packed weights on the GPU, in the backend's mode.
 *
 * Many rows go to cuBLASLt where it is there and faster (cuda_lt.c).
 *
 * Thread: engine. Memory: one workspace for all of them, taken with the matrices (cuda.h).
 */
#include "backend/cuda.h"

void cuda_product(struct cuda *cuda, int rows, const matrix *w, const void *in, float *out,
                  const char *what) {
    if (rows == 0 || cuda_lt_product(cuda, rows, &w->shape, in, out)) return;
    cuda_must(
        kernels_product(cuda->stream, cuda->mode, rows, &w->shape, in, out, cuda->product.data),
        what);
}

void cuda_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial) {
    cuda_product(cuda_of(b), rows, w, in, partial, "product over the rank's columns");
}

void cuda_logits(backend *b, int rows, const matrix *w, const void *h, float *logits) {
    cuda_product(cuda_of(b), rows, w, h, logits, "logits");
}

void cuda_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act) {
    struct cuda *cuda = cuda_of(b);
    if (rows == 0 || cuda_lt_product(cuda, rows, &w->shape, h, act)) return;
    cuda_must(
        kernels_gate_up(cuda->stream, cuda->mode, rows, &w->shape, h, act, cuda->product.data),
        "gate and up");
}
