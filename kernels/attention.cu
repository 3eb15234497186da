/* attention.cu: causal attention over the paged KV cache on tensor cores, for decode and prefill.
 *
 * A block works on one unit at a time (attention_work.cuh): up to COLUMNS = (row, query head) pairs
 * of one sequence that read one kv head, and of the keys one split of 256 tokens after another.
 * mma.sync m16n8k16 with tokens, then dims, as its 16 rows and the columns as its 8 columns:
 *
 *   scores  S [tokens][columns] = K [tokens][hd] Q^T         4 warps: 16 tokens of each page each
 *   split   m = max S, p = 2^(S - m), l = sum p              from scratch, masked p = 0
 *   output  O [hd][columns] = V^T [hd][tokens] P [tokens][columns]      4 warps: 16 DT dims each
 *   row     (m, l, O) of the splits joined in ascending order, whoever made them; then O / l
 *
 * A column's bits do not depend on its neighbours (each is a chain of k16 steps of its own: over
 * hd, over the 256 tokens), nor on who took which split: so neither on batch, chunk, bucket or
 * grid. What a deeper row of the group adds to a shallower one are products 0 x V, which change no
 * bit as long as V is finite. A unit cut by the border of two blocks leaves its triples in the
 * workspace and the block that arrives last joins them.
 *
 * Precision: q is rounded to bf16 as on the CPU, so scores are exact products summed in fp32. p
 * goes into the product as two bf16 (p = high + low to 2^-17), two mma for one: with a single one
 * the error is that of rounding o to bf16 once more (NMSE 2e-6, above the bound of 1e-6); with two
 * the emulation is within 2e-8 of a double rounded to bf16. Exponentials are ex2.approx in the base
 * 2 domain.
 *
 * Pages come by cp.async through a ring of STAGES x 64 rows of K or V, in the order K K K K V V V
 * V, across splits and units: while one stage is used the next ones are on their way. fp8 travels
 * and lies in shared memory as bytes and becomes bf16 (exactly) in the registers of the operand.
 *
 *   shared  stats | Q [COLUMNS][hd] | P [2][high, low][columns / 8][64][8] | ring [STAGES][64][hd]
 *
 * Rows of Q and of the ring are an odd number of 16 bytes apart: ldmatrix meets no bank twice. hd
 * is filled up with zeros to 64 DT. Decode (NT = 1): 128 threads; hd 128 in bf16 takes 76 KB, so an
 * SM of sm_90 or sm_80 has 2 blocks and 96 KB in flight (26 KB would cover the latency of HBM); in
 * fp8 43 KB, 3 blocks for want of registers, 72 KB in flight. Prefill (NT = 4, 64 columns): 256
 * threads, one block an SM, bound by the tensor cores.
 */
#include "kernels/attention_work.cuh"
#include "kernels/kv.cuh"

enum {
    TOKENS = KERNELS_PAGE_TOKENS,
    SPLIT_PAGES = KERNELS_SPLIT_TOKENS / TOKENS,
    TOKEN_WARPS = TOKENS / 16, /* warps side by side over a page's tokens, or over the dims */
    WARP_DIMS = 16 * TOKEN_WARPS,
    MERGE_SPLITS = 16, /* triples that are joined between two barriers */
    COUNTERS = 4096,   /* >= blocks of a launch */
    BLOCKS_AN_SM_MAX = 8,
};

struct attention_job {
    struct attention_work work;
    const int32_t *pages;
    int layer, heads;
    const struct kernels_tile *tiles;
    struct kernels_kv kv;
    const float *q;
    bf16 *o;
    uint32_t *counters;
    float *triples;
    int64_t triples_max;
};

