/* candidates.cu: statistics and the K best of every probed row of logits, in one launch.
 *
 *   block (chunk of a slab, probe)  z' = edited z / T to the workspace; its m, s, q and K best
 *   last block of a probe           chunks ─ slab tree ─► m, s, q; lists ─► K best; watched ids
 *
 * A slab is cut into CHUNKS equal pieces (a function of the slab alone). The K best are found
 * without a sort: keys (order-preserving image of z, then the complemented id, as in the CPU
 * backend) are all different, so the K-th largest is found digit by digit from the top, 256 bins at
 * a time, and the search ends as soon as a bin holds just what is still missing, after three or
 * four digits as a rule. Then at most 64 keys are put in order by counting. m, the lists and the
 * watched values are the CPU's bits; s and q are added up in another order. Odd values as there:
 * NaN counts as -inf, +inf as FLT_MAX.
 */
#include <float.h>

#include "backend/batch.h"
#include "kernels/device.cuh"

enum { CANDIDATES_THREADS = 256, CHUNKS = 4, LISTS_MAX = KERNELS_PARTS_MAX * CHUNKS, BINS = 256 };

/* What a block leaves for the last one. */
struct chunk_answer {
    float m, s, q;
    int32_t count;
    uint64_t keys[KERNELS_CANDIDATES_MAX]; /* descending */
};

/* Workspace: one of these per probe, each followed by z' [V local]; 128 bytes is their alignment. A
 * probe's place does not depend on how many there are: what one call leaves is never another call's
 * counter. */
struct probe_memory {
    uint32_t arrived;
    struct chunk_answer answers[LISTS_MAX];
};
static int64_t probe_stride(int64_t vocab_local) {
    return ((int64_t)sizeof(struct probe_memory) + vocab_local * (int64_t)sizeof(float) + 127) /
           128 * 128;
}

extern "C" size_t kernels_candidates_workspace_bytes(int probes_max, int64_t vocab_local) {
    return (size_t)probes_max * (size_t)probe_stride(vocab_local);
}

