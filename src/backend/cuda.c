/* cuda.c: the CUDA backend: device, memory, waiting, table of verbs.
 *
 * One rank, one GPU: the rank's number on its host, modulo the devices it can see. The CUDA runtime
 * is linked statically and looks for the driver when first called, so the program starts anywhere.
 *
 * bf16 weights, activations and KV only; --dtype f32 is refused. Errors: a call that can be refused
 * (memory, set-up) returns a status; a verb that fails is a device fault and ends the job, because
 * after one the context is unusable.
 */
#include "backend/cuda.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"

enum { SPIN_POLLS = 2000 };

/* One piece given out by alloc; the list is host memory. */
struct cuda_memory {
    void *data;
    struct cuda_memory *next;
};

void cuda_must(int error, const char *what) {
    if (error != 0) check_device_fault("%s: %s", what, cudaGetErrorString((cudaError_t)error));
}

void cuda_wait(struct cuda *cuda) {
    const double start = cuda_seconds();
    for (unsigned polls = 0;; polls++) {
        const cudaError_t state = cudaStreamQuery(cuda->stream);
        if (state == cudaSuccess) break;
        if (state != cudaErrorNotReady) cuda_must((int)state, "a kernel of this step");
        if (polls < SPIN_POLLS) continue;
        if (cuda->base.watch) cuda->base.watch(cuda->base.watch_user, cuda_seconds() - start);
        sched_yield();
    }
    /* what waited in vain may have left by itself: then nothing here is to be used */
    if (cuda->base.watch) cuda->base.watch(cuda->base.watch_user, cuda_seconds() - start);
}

/* ---- memory ---- */

static enum status take(void **out, size_t bytes, const char *what) {
    const cudaError_t error = cudaMalloc(out, bytes ? bytes : 1);
    if (error != cudaSuccess) {
        size_t left = 0, all = 0;
        cudaGetLastError(); /* an allocation that failed is not a device fault */
        cudaMemGetInfo(&left, &all);
        return fail(STATUS_MEMORY,
                    "%s: the GPU cannot give %.1f MB (%.1f MB free): %s: lower the batch or "
                    "length limits, or use more ranks",
                    what, 1e-6 * (double)bytes, 1e-6 * (double)left, cudaGetErrorString(error));
    }
    /* our stream does not wait for the default one, where the memory is cleared */
    if (cudaMemset(*out, 0, bytes ? bytes : 1) == cudaSuccess &&
        cudaDeviceSynchronize() == cudaSuccess)
        return STATUS_OK;
    cudaFree(*out);
    *out = NULL;
    return fail(STATUS_COMM, "%s: GPU memory cannot be cleared", what);
}

enum status cuda_grow(struct cuda *cuda, struct cuda_buffer *buffer, size_t bytes,
                      const char *what) {
    if (bytes <= buffer->bytes) return STATUS_OK;
    if (buffer->data) cuda_wait(cuda); /* kernels may still use it */
    cudaFree(buffer->data);
    cuda->base.scratch_bytes -= buffer->bytes;
    *buffer = (struct cuda_buffer){0};
    TRY(take(&buffer->data, bytes, what));
    buffer->bytes = bytes;
    cuda->base.scratch_bytes += bytes;
    return STATUS_OK;
}

void *cuda_take(struct cuda *cuda, size_t bytes, const char *what) {
    struct cuda_memory *piece = calloc(1, sizeof *piece);
    if (!piece) {
        fail(STATUS_MEMORY, "%s: no host memory", what);
        return NULL;
    }
    if (take(&piece->data, bytes, what) != STATUS_OK) {
        free(piece);
        return NULL;
    }
    piece->next = cuda->memory;
    cuda->memory = piece;
    return piece->data;
}

static void *cuda_alloc(backend *b, size_t bytes, const char *what) {
    void *out = cuda_take(cuda_of(b), bytes, what);
    if (out) b->scratch_bytes += bytes;
    return out;
}

static enum status cuda_write(backend *b, void *device, const void *host, size_t bytes) {
    struct cuda *cuda = cuda_of(b);
    /* pageable host memory: the runtime has read it when the call returns */
    const cudaError_t error =
        cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, cuda->stream);
    if (error == cudaSuccess) return STATUS_OK;
    return fail(STATUS_COMM, "copying %zu bytes to the GPU: %s", bytes, cudaGetErrorString(error));
}

