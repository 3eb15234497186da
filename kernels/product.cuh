/* product.cuh: what the tensor-core products and the GEMV share: epilogue arithmetic. */
#ifndef SFUMATO_KERNELS_PRODUCT_CUH
#define SFUMATO_KERNELS_PRODUCT_CUH

#include "kernels/tile.cuh"

enum { GEMV_ROWS = 4 }; /* gemv.cu takes up to so many rows in fast mode */

/* Partial sums `pitch` apart, 1, 2, 4 or 8 of them, along the slab tree. */
static __device__ __forceinline__ float product_tree(const float *from, int pitch, int count) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = i < count ? from[i * pitch] : -0.0f;
    return tree_sum(v);
}

static __device__ __forceinline__ float product_swiglu(float gate, float up) {
    return gate / (1.0f + fmath_exp(-gate)) * up;
}

/* gemv.cu. The matrix is dense (tile.cuh) and has columns. */
int gemv_run(kernels_stream stream, int rows, const struct kernels_matrix *m, const bf16 *in,
             float *out, bf16 *act, void *workspace);

#endif
