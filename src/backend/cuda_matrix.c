/* cuda_matrix.c: packed weights on the GPU: taking memory for them, and the way rows get there.
 *
 * Between upload begin and end there are host threads (the pool of cpu_pool.h on this rank's share
 * of the cores) and two pinned slots. The threads fill one with rows in the matrix's own number
 * format while the device takes them from the other:
 *
 *   file ─ threads: read, check, round ─► slot[i] (pinned) ─ DMA ─► on_device ─ kernels_pack ─► matrix
 *
 * Copies and packing share the one stream, so one buffer on the device is enough; packing takes a
 * twentieth of the time of a copy over PCIe. A slot is free again when its event has passed.
 * cuda_matrix_load is the way for rows that lie anywhere (self-test).
 *
 * Thread: engine. Memory: matrices live as long as the backend, slots until end. The workspaces of
 * the products and of the candidates are taken here, because the largest matrix decides their size.
 */
#include <stdlib.h>

#include "backend/cpu_pool.h"
#include "backend/cuda.h"
#include "base/bf16.h"
#include "base/fp8.h"

struct cuda_upload {
    cpu_pool *pool;
    void *slot[BACKEND_SLOTS], *on_device;
    cudaEvent_t taken[BACKEND_SLOTS];
    size_t slot_bytes;
};

static bool shape_of(const struct matrix_spec *spec, struct kernels_matrix *out) {
    static const enum kernels_kind kinds[] = {[MATRIX_COLUMN] = KERNELS_COLUMN,
                                              [MATRIX_GATE_UP] = KERNELS_GATE_UP,
                                              [MATRIX_ROW] = KERNELS_ROW};
    return kernels_matrix_shape(spec->dtype == BACKEND_FP8 ? KERNELS_FP8 : KERNELS_BF16,
                                kinds[spec->kind], spec->rows, spec->cols, spec->slab_count,
                                spec->slab_begin, out);
}

static size_t row_bytes(int64_t vocab) { return sizeof(float) * (size_t)vocab; }

size_t cuda_matrix_workspace_bytes(const struct cuda *cuda,
                                   const struct matrix_spec *const *matrices, int count) {
    int row_tiles_max = 0;
    int64_t vocab_max = 0;
    for (int i = 0; i < count; i++) {
        struct kernels_matrix shape;
        if (!shape_of(matrices[i], &shape)) continue; /* matrix_new will refuse it */
        if (shape.row_tiles > row_tiles_max) row_tiles_max = shape.row_tiles;
        if (matrices[i]->kind == MATRIX_COLUMN && shape.rows > vocab_max) vocab_max = shape.rows;
    }
    const size_t products = kernels_product_workspace_bytes(row_tiles_max);
    if (vocab_max == 0) return products;
    return products + kernels_candidates_workspace_bytes(cuda->probes_max, vocab_max) +
           row_bytes(vocab_max);
}

enum status cuda_matrix_new(backend *b, const struct matrix_spec *spec, matrix **out) {
    struct cuda *cuda = cuda_of(b);
    if (spec->dtype == BACKEND_F32) {
        return fail(STATUS_USAGE,
                    "the CUDA backend computes with bf16 or fp8 weights: use --dtype bf16");
    }
    matrix *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for a matrix");
    m->next = cuda->matrices; /* freed by close, whatever comes next */
    cuda->matrices = m;
    m->lookup_only = spec->lookup_only;
    if (!shape_of(spec, &m->shape)) {
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
        TRY(cuda_grow(cuda, &cuda->whole_row, row_bytes(spec->rows), "one row of logits"));
    }
    *out = m;
    return STATUS_OK;
}

void cuda_matrix_load(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                      const float *rows) {
    struct cuda *cuda = cuda_of(b);
    void *on_device = NULL;
    const size_t bytes = (size_t)row_count * (size_t)m->shape.cols * sizeof(float);
    if (bytes == 0) return;
    ASSERT(m->shape.dtype == KERNELS_BF16);
    cuda_must((int)cudaMalloc(&on_device, bytes), "memory for rows of weights");
    cuda_must((int)cudaMemcpyAsync(on_device, rows, bytes, cudaMemcpyHostToDevice, cuda->stream),
              "upload of weights");
    cuda_must(kernels_pack(cuda->stream, &m->shape, part, row_begin, row_count, on_device),
              "packing of weights");
    cuda_wait(cuda);
    cudaFree(on_device);
}

/* ---- upload ---- */

static void upload_end(backend *b) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_upload *u = cuda->upload;
    if (!u) return;
    cudaStreamSynchronize(cuda->stream);
    for (int i = 0; i < BACKEND_SLOTS; i++) {
        cudaFreeHost(u->slot[i]);
        if (u->taken[i]) cudaEventDestroy(u->taken[i]);
    }
    cudaFree(u->on_device);
    cpu_pool_close(u->pool);
    free(u);
    cuda->upload = NULL;
    b->host_threads = 1;
}