static void cuda_read(backend *b, void *host, const void *device, size_t bytes) {
    cuda_wait(cuda_of(b)); /* with the watch; then the copy cannot hang */
    cuda_must((int)cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copying to the host");
}

static void cuda_copy(backend *b, void *to, const void *from, size_t bytes) {
    cuda_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, cuda_of(b)->stream),
              "copying on the device");
}

static int64_t cuda_free_bytes(backend *b) {
    size_t left = 0, all = 0;
    return cudaMemGetInfo(&left, &all) == cudaSuccess ? (int64_t)left / cuda_of(b)->sharing : 0;
}

static int64_t cuda_workspace_bytes(backend *b, const struct matrix_spec *const *matrices,
                                    int count, const struct kv_spec *kv) {
    const struct cuda *cuda = cuda_of(b);
    return (int64_t)(cuda_matrix_workspace_bytes(cuda, matrices, count) +
                     cuda_kv_workspace_bytes(cuda, kv) + cuda_lt_workspace_bytes(cuda));
}

static void cuda_tree_sum(backend *b, const float *gathered, int ranks, size_t count, float *sum) {
    cuda_must(kernels_rank_tree(cuda_of(b)->stream, (int64_t)count, ranks, gathered, sum),
              "sum over ranks");
}

/* ---- open and close ---- */

static void cuda_close(backend *b) {
    struct cuda *cuda = cuda_of(b);
    if (cuda->stream) cudaStreamSynchronize(cuda->stream);
    for (struct cuda_memory *piece = cuda->memory, *next; piece; piece = next) {
        next = piece->next;
        cudaFree(piece->data);
        free(piece);
    }
    struct cuda_buffer *const buffers[] = {&cuda->raw,        &cuda->product,     &cuda->attention,
                                           &cuda->candidates, &cuda->records,     &cuda->whole_row,
                                           &cuda->row_list,   &cuda->batch.device};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) cudaFree(buffers[i]->data);
    cuda_matrices_close(cuda);
    cuda_run_close(cuda);
    cuda_lt_close(cuda);
    cudaFreeHost(cuda->batch.pinned);
    cudaFreeHost(cuda->records_pinned);
    if (cuda->batch_sent) cudaEventDestroy(cuda->batch_sent);
    if (cuda->stream) cudaStreamDestroy(cuda->stream);
    free(cuda);
}

enum status cuda_probe(void) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (error == cudaSuccess && count > 0) return STATUS_OK;
    return fail(STATUS_USAGE,
                "--backend cuda: no GPU can be used here (%s): install an NVIDIA driver, or use "
                "--backend cpu",
                error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
}

/* Device, stream, events and the buffers whose sizes are known before any model. */
static enum status open_device(struct cuda *cuda, const struct backend_config *config) {
    int count = 0;
    struct cudaDeviceProp facts;
    TRY(cuda_probe());
    cudaGetDeviceCount(&count);
    cuda->device = config->local_rank % count;
    cuda->sharing = (config->local_ranks + count - 1) / count;
    if (cuda->sharing < 1) cuda->sharing = 1;
    if (config->local_ranks > count && config->local_rank == 0) {
        log_warn("%d ranks share %d GPU%s of this host", config->local_ranks, count,
                 count == 1 ? "" : "s");
    }
    cudaError_t error = cudaSetDevice(cuda->device);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&facts, cuda->device);
    if (error == cudaSuccess)
        error = cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess)
        error = cudaEventCreateWithFlags(&cuda->batch_sent, cudaEventDisableTiming);
    if (error != cudaSuccess) {
        return fail(STATUS_USAGE, "GPU %d cannot be used: %s: use --backend cpu", cuda->device,
                    cudaGetErrorString(error));
    }
    const int refused = kernels_setup();
    if (refused != 0) {
        return fail(STATUS_USAGE,
                    "GPU %d (%s, compute capability %d.%d): the kernels of this program do not run "
                    "on it: %s: build for it, or use --backend cpu",
                    cuda->device, facts.name, facts.major, facts.minor,
                    kernels_error_text(refused));
    }
    static bool told; /* selftest opens many */
    if (told) return STATUS_OK;
    told = true;
    log_info("GPU %d: %s, compute capability %d.%d, %d multiprocessors, %.1f GB", cuda->device,
             facts.name, facts.major, facts.minor, facts.multiProcessorCount,
             1e-9 * (double)facts.totalGlobalMem);
    return STATUS_OK;
}

