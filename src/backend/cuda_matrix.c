/* cuda_matrix.c: packed weights on the GPU: taking memory for them, and the way rows get there.
 *
 * Rows arrive as fp32 from the loader and go through two pinned buffers in turn, so that copying
 * and packing of one block overlaps reading the next one from the file:
 *
 *   rows ─ memcpy ─► stage[i] (pinned) ─ DMA ─► stage_on[i] ─ kernels_pack ─► the matrix (bf16)
 *
 * Thread: engine. Memory: matrices and buffers live as long as the backend. The workspaces of the
 * products and of the candidates are taken here, because the largest matrix decides their size.
 */
#include <stdlib.h>
#include <string.h>

#include "backend/cuda.h"

enum { STAGE_BYTES = 8 << 20 };

enum status cuda_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out) {
    static const enum kernels_kind kinds[] = {[MATRIX_COLUMN] = KERNELS_COLUMN,
                                              [MATRIX_GATE_UP] = KERNELS_GATE_UP,
                                              [MATRIX_ROW] = KERNELS_ROW};
    struct cuda *cuda = cuda_of(b);
    if (spec->dtype != BACKEND_BF16) {
        return fail(STATUS_USAGE, "the CUDA backend computes with bf16 weights: use --dtype bf16");
    }
    matrix *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for a matrix");
    m->next = cuda->matrices; /* freed by close, whatever comes next */
    cuda->matrices = m;
    m->lookup_only = spec->lookup_only;
    if (!kernels_matrix_shape(KERNELS_BF16, kinds[spec->kind], spec->rows, spec->cols,
                              spec->slab_count, spec->slab_begin, &m->shape)) {
        return fail(STATUS_USAGE,
                    "the CUDA kernels take matrices of at most %d slabs a rank: use more ranks or "
                    "a smaller --slabs",
                    (int)KERNELS_PARTS_MAX);
    }
    const size_t bytes = kernels_matrix_bytes(&m->shape);
    m->shape.data = cuda_take(cuda, bytes, "weights");
    if (!m->shape.data) return STATUS_MEMORY;
    b->weight_bytes += bytes;

    if (m->shape.row_tiles > cuda->row_tiles_max) {
        cuda->row_tiles_max = m->shape.row_tiles;
        TRY(cuda_grow(cuda, &cuda->product, kernels_product_workspace_bytes(m->shape.row_tiles),
                      "workspace of the products"));
    }
    if (spec->kind == MATRIX_COLUMN && spec->rows > cuda->vocab_max) {
        cuda->vocab_max = spec->rows;
        TRY(cuda_grow(cuda, &cuda->candidates,
                      kernels_candidates_workspace_bytes(cuda->probes_max, spec->rows),
                      "workspace of the candidates"));
        TRY(cuda_grow(cuda, &cuda->whole_row, sizeof(float) * (size_t)spec->rows,
                      "one row of logits"));
    }
    *out = m;
    return STATUS_OK;
}

void cuda_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                      const float *rows) {
    struct cuda *cuda = cuda_of(b);
    const size_t row_bytes = sizeof(float) * (size_t)m->shape.cols;
    if (row_bytes == 0) return;
    ASSERT_LE(row_bytes, STAGE_BYTES);
    const int64_t step = (int64_t)(STAGE_BYTES / row_bytes);
    for (int64_t done = 0, n; done < row_count; done += n) {
        const int i = cuda->stage_next;
        n = row_count - done < step ? row_count - done : step;
        cuda_must((int)cudaEventSynchronize(cuda->stage_free[i]), "upload of weights");
        memcpy(cuda->stage[i], rows + done * m->shape.cols, (size_t)n * row_bytes);
        cuda_must((int)cudaMemcpyAsync(cuda->stage_on[i], cuda->stage[i], (size_t)n * row_bytes,
                                       cudaMemcpyHostToDevice, cuda->stream),
                  "upload of weights");
        cuda_must(
            kernels_pack(cuda->stream, &m->shape, part, row_begin + done, n, cuda->stage_on[i]),
            "packing of weights");
        cuda_must((int)cudaEventRecord(cuda->stage_free[i], cuda->stream), "upload of weights");
        cuda->stage_next = (i + 1) % CUDA_STAGES;
    }
}

enum status cuda_matrices_open(struct cuda *cuda) {
    for (int i = 0; i < CUDA_STAGES; i++) {
        cuda->stage_on[i] = cuda_take(cuda, STAGE_BYTES, "upload buffer");
        if (!cuda->stage_on[i]) return STATUS_MEMORY;
        if (cudaEventCreateWithFlags(&cuda->stage_free[i], cudaEventDisableTiming) != cudaSuccess ||
            cudaHostAlloc(&cuda->stage[i], STAGE_BYTES, cudaHostAllocDefault) != cudaSuccess) {
            return fail(STATUS_MEMORY, "no pinned host memory to upload weights through");
        }
    }
    return STATUS_OK;
}

void cuda_matrices_close(struct cuda *cuda) {
    for (struct matrix *m = cuda->matrices, *next; m; m = next) {
        next = m->next;
        free(m);
    }
    for (int i = 0; i < CUDA_STAGES; i++) {
        cudaFreeHost(cuda->stage[i]);
        if (cuda->stage_free[i]) cudaEventDestroy(cuda->stage_free[i]);
    }
}
