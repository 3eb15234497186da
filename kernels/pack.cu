/* pack.cu: fp32 rows to bf16 tiles (kernels.h has the layout), and the shape of a packed matrix.
 *
 * One thread packs four inputs of a row: 16 bytes read, 8 bytes written. Columns of a part that has
 * no multiple of 16 leave zeros at its end, which were there before (the memory comes zeroed).
 */
#include "kernels/tile.cuh"

enum { PACK_THREADS = 256 };

extern "C" bool kernels_matrix_shape(enum kernels_kind kind, int64_t rows, int64_t cols,
                                     int slab_count, const int64_t *slab_begin,
                                     struct kernels_matrix *out) {
    const int64_t tile_rows = kind == KERNELS_GATE_UP ? (int)TILE_UNITS : (int)KERNELS_TILE;
    const int64_t tiles = (cols + KERNELS_TILE - 1) / KERNELS_TILE;
    if (rows < 0 || cols < 0 || cols > INT32_MAX - 8 * KERNELS_TILE ||
        rows / tile_rows >= INT32_MAX)
        return false;
    memset(out, 0, sizeof *out);
    out->kind = kind;
    out->rows = rows;
    out->cols = cols;
    out->row_tiles = (int32_t)((rows + tile_rows - 1) / tile_rows);
    if (kind == KERNELS_ROW) {
        if (slab_count < 0 || slab_count > KERNELS_PARTS_MAX) return false;
        out->part_count = slab_count;
        for (int s = 0; s < slab_count; s++) {
            const int64_t n = slab_begin[s + 1] - slab_begin[s];
            out->part_begin[s] = (int32_t)(slab_begin[s] - slab_begin[0]);
            out->part_tile[s + 1] =
                out->part_tile[s] + (int32_t)((n + KERNELS_TILE - 1) / KERNELS_TILE);
        }
        out->part_begin[slab_count] = (int32_t)cols;
    } else {
        out->part_count = KERNELS_PARTS_MAX;
        for (int p = 0; p <= KERNELS_PARTS_MAX; p++) {
            out->part_tile[p] = (int32_t)(tiles * p / KERNELS_PARTS_MAX);
            const int64_t begin = (int64_t)out->part_tile[p] * KERNELS_TILE;
            out->part_begin[p] = (int32_t)(begin < cols ? begin : cols);
        }
    }
    out->col_tiles = out->part_tile[out->part_count];
    return true;
}

extern "C" size_t kernels_matrix_bytes(const struct kernels_matrix *m) {
    return (size_t)m->row_tiles * (size_t)m->col_tiles * TILE_ELEMENTS * sizeof(bf16);
}

/* blockIdx.y: row; threads: quads of columns. */
static __global__ void __launch_bounds__(PACK_THREADS)
    pack(const __grid_constant__ struct kernels_matrix m, int part, int64_t row_begin,
         const float *rows) {
    after_previous();
    const int64_t quad = (int64_t)blockIdx.x * PACK_THREADS + threadIdx.x;
    const int32_t tile = (int32_t)(quad / 4);
    if (tile >= m.col_tiles) return;
    int p = 0;
    while (tile >= m.part_tile[p + 1]) p++;
    const int column =
        m.part_begin[p] + (tile - m.part_tile[p]) * KERNELS_TILE + (int)(quad % 4) * 4;
    const float *from = rows + (int64_t)blockIdx.y * m.cols;
    bf16 out[4];
    for (int i = 0; i < 4; i++)
        out[i] = column + i < m.part_begin[p + 1] ? bf16_from_float(from[column + i]) : (bf16)0;

    const int64_t row = row_begin + blockIdx.y;
    const bool gated = m.kind == KERNELS_GATE_UP;
    const int64_t row_tile = gated ? row / TILE_UNITS : row / KERNELS_TILE;
    const int in_tile =
        gated ? (int)(row % TILE_UNITS) + part * TILE_UNITS : (int)(row % KERNELS_TILE);
    bf16 *to = (bf16 *)m.data + matrix_offset(&m, row_tile, in_tile, tile, (int)(quad % 4));
    memcpy(to, out, sizeof out);
}

extern "C" int kernels_pack(kernels_stream stream, const struct kernels_matrix *m, int part,
                            int64_t row_begin, int64_t row_count, const float *rows) {
    enum { ROWS_A_LAUNCH = 32768 };
    if (m->col_tiles == 0) return 0;
    for (int64_t done = 0; done < row_count; done += ROWS_A_LAUNCH) {
        const int64_t n =
            row_count - done < ROWS_A_LAUNCH ? row_count - done : (int64_t)ROWS_A_LAUNCH;
        KERNELS_LAUNCH(pack, dim3(blocks_of((int64_t)m->col_tiles * 4, PACK_THREADS), (unsigned)n),
                       dim3(PACK_THREADS), 0, stream, *m, part, row_begin + done,
                       rows + done * m->cols);
    }
    return (int)cudaGetLastError();
}