/* Sizes of one variant. */
template <bool FP8, int DT, int NT, int CW>
struct attention_shape {
    enum {
        COLUMNS = 8 * NT * CW,
        THREADS = WARP * TOKEN_WARPS * CW,
        DIMS = WARP_DIMS * DT,
        STAGES = NT == 1 && DT < 4 ? 4 : 3,
        ROW_BYTES = DIMS * (FP8 ? 1 : 2) + 16, /* of the ring */
        Q_BYTES = DIMS * 2 + 16,
        STAGE_BYTES = TOKENS * ROW_BYTES,
        PLANE_BYTES = TOKENS * COLUMNS * 2, /* of P */
        O_WORDS = DT * NT * 4,              /* of a thread's output */
        TRIPLE_FLOATS = 2 * COLUMNS + O_WORDS * THREADS,
    };
    struct alignas(16) stats {
        float part_m[TOKEN_WARPS][COLUMNS],
            part_l[TOKEN_WARPS][COLUMNS];  /* of the split, by warp */
        float m[COLUMNS], l[COLUMNS];      /* of the row so far */
        float keep[COLUMNS], add[COLUMNS]; /* factors of the last join; add < 0: nothing to add */
        int position[COLUMNS],
            out[COLUMNS]; /* last visible token, place in o; position -1: unused */
        struct work_shared work;
        uint32_t flag;
    };
    enum {
        Q_AT = sizeof(stats),
        P_AT = Q_AT + COLUMNS * Q_BYTES,
        RING_AT = P_AT + 2 * 2 * PLANE_BYTES,
        SHARED = RING_AT + STAGES * STAGE_BYTES,
    };
    static_assert(SHARED <= 163 * 1024, "a block of sm_80 has no more");
    static_assert(3 * MERGE_SPLITS * COLUMNS * 4 <= 4 * PLANE_BYTES, "the join borrows P");
};

/* fp8_to_float of base/fp8.h but for NaN, which becomes 480: a NaN that was cached came with one in
 * the query. Low bytes count; e4m3 is exact in bf16. */
static __device__ __forceinline__ float fp8_wide(uint32_t byte) {
    const uint32_t bits = (byte & 0x7fu) << 20;
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude * 0x1p120f;
}
static __device__ __forceinline__ uint32_t fp8_pair(uint32_t low, uint32_t high) {
    return bf16_pair(fp8_wide(low), fp8_wide(high)) | (low & 0x80u) << 8 | (high & 0x80u) << 24;
}

/* The ring's producer: runs STAGES - 1 stages ahead of the item in work. */
struct attention_feed {
    struct work_item item;
    int page;
    bool values;
    int stage;
};

static __device__ __forceinline__ int split_pages(const struct work_item &item) {
    const int pages = item.position / TOKENS + 1 - item.split * SPLIT_PAGES;
    return pages < SPLIT_PAGES ? pages : SPLIT_PAGES;
}

/* A thread's part of a stage: chunk `chunk` of the rows token, token + step, ... */
struct attention_lane {
    int token, step, chunk;
};

template <typename Shape>
static __device__ __forceinline__ void feed_stage(const struct attention_job &job,
                                                  const struct attention_lane &lane, int64_t end,
                                                  unsigned char *ring,
                                                  struct attention_feed &feed) {
    struct work_item &item = feed.item;
    if (item.index < end) {
        const int row_bytes = job.kv.head_dim * kv_element_bytes(job.kv);
        const int page = item.split * SPLIT_PAGES + feed.page;
        const int visible = item.position + 1 - page * TOKENS;
        const unsigned char *from =
            kv_block(job.kv, job.layer, __ldg(&job.pages[item.page_begin + page]),
                     __ldg(&job.tiles[item.tile].kv_head)) +
            (feed.values ? TOKENS * row_bytes : 0);
        unsigned char *to = ring + feed.stage * Shape::STAGE_BYTES;
        if (row_bytes % 16 == 0) {
            for (int token = lane.token; token < TOKENS; token += lane.step)
                copy_async<16>(to + token * Shape::ROW_BYTES + 16 * lane.chunk,
                               from + token * row_bytes + 16 * lane.chunk, token < visible);
        } else {
            for (int token = lane.token; token < TOKENS; token += lane.step)
                copy_async<4>(to + token * Shape::ROW_BYTES + 4 * lane.chunk,
                              from + token * row_bytes + 4 * lane.chunk, token < visible);
        }
        if (++feed.page == split_pages(item)) {
            feed.page = 0;
            if (feed.values) work_next(job.work, item);
            feed.values = !feed.values;
        }
    }
    copies_commit(); /* an empty group keeps the count */
    feed.stage = feed.stage + 1 == Shape::STAGES ? 0 : feed.stage + 1;
}

/* Factors that join (m_b, .) to a row at m; m moves on. */
static __device__ __forceinline__ void join_factors(float &m, float m_b, float &keep, float &add) {
    const float top = m_b > m ? m_b : m;
    keep = m_b == -INFINITY ? 1.0f : exp2_fast(m - top);
    add = m_b == -INFINITY ? -1.0f : exp2_fast(m_b - top);
    m = top;
}
static __device__ __forceinline__ float join(float a, float b, float keep, float add) {
    return add < 0.0f ? a : fmaf(add, b, keep * a);
}