static enum status upload_begin(backend *b, size_t *bytes, void *slot[BACKEND_SLOTS]) {
    struct cuda *cuda = cuda_of(b);
    enum status status = STATUS_OK;
    struct cuda_upload *u = cuda->upload = calloc(1, sizeof *u);
    if (!u) return fail(STATUS_MEMORY, "no memory for an upload");
    TRY_GOTO(cpu_pool_open(0, cuda->local_rank, cuda->local_ranks, &u->pool), out);
    b->host_threads = cpu_pool_threads(u->pool);
    u->slot_bytes = *bytes *= (size_t)b->host_threads;
    cudaError_t error = cudaMalloc(&u->on_device, u->slot_bytes);
    for (int i = 0; i < BACKEND_SLOTS && error == cudaSuccess; i++) {
        error = cudaEventCreateWithFlags(&u->taken[i], cudaEventDisableTiming);
        if (error == cudaSuccess)
            error = cudaHostAlloc(&u->slot[i], u->slot_bytes, cudaHostAllocDefault);
        slot[i] = u->slot[i];
    }
    if (error != cudaSuccess) {
        status = fail(STATUS_MEMORY, "%d pinned buffers of %.0f MB to upload weights through: %s",
                      (int)BACKEND_SLOTS, 1e-6 * (double)u->slot_bytes, cudaGetErrorString(error));
    }
out:
    if (status != STATUS_OK) upload_end(b);
    return status;
}

/* The slot that holds this address, and how far into it. */
static int slot_of(const struct cuda_upload *u, const void *p, size_t *at) {
    int i = 0;
    while (i < BACKEND_SLOTS && !((const char *)p >= (const char *)u->slot[i] &&
                                  (const char *)p < (const char *)u->slot[i] + u->slot_bytes))
        i++;
    ASSERT_LE(i, BACKEND_SLOTS - 1);
    *at = (size_t)((const char *)p - (const char *)u->slot[i]);
    return i;
}

/* To the same place of the buffer on the device. */
static void *send(struct cuda *cuda, const void *p, size_t bytes, int *slot) {
    const struct cuda_upload *u = cuda->upload;
    size_t at;
    *slot = slot_of(u, p, &at);
    ASSERT_LE(bytes, u->slot_bytes - at);
    void *to = (char *)u->on_device + at;
    cuda_must((int)cudaMemcpyAsync(to, p, bytes, cudaMemcpyHostToDevice, cuda->stream),
              "upload of weights");
    return to;
}

static void upload_rows(backend *b, matrix *m, int part, int64_t row_begin, int64_t row_count,
                        const void *rows, const float *scales) {
    struct cuda *cuda = cuda_of(b);
    const struct kernels_matrix *shape = &m->shape;
    const size_t count = (size_t)row_count * (size_t)shape->cols;
    int slot, error;
    if (count == 0) return;
    if (shape->dtype == KERNELS_FP8) {
        enum { BLOCK_TILES = FP8_BLOCK / KERNELS_TILE };
        const size_t groups = (size_t)((row_count + FP8_BLOCK - 1) / FP8_BLOCK);
        const size_t blocks = (size_t)(shape->col_tiles / BLOCK_TILES);
        const float *scales_there = send(cuda, scales, groups * blocks * sizeof *scales, &slot);
        const void *rows_there = send(cuda, rows, count, &slot);
        error = kernels_pack_fp8(cuda->stream, shape, part, row_begin, row_count, rows_there,
                                 scales_there);
    } else {
        const void *there = send(cuda, rows, count * sizeof(bf16), &slot);
        error = kernels_pack_bf16(cuda->stream, shape, part, row_begin, row_count, there);
    }
    cuda_must(error, "packing of weights");
    cuda_must((int)cudaEventRecord(cuda->upload->taken[slot], cuda->stream), "upload of weights");
}

static void upload_wait(backend *b, int slot) {
    cuda_must((int)cudaEventSynchronize(cuda_of(b)->upload->taken[slot]), "upload of weights");
}

const struct backend_upload cuda_upload_ops = {upload_begin, upload_rows, upload_wait, upload_end};

void cuda_host_run(backend *b, void (*run)(void *context, int thread), void *context) {
    struct cuda *cuda = cuda_of(b);
    if (cuda->upload)
        cpu_pool_run(cuda->upload->pool, run, context);
    else
        run(context, 0);
}

void cuda_matrices_close(struct cuda *cuda) {
    upload_end(&cuda->base);
    for (struct matrix *m = cuda->matrices, *next; m; m = next) {
        next = m->next;
        free(m);
    }
}
