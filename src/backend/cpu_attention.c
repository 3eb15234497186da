/* cpu_attention.c: the KV pool, and the two verbs around it.
 *
 * A page holds 64 positions; for each (layer, page, kv head) there is one block of contiguous
 * memory, keys then values, laid out for the lanes of a vector (bf16 shown; f32 has no pairs):
 *
 *   keys    [hd / 2][64 tokens][2]     scores: lanes are tokens, the chain runs over hd
 *   values  [64 tokens][hd]            output: lanes are dims, the chain runs over tokens
 *
 * Attention of one row and a tile of up to 8 query heads that read the same kv head: every block
 * from scratch gives (m, l, o), and the triples are joined in ascending block order, whoever
 * computed them (cpu.md §8). Normally a thread takes whole (row, tile) items, picked from a counter
 * because their lengths differ. With few items and a long context the blocks of one item are shared
 * out in windows instead; the joins happen in the same order, so the bits are the same. Positions
 * beyond a row's own are never read as numbers: pages may hold anything there.
 */
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/cpu.h"

enum {
    HEADS_MAX = 1024,
    SPLIT_TOKENS = 2048, /* longer contexts may be shared out by blocks ... */
    SPLIT_ITEMS = 4,     /* ... when there are fewer items a thread than this */
    WINDOW_BLOCKS = 16,  /* blocks a thread computes before the triples are joined */
    HEAD_INLINE_FLOATS = 4096,
};

static size_t element_bytes(const struct cpu_kv *kv) { return backend_dtype_bytes(kv->spec.dtype); }

static unsigned char *kv_block(const struct cpu_kv *kv, int layer, int32_t page, int head) {
    const size_t index =
        ((size_t)layer * (size_t)kv->spec.page_count + (size_t)page) * (size_t)kv->spec.kv_heads +
        (size_t)head;
    return kv->data + index * kv->block_bytes;
}

/* Floats of one triple set: m and l of 8 heads, then o. */
static size_t triple_floats(const struct cpu_kv *kv) {
    return 2 * ATTENTION_TILE + (size_t)ATTENTION_TILE * (size_t)kv->dim_stride;
}

enum status cpu_kv_new(backend *b, const struct kv_spec *spec) {
    struct cpu *cpu = cpu_of(b);
    struct cpu_kv *kv = &cpu->kv;
    ASSERT(!kv->data);
    ASSERT(spec->dtype != BACKEND_FP8); /* refused with the options */
    const size_t threads = (size_t)b->threads;
    kv->spec = *spec;
    kv->dim_stride = (spec->head_dim + LANES - 1) / LANES * LANES;
    const size_t dims =
        (size_t)spec->head_dim + (spec->dtype == BACKEND_BF16 ? spec->head_dim % 2 : 0);
    kv->keys_bytes = dims * KV_BLOCK_TOKENS * element_bytes(kv);
    kv->block_bytes = kv->keys_bytes + (size_t)kv->dim_stride * KV_BLOCK_TOKENS * element_bytes(kv);
    const size_t blocks = (size_t)spec->layers * (size_t)spec->page_count * (size_t)spec->kv_heads;
    kv->data = cpu_memory_take(&cpu->memory, blocks * kv->block_bytes, "KV cache");
    if (!kv->data) return STATUS_MEMORY;
    b->kv_bytes += blocks * kv->block_bytes;

    kv->raw = cpu_scratch(cpu, sizeof(float) * (size_t)cpu->rows_max * 2 * (size_t)spec->kv_heads *
                                   (size_t)spec->head_dim);
    /* q as fp32 and bf16, scores, a block's triple, the running triple */
    kv->scratch_floats = (size_t)ATTENTION_TILE * ((size_t)kv->dim_stride * 2 + KV_BLOCK_TOKENS) +
                         2 * triple_floats(kv);
    kv->scratch_floats = (kv->scratch_floats + LANES - 1) / LANES * LANES;
    kv->thread_scratch = cpu_scratch(cpu, sizeof(float) * threads * kv->scratch_floats);
    kv->partial_blocks = WINDOW_BLOCKS * b->threads;
    kv->partial = cpu_scratch(cpu, sizeof(float) * (size_t)kv->partial_blocks * triple_floats(kv));
    return kv->raw && kv->thread_scratch && kv->partial ? STATUS_OK : STATUS_MEMORY;
}