/* What a thread holds of O: dims of DT tiles x columns 2t, 2t + 1 of NT groups of 8. */
template <int DT, int NT>
struct attention_output {
    float o[DT][NT][4];
};

/* A unit begins: its queries, and what its columns are. */
template <typename Shape, bool FP8>
static __device__ __forceinline__ int unit_begin(const struct attention_job &job,
                                                 const struct work_item &item,
                                                 typename Shape::stats &stats, unsigned char *q) {
    const int tid = (int)threadIdx.x, hd = job.kv.head_dim;
    const int group = work_group_rows(job.work, item), row_begin = item.row - group + 1;
    const struct kernels_tile tile = job.tiles[item.tile];
    const int columns = group * tile.head_count;
    for (int c = tid; c < Shape::COLUMNS; c += Shape::THREADS) {
        const int i = c / tile.head_count;
        stats.position[c] = c < columns ? item.position - group + 1 + i : -1;
        stats.out[c] = (row_begin + i) * job.heads + tile.head_begin + c % tile.head_count;
        stats.m[c] = -INFINITY;
        stats.l[c] = 0.0f;
    }
    for (int i = tid; i < Shape::COLUMNS * (Shape::DIMS / 2); i += Shape::THREADS) {
        const int c = i / (Shape::DIMS / 2), pair = i % (Shape::DIMS / 2);
        /* Two dims that an mma takes together. ldmatrix gives lane t bytes 4t .. 4t + 3 of a row as
         * one step: dims 2t, 2t + 1 and 2t + 8, 2t + 9 of bf16, but 4t .. 4t + 3 of fp8: so Q lies
         * in the order in which fp8 keys come. */
        const int within = pair % 8,
                  dim = FP8 ? pair / 8 * 16 + within % 4 * 4 + within / 4 * 2 : 2 * pair;
        uint32_t both = 0;
        if (c < columns && dim < hd) {
            const int64_t head = (int64_t)(row_begin + c / tile.head_count) * job.heads +
                                 tile.head_begin + c % tile.head_count;
            const several<float, 2> x = load_several<2>(job.q + head * hd + dim);
            both = bf16_pair(x.v[0], x.v[1]);
        }
        *(uint32_t *)(q + c * Shape::Q_BYTES + 4 * pair) = both;
    }
    return columns;
}

/* score[16 tokens of the warp][columns] of one page. */
template <typename Shape, bool FP8, int NT>
static __device__ __forceinline__ void page_scores(float (&score)[NT][4], const unsigned char *keys,
                                                   const unsigned char *q, int columns,
                                                   int first_column) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % TOKEN_WARPS;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) score[j][e] = 0.0f;
    /* matrices of bf16: (tokens, dims) = (low, low), (low, high), (high, low), (high, high); of
     * fp8, where a matrix is 16 dims wide: (low, step), (high, step), (low, next), (high, next) */
    const unsigned char *key =
        FP8 ? keys + (16 * warp + lane % 16) * Shape::ROW_BYTES + lane / 16 * 16
            : keys + (16 * warp + lane / 16 * 8 + lane % 8) * Shape::ROW_BYTES + lane / 8 % 2 * 16;
    const unsigned char *query = q + (first_column + lane % 8) * Shape::Q_BYTES + lane / 8 * 16;
#pragma unroll
    for (int step = 0; step < Shape::DIMS / 16; step += 2) {
        uint4 a, a_next;
        if (FP8) {
            const uint4 x = load_matrices<false>(key + step * 16);
            a = make_uint4(fp8_pair(x.x, x.x >> 8), fp8_pair(x.x >> 16, x.x >> 24),
                           fp8_pair(x.y, x.y >> 8), fp8_pair(x.y >> 16, x.y >> 24));
            a_next = make_uint4(fp8_pair(x.z, x.z >> 8), fp8_pair(x.z >> 16, x.z >> 24),
                                fp8_pair(x.w, x.w >> 8), fp8_pair(x.w >> 16, x.w >> 24));
        } else {
            a = load_matrices<false>(key + step * 32);
            a_next = load_matrices<false>(key + step * 32 + 32);
        }
#pragma unroll
        for (int j = 0; j < NT; j++) {
            if (first_column + 8 * j >= columns) break;
            const uint4 b = load_matrices<false>(query + 8 * j * Shape::Q_BYTES + step * 32);
            mma_bf16(score[j], a, make_uint2(b.x, b.y));
            mma_bf16(score[j], a_next, make_uint2(b.z, b.w));
        }
    }
}