/* 0 stands for "no such id": smaller than the key of any z > -inf. */
static __device__ __forceinline__ uint64_t key_of(float z, uint32_t id) {
    if (z == -INFINITY) return 0;
    uint32_t bits;
    memcpy(&bits, &z, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

static __device__ __forceinline__ struct batch_pair pair_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    struct batch_pair pair;
    memcpy(&pair.z, &bits, sizeof bits);
    pair.id = ~(uint32_t)key;
    return pair;
}

/* z / temperature made ordinary. */
static __device__ __forceinline__ float divided(float z, float temperature) {
    const float v = z / temperature + 0.0f;
    return v <= FLT_MAX ? v : v > FLT_MAX ? FLT_MAX : -INFINITY;
}

/* ---- the K best ---- */

struct select_memory {
    uint32_t bin[BINS];
    uint64_t chosen[KERNELS_CANDIDATES_MAX];
    uint64_t prefix;                /* of the K-th largest key, `digits` of it known */
    uint32_t missing, next_missing; /* still to be found: of this digit, of the next */
    uint32_t in_bin, total, taken;
};

/* keys_at(i), i < n: distinct, or 0 for none. Puts the min(k, how many there are) largest in
 * descending order to out and returns their number; all threads of the block call it. */
template <typename Keys>
static __device__ int select_top(struct select_memory &memory, int64_t n, int k,
                                 const Keys &keys_at, uint64_t *out) {
    const int tid = (int)threadIdx.x;
    if (tid == 0) {
        memory.prefix = 0;
        memory.missing = (uint32_t)k;
        memory.total = memory.taken = 0;
    }
    __syncthreads();
    uint32_t here = 0;
    for (int64_t i = tid; i < n; i += CANDIDATES_THREADS) here += keys_at(i) != 0;
    if (here) atomicAdd(&memory.total, here);
    __syncthreads();
    const int count = (int)(memory.total < (uint32_t)k ? memory.total : (uint32_t)k);
    uint64_t least = 1; /* all keys from here on are chosen */
    if (memory.total > (uint32_t)k) {
        for (int shift = 56; shift >= 0; shift -= 8) {
            for (int b = tid; b < BINS; b += CANDIDATES_THREADS) memory.bin[b] = 0;
            __syncthreads();
            const uint64_t prefix = memory.prefix;
            for (int64_t i = tid; i < n; i += CANDIDATES_THREADS) {
                const uint64_t key = keys_at(i);
                if (key != 0 && (shift == 56 || key >> (shift + 8) == prefix))
                    atomicAdd(&memory.bin[key >> shift & 0xff], 1u);
            }
            __syncthreads();
            /* the bin where the count from the top reaches what is missing */
            if (tid < WARP) {
                uint32_t mine = 0; /* of 8 bins, the lane's own */
                for (int b = 0; b < BINS / WARP; b++) mine += memory.bin[tid * (BINS / WARP) + b];
                uint32_t above = mine; /* of my bins and all higher ones, then without mine */
                for (unsigned d = 1; d < WARP; d *= 2) {
                    const uint32_t other = __shfl_down_sync(WARP_ALL, above, d);
                    if (tid + (int)d < WARP) above += other;
                }
                above -= mine;
                if (above < memory.missing && above + mine >= memory.missing) { /* one lane */
                    uint32_t missing = memory.missing - above;
                    int b = BINS / WARP - 1;
                    while (memory.bin[tid * (BINS / WARP) + b] < missing)
                        missing -= memory.bin[tid * (BINS / WARP) + b--];
                    memory.in_bin = memory.bin[tid * (BINS / WARP) + b];
                    memory.prefix = prefix << 8 | (uint32_t)(tid * (BINS / WARP) + b);
                    memory.next_missing = missing; /* the warp still compares with `missing` */
                }
            }
            __syncthreads();
            least = memory.prefix << shift;
            if (memory.in_bin == memory.next_missing) break;
            if (tid == 0)
                memory.missing = memory.next_missing; /* read again after the next barrier */
        }
    }
    for (int64_t i = tid; i < n; i += CANDIDATES_THREADS) {
        const uint64_t key = keys_at(i);
        if (key != 0 && key >= least) memory.chosen[atomicAdd(&memory.taken, 1u)] = key;
    }
    __syncthreads();
    if (tid < count) {
        int place = 0;
        for (int i = 0; i < count; i++) place += memory.chosen[i] > memory.chosen[tid];
        out[place] = memory.chosen[tid];
    }
    __syncthreads();
    return count;
}

/* ---- one block's part ---- */

/* Ids of chunk c of slab s that take part, global. */
static __device__ __forceinline__ void chunk_range(const struct kernels_borders &vocab,
                                                   int64_t vocab_count, int list, int64_t *begin,
                                                   int64_t *end) {
    const int64_t low = vocab.begin[list / CHUNKS], n = vocab.begin[list / CHUNKS + 1] - low;
    *begin = low + n * (list % CHUNKS) / CHUNKS;
    *end = low + n * (list % CHUNKS + 1) / CHUNKS;
    if (*end > vocab_count) *end = vocab_count;
    if (*begin > *end) *begin = *end;
}

/* z' of [begin, end) to z, both indexed by local id. All threads; visible to the block after it. */
static __device__ __forceinline__ void probe_values(const struct batch_probe &probe,
                                                    const struct batch_edit *edits,
                                                    const float *logits, int64_t vocab_first,
                                                    int64_t begin, int64_t end, float *z) {
    for (int64_t i = begin + threadIdx.x; i < end; i += CANDIDATES_THREADS)
        z[i - vocab_first] = divided(logits[i - vocab_first], probe.temperature);
    __syncthreads();
    for (int e = (int)threadIdx.x; e < probe.edit_count; e += CANDIDATES_THREADS) {
        const struct batch_edit edit = edits[probe.edit_begin + e];
        if ((int64_t)edit.id < begin || (int64_t)edit.id >= end) continue;
        const float raw = logits[edit.id - vocab_first];
        z[edit.id - vocab_first] =
            divided((raw > 0.0f ? raw / edit.rep : raw * edit.rep) + edit.add, probe.temperature);
    }
    __syncthreads();
}

static __device__ __forceinline__ float block_max(float v, float *scratch) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    for (int half = WARP / 2; half > 0; half /= 2) v = fmaxf(v, __shfl_xor_sync(WARP_ALL, v, half));
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    v = scratch[0];
    for (int w = 1; w < CANDIDATES_THREADS / WARP; w++) v = fmaxf(v, scratch[w]);
    __syncthreads();
    return v;
}