struct take_job {
    unsigned char *begin;
    int64_t bytes;
    int threads;
    _Atomic bool refused;
};

/* Each thread its range, so that the pages of a host spread over the memory of its threads. The ends are
 * rounded out to whole pages: what lies there belongs to the backend too and keeps its bytes. */
static void take_task(void *context, int thread) {
    enum { PAGE_BYTES = 4096 };
    struct take_job *job = context;
    unsigned char *at = job->begin + cpu_range_begin(job->bytes, thread, job->threads);
    unsigned char *end = job->begin + cpu_range_begin(job->bytes, thread + 1, job->threads);
    at -= (uintptr_t)at % PAGE_BYTES;
    end += (PAGE_BYTES - (uintptr_t)end % PAGE_BYTES) % PAGE_BYTES;
    if (at >= end || madvise(at, (size_t)(end - at), MADV_POPULATE_WRITE) == 0) return;
    if (errno == EINVAL) { /* Linux before 5.14: writes that change nothing */
        for (; at < end; at += PAGE_BYTES) __atomic_fetch_or(at, 0, __ATOMIC_RELAXED);
    } else {
        atomic_store(&job->refused, true);
    }
}

enum status cpu_kv_take(backend *b, int part, int parts) {
    struct cpu *cpu = cpu_of(b);
    const int64_t all = (int64_t)b->kv_bytes;
    const int64_t begin = cpu_range_begin(all, part, parts);
    struct take_job job = {.begin = cpu->kv.data + begin,
                           .bytes = cpu_range_begin(all, part + 1, parts) - begin,
                           .threads = b->threads};
    cpu_pool_run(cpu->pool, take_task, &job);
    if (!atomic_load(&job.refused)) return STATUS_OK;
    return fail(
        STATUS_MEMORY,
        "KV cache: the system gives no more than about %lld of %lld MiB: lower --kv-memory, "
        "--max-num-seqs or --max-model-len",
        (long long)begin >> 20, (long long)all >> 20);
}

/* ---- qkv ---- */

struct heads_job {
    struct cpu *cpu;
    const struct batch *batch;
    const struct attention_spec *spec;
    float *q;
};

static void append_key(const struct cpu_kv *kv, unsigned char *block, int slot, const float *key) {
    const int hd = kv->spec.head_dim;
    if (kv->spec.dtype == BACKEND_F32) {
        for (int d = 0; d < hd; d++) ((float *)block)[d * KV_BLOCK_TOKENS + slot] = key[d];
        return;
    }
    bf16 *out = (bf16 *)block + 2 * slot;
    for (int d = 0; d < hd; d++) out[d / 2 * 2 * KV_BLOCK_TOKENS + d % 2] = bf16_from_float(key[d]);
    if (hd % 2) out[hd / 2 * 2 * KV_BLOCK_TOKENS + 1] = 0;
}

static void append_value(const struct cpu *cpu, unsigned char *block, int slot,
                         const float *value) {
    const struct cpu_kv *kv = &cpu->kv;
    unsigned char *values = block + kv->keys_bytes;
    const int hd = kv->spec.head_dim, at = slot * kv->dim_stride;
    if (kv->spec.dtype == BACKEND_F32)
        memcpy((float *)values + at, value, sizeof(float) * (size_t)hd);
    else
        cpu->kernels->round(value, hd, (bf16 *)values + at);
}

/* The segment of a row; segments are few and ascending, `hint` is where the last search ended. */
static const struct batch_segment *segment_of(const struct batch *batch, int row, int *hint) {
    int s = *hint;
    if (s >= batch->segment_count || row < batch->segments[s].row_begin) s = 0;
    while (row >= batch->segments[s].row_begin + batch->segments[s].row_count) s++;
    *hint = s;
    return &batch->segments[s];
}

