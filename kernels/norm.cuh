/* norm.cuh: residual + RMSNorm of one row by one block, wherever the row's sum comes from: memory
 * (rows.cu) or other ranks (reduce.cu). One body, so both give the same bits.
 *
 * Squares are added in an order of its own, which depends on D and on NORM_THREADS only.
 */
#ifndef SFUMATO_KERNELS_NORM_CUH
#define SFUMATO_KERNELS_NORM_CUH

#include "kernels/device.cuh"

#ifndef KERNELS_NORM_THREADS /* fewer under ThreadSanitizer, to which every fibre is a thread */
#define KERNELS_NORM_THREADS 512
#endif
enum { NORM_THREADS = KERNELS_NORM_THREADS };

/* x_out: the new residual [D], NULL when it is not wanted; may be x. sum(k): V floats of the sum from
 * column k on, asked for by the thread that needs them. V: 4 when D is a multiple of 4, else 1. A
 * thread keeps nothing between the two passes but reads back what it wrote, or adds again. scratch:
 * [33] shared floats. */
template <int V, typename Sum>
static __device__ __forceinline__ void norm_row(int hidden, bool first, float scale, Sum &sum,
                                                const float *x, float *x_out, const float *weight,
                                                float eps, bf16 *h, float *scratch) {
    float squares = 0.0f;
    for (int k = (int)threadIdx.x * V; k < hidden; k += NORM_THREADS * V) {
        const several<float, V> b = sum(k);
        several<float, V> a = b;
        if (!first) a = load_several<V>(x + k);
#pragma unroll
        for (int i = 0; i < V; i++) {
            a.v[i] = first ? scale * b.v[i] : a.v[i] + b.v[i];
            squares = fmaf(a.v[i], a.v[i], squares);
        }
        if (x_out) store_several<V>(x_out + k, a);
    }
    const float r = 1.0f / sqrtf(block_sum(squares, scratch) / (float)hidden + eps);
    for (int k = (int)threadIdx.x * V; k < hidden; k += NORM_THREADS * V) {
        const several<float, V> w = load_several<V>(weight + k);
        several<float, V> a = load_several<V>((x_out ? x_out : x) + k);
        several<bf16, V> out;
        if (!x_out) {
            const several<float, V> b = sum(k);
#pragma unroll
            for (int i = 0; i < V; i++) a.v[i] += b.v[i];
        }
#pragma unroll
        for (int i = 0; i < V; i++) out.v[i] = bf16_from_float((a.v[i] * r) * w.v[i]);
        store_several<V>(h + k, out);
    }
}

#endif
