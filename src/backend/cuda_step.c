/* cuda_step.c: one step on the GPU: the batch goes over in one copy, then verb by verb.
 *
 *   begin   rows | pages | mix_begin | mix_ids | mix_weights | logit_rows | probes | edits | watch_ids
 *           └── written side by side into one pinned buffer, each part on a 16-byte border, one DMA ──┘
 *   verbs   queue kernels of kernels.h on the stream; only candidates and probe_logits wait
 *
 * Segments become rows here: a kernel wants each row's position and page list. No kernel reads the
 * host's batch, and the device copy lives until the next begin, so the slow path (probe_logits) may
 * ask after the step.
 *
 * Memory: see cuda.h. The pinned copy is written again only when its last transfer has ended.
 */
#include <string.h>

#include "backend/cuda.h"

enum {
    PART_ALIGN = 16,
    ATTENTION_ROWS = 64, /* rows whose splits run side by side; more walk theirs in turn */
    ATTENTION_BYTES_MAX = 256 << 20, /* of the workspace */
};

/* ---- the batch ---- */

/* The parts of a batch, in the order of the picture. */
struct part {
    const void *host; /* NULL: written in place */
    size_t bytes, at;
};
enum { ROWS, PAGES, MIX_BEGIN, MIX_IDS, MIX_WEIGHTS, LOGIT_ROWS, PROBES, EDITS, WATCH_IDS, PARTS };

static size_t list_parts(const struct batch *b, struct part parts[PARTS]) {
    int32_t pages = 0, edits = 0, watched = 0;
    for (int32_t s = 0; s < b->segment_count; s++) {
        const int32_t end = b->segments[s].page_begin + b->segments[s].page_count;
        if (end > pages) pages = end;
    }
    for (int32_t p = 0; p < b->probe_count; p++) {
        const struct batch_probe *probe = &b->probes[p];
        if (probe->edit_begin + probe->edit_count > edits)
            edits = probe->edit_begin + probe->edit_count;
        if (probe->watch_begin + probe->watch_count > watched)
            watched = probe->watch_begin + probe->watch_count;
    }
    const size_t rows = (size_t)b->row_count, mixed = (size_t)b->mix_begin[b->row_count];
    parts[ROWS] = (struct part){NULL, rows * sizeof(struct kernels_row), 0};
    parts[PAGES] = (struct part){b->pages, (size_t)pages * sizeof *b->pages, 0};
    parts[MIX_BEGIN] = (struct part){b->mix_begin, (rows + 1) * sizeof *b->mix_begin, 0};
    parts[MIX_IDS] = (struct part){b->mix_ids, mixed * sizeof *b->mix_ids, 0};
    parts[MIX_WEIGHTS] = (struct part){b->mix_weights, mixed * sizeof *b->mix_weights, 0};
    parts[LOGIT_ROWS] =
        (struct part){b->logit_rows, (size_t)b->logit_row_count * sizeof *b->logit_rows, 0};
    parts[PROBES] = (struct part){b->probes, (size_t)b->probe_count * sizeof *b->probes, 0};
    parts[EDITS] = (struct part){b->edits, (size_t)edits * sizeof *b->edits, 0};
    parts[WATCH_IDS] = (struct part){b->watch_ids, (size_t)watched * sizeof *b->watch_ids, 0};
    size_t at = 0;
    for (int i = 0; i < PARTS; i++) {
        parts[i].at = at;
        at += (parts[i].bytes + PART_ALIGN - 1) / PART_ALIGN * PART_ALIGN;
    }
    return at;
}

