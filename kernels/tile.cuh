/* tile.cuh: where an element of a packed matrix is (the picture is in kernels.h). */
#ifndef SFUMATO_KERNELS_TILE_CUH
#define SFUMATO_KERNELS_TILE_CUH

#include "kernels/device.cuh"

enum {
    TILE_ELEMENTS = KERNELS_TILE * KERNELS_TILE,
    TILE_UNITS = KERNELS_TILE / 2, /* GATE_UP: ffn columns of a tile */
};

enum {
    FP8_TILES = FP8_BLOCK / KERNELS_TILE,                  /* column tiles that share a scale */
    FP8_BLOCK_BYTES = FP8_TILES * TILE_ELEMENTS,           /* of one row tile */
    FP8_LOADS = FP8_BLOCK_BYTES / (WARP * (int)sizeof(uint4)), /* a lane's, for one block */
};

/* Offset in elements of inputs [4 quad, +4) of `row` of a tile, inside the tile. */
static __device__ __forceinline__ int tile_offset(int row, int quad) {
    return ((row % 8) * 4 + quad) * 8 + (row / 8) * 4;
}

/* First of the 4 consecutive inputs [4 quad, +4) of a row, by tile coordinates. */
static __device__ __forceinline__ int64_t matrix_offset(const struct kernels_matrix *m,
                                                        int64_t row_tile, int row, int64_t col_tile,
                                                        int quad) {
    return (row_tile * m->col_tiles + col_tile) * TILE_ELEMENTS + tile_offset(row, quad);
}

/* fp8: bytes of inputs 4 quad, + 2, + 1, + 3 of a row, by tile coordinates. */
static __device__ __forceinline__ int64_t matrix_fp8_offset(const struct kernels_matrix *m,
                                                            int64_t row_tile, int row,
                                                            int64_t col_tile, int quad) {
    const int64_t pair = (row_tile * m->col_tiles + col_tile) / 2;
    return pair * 2 * TILE_ELEMENTS + ((row % 8) * 4 + quad) * 16 + (col_tile % 2) * 8 +
           (row / 8) * 4;
}
/* fp8: [row tile][block of 128 columns][rows 0..7, rows 8..15], behind the tiles. */
static __device__ __forceinline__ float *matrix_scales(const struct kernels_matrix *m) {
    return (float *)(void *)((char *)m->data +
                             (int64_t)m->row_tiles * m->col_tiles * TILE_ELEMENTS);
}

/* A warp's weights, `tiles` of them from `first` on, on their way before the wait: the bytes that it
 * reads while the first loads are in flight. More would push out what others asked for: 8 KiB a warp
 * are 17 MB on a full H100 (measure before raising it). */
static __device__ __forceinline__ void prefetch_tiles(const struct kernels_matrix &m, int64_t first,
                                                      int64_t tiles) {
    enum { PREFETCH_TILES = 16 };
    if (threadIdx.x % WARP != 0) return;
    const int64_t bytes = TILE_ELEMENTS * (m.dtype == KERNELS_FP8 ? 1 : (int64_t)sizeof(bf16));
    const int64_t most = PREFETCH_TILES;
    prefetch_weights((const char *)m.data + first * bytes, (tiles < most ? tiles : most) * bytes);
}

/* Four columns of a row never straddle a part's border. */
static inline bool matrix_is_aligned(const struct kernels_matrix *m) {
    bool aligned = m->cols % 4 == 0;
    for (int p = 0; p < m->part_count; p++) aligned = aligned && m->part_begin[p] % 4 == 0;
    return aligned;
}

/* Columns and column tiles count from 0 together: no slab but the last has a partly filled tile,
 * and four columns of a row can be read at once. */
static inline bool matrix_is_dense(const struct kernels_matrix *m) {
    for (int p = 0; p <= m->part_count; p++)
        if (m->part_begin[p] != m->part_tile[p] * KERNELS_TILE && m->part_begin[p] != m->cols)
            return false;
    return m->cols % 4 == 0;
}

#endif
