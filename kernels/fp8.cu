/* fp8.cu: products with fp8 weights and bf16 activations (kernels.h has the layout and the order of
 * sums).
 *
 * product_fp8 is product.cu's kernel with an inner loop of its own: a warp takes a block of 128
 * columns at a time, four 16-byte loads a lane and row tile, the next block's on their way while
 * this one's bytes become bf16 pairs and meet the activations in mma.sync. The block's sums then
 * enter the part's by one fma with the scale. It serves any T, in both modes. Two sums and two
 * blocks a lane leave no registers for two row tiles and 64 rows at once.
 *
 * gemv_fp8 is for up to 8 rows in fast mode: the same arithmetic, with the bytes cut evenly over the
 * blocks as in gemv.cuh. It stays on tensor cores: taking e4m3 apart costs about two integer
 * operations a weight, so at 4 TB/s there is no room for the multiply-adds as well. The columns of
 * the operand that have no row of the step are zeros.
 */
#include "kernels/gemv.cuh"

enum { PAIR = 2 /* column tiles of one load */ };

/* One block of a row tile: this lane's weights and the scales of rows g and g + 8. */
struct fp8_block {
    uint4 weights[FP8_LOADS];
    several<float, 2> scale;
};

static __device__ __forceinline__ struct fp8_block load_block(const struct kernels_matrix &m,
                                                              int64_t tile, int block, int lane) {
    const int64_t at = tile * (m.col_tiles / FP8_TILES) + block;
    const uint4 *from = (const uint4 *)m.data + at * (FP8_LOADS * WARP) + lane;
    struct fp8_block out;
#pragma unroll
    for (int i = 0; i < FP8_LOADS; i++) out.weights[i] = load_stream(from + i * WARP);
    out.scale = load_several<2>(matrix_scales(&m) + at * 2);
    return out;
}

/* Column tile u of the block as the weights operand. */
static __device__ __forceinline__ uint4 operand(const struct fp8_block &block, int u) {
    const uint4 w = block.weights[u / PAIR];
    const uint2 low = fp8_to_bf16(u % PAIR ? w.z : w.x), high = fp8_to_bf16(u % PAIR ? w.w : w.y);
    return make_uint4(low.x, low.y, high.x, high.y);
}

static __device__ __forceinline__ void scale_in(float acc[4], const float sum[4],
                                                const several<float, 2> &scale) {
    acc[0] = fmaf(sum[0], scale.v[0], acc[0]);
    acc[1] = fmaf(sum[1], scale.v[0], acc[1]);
    acc[2] = fmaf(sum[2], scale.v[1], acc[2]);
    acc[3] = fmaf(sum[3], scale.v[1], acc[3]);
}

