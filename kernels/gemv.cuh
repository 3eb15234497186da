/* gemv.cuh: the streaming products for few rows, of bf16 (gemv.cu) and fp8 weights (fp8.cu): who
 * streams what, and how a row tile is finished.
 *
 * The work is row tiles times pieces of K, in the order in which they lie in memory. Block b of G
 * takes the pieces [W b / G, W (b + 1) / G). A row tile inside one block is finished there. Of one
 * that blocks share, each leaves its partial sum in the workspace (a block has at most two: of its
 * first and its last segment); who arrives last adds them in block order and finishes. So bits
 * depend on G and the shape, not on timing.
 *
 *   workspace   partials [G][2][GEMV_ROWS_MAX][16], then counters [row tiles]: what a matrix leaves
 *               as partial sums never is another one's counter
 */
#ifndef SFUMATO_KERNELS_GEMV_CUH
#define SFUMATO_KERNELS_GEMV_CUH

#include "kernels/product.cuh"

enum { GEMV_ROWS_MAX = 8, GEMV_BLOCKS_AN_SM = 2, GEMV_SLOT = GEMV_ROWS_MAX * KERNELS_TILE };

static inline size_t gemv_partials_floats(void) {
    return (size_t)kernels_sm_count * GEMV_BLOCKS_AN_SM * 2 * GEMV_SLOT;
}
static inline uint32_t *gemv_counters(void *workspace) {
    return (uint32_t *)(void *)((float *)workspace + gemv_partials_floats());
}

struct gemv_work {
    int64_t per_row, total; /* pieces of a row tile, and in all */
    /* First piece of a block; the block that owns piece e. */
    __device__ __forceinline__ int64_t begin(int64_t block) const {
        return total * block / gridDim.x;
    }
    __device__ __forceinline__ int64_t owner(int64_t e) const {
        return ((e + 1) * gridDim.x - 1) / total;
    }
};

/* value: [M][16] shared sums of a row tile. Threads 0 .. 16 M - 1 store. */
template <int M>
static __device__ __forceinline__ void gemv_store(const struct kernels_matrix &m, int rows,
                                                  int64_t tile, const float *value, float *out,
                                                  bf16 *act) {
    const int i = (int)threadIdx.x, row = i / KERNELS_TILE, height = i % KERNELS_TILE;
    if (row >= M || row >= rows) return;
    if (m.kind == KERNELS_GATE_UP) {
        const int64_t f = tile * TILE_UNITS + height;
        if (height < TILE_UNITS && f < m.rows)
            act[row * m.rows + f] =
                bf16_from_float(product_swiglu(value[row * KERNELS_TILE + height],
                                               value[row * KERNELS_TILE + height + TILE_UNITS]));
    } else {
        const int64_t n = tile * KERNELS_TILE + height;
        if (n < m.rows) out[row * m.rows + n] = value[row * KERNELS_TILE + height];
    }
}

/* The warps of this block have left their sums of `count` pieces of a row tile in warp_value
 * [PRODUCT_WARPS][16 M]; value: [16 M], flag: shared. All threads call it, before a barrier. */
template <int M>
static __device__ __forceinline__ void gemv_deliver(const struct kernels_matrix &m, int rows,
                                                    const struct gemv_work &work, int64_t tile,
                                                    int64_t count, const float *warp_value,
                                                    float *value, uint32_t *flag,
                                                    uint32_t *counters, float *partials, float *out,
                                                    bf16 *act) {
    const int i = (int)threadIdx.x;
    const int64_t me = blockIdx.x;
    float sum = 0.0f;
    __syncthreads();
    if (i < M * KERNELS_TILE)
        sum = product_tree(warp_value + i, M * KERNELS_TILE, PRODUCT_WARPS) + 0.0f;
    bool mine = count == work.per_row;
    if (!mine) {
        float *slots = partials + i; /* of block b, segment s: slots + (2 b + s) * GEMV_SLOT */
        const int64_t row_begin = tile * work.per_row;
        if (i < M * KERNELS_TILE)
            slots[(2 * me + (work.begin(me) > row_begin ? 0 : 1)) * GEMV_SLOT] = sum;
        const int64_t first = work.owner(row_begin), last = work.owner(row_begin + work.per_row - 1);
        mine = last_arrival(&counters[tile], (uint32_t)(last - first + 1), flag);
        if (mine && i < M * KERNELS_TILE) {
            sum = 0.0f;
            for (int64_t b = first; b <= last; b++)
                sum += __ldcg(slots + (2 * b + (work.begin(b) > row_begin ? 0 : 1)) * GEMV_SLOT);
        }
    }
    if (i < M * KERNELS_TILE) value[i] = sum;
    __syncthreads();
    if (mine) gemv_store<M>(m, rows, tile, value, out, act);
}

#endif
