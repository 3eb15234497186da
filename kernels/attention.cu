/* attention.cu: causal attention of single rows over the paged KV cache, on CUDA cores.
 *
 * A block takes one row, one tile of up to 8 query heads of a kv head, and either one split of 256
 * tokens or, in order, all of them:
 *
 *   split   64 | 64 | 64 | 64 tokens   a page gives (m, l, o) from scratch, joined in order
 *   row     split + split + ...        the same with splits, whoever made them
 *
 * So a row's bits depend on its position only, and up to 256 tokens they are the CPU's: a score is
 * one chain over hd, an output one chain over the tokens of a page, sums of exponentials go over
 * 16 lanes. With one split a block the triples go to the workspace and the block that arrives last
 * joins them. Two halves of 64 threads each take 4 of the heads: for the scores a thread is a token
 * of the page, for the output it is a pair of dims.
 *
 * Shared memory: keys [64][hd + 8] and values [64][hd] of a page as bf16, q [2][hd][4], scores
 * [64][8]. A prefill chunk is so many rows here, each reads its sequence's pages (from L2): right,
 * not fast.
 */
#include "kernels/kv.cuh"

enum {
    HALF = 64, /* threads that share four heads */
    ATTENTION_THREADS = 2 * HALF,
    TOKENS = KERNELS_PAGE_TOKENS,
    HEADS = KERNELS_HEADS_TILE,
    QUAD = HEADS / 2, /* heads of a half */
    KEY_PAD = 8,
    BLOCKS_AN_SM = 2,
};

/* m, l and o of one tile: what a split leaves in the workspace. */
static __host__ __device__ __forceinline__ int64_t triple_floats(int head_dim) {
    return HEADS * (int64_t)(head_dim + 2);
}
static size_t attention_shared(int head_dim) {
    return (size_t)TOKENS * (size_t)(head_dim + KEY_PAD + head_dim) * sizeof(bf16) +
           ((size_t)HEADS * (size_t)head_dim + TOKENS * HEADS) * sizeof(float);
}

/* With more (row, tile) items than this the device is full and nobody shares an item. Counters come
 * first in the workspace and always take the same room, so no call's triples are another one's
 * counters. */
static int64_t shared_items_max(void) { return (int64_t)kernels_sm_count * BLOCKS_AN_SM; }
static size_t counters_bytes(void) {
    return ((size_t)shared_items_max() * sizeof(uint32_t) + 127) / 128 * 128;
}

extern "C" size_t kernels_attention_workspace_bytes(int rows, int tile_count, int head_dim,
                                                    int context_max) {
    const int64_t items = (int64_t)rows * tile_count, most = shared_items_max();
    const size_t splits = ((size_t)context_max + KERNELS_SPLIT_TOKENS - 1) / KERNELS_SPLIT_TOKENS;
    return counters_bytes() + (size_t)(items < most ? items : most) * splits *
                                  (size_t)triple_floats(head_dim) * sizeof(float);
}

/* Outputs of a thread: PAIRS pairs of dims of its four heads; m and l of all heads are shared. */
template <int PAIRS>
struct output {
    float o[PAIRS][QUAD][2];
};

/* a = a joined with b: factors c and c_b from the heads' (m, l). */
template <int PAIRS>
static __device__ __forceinline__ void output_join(struct output<PAIRS> &a,
                                                   const struct output<PAIRS> &b, const float *c,
                                                   const float *c_b, int quad) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int h = 0; h < QUAD; h++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                a.o[i][h][e] = fmaf(c_b[quad + h], b.o[i][h][e], c[quad + h] * a.o[i][h][e]);
}

/* (m, l) of a head joined with another's; the factors for o. */
static __device__ __forceinline__ void stats_join(float &m, float &l, float m_b, float l_b,
                                                  float &c, float &c_b) {
    const float top = m > m_b ? m : m_b;
    c = fmath_exp(m - top);
    c_b = fmath_exp(m_b - top);
    m = top;
    l = fmaf(c_b, l_b, c * l);
}

/* m and l of the block of 64 tokens, of the split and of the row so far, and factors of the last
 * join. */
struct shared_stats {
    float m[HEADS], l[HEADS], split_m[HEADS], split_l[HEADS], row_m[HEADS], row_l[HEADS];
    float c[HEADS], c_b[HEADS];
    uint32_t flag;
};

