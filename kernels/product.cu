/* product.cu: products with packed weights on tensor cores, up to 64 rows at a time.
 *
 * The weights are the 16-row operand of mma.sync m16n8k16, the rows of the step its 8 columns: a
 * column's result does not depend on its neighbours, so a row's bits do not depend on T. A warp
 * takes one part of K (a slab, or an eighth) of MT row tiles, from its first to its last tile; the
 * partial sums of a block's 8 warps meet in shared memory and are added along the slab tree.
 * How warps share the work and where the sums meet: product.cuh.
 *
 * Weights are read once, 16 bytes a lane, straight into the operand's registers; activations 8
 * bytes a lane from L1 and L2, unless K or a slab border is no multiple of 4 (toy models).
 * Epilogues: store fp32, or SwiGLU (a tile holds 8 gate rows and their up rows). gemv.cu takes over
 * for up to 4 rows in fast mode, fp8.cu for weights of 8 bits.
 */
#include "kernels/product.cuh"

/* MT row tiles, NT times 8 rows of the step. grid: (row tile groups, groups of 8 NT rows). */
template <int MT, int NT, bool ALIGNED>
static __global__ void __launch_bounds__(PRODUCT_THREADS, NT > 4 ? 1 : 2)
    product_mma(const __grid_constant__ struct kernels_matrix m, struct product_split split,
                int rows, const bf16 *in, float *out, bf16 *act) {
    enum { COLUMNS = 8 * NT };
    enum {
        UNROLL = NT == 4 ? 2 : 4
    };                              /* tiles in flight; two blocks of NT = 4 share 64 K registers */
    KERNELS_SHARED(float, partial); /* see product_finish */
    const int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_row = (int)blockIdx.y * COLUMNS;
    const struct product_work work = product_work_of<MT, 1>(m, split);
    after_previous();

    float acc[MT][NT][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;

    if (work.begin < work.end) {
        const int column_end = work.column_end;
        int column = work.column + 4 * t;
        const uint4 *weights[MT]; /* a tile past the last: reads the last one, is not stored */
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int tile =
                work.first_tile + i < m.row_tiles ? work.first_tile + i : m.row_tiles - 1;
            weights[i] =
                (const uint4 *)m.data + ((int64_t)tile * m.col_tiles + work.begin) * WARP + lane;
        }
        const bf16 *inputs = in + (int64_t)(first_row + g) * m.cols;
        const int rows_left = rows - first_row - g;
        int k = work.begin;
        for (; k + UNROLL <= work.end; k += UNROLL) {
            uint4 a[UNROLL][MT];
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
#pragma unroll
                for (int i = 0; i < MT; i++) a[u][i] = load_stream(weights[i] + u * WARP);
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    const uint2 b =
                        load_inputs<ALIGNED>(inputs + (int64_t)j * 8 * m.cols, j * 8 < rows_left,
                                             column + u * KERNELS_TILE, column_end);
#pragma unroll
                    for (int i = 0; i < MT; i++) mma_bf16(acc[i][j], a[u][i], b);
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) weights[i] += UNROLL * WARP;
            column += UNROLL * KERNELS_TILE;
        }
        for (; k < work.end; k++) {
            uint4 a[MT];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                a[i] = load_stream(weights[i]);
                weights[i] += WARP;
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const uint2 b = load_inputs<ALIGNED>(inputs + (int64_t)j * 8 * m.cols,
                                                     j * 8 < rows_left, column, column_end);
#pragma unroll
                for (int i = 0; i < MT; i++) mma_bf16(acc[i][j], a[i], b);
            }
            column += KERNELS_TILE;
        }
    }

    product_finish<MT, NT>(m, split, rows, acc, work.present, partial, out, act);
}

template <int MT, int NT, bool ALIGNED>
static void launch(kernels_stream stream, const struct kernels_matrix *m,
                   struct product_split split, int rows, const bf16 *in, float *out, bf16 *act) {
    const dim3 grid = product_grid<MT, NT>(m, split, rows);
    const int shared = product_shared<MT, NT>::SHARED;
    KERNELS_LAUNCH((product_mma<MT, NT, ALIGNED>), grid, dim3(PRODUCT_THREADS), shared, stream, *m,
                   split, rows, in, out, act);
}

int product_setup(void) {
    int error = KERNELS_SHARED_LIMIT((product_mma<2, 8, true>), (product_shared<2, 8>::SHARED));
    if (error == 0)
        error = KERNELS_SHARED_LIMIT((product_mma<1, 8, true>), (product_shared<1, 8>::SHARED));
    if (error == 0)
        error = KERNELS_SHARED_LIMIT((product_mma<1, 8, false>), (product_shared<1, 8>::SHARED));
    return error;
}

static int run(kernels_stream stream, enum kernels_mode mode, int rows,
               const struct kernels_matrix *m, const bf16 *in, float *out, bf16 *act,
               void *workspace) {
    if (rows <= 0 || m->row_tiles == 0) return 0;
    if (m->dtype == KERNELS_FP8) return fp8_run(stream, mode, rows, m, in, out, act, workspace);
    const bool aligned = matrix_is_aligned(m);
    if (mode == KERNELS_FAST && rows <= GEMV_ROWS && m->col_tiles > 0 && matrix_is_dense(m))
        return gemv_run(stream, rows, m, in, out, act, workspace);
    const struct product_split split = product_split_of(mode, m);
    if (!aligned)
        launch<1, 8, false>(stream, m, split, rows, in, out, act);
    else if (rows <= 8)
        launch<1, 1, true>(stream, m, split, rows, in, out, act);
    else if (rows <= 16)
        launch<1, 2, true>(stream, m, split, rows, in, out, act);
    else if (rows <= 32)
        launch<2, 4, true>(stream, m, split, rows, in, out, act);
    else if (split.part_log + split.piece_log < 3)
        launch<1, 8, true>(stream, m, split, rows, in, out, act);
    else
        launch<2, 8, true>(stream, m, split, rows, in, out, act);
    return (int)cudaGetLastError();
}

extern "C" int kernels_product(kernels_stream stream, enum kernels_mode mode, int rows,
                               const struct kernels_matrix *m, const uint16_t *in, float *out,
                               void *workspace) {
    return run(stream, mode, rows, m, in, out, nullptr, workspace);
}

extern "C" int kernels_gate_up(kernels_stream stream, enum kernels_mode mode, int rows,
                               const struct kernels_matrix *m, const uint16_t *in, uint16_t *act,
                               void *workspace) {
    return run(stream, mode, rows, m, in, nullptr, act, workspace);
}