/* Returns the number of tokens the longest row sees. */
static int32_t fill_rows(const struct batch *b, struct kernels_row *rows) {
    int32_t context = 0;
    for (int32_t r = 0; r < b->row_count; r++) rows[r] = (struct kernels_row){.position = -1};
    for (int32_t s = 0; s < b->segment_count; s++) {
        const struct batch_segment *segment = &b->segments[s];
        ASSERT_LE(segment->row_begin + segment->row_count, b->row_count);
        ASSERT_LE(segment->position + segment->row_count,
                  segment->page_count * KERNELS_PAGE_TOKENS);
        for (int32_t i = 0; i < segment->row_count; i++) {
            rows[segment->row_begin + i] = (struct kernels_row){.position = segment->position + i,
                                                                .page_begin = segment->page_begin};
        }
        if (segment->position + segment->row_count > context)
            context = segment->position + segment->row_count;
    }
    return context;
}

/* Room for a batch of `bytes`, on both sides. */
static enum status batch_room(struct cuda *cuda, size_t bytes) {
    struct cuda_batch *to = &cuda->batch;
    if (bytes <= to->pinned_bytes) return STATUS_OK;
    const size_t room = 2 * bytes; /* growing is rare then */
    cudaFreeHost(to->pinned);
    to->pinned_bytes = 0;
    if (cudaHostAlloc((void **)&to->pinned, room, cudaHostAllocDefault) != cudaSuccess) {
        to->pinned = NULL;
        return fail(STATUS_MEMORY, "no pinned host memory for a batch of %zu bytes", bytes);
    }
    TRY(cuda_grow(cuda, &to->device, room, "batch"));
    to->pinned_bytes = room;
    return STATUS_OK;
}

void cuda_begin(backend *b, const struct batch *batch) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_batch *to = &cuda->batch;
    struct part parts[PARTS];
    ASSERT_LE(batch->row_count, cuda->rows_max);
    ASSERT_LE(batch->probe_count, cuda->probes_max);
    const size_t bytes = list_parts(batch, parts);
    cuda_must((int)cudaEventSynchronize(cuda->batch_sent), "batch");
    if (batch_room(cuda, bytes) != STATUS_OK) check_device_fault("%s", fail_text());
    to->context_max = fill_rows(batch, (struct kernels_row *)(to->pinned + parts[ROWS].at));
    for (int i = 0; i < PARTS; i++) {
        if (parts[i].host && parts[i].bytes > 0)
            memcpy(to->pinned + parts[i].at, parts[i].host, parts[i].bytes);
    }
    cuda_must((int)cudaMemcpyAsync(to->device.data, to->pinned, bytes, cudaMemcpyHostToDevice,
                                   cuda->stream),
              "batch");
    cuda_must((int)cudaEventRecord(cuda->batch_sent, cuda->stream), "batch");

    const unsigned char *at = to->device.data;
    to->row_count = batch->row_count;
    to->host_logit_rows = batch->logit_rows;
    to->rows = (const struct kernels_row *)(at + parts[ROWS].at);
    to->pages = (const int32_t *)(at + parts[PAGES].at);
    to->mix_begin = (const int32_t *)(at + parts[MIX_BEGIN].at);
    to->mix_ids = (const uint32_t *)(at + parts[MIX_IDS].at);
    to->mix_weights = (const float *)(at + parts[MIX_WEIGHTS].at);
    to->logit_rows = (const int32_t *)(at + parts[LOGIT_ROWS].at);
    to->probes = (struct kernels_probes){
        .probe_count = batch->probe_count,
        .candidate_count = batch->candidate_count,
        .watch_max = batch->watch_max,
        .probes = (const struct batch_probe *)(at + parts[PROBES].at),
        .edits = (const struct batch_edit *)(at + parts[EDITS].at),
        .watch_ids = (const uint32_t *)(at + parts[WATCH_IDS].at),
    };
}

static struct kernels_borders borders_of(int slab_count, const int64_t *vocab_begin) {
    struct kernels_borders out = {.count = slab_count};
    ASSERT_LE(slab_count, KERNELS_PARTS_MAX);
    for (int s = 0; s <= slab_count; s++) out.begin[s] = vocab_begin[s];
    return out;
}

/* ---- embedding and norms ---- */