/* Scores of a page, exponentials in place, m and l of the page. */
static __device__ __forceinline__ void page_scores(const bf16 *keys, const float *q, float *score,
                                                   struct shared_stats &stats, int hd, int visible,
                                                   float scale) {
    const int token = (int)threadIdx.x % HALF, quad = (int)threadIdx.x / HALF * QUAD;
    const float4 *mine = (const float4 *)(q + quad * hd);
    const bf16 *key = keys + token * (hd + KEY_PAD);
    float dot[QUAD] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int d = 0; d < hd; d += 2) {
        const uint32_t pair = *(const uint32_t *)(key + d);
        const float k0 = bf16_low(pair), k1 = bf16_high(pair);
        const float4 a = mine[d], b = mine[d + 1];
        dot[0] = fmaf(k1, b.x, fmaf(k0, a.x, dot[0]));
        dot[1] = fmaf(k1, b.y, fmaf(k0, a.y, dot[1]));
        dot[2] = fmaf(k1, b.z, fmaf(k0, a.z, dot[2]));
        dot[3] = fmaf(k1, b.w, fmaf(k0, a.w, dot[3]));
    }
#pragma unroll
    for (int h = 0; h < QUAD; h++)
        score[token * HEADS + quad + h] = token < visible ? dot[h] * scale : -INFINITY;
    __syncthreads();

    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < HEADS / (ATTENTION_THREADS / WARP); i++) {
        const int h = warp * (HEADS / (ATTENTION_THREADS / WARP)) + i;
        float *low = score + lane * HEADS + h, *high = low + WARP * HEADS;
        float m = *low > *high ? *low : *high;
        for (int half = WARP / 2; half > 0; half /= 2) {
            const float other = __shfl_xor_sync(WARP_ALL, m, half);
            m = other > m ? other : m;
        }
        const float p_low = lane < visible ? fmath_exp(*low - m) : 0.0f;
        const float p_high = lane + WARP < visible ? fmath_exp(*high - m) : 0.0f;
        *low = p_low;
        *high = p_high;
        /* lane j < 16: tokens j, j + 16, j + 32, j + 48 in this order, then lanes + 8, 4, 2, 1 */
        float sum = p_low + __shfl_down_sync(WARP_ALL, p_low, 16);
        sum = sum + p_high;
        sum = sum + __shfl_down_sync(WARP_ALL, p_high, 16);
        for (int half = 8; half > 0; half /= 2)
            sum += __shfl_down_sync(WARP_ALL, sum, (unsigned)half);
        if (lane == 0) {
            stats.m[h] = m;
            stats.l[h] = sum;
        }
    }
    __syncthreads();
}

/* o of a page: a chain over its visible tokens. */
template <int PAIRS>
static __device__ __forceinline__ void page_output(struct output<PAIRS> &out, const bf16 *values,
                                                   const float *score, int hd, int visible) {
    const int pair = (int)threadIdx.x % HALF, quad = (int)threadIdx.x / HALF * QUAD;
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int h = 0; h < QUAD; h++) out.o[i][h][0] = out.o[i][h][1] = 0.0f;
#pragma unroll 4
    for (int t = 0; t < visible; t++) {
        const float4 p = *(const float4 *)(score + t * HEADS + quad);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int d = 2 * (pair + i * HALF);
            if (d >= hd) continue;
            const uint32_t both = *(const uint32_t *)(values + t * hd + d);
            const float v[2] = {bf16_low(both), bf16_high(both)};
#pragma unroll
            for (int e = 0; e < 2; e++) {
                out.o[i][0][e] = fmaf(p.x, v[e], out.o[i][0][e]);
                out.o[i][1][e] = fmaf(p.y, v[e], out.o[i][1][e]);
                out.o[i][2][e] = fmaf(p.z, v[e], out.o[i][2][e]);
                out.o[i][3][e] = fmaf(p.w, v[e], out.o[i][3][e]);
            }
        }
    }
}

/* [64][hd] bf16 from the pool to rows of `stride` elements, 4 or 16 bytes at a time. Tokens past
 * the last visible one become zeros: a page may hold anything there. */
static __device__ __forceinline__ void page_load(bf16 *to, const bf16 *from, int hd, int stride,
                                                 int visible) {
    if (hd % 8 == 0) {
        const int chunks = hd / 8;
        for (int i = (int)threadIdx.x; i < TOKENS * chunks; i += ATTENTION_THREADS) {
            const int token = i / chunks, c = i % chunks;
            *(uint4 *)(to + token * stride + c * 8) =
                token < visible ? *(const uint4 *)(from + token * hd + c * 8)
                                : make_uint4(0, 0, 0, 0);
        }
    } else {
        const int chunks = hd / 2;
        for (int i = (int)threadIdx.x; i < TOKENS * chunks; i += ATTENTION_THREADS) {
            const int token = i / chunks, c = i % chunks;
            *(uint32_t *)(to + token * stride + c * 2) =
                token < visible ? *(const uint32_t *)(from + token * hd + c * 2) : 0u;
        }
    }
}

