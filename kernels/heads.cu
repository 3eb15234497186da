/* heads.cu: from raw projections to queries and cached keys: bias, QK norm, RoPE, the paged append.
 *
 * A warp per (row, head): the head lies in shared memory, its sum of squares goes over 16 lanes as
 * on the CPU, so equal inputs give equal bits. The pool is [layer][page][G] blocks of
 * [64 tokens][hd] keys, then as many values: bf16, or e4m3 of x / scale, rounded once and kept
 * within +-448.
 */
#include "kernels/kv.cuh"

enum { HEADS_WARPS = 4, HEADS_THREADS = HEADS_WARPS * WARP };

extern "C" size_t kernels_kv_bytes(const struct kernels_kv *kv) {
    return (size_t)kv->layers * (size_t)kv->page_count * (size_t)kv->kv_heads * 2 *
           KERNELS_PAGE_TOKENS * (size_t)kv->head_dim * (size_t)kv_element_bytes(*kv);
}

/* 1 / sqrt(mean of squares + eps): lane j < 16 takes x[j], x[j + 16], ...; then + 8, 4, 2, 1. */
static __device__ __forceinline__ float head_scale(const float *x, int n, float eps, int lane) {
    float sum = 0.0f;
    if (lane < 16)
        for (int k = lane; k < n; k += 16) sum = fmaf(x[k], x[k], sum);
    for (int half = 8; half > 0; half /= 2) sum += __shfl_down_sync(WARP_ALL, sum, (unsigned)half);
    sum = __shfl_sync(WARP_ALL, sum, 0);
    return 1.0f / sqrtf(sum / (float)n + eps);
}

/* grid: (ceil((H + 2 G) / 4), rows). */
static __global__ void __launch_bounds__(HEADS_THREADS)
    heads_append(const struct kernels_row *rows, const int32_t *pages,
                 const __grid_constant__ struct kernels_heads spec,
                 const __grid_constant__ struct kernels_kv kv, const float *raw, float *q) {
    after_previous();
    __shared__ float memory[HEADS_WARPS][KERNELS_HEAD_DIM_MAX];
    const int lane = (int)threadIdx.x % WARP, H = spec.heads, G = kv.kv_heads, hd = kv.head_dim;
    const int head = (int)blockIdx.x * HEADS_WARPS + (int)threadIdx.x / WARP;
    const int64_t row = blockIdx.y;
    const struct kernels_row place = rows[row];
    if (head >= H + 2 * G) return; /* whole warps */
    float *x = memory[threadIdx.x / WARP];
    if (place.position < 0) { /* padding */
        if (head < H)
            for (int d = lane; d < hd; d += WARP) q[(row * H + head) * hd + d] = 0.0f;
        return;
    }
    const float *from = raw + (row * (H + 2 * G) + head) * hd;
    for (int d = lane; d < hd; d += WARP)
        x[d] = spec.bias ? from[d] + spec.bias[head * hd + d] : from[d];
    __syncwarp();
    const float *norm = head < H ? spec.q_norm : head < H + G ? spec.k_norm : nullptr;
    if (norm) {
        const float r = head_scale(x, hd, spec.norm_eps, lane);
        __syncwarp();
        for (int d = lane; d < hd; d += WARP) x[d] = (x[d] * r) * norm[d];
        __syncwarp();
    }
    if (head < H + G) {
        const int half = hd / 2;
        const float *cosine = spec.rope_cos + (int64_t)place.position * half;
        const float *sine = spec.rope_sin + (int64_t)place.position * half;
        for (int i = lane; i < half; i += WARP) {
            const float a = x[i], b = x[i + half];
            x[i] = fmaf(a, cosine[i], -(b * sine[i]));
            x[i + half] = fmaf(b, cosine[i], a * sine[i]);
        }
        __syncwarp();
    }
    if (head < H) {
        for (int d = lane; d < hd; d += WARP) q[(row * H + head) * hd + d] = x[d];
        return;
    }
    const int32_t page = pages[place.page_begin + place.position / KERNELS_PAGE_TOKENS];
    const bool value = head >= H + G;
    const int kv_head = (head - H) % G;
    const int at = ((value ? KERNELS_PAGE_TOKENS : 0) + place.position % KERNELS_PAGE_TOKENS) * hd;
    unsigned char *block = kv_block(kv, spec.layer, page, kv_head);
    if (kv.type == KERNELS_KV_FP8) {
        const float scale = kv_scale(kv, spec.layer, kv_head, value);
        for (int d = 4 * lane; d < hd; d += 4 * WARP) {
            several<fp8, 4> out;
            for (int i = 0; i < 4; i++) out.v[i] = fp8_from_float(x[d + i] / scale);
            store_several<4>((fp8 *)block + at + d, out);
        }
    } else {
        bf16 *to = (bf16 *)(void *)block + at;
        for (int d = lane; d < hd; d += WARP) to[d] = bf16_from_float(x[d]);
    }
}

extern "C" int kernels_heads_append(kernels_stream stream, int rows, const struct kernels_row *row,
                                    const int32_t *pages, struct kernels_heads spec,
                                    struct kernels_kv kv, const float *raw, float *q) {
    if (rows > 0)
        KERNELS_LAUNCH(heads_append,
                       dim3(blocks_of(spec.heads + 2 * kv.kv_heads, HEADS_WARPS), (unsigned)rows),
                       dim3(HEADS_THREADS), 0, stream, row, pages, spec, kv, raw, q);
    return (int)cudaGetLastError();
}
