/* cuda_step.c: one step on the GPU: the batch goes over in one copy; embedding, norms, answers.
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

enum { PART_ALIGN = 16 };

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

/* Room for the longest batch there can be, on both sides. */
enum status cuda_batch_open(struct cuda *cuda, const struct backend_config *config) {
    struct cuda_batch *to = &cuda->batch;
    const struct batch_limits *l = &config->batch;
    const int64_t rows = cuda->rows_max;
    const int64_t sizes[PARTS] = {[ROWS] = rows * (int64_t)sizeof(struct kernels_row),
                                  [PAGES] = l->pages * (int64_t)sizeof(int32_t),
                                  [MIX_BEGIN] = (rows + 1) * (int64_t)sizeof(int32_t),
                                  [MIX_IDS] = l->mix * (int64_t)sizeof(uint32_t),
                                  [MIX_WEIGHTS] = l->mix * (int64_t)sizeof(float),
                                  [LOGIT_ROWS] = cuda->logit_rows_max * (int64_t)sizeof(int32_t),
                                  [PROBES] = cuda->probes_max * (int64_t)sizeof(struct batch_probe),
                                  [EDITS] = l->edits * (int64_t)sizeof(struct batch_edit),
                                  [WATCH_IDS] = l->watch * (int64_t)sizeof(uint32_t)};
    size_t bytes = 0;
    for (int i = 0; i < PARTS; i++) bytes += (size_t)sizes[i] + PART_ALIGN;
    if (cudaHostAlloc((void **)&to->pinned, bytes, cudaHostAllocDefault) != cudaSuccess) {
        to->pinned = NULL;
        return fail(STATUS_MEMORY, "no pinned host memory for a batch of %zu bytes", bytes);
    }
    to->pinned_bytes = bytes;
    return cuda_grow(cuda, &to->device, bytes, "batch");
}

void cuda_begin(backend *b, const struct batch *batch) {
    struct cuda *cuda = cuda_of(b);
    struct cuda_batch *to = &cuda->batch;
    struct part parts[PARTS];
    ASSERT_LE(batch->row_count, cuda->rows_max);
    ASSERT_LE(batch->probe_count, cuda->probes_max);
    const size_t bytes = list_parts(batch, parts);
    ASSERT_LE(bytes, to->pinned_bytes);
    cuda_must((int)cudaEventSynchronize(cuda->batch_sent), "batch");
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

struct kernels_borders cuda_borders(int slab_count, const int64_t *vocab_begin) {
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
    cuda_must(kernels_embed_mix(cuda->stream, batch->row_count, on->mix_begin, on->mix_ids,
                                on->mix_weights, &embed->shape,
                                cuda_borders(slab_count, vocab_begin), out),
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
                                 cuda_borders(slab_count, vocab_begin), vocab_count,
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
                                   cuda_borders(slab_count, vocab_begin), vocab_count,
                                   cuda->whole_row.data),
              "logits of a probe");
    b->ops->read(b, out, cuda->whole_row.data, bytes);
}