/* grid: (splits or 1, tiles, rows). */
template <int PAIRS>
static __global__ void __launch_bounds__(ATTENTION_THREADS)
    attention(const struct kernels_row *rows, const int32_t *pages, int layer, int heads,
              const struct kernels_tile *tiles, const __grid_constant__ struct kernels_kv kv,
              const float *q_in, bf16 *o_out, uint32_t *counters, float *triples) {
    after_previous();
    KERNELS_SHARED(float, q); /* [2][hd][4] */
    __shared__ struct shared_stats stats;
    const int hd = kv.head_dim, tid = (int)threadIdx.x, pair = tid % HALF, quad = tid / HALF * QUAD;
    float *score = q + HEADS * hd; /* [64][8] */
    bf16 *keys = (bf16 *)(void *)(score + TOKENS * HEADS), *values = keys + TOKENS * (hd + KEY_PAD);
    const int row = (int)blockIdx.z;
    const struct kernels_row place = rows[row];
    const struct kernels_tile tile = tiles[blockIdx.y];
    const int context = place.position + 1;
    const int splits = (context + KERNELS_SPLIT_TOKENS - 1) / KERNELS_SPLIT_TOKENS;
    const bool shared_out = gridDim.x > 1;
    bf16 *o_row = o_out + ((int64_t)row * heads + tile.head_begin) * hd;
    if (context <= 0) { /* padding */
        if (blockIdx.x == 0)
            for (int i = tid; i < tile.head_count * hd; i += ATTENTION_THREADS) o_row[i] = 0;
        return;
    }
    if (shared_out && (int)blockIdx.x >= splits) return;

    for (int i = tid; i < HEADS * hd; i += ATTENTION_THREADS) {
        const int h = i / hd, d = i % hd;
        const float x = h < tile.head_count
                            ? q_in[((int64_t)row * heads + tile.head_begin + h) * hd + d]
                            : 0.0f;
        q[h / QUAD * QUAD * hd + d * QUAD + h % QUAD] = bf16_to_float(bf16_from_float(x));
    }
    const float scale = 1.0f / sqrtf((float)hd);
    const int split_begin = shared_out ? (int)blockIdx.x : 0,
              split_end = shared_out ? split_begin + 1 : splits;
    struct output<PAIRS> page_o, split_o = {}, row_o = {};
    for (int s = split_begin; s < split_end; s++) {
        const int page_begin = s * (KERNELS_SPLIT_TOKENS / TOKENS);
        const int page_end =
            min((context + TOKENS - 1) / TOKENS, page_begin + KERNELS_SPLIT_TOKENS / TOKENS);
        for (int p = page_begin; p < page_end; p++) {
            const bf16 *block = kv_block(kv, layer, pages[place.page_begin + p], tile.kv_head);
            const int visible = min(context - p * TOKENS, (int)TOKENS);
            __syncthreads(); /* everybody is done with the page before, and q is there */
            page_load(keys, block, hd, hd + KEY_PAD, visible);
            page_load(values, block + TOKENS * hd, hd, hd, visible);
            __syncthreads();
            page_scores(keys, q, score, stats, hd, visible, scale);
            page_output<PAIRS>(page_o, values, score, hd, visible);
            const bool first = p == page_begin;
            if (tid < HEADS) {
                if (first) {
                    stats.split_m[tid] = stats.m[tid];
                    stats.split_l[tid] = stats.l[tid];
                } else {
                    stats_join(stats.split_m[tid], stats.split_l[tid], stats.m[tid], stats.l[tid],
                               stats.c[tid], stats.c_b[tid]);
                }
            }
            __syncthreads();
            if (first)
                split_o = page_o;
            else
                output_join<PAIRS>(split_o, page_o, stats.c, stats.c_b, quad);
        }
        __syncthreads(); /* the factors of the last page's join have been read */
        if (tid < HEADS) {
            if (s == split_begin) {
                stats.row_m[tid] = stats.split_m[tid];
                stats.row_l[tid] = stats.split_l[tid];
            } else {
                stats_join(stats.row_m[tid], stats.row_l[tid], stats.split_m[tid],
                           stats.split_l[tid], stats.c[tid], stats.c_b[tid]);
            }
        }
        __syncthreads();
        if (s == split_begin)
            row_o = split_o;
        else
            output_join<PAIRS>(row_o, split_o, stats.c, stats.c_b, quad);
    }

    if (shared_out && splits > 1) {
        const int64_t item = (int64_t)row * gridDim.y + blockIdx.y;
        float *first =
            triples + item * gridDim.x * triple_floats(hd); /* [splits] (m [8], l [8], o [8][hd]) */
        float *mine = first + (int64_t)blockIdx.x * triple_floats(hd);
        if (tid < HEADS) {
            mine[tid] = stats.row_m[tid];
            mine[HEADS + tid] = stats.row_l[tid];
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int h = 0; h < QUAD; h++)
                if (2 * (pair + i * HALF) < hd)
                    store_several<2>(mine + 2 * HEADS + (quad + h) * hd + 2 * (pair + i * HALF),
                                     several<float, 2>{{row_o.o[i][h][0], row_o.o[i][h][1]}});
        if (!last_arrival(&counters[item], (uint32_t)splits, &stats.flag)) return;
        for (int s = 0; s < splits; s++) {
            const float *from = first + s * triple_floats(hd);
            __syncthreads();
            if (tid < HEADS) {
                if (s == 0) {
                    stats.row_m[tid] = __ldcg(from + tid);
                    stats.row_l[tid] = __ldcg(from + HEADS + tid);
                } else {
                    stats_join(stats.row_m[tid], stats.row_l[tid], __ldcg(from + tid),
                               __ldcg(from + HEADS + tid), stats.c[tid], stats.c_b[tid]);
                }
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
#pragma unroll
                for (int h = 0; h < QUAD; h++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (2 * (pair + i * HALF) < hd)
                            split_o.o[i][h][e] = __ldcg(from + 2 * HEADS + (quad + h) * hd +
                                                        2 * (pair + i * HALF) + e);
            if (s == 0)
                row_o = split_o;
            else
                output_join<PAIRS>(row_o, split_o, stats.c, stats.c_b, quad);
        }
    }
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int h = 0; h < QUAD; h++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int d = 2 * (pair + i * HALF) + e;
                if (quad + h < tile.head_count && d < hd)
                    o_row[(quad + h) * hd + d] =
                        bf16_from_float(row_o.o[i][h][e] / stats.row_l[quad + h]);
            }
}

int attention_setup(void) {
    const int error = KERNELS_SHARED_LIMIT(attention<1>, (int)attention_shared(2 * HALF));
    return error != 0
               ? error
               : KERNELS_SHARED_LIMIT(attention<2>, (int)attention_shared(KERNELS_HEAD_DIM_MAX));
}

extern "C" int kernels_attention(kernels_stream stream, int rows, const struct kernels_row *row,
                                 const int32_t *pages, int layer, int heads,
                                 const struct kernels_tile *tiles, int tile_count,
                                 struct kernels_kv kv, int context_max, const float *q, uint16_t *o,
                                 void *workspace, size_t workspace_bytes) {
    const int splits = (int)blocks_of(context_max, KERNELS_SPLIT_TOKENS);
    /* one block walks all splits when there are rows enough to fill the device, or no room for
     * triples */
    const bool enough = (int64_t)rows * tile_count > shared_items_max();
    const bool room = kernels_attention_workspace_bytes(rows, tile_count, kv.head_dim,
                                                        context_max) <= workspace_bytes;
    const dim3 grid((unsigned)(enough || !room || splits < 1 ? 1 : splits), (unsigned)tile_count,
                    (unsigned)rows);
    const size_t shared = attention_shared(kv.head_dim);
    uint32_t *counters = (uint32_t *)workspace;
    float *triples = (float *)(void *)((unsigned char *)workspace + counters_bytes());
    if (rows <= 0 || tile_count <= 0) return 0;
    if (kv.head_dim <= 2 * HALF)
        KERNELS_LAUNCH(attention<1>, grid, dim3(ATTENTION_THREADS), shared, stream, row, pages,
                       layer, heads, tiles, kv, q, o, counters, triples);
    else
        KERNELS_LAUNCH(attention<2>, grid, dim3(ATTENTION_THREADS), shared, stream, row, pages,
                       layer, heads, tiles, kv, q, o, counters, triples);
    return (int)cudaGetLastError();
}