/* As product_mma. */
template <int MT, int NT, bool ALIGNED>
static __global__ void __launch_bounds__(PRODUCT_THREADS, NT > 2 ? 1 : 2)
    product_fp8(const __grid_constant__ struct kernels_matrix m, struct product_split split,
                int rows, const bf16 *in, float *out, bf16 *act) {
    KERNELS_SHARED(float, partial); /* see product_finish */
    const int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_row = (int)blockIdx.y * 8 * NT;
    const struct product_work work = product_work_of<MT, FP8_TILES>(m, split);
    after_previous();

    float acc[MT][NT][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
    if (work.begin < work.end) {
        const int column_end = work.column_end, rows_left = rows - first_row - g;
        int column = work.column + 4 * t;
        const bf16 *inputs = in + (int64_t)(first_row + g) * m.cols;
        int tile[MT]; /* a tile past the last: reads the last one, is not stored */
        struct fp8_block next[MT];
#pragma unroll
        for (int i = 0; i < MT; i++) {
            tile[i] = work.first_tile + i < m.row_tiles ? work.first_tile + i : m.row_tiles - 1;
            next[i] = load_block(m, tile[i], work.begin, lane);
        }
        for (int block = work.begin; block < work.end; block++, column += FP8_BLOCK) {
            struct fp8_block now[MT];
            float sum[MT][NT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                now[i] = next[i];
                if (block + 1 < work.end) next[i] = load_block(m, tile[i], block + 1, lane);
#pragma unroll
                for (int j = 0; j < NT; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[i][j][e] = 0.0f;
            }
#pragma unroll
            for (int u = 0; u < FP8_TILES; u++) {
                uint4 a[MT];
#pragma unroll
                for (int i = 0; i < MT; i++) a[i] = operand(now[i], u);
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const uint2 b =
                        load_inputs<ALIGNED>(inputs + (int64_t)j * 8 * m.cols, j * 8 < rows_left,
                                             column + u * KERNELS_TILE, column_end);
#pragma unroll
                    for (int i = 0; i < MT; i++) mma_bf16(sum[i][j], a[i], b);
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int j = 0; j < NT; j++) scale_in(acc[i][j], sum[i][j], now[i].scale);
        }
    }
    product_finish<MT, NT>(m, split, rows, acc, work.present, partial, out, act);
}

/* A piece of K is a block of 128 columns. Warps take equal numbers of them. */
static __global__ void __launch_bounds__(PRODUCT_THREADS, GEMV_BLOCKS_AN_SM)
    gemv_fp8(const __grid_constant__ struct kernels_matrix m, int rows, const bf16 *in, float *out,
             bf16 *act, uint32_t *counters, float *partials) {
    __shared__ float warp_value[PRODUCT_WARPS][GEMV_SLOT];
    __shared__ float value[GEMV_SLOT];
    __shared__ uint32_t flag;
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, g = lane / 4,
              t = lane % 4;
    const int per_row = m.col_tiles / FP8_TILES;
    const struct gemv_work work = {per_row, m.row_tiles * (int64_t)per_row};
    const int64_t my_begin = work.begin(blockIdx.x), my_end = work.begin(blockIdx.x + 1);
    const int64_t ahead = (my_end - my_begin < per_row ? my_end - my_begin : per_row);
    prefetch_tiles(m, (my_begin + ahead * warp / PRODUCT_WARPS) * FP8_TILES,
                   (ahead * (warp + 1) / PRODUCT_WARPS - ahead * warp / PRODUCT_WARPS) * FP8_TILES);
    after_previous();
    const bf16 *inputs = in + g * m.cols;

    for (int64_t at = my_begin; at < my_end;) {
        const int64_t tile = at / per_row, row_end = (tile + 1) * per_row;
        const int64_t end = row_end < my_end ? row_end : my_end, count = end - at;
        const int first = (int)(at - tile * per_row);
        const int from = first + (int)(count * warp / PRODUCT_WARPS);
        const int to = first + (int)(count * (warp + 1) / PRODUCT_WARPS);
        float acc[4] = {};
        struct fp8_block next = {};
        if (from < to) next = load_block(m, tile, from, lane);
        for (int block = from; block < to; block++) {
            const struct fp8_block now = next;
            const int column = block * FP8_BLOCK + 4 * t, column_end = (int)m.cols;
            float sum[4] = {};
            uint2 x[FP8_TILES];
            if (block + 1 < to) next = load_block(m, tile, block + 1, lane);
#pragma unroll
            for (int u = 0; u < FP8_TILES; u++)
                x[u] = load_inputs<true>(inputs, g < rows, column + u * KERNELS_TILE, column_end);
#pragma unroll
            for (int u = 0; u < FP8_TILES; u++) mma_bf16(sum, operand(now, u), x[u]);
            scale_in(acc, sum, now.scale);
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            warp_value[warp][(2 * t + e % 2) * KERNELS_TILE + g + e / 2 * 8] = acc[e];
        gemv_deliver<GEMV_ROWS_MAX>(m, rows, work, tile, count, &warp_value[0][0], value, &flag,
                                    counters, partials, out, act);
        at = end;
    }
}

template <int MT, int NT, bool ALIGNED>
static void launch(kernels_stream stream, const struct kernels_matrix *m,
                   struct product_split split, int rows, const bf16 *in, float *out, bf16 *act) {
    const dim3 grid = product_grid<MT, NT>(m, split, rows);
    const int shared = product_shared<MT, NT>::SHARED;
    KERNELS_LAUNCH((product_fp8<MT, NT, ALIGNED>), grid, dim3(PRODUCT_THREADS), shared, stream, *m,
                   split, rows, in, out, act);
}

static void stream_run(kernels_stream stream, int rows, const struct kernels_matrix *m,
                       const bf16 *in, float *out, bf16 *act, void *workspace) {
    const int64_t total = (int64_t)m->row_tiles * (m->col_tiles / FP8_TILES);
    const int64_t most = (int64_t)kernels_sm_count * GEMV_BLOCKS_AN_SM;
    const dim3 grid((unsigned)(total < most ? total : most)), block(PRODUCT_THREADS);
    KERNELS_LAUNCH(gemv_fp8, grid, block, 0, stream, *m, rows, in, out, act,
                   gemv_counters(workspace), (float *)workspace);
}

int fp8_run(kernels_stream stream, enum kernels_mode mode, int rows, const struct kernels_matrix *m,
            const bf16 *in, float *out, bf16 *act, void *workspace) {
    const struct product_split split = product_split_of(mode, m);
    if (mode == KERNELS_FAST && rows <= GEMV_ROWS_MAX && m->col_tiles > 0 && matrix_is_dense(m))
        stream_run(stream, rows, m, in, out, act, workspace);
    else if (!matrix_is_aligned(m))
        launch<1, 4, false>(stream, m, split, rows, in, out, act);
    else if (rows <= 8)
        launch<1, 1, true>(stream, m, split, rows, in, out, act);
    else if (rows <= 16)
        launch<1, 2, true>(stream, m, split, rows, in, out, act);
    else if (rows <= 32)
        launch<2, 4, true>(stream, m, split, rows, in, out, act);
    else
        launch<1, 8, true>(stream, m, split, rows, in, out, act);
    return (int)cudaGetLastError();
}
