/* rows.cu: what happens to whole rows: the embedding mixture, residual + RMSNorm, the tree over
 * ranks.
 *
 * The mixture does the CPU's operations in the CPU's order and gives its bits. The norm sums
 * squares in an order of its own (a block per row), which depends on D only; against the CPU it is
 * compared by tolerance.
 */
#include "kernels/norm.cuh"
#include "kernels/tile.cuh"

enum { MIX_THREADS = 256, TREE_THREADS = 256 };

/* ---- mixture ---- */

/* blockIdx.y: row; a thread makes four columns. Per slab a chain over the row's ids in the order
 * of the record, its first term a plain product; an absent slab is -0.0f. */
static __global__ void __launch_bounds__(MIX_THREADS)
    embed_mix(const int32_t *mix_begin, const uint32_t *mix_ids, const float *mix_weights,
              const __grid_constant__ struct kernels_matrix m,
              const __grid_constant__ struct kernels_borders vocab, float *out) {
    after_previous();
    const int64_t quad = (int64_t)blockIdx.x * MIX_THREADS + threadIdx.x, row = blockIdx.y;
    if (quad * 4 >= m.cols) return;
    const int begin = mix_begin[row], end = mix_begin[row + 1];
    float slab[4][KERNELS_PARTS_MAX]; /* static indices only: stays in registers */
#pragma unroll
    for (int s = 0; s < KERNELS_PARTS_MAX; s++) {
        float acc[4] = {-0.0f, -0.0f, -0.0f, -0.0f};
        bool first = true;
        const int64_t low = s < vocab.count ? vocab.begin[s] : 0;
        const int64_t high = s < vocab.count ? vocab.begin[s + 1] : 0;
        for (int c = begin; c < end; c++) {
            const int64_t id = mix_ids[c];
            if (id < low || id >= high) continue;
            const int64_t local = id - vocab.begin[0];
            const uint2 e =
                *(const uint2 *)((const bf16 *)m.data + matrix_offset(&m, local / KERNELS_TILE,
                                                                      (int)(local % KERNELS_TILE),
                                                                      quad / 4, (int)(quad % 4)));
            const float value[4] = {bf16_low(e.x), bf16_high(e.x), bf16_low(e.y), bf16_high(e.y)};
            const float w = mix_weights[c];
#pragma unroll
            for (int i = 0; i < 4; i++) acc[i] = first ? w * value[i] : fmaf(w, value[i], acc[i]);
            first = false;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) slab[i][s] = acc[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (quad * 4 + i < m.cols) out[row * m.cols + quad * 4 + i] = tree_sum(slab[i]);
}

extern "C" int kernels_embed_mix(kernels_stream stream, int rows, const int32_t *mix_begin,
                                 const uint32_t *mix_ids, const float *mix_weights,
                                 const struct kernels_matrix *m, struct kernels_borders vocab,
                                 float *out) {
    if (rows > 0 && m->cols > 0)
        KERNELS_LAUNCH(embed_mix, dim3(blocks_of((m->cols + 3) / 4, MIX_THREADS), (unsigned)rows),
                       dim3(MIX_THREADS), 0, stream, mix_begin, mix_ids, mix_weights, *m, vocab,
                       out);
    return (int)cudaGetLastError();
}

/* ---- norms ---- */

template <int V>
struct sum_in_memory {
    const float *at;
    __device__ several<float, V> operator()(int k) const { return load_several<V>(at + k); }
};

/* One block per row. x: read; x_out: as in norm_row. */
template <int V>
static __global__ void __launch_bounds__(NORM_THREADS)
    add_norm(const int32_t *rows, int hidden, bool first, float scale, const float *sum,
             const float *x, float *x_out, const float *weight, float eps, bf16 *h) {
    after_previous();
    __shared__ float scratch[WARP + 1];
    const int64_t from = (rows ? rows[blockIdx.x] : (int64_t)blockIdx.x) * hidden;
    const int64_t to = (int64_t)blockIdx.x * hidden;
    sum_in_memory<V> row = {sum + from};
    norm_row<V>(hidden, first, scale, row, x + from, x_out ? x_out + from : nullptr, weight, eps,
                h + to, scratch);
}

static int launch_norm(kernels_stream stream, const int32_t *rows, int row_count, int hidden,
                       bool first, float scale, const float *sum, const float *x, float *x_out,
                       const float *weight, float eps, bf16 *h) {
    const dim3 grid((unsigned)row_count), block(NORM_THREADS);
    if (row_count <= 0) return 0;
    if (hidden % 4 == 0)
        KERNELS_LAUNCH(add_norm<4>, grid, block, 0, stream, rows, hidden, first, scale, sum, x,
                       x_out, weight, eps, h);
    else
        KERNELS_LAUNCH(add_norm<1>, grid, block, 0, stream, rows, hidden, first, scale, sum, x,
                       x_out, weight, eps, h);
    return (int)cudaGetLastError();
}

extern "C" int kernels_add_norm(kernels_stream stream, int rows, int hidden, bool first,
                                float scale, const float *sum, float *x, const float *weight,
                                float eps, uint16_t *h) {
    return launch_norm(stream, nullptr, rows, hidden, first, scale, sum, x, x, weight, eps, h);
}

extern "C" int kernels_add_norm_rows(kernels_stream stream, const int32_t *rows, int row_count,
                                     int hidden, const float *sum, const float *x,
                                     const float *weight, float eps, uint16_t *h) {
    return launch_norm(stream, rows, row_count, hidden, false, 1.0f, sum, x, nullptr, weight, eps,
                       h);
}

/* ---- the tree over ranks ---- */

/* Adjacent pairs, an odd one out moves up: a binary counter of partial sums, as in the CPU backend.
 */
static __global__ void __launch_bounds__(TREE_THREADS)
    rank_tree(int64_t count, int ranks, const float *gathered, float *sum) {
    after_previous();
    const int64_t i = (int64_t)blockIdx.x * TREE_THREADS + threadIdx.x;
    if (i >= count) return;
    float stack[7]; /* log2(KERNELS_RANKS_MAX) + 1 */
    int top = -1;
    for (int r = 0; r < ranks; r++) {
        stack[++top] = gathered[r * count + i];
        for (int n = r + 1; n % 2 == 0; n /= 2, top--) stack[top - 1] += stack[top];
    }
    for (; top > 0; top--) stack[top - 1] += stack[top];
    sum[i] = stack[0];
}

extern "C" int kernels_rank_tree(kernels_stream stream, int64_t count, int ranks,
                                 const float *gathered, float *sum) {
    if (count > 0)
        KERNELS_LAUNCH(rank_tree, dim3(blocks_of(count, TREE_THREADS)), dim3(TREE_THREADS), 0,
                       stream, count, ranks, gathered, sum);
    return (int)cudaGetLastError();
}
