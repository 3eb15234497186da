/* gemv.cu: products for 1 to 4 rows: the weights are one stream of bytes, cut evenly over the
 * blocks.
 *
 * Fast mode only. Block b of G takes the k tiles [W b / G, W (b + 1) / G) of the W = row tiles x
 * column tiles of the matrix, whatever row they belong to; inside a row tile its 8 warps take equal
 * pieces of the segment, 4 loads of 16 bytes a lane in flight:
 *
 *   block        0          1          2
 *   tiles   |....:....|..:....:..|.:....:...      : = row tile ends
 *
 * gemv.cuh says how a row tile that several blocks share is finished.
 */
#include "kernels/gemv.cuh"

enum { WARPS = PRODUCT_WARPS, UNROLL = 4 };

extern "C" size_t kernels_product_workspace_bytes(int row_tiles_max) {
    return gemv_partials_floats() * sizeof(float) + (size_t)row_tiles_max * sizeof(uint32_t);
}

/* acc[row][0, 1] += rows g and g + 8 of the tile times four inputs. */
template <int M>
static __device__ __forceinline__ void multiply(float acc[M][2], uint4 w, const uint2 x[M]) {
    const float a[8] = {bf16_low(w.x), bf16_high(w.x), bf16_low(w.y), bf16_high(w.y),
                        bf16_low(w.z), bf16_high(w.z), bf16_low(w.w), bf16_high(w.w)};
#pragma unroll
    for (int r = 0; r < M; r++) {
        const float b[4] = {bf16_low(x[r].x), bf16_high(x[r].x), bf16_low(x[r].y),
                            bf16_high(x[r].y)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[r][0] = fmaf(a[i], b[i], acc[r][0]);
            acc[r][1] = fmaf(a[4 + i], b[i], acc[r][1]);
        }
    }
}

template <int M>
static __global__ void __launch_bounds__(PRODUCT_THREADS, GEMV_BLOCKS_AN_SM)
    gemv(const __grid_constant__ struct kernels_matrix m, const bf16 *in, float *out, bf16 *act,
         uint32_t *counters, float *partials) {
    __shared__ float warp_value[WARPS][M * KERNELS_TILE];
    __shared__ float value[M * KERNELS_TILE];
    __shared__ uint32_t flag;
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, g = lane / 4,
              t = lane % 4;
    const struct gemv_work work = {m.col_tiles, m.row_tiles * (int64_t)m.col_tiles};
    const int64_t per_row = work.per_row, my_begin = work.begin(blockIdx.x),
                  my_end = work.begin(blockIdx.x + 1);
    /* the warps' pieces of the first segment, about */
    const int64_t ahead = (my_end - my_begin < per_row ? my_end - my_begin : per_row) / WARPS;
    prefetch_tiles(m, my_begin + ahead * warp, ahead);
    after_previous();

    for (int64_t at = my_begin; at < my_end;) {
        const int64_t tile = at / per_row, row_end = (tile + 1) * per_row;
        const int64_t end = row_end < my_end ? row_end : my_end, count = end - at;
        const int from = (int)(count * warp / WARPS), to = (int)(count * (warp + 1) / WARPS);
        const uint4 *weights = (const uint4 *)m.data + (at + from) * WARP + lane;
        int column = (int)(at + from - tile * per_row) * KERNELS_TILE + 4 * t;
        float acc[M][2] = {};
        int k = from;
        for (; k + UNROLL <= to;
             k += UNROLL, weights += UNROLL * WARP, column += UNROLL * KERNELS_TILE) {
            uint4 w[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) w[u] = load_stream(weights + u * WARP);
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                uint2 x[M];
                const int c = column + u * KERNELS_TILE;
#pragma unroll
                for (int r = 0; r < M; r++)
                    x[r] = c < m.cols ? *(const uint2 *)(in + r * m.cols + c) : make_uint2(0, 0);
                multiply<M>(acc, w[u], x);
            }
        }
        for (; k < to; k++, weights += WARP, column += KERNELS_TILE) {
            uint2 x[M];
#pragma unroll
            for (int r = 0; r < M; r++)
                x[r] =
                    column < m.cols ? *(const uint2 *)(in + r * m.cols + column) : make_uint2(0, 0);
            multiply<M>(acc, load_stream(weights), x);
        }
#pragma unroll
        for (int r = 0; r < M; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float v = acc[r][half];
                v += __shfl_xor_sync(WARP_ALL, v, 1);
                v += __shfl_xor_sync(WARP_ALL, v, 2);
                if (t == 0) warp_value[warp][r * KERNELS_TILE + g + 8 * half] = v;
            }
        gemv_deliver<M>(m, M, work, tile, count, &warp_value[0][0], value, &flag, counters, partials,
                        out, act);
        at = end;
    }
}

int gemv_run(kernels_stream stream, int rows, const struct kernels_matrix *m, const bf16 *in,
             float *out, bf16 *act, void *workspace) {
    float *partials = (float *)workspace;
    uint32_t *counters = gemv_counters(workspace);
    const int64_t total = (int64_t)m->row_tiles * m->col_tiles;
    const int64_t most = (int64_t)kernels_sm_count * GEMV_BLOCKS_AN_SM;
    const dim3 grid((unsigned)(total < most ? total : most)), block(PRODUCT_THREADS);
    if (rows == 1)
        KERNELS_LAUNCH(gemv<1>, grid, block, 0, stream, *m, in, out, act, counters, partials);
    else if (rows == 2)
        KERNELS_LAUNCH(gemv<2>, grid, block, 0, stream, *m, in, out, act, counters, partials);
    else if (rows == 3)
        KERNELS_LAUNCH(gemv<3>, grid, block, 0, stream, *m, in, out, act, counters, partials);
    else
        KERNELS_LAUNCH(gemv<4>, grid, block, 0, stream, *m, in, out, act, counters, partials);
    return (int)cudaGetLastError();
}
