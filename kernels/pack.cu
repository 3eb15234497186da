/* pack.cu: fp32 rows to bf16 or fp8 tiles (kernels.h has the layout), and the shape of a packed matrix.
 *
 * One thread packs four inputs of a row: 16 bytes read, 8 (fp8: 4) written. Columns of a part that has
 * no multiple of 16 leave zeros at its end, which were there before (the memory comes zeroed).
 */
#include "kernels/tile.cuh"

enum { PACK_THREADS = 256, ROWS_A_LAUNCH = 32768 /* of a grid's 65,535 */ };

extern "C" bool kernels_matrix_shape(enum kernels_dtype dtype, enum kernels_kind kind, int64_t rows, int64_t cols,
                                     int slab_count, const int64_t *slab_begin,
                                     struct kernels_matrix *out) {
    const int64_t tile_rows = kind == KERNELS_GATE_UP ? (int)TILE_UNITS : (int)KERNELS_TILE;
    /* a part is whole blocks of columns: those that share a scale */
    const int64_t unit = dtype == KERNELS_FP8 ? (int)FP8_TILES : 1;
    const int64_t unit_cols = unit * KERNELS_TILE, units = (cols + unit_cols - 1) / unit_cols;
    if (rows < 0 || cols < 0 || cols > INT32_MAX - 8 * FP8_BLOCK ||
        rows / tile_rows >= INT32_MAX)
        return false;
    memset(out, 0, sizeof *out);
    out->dtype = dtype;
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
                out->part_tile[s] + (int32_t)((n + unit_cols - 1) / unit_cols * unit);
        }
        out->part_begin[slab_count] = (int32_t)cols;
    } else {
        out->part_count = KERNELS_PARTS_MAX;
        for (int p = 0; p <= KERNELS_PARTS_MAX; p++) {
            out->part_tile[p] = (int32_t)(units * p / KERNELS_PARTS_MAX * unit);
            const int64_t begin = (int64_t)out->part_tile[p] * KERNELS_TILE;
            out->part_begin[p] = (int32_t)(begin < cols ? begin : cols);
        }
    }
    out->col_tiles = out->part_tile[out->part_count];
    return true;
}

extern "C" size_t kernels_matrix_bytes(const struct kernels_matrix *m) {
    const size_t tiles = (size_t)m->row_tiles * (size_t)m->col_tiles;
    if (m->dtype == KERNELS_FP8)
        return (tiles * TILE_ELEMENTS + tiles / FP8_TILES * 2 * sizeof(float) + 15) / 16 * 16;
    return tiles * TILE_ELEMENTS * sizeof(bf16);
}

/* Where four inputs of a row come from and go to. blockIdx.y: row; threads: quads of columns. */
struct pack_place {
    int64_t row_tile;
    int row, tile, quad; /* inside the row tile; column tile; quad of it */
    int column, left;    /* first column, and columns of the part from there on */
};

/* False: the thread has nothing to do. */
static __device__ __forceinline__ bool pack_find(const struct kernels_matrix &m, int part,
                                                 int64_t row_begin, struct pack_place *out) {
    const int64_t quad = (int64_t)blockIdx.x * PACK_THREADS + threadIdx.x;
    if (quad / 4 >= m.col_tiles) return false;
    out->tile = (int)(quad / 4);
    out->quad = (int)(quad % 4);
    int p = 0;
    while (out->tile >= m.part_tile[p + 1]) p++;
    out->column =
        m.part_begin[p] + (out->tile - m.part_tile[p]) * KERNELS_TILE + out->quad * 4;
    out->left = m.part_begin[p + 1] - out->column;
    const int64_t row = row_begin + blockIdx.y;
    const bool gated = m.kind == KERNELS_GATE_UP;
    out->row_tile = gated ? row / TILE_UNITS : row / KERNELS_TILE;
    out->row = gated ? (int)(row % TILE_UNITS) + part * TILE_UNITS : (int)(row % KERNELS_TILE);
    return true;
}

static __device__ __forceinline__ bf16 as_bf16(float x) { return bf16_from_float(x); }
static __device__ __forceinline__ bf16 as_bf16(bf16 x) { return x; }