/* Items: (row, one of H query, G key, G value heads). */
static void heads_task(void *context, int thread) {
    const struct heads_job *job = context;
    const struct attention_spec *spec = job->spec;
    const struct batch *batch = job->batch;
    const struct cpu_kernels *kernels = job->cpu->kernels;
    const struct cpu_kv *kv = &job->cpu->kv;
    const int hd = spec->head_dim, H = spec->heads, G = spec->kv_heads,
              threads = job->cpu->base.threads;
    const int64_t items = (int64_t)batch->row_count * (H + 2 * G);
    const int64_t end = cpu_range_begin(items, thread + 1, threads);
    int hint = 0;
    for (int64_t i = cpu_range_begin(items, thread, threads); i < end; i++) {
        const int row = (int)(i / (H + 2 * G)), head = (int)(i % (H + 2 * G));
        const struct batch_segment *segment = segment_of(batch, row, &hint);
        const int position = segment->position + row - segment->row_begin;
        const float *bias = spec->bias ? spec->bias + head * hd : NULL;
        const float *cos = spec->rope_cos + (int64_t)position * (hd / 2);
        const float *sin = spec->rope_sin + (int64_t)position * (hd / 2);
        if (head < H) {
            kernels->head_row(job->q + ((int64_t)row * H + head) * hd, hd, bias, spec->q_norm,
                              spec->norm_eps, cos, sin);
            continue;
        }
        float *x = kv->raw + ((int64_t)row * 2 * G + head - H) * hd;
        ASSERT_LT(position / KV_BLOCK_TOKENS, segment->page_count);
        const int32_t page = batch->pages[segment->page_begin + position / KV_BLOCK_TOKENS];
        unsigned char *block = kv_block(kv, spec->layer, page, (head - H) % G);
        if (head < H + G) {
            kernels->head_row(x, hd, bias, spec->k_norm, spec->norm_eps, cos, sin);
            append_key(kv, block, position % KV_BLOCK_TOKENS, x);
        } else {
            kernels->head_row(x, hd, bias, NULL, 0.0f, NULL, NULL);
            append_value(job->cpu, block, position % KV_BLOCK_TOKENS, x);
        }
    }
}

void cpu_qkv(backend *b, const struct batch *batch, const struct attention_spec *spec,
             const void *h, float *q) {
    struct cpu *cpu = cpu_of(b);
    ASSERT_EQ(spec->kv_heads, cpu->kv.spec.kv_heads);
    ASSERT_EQ(spec->head_dim, cpu->kv.spec.head_dim);
    ASSERT_EQ(spec->qkv->rows, (spec->heads + 2 * spec->kv_heads) * spec->head_dim);
    cpu_product_split(cpu, batch->row_count, spec->qkv, h, (int64_t)spec->heads * spec->head_dim, q,
                      cpu->kv.raw);
    struct heads_job job = {cpu, batch, spec, q};
    if ((int64_t)batch->row_count * spec->qkv->rows >= HEAD_INLINE_FLOATS)
        cpu_pool_run(cpu->pool, heads_task, &job);
    else
        for (int t = 0; t < b->threads; t++) heads_task(&job, t);
}

/* ---- attention ---- */

/* Up to 8 consecutive query heads of one kv head. */
struct tile {
    int head_begin, head_count, kv_head;
};

struct attention_job {
    struct cpu *cpu;
    const struct batch *batch;
    const struct attention_spec *spec;
    const float *q;
    enum backend_dtype dtype;
    void *o;
    struct tile tiles[HEADS_MAX];
    int tile_count;
    atomic_llong next_item;
    /* one item whose blocks are shared out */
    struct item *shared;
    int window_begin, window_end;
};

/* One row and one tile, with the scratch of whoever works on it. */
struct item {
    int row, context; /* tokens seen */
    const int32_t *pages;
    struct tile tile;
    struct attention_block block; /* q, score, m, l, o: scratch */
    float *m, *l, *o;             /* the running triple */
};

static void triple_at(float *memory, float **m, float **l, float **o) {
    *m = memory;
    *l = memory + ATTENTION_TILE;
    *o = memory + 2 * ATTENTION_TILE;
}