void cuda_embed_mix(backend *b, const struct batch *batch, const matrix *embed, int slab_count,
                    const int64_t *vocab_begin, float *out) {
    const struct cuda *cuda = cuda_of(b);
    const struct cuda_batch *on = &cuda->batch;
    ASSERT_EQ(batch->row_count, on->row_count);
    cuda_must(
        kernels_embed_mix(cuda->stream, batch->row_count, on->mix_begin, on->mix_ids,
                          on->mix_weights, &embed->shape, borders_of(slab_count, vocab_begin), out),
        "embedding mixture");
}

void cuda_add_norm(backend *b, int rows, int hidden, bool first, float scale, const float *sum,
                   float *x, const float *weight, float eps, enum backend_dtype dtype, void *h) {
    ASSERT(dtype == BACKEND_BF16);
    cuda_must(
        kernels_add_norm(cuda_of(b)->stream, rows, hidden, first, scale, sum, x, weight, eps, h),
        "norm");
}

void cuda_add_norm_rows(backend *b, const int32_t *rows, int row_count, int hidden,
                        const float *sum, const float *x, const float *weight, float eps,
                        enum backend_dtype dtype, void *h) {
    struct cuda *cuda = cuda_of(b);
    const int32_t *on_device = cuda->batch.logit_rows;
    ASSERT(dtype == BACKEND_BF16);
    if (rows != cuda->batch.host_logit_rows) {
        ASSERT_LE(row_count, cuda->logit_rows_max);
        on_device = cuda->row_list.data;
        cuda_must((int)cudaMemcpyAsync(cuda->row_list.data, rows, sizeof *rows * (size_t)row_count,
                                       cudaMemcpyHostToDevice, cuda->stream),
                  "list of rows");
    }
    cuda_must(
        kernels_add_norm_rows(cuda->stream, on_device, row_count, hidden, sum, x, weight, eps, h),
        "final norm");
}

/* ---- attention ---- */

enum status cuda_kv_new(backend *b, const struct kv_spec *spec) {
    struct cuda *cuda = cuda_of(b);
    ASSERT(!cuda->kv.data);
    if (spec->dtype != BACKEND_BF16) {
        return fail(STATUS_USAGE,
                    "the CUDA backend keeps keys and values in bf16: use --kv-dtype "
                    "bf16");
    }
    if (spec->head_dim > KERNELS_HEAD_DIM_MAX || spec->heads > CUDA_HEADS_MAX) {
        return fail(STATUS_USAGE,
                    "the CUDA kernels take heads of at most %d dimensions, and %d of them",
                    (int)KERNELS_HEAD_DIM_MAX, (int)CUDA_HEADS_MAX);
    }
    struct kernels_kv kv = {.layers = spec->layers,
                            .page_count = spec->page_count,
                            .kv_heads = spec->kv_heads,
                            .head_dim = spec->head_dim};
    const size_t bytes = kernels_kv_bytes(&kv), scratch = b->scratch_bytes;
    kv.data = b->ops->alloc(b, bytes, "KV cache");
    if (!kv.data) return STATUS_MEMORY;
    b->scratch_bytes = scratch;
    b->kv_bytes += bytes;
    cuda->kv = kv;

    const size_t width = (size_t)(spec->heads + 2 * spec->kv_heads) * (size_t)spec->head_dim;
    TRY(cuda_grow(cuda, &cuda->raw, sizeof(float) * (size_t)cuda->rows_max * width,
                  "queries, keys and values of a step"));
    const int rows = cuda->rows_max < ATTENTION_ROWS ? cuda->rows_max : ATTENTION_ROWS;
    size_t room =
        kernels_attention_workspace_bytes(rows, spec->heads, spec->head_dim, spec->positions_max);
    if (room > ATTENTION_BYTES_MAX) room = ATTENTION_BYTES_MAX;
    return cuda_grow(cuda, &cuda->attention, room, "workspace of the attention");
}

