/* cuda_attention.c: the KV pool on the GPU, and the verbs that write and read it: qkv, attention.
 *
 * Keys and values stay in the pool for as long as the backend lives; which page belongs to whom is
 * the batch's matter. Query heads that share a kv head are grouped into tiles once, since every
 * layer has the same. Thread: engine. Memory: see cuda.h.
 */
#include <string.h>

#include "backend/cuda.h"

enum { ATTENTION_BYTES_MAX = 256 << 20 }; /* of the workspace */

/* Room for the splits of a step, when as many tokens as the pool has are read in splits; sharing of
 * pages can ask for more, and then the kernel divides the work more coarsely. */
static size_t attention_bytes(const struct kv_spec *spec, int rows) {
    /* query heads of a kv head may be cut by a rank's border: one tile more */
    const int tiles = spec->heads / KERNELS_HEADS_TILE + spec->kv_heads + 1;
    const int pages_a_split = KERNELS_SPLIT_TOKENS / KERNELS_PAGE_TOKENS;
    const int64_t all = (int64_t)rows * (spec->positions_max / KERNELS_SPLIT_TOKENS + 1);
    const int64_t of_pool = spec->page_count / pages_a_split + rows;
    const int64_t splits = all < of_pool ? all : of_pool;
    const size_t room = splits > INT32_MAX / tiles
                            ? ATTENTION_BYTES_MAX
                            : kernels_attention_workspace_bytes((int)splits, tiles, spec->head_dim,
                                                                KERNELS_SPLIT_TOKENS);
    return room < ATTENTION_BYTES_MAX ? room : ATTENTION_BYTES_MAX;
}

static size_t raw_bytes(const struct kv_spec *spec, int rows) {
    return sizeof(float) * (size_t)rows * (size_t)(spec->heads + 2 * spec->kv_heads) *
           (size_t)spec->head_dim;
}

static size_t scales_bytes(const struct kv_spec *spec) {
    return sizeof(float) * 2 * (size_t)spec->layers * (size_t)spec->kv_heads;
}

size_t cuda_kv_workspace_bytes(const struct cuda *cuda, const struct kv_spec *spec) {
    return raw_bytes(spec, cuda->rows_max) + attention_bytes(spec, cuda->rows_max) +
           (spec->dtype == BACKEND_FP8 ? scales_bytes(spec) : 0);
}

enum status cuda_kv_new(backend *b, const struct kv_spec *spec) {
    struct cuda *cuda = cuda_of(b);
    ASSERT(!cuda->kv.data);
    if (spec->dtype == BACKEND_F32) {
        return fail(STATUS_USAGE,
                    "the CUDA backend keeps keys and values in bf16 or fp8: use --kv-dtype bf16");
    }
    if (spec->dtype == BACKEND_FP8 && spec->head_dim % 4 != 0) {
        return fail(STATUS_USAGE,
                    "heads of %d dimensions, no multiple of 4, cannot be kept in fp8: use "
                    "--kv-dtype bf16",
                    spec->head_dim);
    }
    if (spec->head_dim > KERNELS_HEAD_DIM_MAX || spec->heads > CUDA_HEADS_MAX) {
        return fail(STATUS_USAGE,
                    "the CUDA kernels take heads of at most %d dimensions, and %d of them",
                    (int)KERNELS_HEAD_DIM_MAX, (int)CUDA_HEADS_MAX);
    }
    struct kernels_kv kv = {.layers = spec->layers,
                            .page_count = spec->page_count,
                            .kv_heads = spec->kv_heads,
                            .head_dim = spec->head_dim,
                            .type = spec->dtype == BACKEND_FP8 ? KERNELS_KV_FP8 : KERNELS_KV_BF16};
    const size_t bytes = kernels_kv_bytes(&kv), scratch = b->scratch_bytes;
    kv.data = b->ops->alloc(b, bytes, "KV cache");
    if (!kv.data) return STATUS_MEMORY;
    b->scratch_bytes = scratch;
    b->kv_bytes += bytes;
    if (spec->dtype == BACKEND_FP8 && spec->scales) {
        float *scales = b->ops->alloc(b, scales_bytes(spec), "scales of the KV cache");
        if (!scales) return STATUS_MEMORY;
        TRY(b->ops->write(b, scales, spec->scales, scales_bytes(spec)));
        kv.scales = scales;
    }
    cuda->kv = kv;