/* The largest score of a column over the warps' parts of the split. */
template <typename Shape>
static __device__ __forceinline__ float split_max(const typename Shape::stats &stats, int column) {
    float m = stats.part_m[0][column];
#pragma unroll
    for (int w = 1; w < TOKEN_WARPS; w++) {
        const float other = stats.part_m[w][column];
        m = other > m ? other : m;
    }
    return m;
}

/* Scores of a split become exponentials; the warp's part of m and l goes to stats. All threads. */
template <typename Shape, int NT>
static __device__ __forceinline__ void split_softmax(float (&score)[SPLIT_PAGES][NT][4],
                                                     typename Shape::stats &stats, float scale,
                                                     int token, int columns, int first_column) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % TOKEN_WARPS,
              g = lane / 4, t = lane % 4;
    token += 16 * warp + g;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        if (first_column + 8 * j >= columns) break;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = first_column + 8 * j + 2 * t + e;
            const int last = stats.position[column];
            float m = -INFINITY;
#pragma unroll
            for (int p = 0; p < SPLIT_PAGES; p++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &s = score[p][j][2 * half + e];
                    s = token + p * TOKENS + 8 * half <= last ? s * scale : -INFINITY;
                    m = s > m ? s : m;
                }
            for (int step = 4; step < WARP; step *= 2) {
                const float other = __shfl_xor_sync(WARP_ALL, m, step);
                m = other > m ? other : m;
            }
            if (g == 0) stats.part_m[warp][column] = m;
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < NT; j++) {
        if (first_column + 8 * j >= columns) break;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = first_column + 8 * j + 2 * t + e;
            float m = split_max<Shape>(stats, column), sum = 0.0f;
            if (m == -INFINITY) m = 0.0f; /* no token of this split: all exponentials 0 */
#pragma unroll
            for (int p = 0; p < SPLIT_PAGES; p++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &s = score[p][j][2 * half + e];
                    s = exp2_fast(s - m);
                    sum += s;
                }
            for (int step = 4; step < WARP; step *= 2) sum += __shfl_xor_sync(WARP_ALL, sum, step);
            if (g == 0) stats.part_l[warp][column] = sum;
        }
    }
}

/* m and l of the split, in every thread that asks. */
template <typename Shape>
static __device__ __forceinline__ void split_stats(const typename Shape::stats &stats, int column,
                                                   float &m, float &l) {
    m = split_max<Shape>(stats, column);
    l = (stats.part_l[0][column] + stats.part_l[1][column]) +
        (stats.part_l[2][column] + stats.part_l[3][column]);
}

/* P of one page: score [16 tokens of the warp][columns] as two bf16 planes. */
template <typename Shape, int NT>
static __device__ __forceinline__ void page_weights(const float (&score)[NT][4], unsigned char *p,
                                                    int columns, int first_column) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % TOKEN_WARPS,
              g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NT; j++) {
        if (first_column + 8 * j >= columns) break;
        unsigned char *to = p + (first_column + 8 * j) * TOKENS * 2 + (16 * warp + g) * 16 + 4 * t;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float a = score[j][2 * half], b = score[j][2 * half + 1];
            const uint32_t high = bf16_pair(a, b);
            *(uint32_t *)(to + half * 8 * 16) = high;
            *(uint32_t *)(to + half * 8 * 16 + Shape::PLANE_BYTES) =
                bf16_pair(a - bf16_low(high), b - bf16_high(high));
        }
    }
}