/* Runs of query heads that read one kv head; the same in every layer, so usually there is nothing
 * to do. */
static void make_tiles(struct cuda *cuda, const struct attention_spec *spec) {
    struct kernels_tile tiles[CUDA_HEADS_MAX];
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
    cuda_must(kernels_product(cuda->stream, cuda->mode, rows, &spec->qkv->shape, h, cuda->raw.data,
                              cuda->product.data),
              "product of q, k and v");
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
    cuda_must(kernels_attention(cuda->stream, batch->row_count, cuda->batch.rows, cuda->batch.pages,
                                spec->layer, spec->heads, cuda->tiles, cuda->tile_count, cuda->kv,
                                cuda->batch.context_max, q, o, cuda->attention.data,
                                cuda->attention.bytes),
              "attention");
}

/* ---- products ---- */

static void product(backend *b, int rows, const matrix *w, const void *in, float *out,
                    const char *what) {
    struct cuda *cuda = cuda_of(b);
    if (rows == 0) return;
    cuda_must(
        kernels_product(cuda->stream, cuda->mode, rows, &w->shape, in, out, cuda->product.data),
        what);
}

void cuda_row_matmul(backend *b, int rows, const matrix *w, const void *in, float *partial) {
    product(b, rows, w, in, partial, "product over the rank's columns");
}

void cuda_logits(backend *b, int rows, const matrix *w, const void *h, float *logits) {
    product(b, rows, w, h, logits, "logits");
}

void cuda_gate_up(backend *b, int rows, const matrix *w, const void *h, void *act) {
    struct cuda *cuda = cuda_of(b);
    if (rows == 0) return;
    cuda_must(
        kernels_gate_up(cuda->stream, cuda->mode, rows, &w->shape, h, act, cuda->product.data),
        "gate and up");
}

/* ---- answers ---- */

void cuda_candidates(backend *b, const struct batch *batch, const float *logits, int slab_count,
                     const int64_t *vocab_begin, int64_t vocab_count, void *records) {
    struct cuda *cuda = cuda_of(b);
    if (batch->probe_count == 0) return;
    const size_t bytes = (size_t)batch->probe_count *
                         (size_t)batch_record_bytes(batch->candidate_count, batch->watch_max);
    ASSERT_EQ(batch->probe_count, cuda->batch.probes.probe_count);
    ASSERT_LE(batch->candidate_count, KERNELS_CANDIDATES_MAX);
    ASSERT_LE(bytes, cuda->records_pinned_bytes);
    cuda_must(kernels_candidates(cuda->stream, cuda->batch.probes, logits,
                                 borders_of(slab_count, vocab_begin), vocab_count,
                                 cuda->records.data, cuda->candidates.data),
              "candidates");
    cuda_must((int)cudaMemcpyAsync(cuda->records_pinned, cuda->records.data, bytes,
                                   cudaMemcpyDeviceToHost, cuda->stream),
              "candidates");
    cuda_wait(cuda);
    memcpy(records, cuda->records_pinned, bytes);
}

void cuda_probe_logits(backend *b, const struct batch *batch, int probe, const float *logits,
                       int slab_count, const int64_t *vocab_begin, int64_t vocab_count,
                       float *out) {
    struct cuda *cuda = cuda_of(b);
    const size_t bytes = sizeof *out * (size_t)(vocab_begin[slab_count] - vocab_begin[0]);
    ASSERT(probe >= 0 && probe < batch->probe_count);
    ASSERT_EQ(batch->probe_count, cuda->batch.probes.probe_count);
    ASSERT_LE(bytes, cuda->whole_row.bytes);
    cuda_must(kernels_probe_logits(cuda->stream, cuda->batch.probes, probe, logits,
                                   borders_of(slab_count, vocab_begin), vocab_count,
                                   cuda->whole_row.data),
              "logits of a probe");
    b->ops->read(b, out, cuda->whole_row.data, bytes);
}
