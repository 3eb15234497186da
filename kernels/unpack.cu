/* unpack.cu: packed weights as plain rows, for a library that knows no fragments, and SwiGLU of its
 * fp32 results.
 *
 * A lane reads four inputs of two rows, 16 bytes of a fragment (kernels.h), and stores them apart; a
 * warp's stores fill 32 bytes of 16 rows. What is written is meant to be read from L2 at once: the
 * caller unpacks a piece of the matrix that fits there.
 */
#include "kernels/product.cuh"

enum { UNPACK_WARPS = 8, UNPACK_THREADS = UNPACK_WARPS * WARP, SWIGLU_THREADS = 256 };

/* One of the two rows of a fragment: row is the tile's, 0..15. */
static __device__ __forceinline__ void put_row(const struct kernels_matrix &m, int64_t tile, int row,
                                               int64_t row_begin, int64_t row_count, int column,
                                               int column_end, uint2 w, bf16 *out, int64_t pitch) {
    int64_t at = tile * KERNELS_TILE + row - row_begin;
    if (m.kind == KERNELS_GATE_UP) { /* gate rows first, then as many up rows */
        at = tile * TILE_UNITS + row % TILE_UNITS - row_begin;
        if (at < 0 || at >= row_count) return;
        if (row >= TILE_UNITS) at += row_count;
    } else if (at < 0 || at >= row_count) {
        return;
    }
    bf16 *to = out + at * pitch + column;
    if (column + 4 <= column_end && (pitch | column) % 4 == 0) {
        *(uint2 *)(void *)to = w;
        return;
    }
    bf16 v[4];
    memcpy(v, &w, sizeof v);
    for (int i = 0; i < 4; i++)
        if (column + i < column_end) to[i] = v[i];
}

/* Four weights times their block's scale, rounded to bf16 (the one rounding that the other products
 * with fp8 weights do not have). */
static __device__ __forceinline__ uint2 scaled(uint2 w, float scale) {
    return make_uint2(bf16_from_float(bf16_low(w.x) * scale) |
                          (uint32_t)bf16_from_float(bf16_high(w.x) * scale) << 16,
                      bf16_from_float(bf16_low(w.y) * scale) |
                          (uint32_t)bf16_from_float(bf16_high(w.y) * scale) << 16);
}

/* Inputs [4 quad, +4) of rows `row` and row + 8 of a tile. */
static __device__ __forceinline__ uint4 load_rows(const struct kernels_matrix &m, int64_t row_tile,
                                                  int row, int64_t tile, int quad) {
    if (m.dtype == KERNELS_BF16)
        return load_stream((const uint4 *)m.data + (row_tile * m.col_tiles + tile) * WARP + row * 4 +
                           quad);
    const uint2 q = *(const uint2 *)((const fp8 *)m.data +
                                     matrix_fp8_offset(&m, row_tile, row, tile, quad));
    const float *scale =
        matrix_scales(&m) + (row_tile * (m.col_tiles / FP8_TILES) + tile / FP8_TILES) * 2;
    const uint2 low = scaled(fp8_to_bf16(q.x), scale[0]), high = scaled(fp8_to_bf16(q.y), scale[1]);
    return make_uint4(low.x, low.y, high.x, high.y);
}

/* blockIdx.y: row tile from first_tile on; a warp takes a column tile. */
static __global__ void __launch_bounds__(UNPACK_THREADS)
    unpack(const __grid_constant__ struct kernels_matrix m, int64_t first_tile, int64_t row_begin,
           int64_t row_count, bf16 *out, int64_t pitch) {
    after_previous();
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const int32_t tile = (int32_t)blockIdx.x * UNPACK_WARPS + warp;
    if (tile >= m.col_tiles) return;
    int p = 0;
    while (tile >= m.part_tile[p + 1]) p++;
    const int column = m.part_begin[p] + (tile - m.part_tile[p]) * KERNELS_TILE + lane % 4 * 4;
    const int64_t row_tile = first_tile + blockIdx.y;
    const uint4 w = load_rows(m, row_tile, lane / 4, tile, lane % 4);
    const int end = m.part_begin[p + 1];
    put_row(m, row_tile, lane / 4, row_begin, row_count, column, end, make_uint2(w.x, w.y), out, pitch);
    put_row(m, row_tile, lane / 4 + 8, row_begin, row_count, column, end, make_uint2(w.z, w.w), out,
            pitch);
}

extern "C" int kernels_unpack(kernels_stream stream, const struct kernels_matrix *m,
                              int64_t row_begin, int64_t row_count, uint16_t *out, int64_t pitch) {
    enum { TILES_A_LAUNCH = 32768 };
    const int64_t height = m->kind == KERNELS_GATE_UP ? (int)TILE_UNITS : (int)KERNELS_TILE;
    if (row_count <= 0 || m->col_tiles == 0) return 0;
    const int64_t end = (row_begin + row_count + height - 1) / height;
    for (int64_t tile = row_begin / height; tile < end; tile += TILES_A_LAUNCH) {
        const int64_t n = end - tile < TILES_A_LAUNCH ? end - tile : (int64_t)TILES_A_LAUNCH;
        KERNELS_LAUNCH(unpack, dim3(blocks_of(m->col_tiles, UNPACK_WARPS), (unsigned)n),
                       dim3(UNPACK_THREADS), 0, stream, *m, tile, row_begin, row_count, out, pitch);
    }
    return (int)cudaGetLastError();
}

/* blockIdx.y: row. */
static __global__ void __launch_bounds__(SWIGLU_THREADS)
    swiglu(int64_t units, const float *gate_up, bf16 *act, int64_t pitch) {
    after_previous();
    const int64_t f = (int64_t)blockIdx.x * SWIGLU_THREADS + threadIdx.x, row = blockIdx.y;
    if (f >= units) return;
    const float *from = gate_up + row * 2 * units + f;
    act[row * pitch + f] = bf16_from_float(product_swiglu(from[0], from[units]));
}

extern "C" int kernels_swiglu(kernels_stream stream, int rows, int64_t units, const float *gate_up,
                              uint16_t *act, int64_t pitch) {
    if (rows > 0 && units > 0)
        KERNELS_LAUNCH(swiglu, dim3(blocks_of(units, SWIGLU_THREADS), (unsigned)rows),
                       dim3(SWIGLU_THREADS), 0, stream, units, gate_up, act, pitch);
    return (int)cudaGetLastError();
}