static void item_begin(const struct attention_job *job, int row,
                       const struct batch_segment *segment, const struct tile *tile, float *scratch,
                       struct item *item) {
    struct cpu *cpu = job->cpu;
    const struct cpu_kv *kv = &cpu->kv;
    const int hd = job->spec->head_dim, stride = kv->dim_stride;
    float *q = scratch;
    bf16 *q_bf16 = (bf16 *)(q + ATTENTION_TILE * stride);
    float *score = q + 2 * ATTENTION_TILE * stride;
    *item = (struct item){.row = row,
                          .context = segment->position + row - segment->row_begin + 1,
                          .pages = job->batch->pages + segment->page_begin,
                          .tile = *tile};
    ASSERT_LE((item->context + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS, segment->page_count);
    item->block = (struct attention_block){.dtype = kv->spec.dtype,
                                           .head_dim = hd,
                                           .dim_stride = stride,
                                           .heads = tile->head_count,
                                           .scale = 1.0f / sqrtf((float)hd),
                                           .q = q,
                                           .score = score};
    float *triples = score + ATTENTION_TILE * KV_BLOCK_TOKENS;
    triple_at(triples, &item->block.m, &item->block.l, &item->block.o);
    triple_at(triples + triple_floats(kv), &item->m, &item->l, &item->o);
    for (int h = 0; h < tile->head_count; h++) {
        const float *from = job->q + ((int64_t)row * job->spec->heads + tile->head_begin + h) * hd;
        memset(q + h * stride, 0, sizeof(float) * (size_t)stride);
        if (kv->spec.dtype == BACKEND_F32) {
            memcpy(q + h * stride, from, sizeof(float) * (size_t)hd);
        } else {
            memset(q_bf16 + h * stride, 0, sizeof(bf16) * (size_t)stride);
            cpu->kernels->round(from, hd, q_bf16 + h * stride);
            cpu->kernels->widen(q_bf16 + h * stride, hd, q + h * stride);
        }
    }
    if (kv->spec.dtype == BACKEND_BF16 && cpu->base.numerics == NUMERICS_DPBF16)
        item->block.q_bf16 = q_bf16;
}

/* (m, l, o) of one block from scratch, into block->m, l, o. `end`: where this thread's blocks of
 * the item end. */
static void item_block(const struct attention_job *job, const struct item *item, int index, int end,
                       struct attention_block *block) {
    const struct cpu_kv *kv = &job->cpu->kv;
    const unsigned char *data =
        kv_block(kv, job->spec->layer, item->pages[index], item->tile.kv_head);
    const int left = item->context - index * KV_BLOCK_TOKENS;
    block->keys = data;
    block->next = index + 1 < end
                      ? kv_block(kv, job->spec->layer, item->pages[index + 1], item->tile.kv_head)
                      : NULL;
    block->next_bytes = kv->block_bytes;
    block->values = data + kv->keys_bytes;
    block->visible = left < KV_BLOCK_TOKENS ? left : KV_BLOCK_TOKENS;
    job->cpu->kernels->attention_block(block);
}

static void item_join(const struct attention_job *job, struct item *item, bool first,
                      const float *m, const float *l, const float *o) {
    const struct cpu_kv *kv = &job->cpu->kv;
    if (first) {
        memcpy(item->m, m, sizeof(float) * triple_floats(kv)); /* m, l, o are adjacent */
        return;
    }
    for (int h = 0; h < item->tile.head_count; h++)
        job->cpu->kernels->attention_join(&item->m[h], &item->l[h], item->o + h * kv->dim_stride,
                                          m[h], l[h], o + h * kv->dim_stride, kv->spec.head_dim);
}

static void item_end(const struct attention_job *job, const struct item *item) {
    const struct cpu_kv *kv = &job->cpu->kv;
    const int hd = job->spec->head_dim;
    for (int h = 0; h < item->tile.head_count; h++) {
        float *o = item->o + h * kv->dim_stride;
        for (int d = 0; d < hd; d++) o[d] /= item->l[h];
        const int64_t to = ((int64_t)item->row * job->spec->heads + item->tile.head_begin + h) * hd;
        if (job->dtype == BACKEND_F32)
            memcpy((float *)job->o + to, o, sizeof(float) * (size_t)hd);
        else
            job->cpu->kernels->round(o, hd, (bf16 *)job->o + to);
    }
}

static int block_count(const struct item *item) {
    return (item->context + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS;
}

/* Whole items from the counter. The order is by segment, tile, row: neighbours read the same
 * blocks. */
static void items_task(void *context, int thread) {
    struct attention_job *job = context;
    const struct batch *batch = job->batch;
    float *scratch = job->cpu->kv.thread_scratch + (size_t)thread * job->cpu->kv.scratch_floats;
    int64_t next = atomic_fetch_add_explicit(&job->next_item, 1, memory_order_relaxed), begin = 0;
    for (int s = 0; s < batch->segment_count; s++) {
        const struct batch_segment *segment = &batch->segments[s];
        const int64_t items = (int64_t)segment->row_count * job->tile_count;
        while (next < begin + items) {
            const int tile = (int)((next - begin) / segment->row_count);
            const int row = segment->row_begin + (int)((next - begin) % segment->row_count);
            struct item item;
            item_begin(job, row, segment, &job->tiles[tile], scratch, &item);
            for (int i = 0; i < block_count(&item); i++) {
                item_block(job, &item, i, block_count(&item), &item.block);
                item_join(job, &item, i == 0, item.block.m, item.block.l, item.block.o);
            }
            item_end(job, &item);
            next = atomic_fetch_add_explicit(&job->next_item, 1, memory_order_relaxed);
        }
        begin += items;
    }
}

/* A thread's blocks of the window, triples to kv->partial. */
static void window_task(void *context, int thread) {
    const struct attention_job *job = context;
    const struct cpu_kv *kv = &job->cpu->kv;
    const int threads = job->cpu->base.threads, count = job->window_end - job->window_begin;
    struct attention_block block = job->shared->block;
    block.score = kv->thread_scratch + (size_t)thread * kv->scratch_floats +
                  2 * ATTENTION_TILE * kv->dim_stride;
    const int end = (int)cpu_range_begin(count, thread + 1, threads);
    for (int i = (int)cpu_range_begin(count, thread, threads); i < end; i++) {
        triple_at(kv->partial + (size_t)i * triple_floats(kv), &block.m, &block.l, &block.o);
        item_block(job, job->shared, job->window_begin + i, job->window_begin + end, &block);
    }
}

static void item_shared(struct attention_job *job, int row, const struct batch_segment *segment,
                        const struct tile *tile) {
    struct cpu_kv *kv = &job->cpu->kv;
    struct item item;
    item_begin(job, row, segment, tile, kv->thread_scratch, &item);
    job->shared = &item;
    const int blocks = block_count(&item);
    for (int begin = 0; begin < blocks; begin = job->window_end) {
        job->window_begin = begin;
        job->window_end = begin + kv->partial_blocks < blocks ? begin + kv->partial_blocks : blocks;
        cpu_pool_run(job->cpu->pool, window_task, job);
        for (int i = begin; i < job->window_end; i++) {
            float *m, *l, *o;
            triple_at(kv->partial + (size_t)(i - begin) * triple_floats(kv), &m, &l, &o);
            item_join(job, &item, i == 0, m, l, o);
        }
    }
    item_end(job, &item);
}

void cpu_attention(backend *b, const struct batch *batch, const struct attention_spec *spec,
                   const float *q, enum backend_dtype dtype, void *o) {
    struct cpu *cpu = cpu_of(b);
    struct attention_job job = {
        .cpu = cpu, .batch = batch, .spec = spec, .q = q, .dtype = dtype, .o = o};
    ASSERT_LE(spec->heads, HEADS_MAX);
    for (int h = 0; h < spec->heads; h++) {
        struct tile *tile = job.tile_count ? &job.tiles[job.tile_count - 1] : NULL;
        if (tile && tile->kv_head == spec->kv_of_head[h] && tile->head_count < ATTENTION_TILE)
            tile->head_count++;
        else
            job.tiles[job.tile_count++] = (struct tile){h, 1, spec->kv_of_head[h]};
    }
    const int64_t items = (int64_t)batch->row_count * job.tile_count;
    int64_t longest = 0;
    for (int s = 0; s < batch->segment_count; s++) {
        const int64_t end = batch->segments[s].position + batch->segments[s].row_count;
        longest = end > longest ? end : longest;
    }
    if (b->threads > 1 && items < SPLIT_ITEMS * b->threads && longest > SPLIT_TOKENS) {
        for (int s = 0; s < batch->segment_count; s++) {
            const struct batch_segment *segment = &batch->segments[s];
            for (int r = 0; r < segment->row_count; r++)
                for (int t = 0; t < job.tile_count; t++)
                    item_shared(&job, segment->row_begin + r, segment, &job.tiles[t]);
        }
    } else {
        cpu_pool_run(cpu->pool, items_task, &job);
    }
}