    TRY(cuda_grow(cuda, &cuda->raw, raw_bytes(spec, cuda->rows_max),
                  "queries, keys and values of a step"));
    TRY(cuda_grow(cuda, &cuda->attention, attention_bytes(spec, cuda->rows_max),
                  "workspace of the attention"));
    return cuda_lt_tune(cuda);
}

/* Runs of query heads that read one kv head; the same in every layer, so usually there is nothing
 * to do. */
static void make_tiles(struct cuda *cuda, const struct attention_spec *spec) {
    struct kernels_tile *tiles = cuda->host_tiles; /* a copy may be made after we have returned */
    const size_t bytes = sizeof *spec->kv_of_head * (size_t)spec->heads;
    ASSERT_LE(spec->heads, CUDA_HEADS_MAX);
    if (cuda->head_count == spec->heads && memcmp(cuda->kv_of_head, spec->kv_of_head, bytes) == 0)
        return;
    int count = 0;
    for (int h = 0; h < spec->heads; h++) {
        struct kernels_tile *last = count > 0 ? &tiles[count - 1] : NULL;
        if (last && last->kv_head == spec->kv_of_head[h] && last->head_count < KERNELS_HEADS_TILE) {
            last->head_count++;
        } else {
            tiles[count++] = (struct kernels_tile){h, 1, spec->kv_of_head[h]};
        }
    }
    memcpy(cuda->kv_of_head, spec->kv_of_head, bytes);
    cuda->head_count = spec->heads;
    cuda->tile_count = count;
    cuda->tile_heads_max = 1;
    for (int i = 0; i < count; i++)
        if (tiles[i].head_count > cuda->tile_heads_max) cuda->tile_heads_max = tiles[i].head_count;
    cuda_must((int)cudaMemcpyAsync(cuda->tiles, tiles, sizeof *tiles * (size_t)count,
                                   cudaMemcpyHostToDevice, cuda->stream),
              "head tiles");
}

void cuda_qkv(backend *b, const struct batch *batch, const struct attention_spec *spec,
              const void *h, float *q) {
    struct cuda *cuda = cuda_of(b);
    const int rows = batch->row_count;
    const struct kernels_heads heads = {.heads = spec->heads,
                                        .layer = spec->layer,
                                        .bias = spec->bias,
                                        .q_norm = spec->q_norm,
                                        .k_norm = spec->k_norm,
                                        .norm_eps = spec->norm_eps,
                                        .rope_cos = spec->rope_cos,
                                        .rope_sin = spec->rope_sin};
    ASSERT_EQ(rows, cuda->batch.row_count);
    ASSERT_LE(sizeof(float) * (size_t)rows * (size_t)spec->qkv->shape.rows, cuda->raw.bytes);
    cuda_product(cuda, rows, spec->qkv, h, cuda->raw.data, "product of q, k and v");
    cuda_must(kernels_heads_append(cuda->stream, rows, cuda->batch.rows, cuda->batch.pages, heads,
                                   cuda->kv, cuda->raw.data, q),
              "heads");
}

void cuda_attention(backend *b, const struct batch *batch, const struct attention_spec *spec,
                    const float *q, enum backend_dtype dtype, void *o) {
    struct cuda *cuda = cuda_of(b);
    ASSERT(dtype == BACKEND_BF16);
    ASSERT_EQ(batch->row_count, cuda->batch.row_count);
    make_tiles(cuda, spec);
    int run_max = 1;
    for (int i = 0; i < batch->segment_count; i++)
        if (batch->segments[i].row_count > run_max) run_max = batch->segments[i].row_count;
    const struct kernels_attention attention = {.layer = spec->layer,
                                                .heads = spec->heads,
                                                .tile_count = cuda->tile_count,
                                                .tile_heads_max = cuda->tile_heads_max,
                                                .tiles = cuda->tiles,
                                                .context_max = cuda->batch.context_max,
                                                .run_max = run_max};
    cuda_must(
        kernels_attention(cuda->stream, batch->row_count, cuda->batch.rows, cuda->batch.pages,
                          attention, cuda->kv, q, o, cuda->attention.data, cuda->attention.bytes),
        "attention");
}