/* o += V^T P of one page. */
template <typename Shape, bool FP8, int DT, int NT>
static __device__ __forceinline__ void page_output(attention_output<DT, NT> &out,
                                                   const unsigned char *values,
                                                   const unsigned char *p, int columns,
                                                   int first_column) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % TOKEN_WARPS;
    /* matrices of P: high plane tokens low, high; low plane the same */
    const unsigned char *weights =
        p + lane / 16 * Shape::PLANE_BYTES + first_column * TOKENS * 2 + lane % 16 * 16;
    /* matrices of bf16: (tokens, dims) = (low, low), (high, low), (low, high), (high, high); of fp8
     * four times 8 tokens of 16 dims: two steps; rows g, g + 8 of the operand: dims 2g, 2g + 1 */
    const unsigned char *value =
        FP8 ? values + lane * Shape::ROW_BYTES + 16 * warp
            : values + lane % 16 * Shape::ROW_BYTES + 32 * warp + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step += 2) {
        uint4 a[DT][2];
#pragma unroll
        for (int i = 0; i < DT; i++) {
            if (FP8) {
                const uint4 x =
                    load_matrices<true>(value + 16 * step * Shape::ROW_BYTES + i * WARP_DIMS);
                a[i][0] = make_uint4(fp8_pair(x.x, x.x >> 16), fp8_pair(x.y, x.y >> 16),
                                     fp8_pair(x.x >> 8, x.x >> 24), fp8_pair(x.y >> 8, x.y >> 24));
                a[i][1] = make_uint4(fp8_pair(x.z, x.z >> 16), fp8_pair(x.w, x.w >> 16),
                                     fp8_pair(x.z >> 8, x.z >> 24), fp8_pair(x.w >> 8, x.w >> 24));
            } else {
#pragma unroll
                for (int s = 0; s < 2; s++)
                    a[i][s] = load_matrices<true>(value + 16 * (step + s) * Shape::ROW_BYTES +
                                                  2 * i * WARP_DIMS);
            }
        }
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (first_column + 8 * j >= columns) break;
                const uint4 b =
                    load_matrices<true>(weights + 8 * j * TOKENS * 2 + 16 * (step + s) * 16);
#pragma unroll
                for (int i = 0; i < DT; i++) mma_bf16(out.o[i][j], a[i][s], make_uint2(b.x, b.y));
#pragma unroll
                for (int i = 0; i < DT; i++) mma_bf16(out.o[i][j], a[i][s], make_uint2(b.z, b.w));
            }
    }
}

template <int DT, int NT>
static __device__ __forceinline__ void output_clear(attention_output<DT, NT> &out) {
#pragma unroll
    for (int i = 0; i < DT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) out.o[i][j][e] = 0.0f;
}

/* row = row joined with split; keep, add: [COLUMNS]. */
template <int DT, int NT>
static __device__ __forceinline__ void output_join(attention_output<DT, NT> &row,
                                                   const attention_output<DT, NT> &split,
                                                   const float *keep, const float *add,
                                                   int first_column) {
    const int t = (int)threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = first_column + 8 * j + 2 * t + e % 2;
#pragma unroll
            for (int i = 0; i < DT; i++)
                row.o[i][j][e] = join(row.o[i][j][e], split.o[i][j][e], keep[column], add[column]);
        }
}

template <typename Shape, bool FP8, int DT, int NT>
static __device__ __forceinline__ void output_store(const struct attention_job &job,
                                                    const attention_output<DT, NT> &row,
                                                    const typename Shape::stats &stats, float scale,
                                                    int first_column) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP % TOKEN_WARPS,
              g = lane / 4, t = lane % 4, hd = job.kv.head_dim;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int column = first_column + 8 * j + 2 * t + e % 2;
            if (stats.position[column] < 0) continue;
            bf16 *to = job.o + (int64_t)stats.out[column] * hd;
#pragma unroll
            for (int i = 0; i < DT; i++) {
                const int tile = WARP_DIMS * i + 16 * warp;
                const int dim = tile + (FP8 ? 2 * g + e / 2 : g + e / 2 * 8);
                if (dim < hd) to[dim] = bf16_from_float(row.o[i][j][e] / stats.l[column] * scale);
            }
        }
}

/* A split's triple in the workspace: m [COLUMNS], l [COLUMNS], then 4 values a thread at a time. */
template <typename Shape, int DT, int NT>
static __device__ __forceinline__ void triple_store(float *to,
                                                    const attention_output<DT, NT> &split,
                                                    const typename Shape::stats &stats, int columns,
                                                    int first_column) {
    const int tid = (int)threadIdx.x;
    if (tid < columns) split_stats<Shape>(stats, tid, to[tid], to[Shape::COLUMNS + tid]);
    float4 *o = (float4 *)(void *)(to + 2 * Shape::COLUMNS) + tid;
#pragma unroll
    for (int j = 0; j < NT; j++)
        if (first_column + 8 * j + 2 * (tid % 4) < columns)
#pragma unroll
            for (int i = 0; i < DT; i++)
                o[(i * NT + j) * Shape::THREADS] = make_float4(split.o[i][j][0], split.o[i][j][1],
                                                               split.o[i][j][2], split.o[i][j][3]);
}

/* row, stats.m and stats.l = triples [splits] joined in order. scratch: shared, [3][MERGE_SPLITS]
 * [COLUMNS]. All threads. */
