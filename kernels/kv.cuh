/* kv.cuh: where a page's keys and values are, and what an element of them means. */
#ifndef SFUMATO_KERNELS_KV_CUH
#define SFUMATO_KERNELS_KV_CUH

#include "base/fp8.h"
#include "kernels/device.cuh"

static __host__ __device__ __forceinline__ int kv_element_bytes(const struct kernels_kv &kv) {
    return kv.type == KERNELS_KV_FP8 ? (int)sizeof(fp8) : (int)sizeof(bf16);
}

/* Keys [64][hd] of a page; its values follow at once. */
static __device__ __forceinline__ unsigned char *kv_block(const struct kernels_kv &kv, int layer,
                                                          int32_t page, int head) {
    const int64_t index = ((int64_t)layer * kv.page_count + page) * kv.kv_heads + head;
    return (unsigned char *)kv.data +
           index * (2 * KERNELS_PAGE_TOKENS * kv.head_dim * kv_element_bytes(kv));
}

static __device__ __forceinline__ float kv_scale(const struct kernels_kv &kv, int layer, int head,
                                                 bool value) {
    return kv.scales ? kv.scales[2 * ((int64_t)layer * kv.kv_heads + head) + value] : 1.0f;
}

#endif
