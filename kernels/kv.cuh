/* kv.cuh: where a page's keys and values are. */
#ifndef SFUMATO_KERNELS_KV_CUH
#define SFUMATO_KERNELS_KV_CUH

#include "kernels/device.cuh"

/* Keys [64][hd] of a page; its values follow at once. */
static __device__ __forceinline__ bf16 *kv_block(const struct kernels_kv &kv, int layer,
                                                 int32_t page, int head) {
    const int64_t index = ((int64_t)layer * kv.page_count + page) * kv.kv_heads + head;
    return kv.data + index * (2 * KERNELS_PAGE_TOKENS * kv.head_dim);
}

#endif