template <typename Shape, int DT, int NT>
static __device__ __forceinline__ void triples_join(const float *triples, int splits,
                                                    attention_output<DT, NT> &row,
                                                    typename Shape::stats &stats, float *scratch,
                                                    int columns, int first_column) {
    enum { COLUMNS = Shape::COLUMNS, AHEAD = DT * NT >= 8 ? 1 : 8 / (DT * NT) };
    const int tid = (int)threadIdx.x;
    float *m_of = scratch, *keep_of = m_of + MERGE_SPLITS * COLUMNS,
          *add_of = keep_of + MERGE_SPLITS * COLUMNS;
    output_clear(row);
    for (int begin = 0; begin < splits; begin += MERGE_SPLITS) {
        const int count = min(splits - begin, (int)MERGE_SPLITS);
        const float *from = triples + (int64_t)begin * Shape::TRIPLE_FLOATS;
        for (int i = tid; i < count * COLUMNS; i += Shape::THREADS)
            m_of[i] =
                i % COLUMNS < columns
                    ? __ldcg(from + (int64_t)(i / COLUMNS) * Shape::TRIPLE_FLOATS + i % COLUMNS)
                    : -INFINITY;
        __syncthreads();
        for (int i = tid; i < count * COLUMNS; i += Shape::THREADS) {
            float m = stats.m[i % COLUMNS];
            for (int k = i % COLUMNS; k < i; k += COLUMNS) m = m_of[k] > m ? m_of[k] : m;
            join_factors(m, m_of[i], keep_of[i], add_of[i]);
        }
        __syncthreads();
        if (tid < columns) {
            float m = stats.m[tid], l = stats.l[tid];
            for (int s = 0; s < count; s++) {
                const int i = s * COLUMNS + tid;
                m = m_of[i] > m ? m_of[i] : m;
                l = join(l, __ldcg(from + (int64_t)s * Shape::TRIPLE_FLOATS + COLUMNS + tid),
                         keep_of[i], add_of[i]);
            }
            stats.m[tid] = m;
            stats.l[tid] = l;
        }
        const float4 *o = (const float4 *)(const void *)(from + 2 * COLUMNS) + tid;
        for (int s = 0; s < count; s += AHEAD) {
            attention_output<DT, NT> split[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int i = 0; i < DT; i++) {
                        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                        if (s + k < count && first_column + 8 * j + 2 * (tid % 4) < columns)
                            x = __ldcg(o + (int64_t)(s + k) * (Shape::TRIPLE_FLOATS / 4) +
                                       (i * NT + j) * Shape::THREADS);
                        split[k].o[i][j][0] = x.x;
                        split[k].o[i][j][1] = x.y;
                        split[k].o[i][j][2] = x.z;
                        split[k].o[i][j][3] = x.w;
                    }
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (s + k < count)
                    output_join(row, split[k], keep_of + (s + k) * COLUMNS,
                                add_of + (s + k) * COLUMNS, first_column);
        }
        __syncthreads(); /* stats and scratch: the next triples, or the end */
    }
}