/* grid: (slabs x CHUNKS, probes). */
static __global__ void __launch_bounds__(CANDIDATES_THREADS, 2)
    candidates(const __grid_constant__ struct kernels_probes batch, const float *logits,
               const __grid_constant__ struct kernels_borders vocab, int64_t vocab_count,
               unsigned char *records, unsigned char *workspace, int64_t stride) {
    after_previous();
    __shared__ struct select_memory memory;
    __shared__ uint64_t best[KERNELS_CANDIDATES_MAX];
    __shared__ float scratch[WARP + 1];
    __shared__ uint32_t flag;
    const int tid = (int)threadIdx.x, lists = (int)gridDim.x, p = (int)blockIdx.y,
              k = batch.candidate_count;
    const struct batch_probe probe = batch.probes[p];
    const int64_t first = vocab.begin[0], width = vocab.begin[vocab.count] - first;
    const float *row = logits + probe.logit_row * width;
    struct probe_memory *own = (struct probe_memory *)(void *)(workspace + p * stride);
    float *z = (float *)(void *)(own + 1);

    int64_t begin, end;
    chunk_range(vocab, vocab_count, (int)blockIdx.x, &begin, &end);
    probe_values(probe, batch.edits, row, first, begin, end, z);
    float m = -INFINITY, s = 0.0f, q = 0.0f;
    for (int64_t i = begin + tid; i < end; i += CANDIDATES_THREADS) m = fmaxf(m, z[i - first]);
    m = block_max(m, scratch);
    if (m > -INFINITY) {
        for (int64_t i = begin + tid; i < end; i += CANDIDATES_THREADS) {
            const float d = z[i - first] - m, e = fmath_exp(d);
            if (e == 0.0f) continue; /* z = -inf among them: never 0 * inf */
            s += e;
            q = fmaf(d, e, q);
        }
    }
    s = block_sum(s, scratch);
    q = block_sum(q, scratch);
    struct chunk_answer *mine = &own->answers[blockIdx.x];
    const float *chunk = z + (begin - first);
    const int count = select_top(
        memory, end - begin, k, [=](int64_t i) { return key_of(chunk[i], (uint32_t)(begin + i)); },
        best);
    if (tid < count) mine->keys[tid] = best[tid];
    if (tid == 0) {
        mine->m = m;
        mine->s = s;
        mine->q = q;
        mine->count = count;
    }
    if (!last_arrival(&own->arrived, (uint32_t)lists, &flag)) return;

    /* statistics: chunks of a slab, then the slabs, adjacent pairs with an odd one moving up; both
     * in one go, for CHUNKS is a power of two */
    const struct chunk_answer *all = own->answers;
    unsigned char *at = records + p * batch_record_bytes(k, batch.watch_max);
    struct batch_record *record = (struct batch_record *)(void *)at;
    struct batch_pair *pairs = (struct batch_pair *)(void *)(at + sizeof *record);
    if (tid < WARP) {
        float node_m = -INFINITY, node_s = 0.0f, node_q = 0.0f;
        if (tid < lists) {
            node_m = __ldcg(&all[tid].m);
            node_s = __ldcg(&all[tid].s);
            node_q = __ldcg(&all[tid].q);
        }
        for (unsigned d = 1; d < WARP; d *= 2) {
            const float m_b = __shfl_down_sync(WARP_ALL, node_m, d),
                        s_b = __shfl_down_sync(WARP_ALL, node_s, d);
            const float q_b = __shfl_down_sync(WARP_ALL, node_q, d);
            if (tid % (2 * d) == 0 && tid + d < WARP)
                batch_stats_join(&node_m, &node_s, &node_q, m_b, s_b, q_b);
        }
        if (tid == 0) {
            record->m = node_m;
            record->s = node_s;
            record->q = node_q;
        }
    }
    const int found = select_top(
        memory, (int64_t)lists * KERNELS_CANDIDATES_MAX, k,
        [=](int64_t i) {
            const struct chunk_answer *from = all + i / KERNELS_CANDIDATES_MAX;
            const int place = (int)(i % KERNELS_CANDIDATES_MAX);
            return place < __ldcg(&from->count) ? __ldcg(&from->keys[place]) : (uint64_t)0;
        },
        best);
    if (tid == 0) record->count = found;
    const struct batch_pair none = {0.0f, 0};
    for (int i = tid; i < k; i += CANDIDATES_THREADS)
        pairs[i] = i < found ? pair_of(best[i]) : none;
    for (int w = tid; w < batch.watch_max; w += CANDIDATES_THREADS) {
        struct batch_pair pair = {-INFINITY, 0};
        if (w < probe.watch_count) {
            pair.id = batch.watch_ids[probe.watch_begin + w];
            const int64_t id = pair.id;
            if (id >= first && id < vocab.begin[vocab.count] && id < vocab_count)
                pair.z = __ldcg(&z[id - first]);
        }
        pairs[k + w] = pair;
    }
}