template <typename T>
static __global__ void __launch_bounds__(PACK_THREADS)
    pack(const __grid_constant__ struct kernels_matrix m, int part, int64_t row_begin,
         const T *rows) {
    struct pack_place at;
    after_previous();
    if (!pack_find(m, part, row_begin, &at)) return;
    const T *from = rows + (int64_t)blockIdx.y * m.cols + at.column;
    bf16 out[4];
    for (int i = 0; i < 4; i++) out[i] = i < at.left ? as_bf16(from[i]) : (bf16)0;
    bf16 *to = (bf16 *)m.data + matrix_offset(&m, at.row_tile, at.row, at.tile, at.quad);
    memcpy(to, out, sizeof out);
}

/* The rows of a half tile bring the same scales: whoever comes last stores them again. */
static __global__ void __launch_bounds__(PACK_THREADS)
    pack_fp8(const __grid_constant__ struct kernels_matrix m, int part, int64_t row_begin,
             const fp8 *rows, const float *scales) {
    struct pack_place at;
    after_previous();
    if (!pack_find(m, part, row_begin, &at)) return;
    const fp8 *from = rows + (int64_t)blockIdx.y * m.cols + at.column;
    fp8 out[4];
    for (int i = 0; i < 4; i++) out[i / 2 + i % 2 * 2] = i < at.left ? from[i] : (fp8)0;
    fp8 *to = (fp8 *)m.data + matrix_fp8_offset(&m, at.row_tile, at.row, at.tile, at.quad);
    memcpy(to, out, sizeof out);
    if (at.tile % FP8_TILES != 0 || at.quad != 0) return;
    const int block = at.tile / FP8_TILES, blocks = m.col_tiles / FP8_TILES;
    matrix_scales(&m)[(at.row_tile * blocks + block) * 2 + at.row / 8] =
        scales[(int64_t)(blockIdx.y / FP8_BLOCK) * blocks + block];
}

template <typename T>
static int pack_run(kernels_stream stream, const struct kernels_matrix *m, int part,
                    int64_t row_begin, int64_t row_count, const T *rows) {
    if (m->col_tiles == 0) return 0;
    for (int64_t done = 0; done < row_count; done += ROWS_A_LAUNCH) {
        const int64_t n =
            row_count - done < ROWS_A_LAUNCH ? row_count - done : (int64_t)ROWS_A_LAUNCH;
        KERNELS_LAUNCH(pack<T>,
                       dim3(blocks_of((int64_t)m->col_tiles * 4, PACK_THREADS), (unsigned)n),
                       dim3(PACK_THREADS), 0, stream, *m, part, row_begin + done,
                       rows + done * m->cols);
    }
    return (int)cudaGetLastError();
}

extern "C" int kernels_pack(kernels_stream stream, const struct kernels_matrix *m, int part,
                            int64_t row_begin, int64_t row_count, const float *rows) {
    return pack_run(stream, m, part, row_begin, row_count, rows);
}

extern "C" int kernels_pack_bf16(kernels_stream stream, const struct kernels_matrix *m, int part,
                                 int64_t row_begin, int64_t row_count, const uint16_t *rows) {
    return pack_run(stream, m, part, row_begin, row_count, rows);
}

extern "C" int kernels_pack_fp8(kernels_stream stream, const struct kernels_matrix *m, int part,
                                int64_t row_begin, int64_t row_count, const uint8_t *rows,
                                const float *scales) {
    if (m->col_tiles == 0) return 0;
    if (row_begin % TILE_UNITS != 0) return 1; /* invalid value */
    const int64_t blocks = m->col_tiles / FP8_TILES;
    for (int64_t done = 0; done < row_count; done += ROWS_A_LAUNCH) {
        const int64_t n =
            row_count - done < ROWS_A_LAUNCH ? row_count - done : (int64_t)ROWS_A_LAUNCH;
        KERNELS_LAUNCH(pack_fp8,
                       dim3(blocks_of((int64_t)m->col_tiles * 4, PACK_THREADS), (unsigned)n),
                       dim3(PACK_THREADS), 0, stream, *m, part, row_begin + done,
                       rows + done * m->cols, scales + done / FP8_BLOCK * blocks);
    }
    return (int)cudaGetLastError();
}