/* CW: warps side by side over the columns. grid: any, all of whose blocks fit the device. */
template <bool FP8, int DT, int NT, int CW>
static __global__ void __launch_bounds__(WARP *TOKEN_WARPS *CW, NT == 1 && DT < 4 ? 3 : 1)
    attention(const __grid_constant__ struct attention_job job) {
    typedef attention_shape<FP8, DT, NT, CW> shape;
    after_previous();
    KERNELS_SHARED(unsigned char, memory);
    typename shape::stats &stats = *(typename shape::stats *)(void *)memory;
    unsigned char *const q = memory + shape::Q_AT, *const p_of = memory + shape::P_AT,
                         *const ring = memory + shape::RING_AT;
    const int tid = (int)threadIdx.x, hd = job.kv.head_dim;
    const int first_column = tid / (WARP * TOKEN_WARPS) * 8 * NT;

    for (int row = (int)blockIdx.x; row < job.work.row_count; row += (int)gridDim.x)
        if (job.work.rows[row].position < 0) /* padding */
            for (int i = tid; i < job.heads * hd; i += shape::THREADS)
                job.o[(int64_t)row * job.heads * hd + i] = 0;

    struct work_item item;
    const struct work_share share = work_divide(job.work, job.triples_max, stats.work, item);
    if (share.begin >= share.end) return;

    const int chunk_bytes = hd * kv_element_bytes(job.kv) % 16 == 0 ? 16 : 4;
    const int chunks = hd * kv_element_bytes(job.kv) / chunk_bytes, step = shape::THREADS / chunks;
    const struct attention_lane lane = {tid < step * chunks ? tid / chunks : (int)TOKENS, step,
                                        tid % chunks};
    if (hd < shape::DIMS) { /* dims that are not there */
        for (int i = tid; i < shape::STAGES * shape::STAGE_BYTES / 16; i += shape::THREADS)
            ((uint4 *)(void *)ring)[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    struct attention_feed feed = {item, 0, false, 0};
    for (int s = 0; s < shape::STAGES - 1; s++) feed_stage<shape>(job, lane, share.end, ring, feed);

    attention_output<DT, NT> row_o;
    int columns = 0, stage = 0;
    for (; item.index < share.end; work_next(job.work, item)) {
        const int splits = work_splits(item.position), pages = split_pages(item);
        const int64_t unit = item.index - item.split; /* its first item */
        const bool cut = unit < share.begin || unit + splits > share.end;
        const int kv_head = job.tiles[item.tile].kv_head;
        if (item.split == 0 || item.index == share.begin) {
            __syncthreads(); /* the unit before has been stored */
            columns = unit_begin<shape, FP8>(job, item, stats, q);
            output_clear(row_o);
        }

        float score[SPLIT_PAGES][NT][4];
#pragma unroll
        for (int p = 0; p < SPLIT_PAGES; p++) {
            if (p < pages) {
                copies_wait<shape::STAGES - 2>();
                __syncthreads(); /* the stage is there, and everybody is done with the one before */
                feed_stage<shape>(job, lane, share.end, ring, feed);
                page_scores<shape, FP8, NT>(score[p], ring + stage * shape::STAGE_BYTES, q, columns,
                                            first_column);
                stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
            } else {
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) score[p][j][e] = 0.0f;
            }
        }
        const float log2e = 1.4426950408889634f;
        split_softmax<shape, NT>(
            score, stats, kv_scale(job.kv, job.layer, kv_head, false) * log2e / sqrtf((float)hd),
            item.split * KERNELS_SPLIT_TOKENS, columns, first_column);

        attention_output<DT, NT> split_o;
        output_clear(split_o);
#pragma unroll
        for (int p = 0; p < SPLIT_PAGES; p++) {
            if (p >= pages) break;
            unsigned char *weights = p_of + p % 2 * 2 * shape::PLANE_BYTES;
            page_weights<shape, NT>(score[p], weights, columns, first_column);
            copies_wait<shape::STAGES - 2>();
            __syncthreads();
            feed_stage<shape>(job, lane, share.end, ring, feed);
            page_output<shape, FP8, DT, NT>(split_o, ring + stage * shape::STAGE_BYTES, weights,
                                            columns, first_column);
            stage = stage + 1 == shape::STAGES ? 0 : stage + 1;
        }

        const float scale = kv_scale(job.kv, job.layer, kv_head, true);
        if (!cut) {
            if (tid < columns) {
                float m, l;
                split_stats<shape>(stats, tid, m, l);
                join_factors(stats.m[tid], m, stats.keep[tid], stats.add[tid]);
                stats.l[tid] = join(stats.l[tid], l, stats.keep[tid], stats.add[tid]);
            }
            __syncthreads();
            output_join(row_o, split_o, stats.keep, stats.add, first_column);
            if (item.split + 1 == splits)
                output_store<shape, FP8, DT, NT>(job, row_o, stats, scale, first_column);
            continue;
        }
        triple_store<shape, DT, NT>(job.triples + item.index * shape::TRIPLE_FLOATS, split_o, stats,
                                    columns, first_column);
        if (item.split + 1 < splits && item.index + 1 < share.end) continue;
        const int first_block = work_block_of(share, unit),
                  last_block = work_block_of(share, unit + splits - 1);
        if (!last_arrival(&job.counters[first_block], (uint32_t)(last_block - first_block + 1),
                          &stats.flag))
            continue;
        triples_join<shape, DT, NT>(job.triples + unit * shape::TRIPLE_FLOATS, splits, row_o, stats,
                                    (float *)(void *)p_of, columns, first_column);
        output_store<shape, FP8, DT, NT>(job, row_o, stats, scale, first_column);
    }
}

/* ---- host ---- */

/* The kernels there are: [fp8][hd up to 64, 128, 256][decode, chunks]. */
struct attention_variant {
    int blocks_an_sm, columns;
    size_t shared, triple_bytes;
    void (*launch)(kernels_stream stream, unsigned blocks, const struct attention_job &job);
};

template <bool FP8, int DT, int NT, int CW>
static void attention_launch(kernels_stream stream, unsigned blocks,
                             const struct attention_job &job) {
    typedef attention_shape<FP8, DT, NT, CW> shape;
    KERNELS_LAUNCH((attention<FP8, DT, NT, CW>), dim3(blocks), dim3(shape::THREADS),
                   (size_t)shape::SHARED, stream, job);
}

template <bool FP8, int DT, int NT, int CW>
static struct attention_variant attention_make() {
    typedef attention_shape<FP8, DT, NT, CW> shape;
    struct attention_variant v = {0, shape::COLUMNS, shape::SHARED,
                                  shape::TRIPLE_FLOATS * sizeof(float),
                                  attention_launch<FP8, DT, NT, CW>};
    /* a device whose multiprocessors are too small for a variant refuses it when it is launched */
    if (KERNELS_SHARED_LIMIT((attention<FP8, DT, NT, CW>), (int)shape::SHARED) != 0 ||
        KERNELS_BLOCKS_AN_SM((attention<FP8, DT, NT, CW>), shape::THREADS, (size_t)shape::SHARED,
                             &v.blocks_an_sm) != 0) {
        (void)cudaGetLastError();
        v.blocks_an_sm = 1;
    }
    v.blocks_an_sm = max(1, min(v.blocks_an_sm, (int)BLOCKS_AN_SM_MAX));
    return v;
}

static struct attention_variant variants[2][3][2];

int attention_setup(void) {
    variants[0][0][0] = attention_make<false, 1, 1, 1>();
    variants[0][1][0] = attention_make<false, 2, 1, 1>();
    variants[0][2][0] = attention_make<false, 4, 1, 1>();
    variants[0][0][1] = attention_make<false, 1, 4, 2>();
    variants[0][1][1] = attention_make<false, 2, 4, 2>();
    variants[0][2][1] = attention_make<false, 4, 2, 2>();
    variants[1][0][0] = attention_make<true, 1, 1, 1>();
    variants[1][1][0] = attention_make<true, 2, 1, 1>();
    variants[1][2][0] = attention_make<true, 4, 1, 1>();
    variants[1][0][1] = attention_make<true, 1, 4, 2>();
    variants[1][1][1] = attention_make<true, 2, 4, 2>();
    variants[1][2][1] = attention_make<true, 4, 2, 2>();
    return 0;
}

static int size_class(int head_dim) { return head_dim <= 64 ? 0 : head_dim <= 128 ? 1 : 2; }

extern "C" size_t kernels_attention_workspace_bytes(int rows, int tile_count, int head_dim,
                                                    int context_max) {
    const size_t splits = ((size_t)context_max + KERNELS_SPLIT_TOKENS - 1) / KERNELS_SPLIT_TOKENS;
    return COUNTERS * sizeof(uint32_t) + (size_t)rows * (size_t)tile_count * splits *
                                             variants[0][size_class(head_dim)][0].triple_bytes;
}

extern "C" int kernels_attention(kernels_stream stream, int rows, const struct kernels_row *row,
                                 const int32_t *pages, struct kernels_attention spec,
                                 struct kernels_kv kv, const float *q, uint16_t *o, void *workspace,
                                 size_t workspace_bytes) {
    if (rows <= 0 || spec.tile_count <= 0) return 0;
    const struct attention_variant *v =
        &variants[kv.type == KERNELS_KV_FP8][size_class(kv.head_dim)][spec.run_max > 1];
    const int64_t splits = blocks_of(spec.context_max, KERNELS_SPLIT_TOKENS);
    const int64_t items = (int64_t)rows * spec.tile_count * (splits > 0 ? splits : 1);
    const size_t counters = COUNTERS * sizeof(uint32_t);
    struct attention_job job = {};
    job.work.rows = row;
    job.work.row_count = rows;
    job.work.group_max = spec.run_max > 1 ? v->columns / spec.tile_heads_max : 1;
    job.work.tile_count = spec.tile_count;
    job.pages = pages;
    job.layer = spec.layer;
    job.heads = spec.heads;
    job.tiles = spec.tiles;
    job.kv = kv;
    job.q = q;
    job.o = o;
    job.counters = (uint32_t *)workspace;
    job.triples = (float *)(void *)((unsigned char *)workspace + counters);
    job.triples_max =
        workspace_bytes > counters ? (int64_t)((workspace_bytes - counters) / v->triple_bytes) : 0;
    const int64_t blocks =
        min(min(items, (int64_t)kernels_sm_count * v->blocks_an_sm), (int64_t)COUNTERS);
    v->launch(stream, (unsigned)blocks, job);
    return (int)cudaGetLastError();
}
