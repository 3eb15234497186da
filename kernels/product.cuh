/* product.cuh: what the products of bf16 and of fp8 weights share: who computes what, and the end.
 *
 * On tensor cores (product.cu, fp8.cu) the 8 warps of a block take
 *
 *   warp = (group of row tiles, part of K, piece of the part)
 *          8 slabs: 1, 8, 1     1 slab, deterministic: 8, 1, 1     1 slab, fast: 1, 1, 8
 *
 * and their sums meet in shared memory, [warp][8 NT columns][16 MT rows + 4] fp32. The streaming
 * products for few rows (gemv.cu, fp8.cu) share their end as well: gemv.cuh.
 */
#ifndef SFUMATO_KERNELS_PRODUCT_CUH
#define SFUMATO_KERNELS_PRODUCT_CUH

#include "kernels/tile.cuh"

enum { GEMV_ROWS = 4 }; /* gemv.cu takes up to so many rows in fast mode */
enum { PRODUCT_WARPS = 8, PRODUCT_THREADS = PRODUCT_WARPS * WARP, ROW_PAD = 4 };

/* Partial sums `pitch` apart, 1, 2, 4 or 8 of them, along the slab tree. */
static __device__ __forceinline__ float product_tree(const float *from, int pitch, int count) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < count ? from[i * pitch] : -0.0f;
    return tree_sum(v);
}

static __device__ __forceinline__ float product_swiglu(float gate, float up) {
    return gate / (1.0f + fmath_exp(-gate)) * up;
}

/* How the 8 warps share a block's work: 1 << log each, the product of the three is 8. */
struct product_split {
    int part_log, piece_log;
};

/* Four consecutive inputs of an activation row; beyond the part or the rows: zeros. */
template <bool ALIGNED>
static __device__ __forceinline__ uint2 load_inputs(const bf16 *row, bool valid, int column,
                                                    int end) {
    if constexpr (ALIGNED) {
        return valid && column < end ? *(const uint2 *)(row + column) : make_uint2(0, 0);
    } else {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = valid && column + i < end ? row[column + i] : 0u;
        return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    }
}

/* One slab or few: fast mode cuts them further, deterministic mode gives the warps other rows. */
static inline struct product_split product_split_of(enum kernels_mode mode,
                                                   const struct kernels_matrix *m) {
    struct product_split split = {0, 0};
    while (1 << split.part_log < m->part_count) split.part_log++;
    if (mode == KERNELS_FAST) split.piece_log = 3 - split.part_log;
    return split;
}

/* What a warp multiplies: MT row tiles by one piece of one part of K. */
struct product_work {
    bool present;           /* the part has columns at all */
    int first_tile;         /* row tile */
    int begin, end;         /* column tiles, in units; equal: nothing */
    int column, column_end; /* first of the piece, end of the part */
};

/* Pieces are whole units of UNIT column tiles. Prefetches the weights: comes before after_previous. */
template <int MT, int UNIT>
static __device__ __forceinline__ struct product_work product_work_of(
    const struct kernels_matrix &m, struct product_split split) {
    const int warp = (int)threadIdx.x / WARP;
    const int pieces = 1 << split.piece_log, slots = 1 << (split.part_log + split.piece_log);
    const int part = warp % slots >> split.piece_log, piece = warp % pieces;
    struct product_work w = {};
    w.first_tile = ((int)blockIdx.x * (PRODUCT_WARPS / slots) + warp / slots) * MT;
    w.present = part < m.part_count && m.part_tile[part] < m.part_tile[part + 1];
    if (!w.present || w.first_tile >= m.row_tiles) return w;
    const int first = m.part_tile[part] / UNIT, count = m.part_tile[part + 1] / UNIT - first;
    w.begin = first + (int)((int64_t)count * piece >> split.piece_log);
    w.end = first + (int)((int64_t)count * (piece + 1) >> split.piece_log);
    w.column = m.part_begin[part] + (w.begin - first) * (UNIT * KERNELS_TILE);
    w.column_end = m.part_begin[part + 1];
    prefetch_tiles(m, (int64_t)w.first_tile * m.col_tiles + w.begin * UNIT,
                   (w.end - w.begin) * UNIT);
    return w;
}

/* (row tile groups, groups of 8 NT rows) */
template <int MT, int NT>
static inline dim3 product_grid(const struct kernels_matrix *m, struct product_split split,
                                int rows) {
    const int groups = PRODUCT_WARPS >> (split.part_log + split.piece_log);
    return dim3(blocks_of(m->row_tiles, groups * MT), blocks_of(rows, 8 * NT));
}

template <int MT, int NT>
struct product_shared {
    enum { SHARED = PRODUCT_WARPS * 8 * NT * (KERNELS_TILE * MT + ROW_PAD) * (int)sizeof(float) };
};

/* acc: what a warp has summed for MT row tiles (from first_tile on) and NT times 8 rows; present: its
 * part has columns at all. partial: shared, all of it. */
template <int MT, int NT>
static __device__ __forceinline__ void product_finish(const struct kernels_matrix &m,
                                                      struct product_split split, int rows,
                                                      const float acc[MT][NT][4], bool present,
                                                      float *partial, float *out, bf16 *act) {
    enum { COLUMNS = 8 * NT, HEIGHT = KERNELS_TILE * MT, PITCH = HEIGHT + ROW_PAD };
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, g = lane / 4,
              t = lane % 4;
    const int slots = 1 << (split.part_log + split.piece_log), groups = PRODUCT_WARPS / slots;
    const int first_row = (int)blockIdx.y * COLUMNS;
    float *mine = partial + warp * (COLUMNS * PITCH);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                mine[(8 * j + 2 * t + e % 2) * PITCH + KERNELS_TILE * i + g + e / 2 * 8] =
                    present ? acc[i][j][e] + 0.0f : -0.0f;
    __syncthreads();

    /* outputs of the block: [groups][COLUMNS][HEIGHT], height fastest: neighbours store neighbours
     */
    for (int i = (int)threadIdx.x; i < groups * COLUMNS * HEIGHT; i += PRODUCT_THREADS) {
        const int height = i % HEIGHT, column = i / HEIGHT % COLUMNS,
                  group = i / (HEIGHT * COLUMNS);
        const int row = first_row + column;
        const int tile = ((int)blockIdx.x * groups + group) * MT + height / KERNELS_TILE;
        if (row >= rows || tile >= m.row_tiles) continue;
        const float *from = partial + (group * slots * COLUMNS + column) * PITCH + height;
        if (m.kind == KERNELS_GATE_UP) {
            const int unit = height % KERNELS_TILE;
            const int64_t f = (int64_t)tile * TILE_UNITS + unit;
            if (unit >= TILE_UNITS || f >= m.rows) continue;
            act[row * m.rows + f] = bf16_from_float(
                product_swiglu(product_tree(from, COLUMNS * PITCH, slots),
                               product_tree(from + TILE_UNITS, COLUMNS * PITCH, slots)));
        } else {
            const int64_t n = (int64_t)tile * KERNELS_TILE + height % KERNELS_TILE;
            if (n >= m.rows) continue;
            out[row * m.rows + n] = product_tree(from, COLUMNS * PITCH, slots);
        }
    }
}

/* gemv.cu. The matrix is dense (tile.cuh) and has columns. */
int gemv_run(kernels_stream stream, int rows, const struct kernels_matrix *m, const bf16 *in,
             float *out, bf16 *act, void *workspace);
/* fp8.cu. */
int fp8_run(kernels_stream stream, enum kernels_mode mode, int rows, const struct kernels_matrix *m,
            const bf16 *in, float *out, bf16 *act, void *workspace);

#endif