extern "C" int kernels_candidates(kernels_stream stream, struct kernels_probes batch,
                                  const float *logits, struct kernels_borders vocab,
                                  int64_t vocab_count, void *records, void *workspace) {
    if (batch.probe_count <= 0 || vocab.count <= 0) return 0;
    const int64_t stride = probe_stride(vocab.begin[vocab.count] - vocab.begin[0]);
    KERNELS_LAUNCH(candidates, dim3((unsigned)vocab.count * CHUNKS, (unsigned)batch.probe_count),
                   dim3(CANDIDATES_THREADS), 0, stream, batch, logits, vocab, vocab_count,
                   (unsigned char *)records, (unsigned char *)workspace, stride);
    return (int)cudaGetLastError();
}

/* ---- the slow path ---- */

/* grid: slabs x CHUNKS. */
static __global__ void __launch_bounds__(CANDIDATES_THREADS)
    probe_logits(const __grid_constant__ struct kernels_probes batch, int index,
                 const float *logits, const __grid_constant__ struct kernels_borders vocab,
                 int64_t vocab_count, float *out) {
    after_previous();
    const struct batch_probe probe = batch.probes[index];
    const int list = (int)blockIdx.x;
    const int64_t first = vocab.begin[0], width = vocab.begin[vocab.count] - first;
    int64_t begin, end, beyond, unused;
    chunk_range(vocab, vocab_count, list, &begin, &end);
    probe_values(probe, batch.edits, logits + probe.logit_row * width, first, begin, end, out);
    chunk_range(vocab, INT64_MAX, list, &unused, &beyond); /* padding ids of this chunk */
    for (int64_t i = (end > unused ? end : unused) + threadIdx.x; i < beyond;
         i += CANDIDATES_THREADS)
        out[i - first] = -INFINITY;
}

extern "C" int kernels_probe_logits(kernels_stream stream, struct kernels_probes batch, int probe,
                                    const float *logits, struct kernels_borders vocab,
                                    int64_t vocab_count, float *out) {
    if (vocab.count > 0)
        KERNELS_LAUNCH(probe_logits, dim3((unsigned)vocab.count * CHUNKS), dim3(CANDIDATES_THREADS),
                       0, stream, batch, probe, logits, vocab, vocab_count, out);
    return (int)cudaGetLastError();
}