static enum status take_buffers(struct cuda *cuda) {
    cuda->tiles = cuda_take(cuda, sizeof *cuda->tiles * CUDA_HEADS_MAX, "head tiles");
    cuda->sink = cuda_take(cuda, CUDA_ALIGN, "benchmark sink");
    if (!cuda->tiles || !cuda->sink) return STATUS_MEMORY;
    const size_t list_rows = (size_t)(cuda->logit_rows_max > 0 ? cuda->logit_rows_max : 1);
    TRY(cuda_grow(cuda, &cuda->row_list, sizeof(int32_t) * list_rows, "list of rows"));
    cuda->records_pinned_bytes = (size_t)cuda->probes_max *
                                 (size_t)batch_record_bytes(KERNELS_CANDIDATES_MAX, CUDA_WATCH_MAX);
    TRY(cuda_grow(cuda, &cuda->records, cuda->records_pinned_bytes, "candidate records"));
    if (cudaHostAlloc(&cuda->records_pinned, cuda->records_pinned_bytes, cudaHostAllocDefault) !=
        cudaSuccess) {
        return fail(STATUS_MEMORY, "no pinned host memory for candidate records");
    }
    return STATUS_OK;
}

static const struct backend_ops cuda_ops;

enum status cuda_open(const struct backend_config *config, backend **out) {
    enum status status = STATUS_OK;
    if (config->rows_max > KERNELS_ROWS_MAX) {
        return fail(STATUS_USAGE,
                    "--max-num-batched-tokens is %d: the CUDA kernels take at most %d rows a step",
                    config->rows_max, (int)KERNELS_ROWS_MAX);
    }
    struct cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda) return fail(STATUS_MEMORY, "no memory for the CUDA backend");
    cuda->base.ops = &cuda_ops;
    cuda->base.isa = ISA_CUDA;
    cuda->base.numerics = NUMERICS_CUDA;
    cuda->base.threads = cuda->base.host_threads = 1;
    cuda->local_rank = config->local_rank;
    cuda->local_ranks = config->local_ranks;
    cuda->mode = config->deterministic ? KERNELS_DETERMINISTIC : KERNELS_FAST;
    cuda->rows_max =
        config->rows_max > config->logit_rows_max ? config->rows_max : config->logit_rows_max;
    cuda->logit_rows_max = config->logit_rows_max;
    cuda->probes_max = config->probes_max;
    TRY_GOTO(open_device(cuda, config), out);
    TRY_GOTO(cuda_lt_open(cuda, config->gemm), out);
    TRY_GOTO(take_buffers(cuda), out);
    TRY_GOTO(cuda_batch_open(cuda, config), out);
    TRY_GOTO(cuda_run_open(cuda, config), out);
    cuda->base.stream = cuda->stream;
    *out = &cuda->base;
    return STATUS_OK;
out:
    cuda_close(&cuda->base);
    return status;
}

static const struct backend_ops cuda_ops = {
    .name = "cuda",
    .close = cuda_close,
    .alloc = cuda_alloc,
    .write = cuda_write,
    .read = cuda_read,
    .copy = cuda_copy,
    .free_bytes = cuda_free_bytes,
    .tree_sum = cuda_tree_sum,
    .matrix_new = cuda_matrix_new,
    .matrix_load = cuda_matrix_load,
    .upload = &cuda_upload_ops,
    .host_run = cuda_host_run,
    .kv_new = cuda_kv_new,
    .workspace_bytes = cuda_workspace_bytes,
    .begin = cuda_begin,
    .embed_mix = cuda_embed_mix,
    .add_norm = cuda_add_norm,
    .add_norm_rows = cuda_add_norm_rows,
    .qkv = cuda_qkv,
    .attention = cuda_attention,
    .row_matmul = cuda_row_matmul,
    .gate_up = cuda_gate_up,
    .logits = cuda_logits,
    .candidates = cuda_candidates,
    .probe_logits = cuda_probe_logits,
    .read_sweep = cuda_read_sweep,
    .peak_flops = cuda_peak_flops,
    .delay = cuda_delay,
    .run = &cuda_run_ops,
};
