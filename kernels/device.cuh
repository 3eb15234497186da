/* device.cuh: what the kernels share: launches, 16-byte loads, the tensor-core product, small sums.
 *
 * The same .cu files compile twice: by nvcc, and by g++ with KERNELS_FIBRE and the emulation in
 * tests/fibre. Everything that differs between the two is here; a kernel file has no #ifdef.
 * All files compile with --fmad=false: where a multiply and an add shall be one operation it says
 * fmaf.
 *
 * Overlap of launches (programmatic dependent launch, sm_90 on). A kernel may start while the one
 * before it on the stream still runs, as soon as all blocks of that one are past after_previous():
 *
 *   kernel n      prefetch | wait | work of the last blocks ......... end
 *   kernel n + 1                         start, prefetch | wait ........ | work
 *
 * Every thread of every kernel calls after_previous() once, before any return, and before it reads
 * or writes memory; parameters and prefetch_weights are all that may come earlier. Then nothing can
 * be read before it is written or overwritten before it is read: the wait returns when the kernel
 * before has ended and its writes are visible, that one could only end after its own wait, and so on
 * back. A kernel that left a thread out would break this chain for everybody behind it. A prefetch
 * goes to L2 alone, where all memory is coherent: it may even run while the weights are written.
 */
#ifndef SFUMATO_KERNELS_DEVICE_CUH
#define SFUMATO_KERNELS_DEVICE_CUH

#include <stdint.h>

#ifdef KERNELS_FIBRE
#include "fibre/cuda_copies.h"
#include "fibre/cuda_fibre.h"
#else
#include <cuda_runtime.h>
#endif

#include "base/bf16.h"
#include "base/fp8.h"
#include "base/fmath.h"
#include "kernels/kernels.h"

enum { WARP = 32 };
#define WARP_ALL 0xffffffffu

#ifdef KERNELS_FIBRE
#define KERNELS_LAUNCH(kernel, grid, block, shared, stream, ...) \
    fibre_launch(grid, block, shared, stream, kernel, __VA_ARGS__)
#define KERNELS_SHARED(type, name) type *const name = (type *)(void *)fibre_shared
#else
#define KERNELS_LAUNCH(kernel, grid, block, shared, stream, ...) \
    kernels_launch(grid, block, shared, stream, kernel, __VA_ARGS__)
#define KERNELS_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char kernels_shared[]; \
    type *const name = reinterpret_cast<type *>(kernels_shared)
#endif

/* Allows a kernel more than 48 KiB of dynamic shared memory. */
#ifdef KERNELS_FIBRE
#define KERNELS_SHARED_LIMIT(kernel, bytes) 0
#else
#define KERNELS_SHARED_LIMIT(kernel, bytes) \
    ((int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
#endif

/* Blocks of a kernel that a multiprocessor holds at once. */
#ifdef KERNELS_FIBRE
#define KERNELS_BLOCKS_AN_SM(kernel, threads, shared, out) ((int)(*(out) = 2, 0))
#else
#define KERNELS_BLOCKS_AN_SM(kernel, threads, shared, out) \
    ((int)cudaOccupancyMaxActiveBlocksPerMultiprocessor(out, kernel, threads, shared))
#endif

/* setup.cu: multiprocessors of the device; may a kernel start before the one ahead of it ends? */
extern int kernels_sm_count;
extern bool kernels_overlap;

#ifndef KERNELS_FIBRE
/* An error stays with the runtime until cudaGetLastError. */
template <typename... Wanted, typename... Given>
static inline void kernels_launch(dim3 grid, dim3 block, size_t shared, kernels_stream stream,
                                  void (*kernel)(Wanted...), Given &&...given) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = kernels_overlap ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, static_cast<Given &&>(given)...);
}
#endif

/* Waits until the kernel before has ended, then lets the next one start. */
static __device__ __forceinline__ void after_previous() {
#ifdef KERNELS_FIBRE
    fibre_after_previous();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Asks for `bytes` (a multiple of 16) at p (aligned to 16) to be in L2 soon. One thread is enough. */
static __device__ __forceinline__ void prefetch_weights(const void *p, int64_t bytes) {
    if (bytes <= 0) return;
#ifdef KERNELS_FIBRE
    fibre_prefetch(p, bytes);
#elif __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"((uint32_t)bytes));
#endif
}

/* Nanoseconds of a clock that all blocks of a device share. */
static __device__ __forceinline__ uint64_t device_clock_ns() {
#ifdef KERNELS_FIBRE
    return fibre_clock_ns();
#else
    uint64_t out;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(out));
    return out;
#endif
}

/* Weights: read once, not worth a line of L1. */
static __device__ __forceinline__ uint4 load_stream(const uint4 *p) {
#ifdef KERNELS_FIBRE
    return *p;
#else
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
#endif
}

/* d[16 x 8] += a[16 x 16] b[16 x 8] on a warp. With lane = 4 g + t and the order of k of
 * kernels.h: a = rows g and g + 8, inputs 4t .. 4t + 3 of each; b = column g, inputs 4t .. 4t + 3;
 * d = (row g, columns 2t, 2t + 1), (row g + 8, the same). */
static __device__ __forceinline__ void mma_bf16(float d[4], uint4 a, uint2 b) {
#ifdef KERNELS_FIBRE
    struct {
        uint4 a;
        uint2 b;
    } mine = {a, b}, all[WARP];
    memcpy(all, fibre_exchange_bytes(&mine, sizeof mine), sizeof all);
    const unsigned lane = fibre_lane(), g = lane / 4, t = lane % 4;
    for (unsigned e = 0; e < 4; e++) {
        const unsigned row = g + e / 2 * 8, column = 2 * t + e % 2;
        for (unsigned k = 0; k < 16; k++) {
            bf16 weights[8], inputs[4];
            memcpy(weights, &all[row % 8 * 4 + k / 4].a, sizeof weights);
            memcpy(inputs, &all[column * 4 + k / 4].b, sizeof inputs);
            d[e] = fmaf(bf16_to_float(weights[row / 8 * 4 + k % 4]), bf16_to_float(inputs[k % 4]),
                        d[e]);
        }
    }
#else
    /* the instruction's k order is (2t, 2t + 1, 2t + 8, 2t + 9): any order will do, both sides
     * agree */
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.z), "r"(a.y), "r"(a.w), "r"(b.x), "r"(b.y));
#endif
}

/* BYTES (4 or 16) from global to shared memory, or zeros, without waiting; both addresses are
 * multiples of BYTES. The thread's copies since its last copies_commit form a group; after
 * copies_wait<N> all its groups but the last N have arrived, for this thread: others need a barrier
 * after it. */
template <int BYTES>
static __device__ __forceinline__ void copy_async(void *shared, const void *from, bool valid) {
    static_assert(BYTES == 4 || BYTES == 16, "what cp.async copies");
#ifdef KERNELS_FIBRE
    fibre_copy_async(shared, from, BYTES, valid);
#else
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    const uint32_t size = valid ? (uint32_t)BYTES : 0u;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size)
                     : "memory");
#endif
}
static __device__ __forceinline__ void copies_commit() {
#ifdef KERNELS_FIBRE
    fibre_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
static __device__ __forceinline__ void copies_wait() {
#ifdef KERNELS_FIBRE
    fibre_copy_wait(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

/* Four 8 x 8 matrices of 2-byte elements from shared memory (ldmatrix). Lane l gives the address of
 * row l % 8 of matrix l / 8: 16 bytes, aligned to them. Lane 4 g + t gets of each matrix elements
 * 2t, 2t + 1 of row g; transposed: of column g. A warp calls it together. */
template <bool TRANSPOSED>
static __device__ __forceinline__ uint4 load_matrices(const void *shared) {
#ifdef KERNELS_FIBRE
    return fibre_load_matrices(shared, TRANSPOSED);
#else
    const uint32_t from = (uint32_t)__cvta_generic_to_shared(shared);
    uint4 v;
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(from)
                     : "memory");
    return v;
#endif
}

/* Two floats rounded to bf16 (RNE): low in the lower half. */
static __device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
#ifdef KERNELS_FIBRE
    return (uint32_t)bf16_from_float(high) << 16 | bf16_from_float(low);
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

/* 2^x to 2^-22 of it, 0 for x = -inf; one instruction. */
static __device__ __forceinline__ float exp2_fast(float x) {
#ifdef KERNELS_FIBRE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* Four e4m3 weights (a word of kernels.h's fp8 layout) as the bf16 pairs of mma_bf16, exactly: sign
 * and the 7 bits below it move to where bf16 has them, and a product with 2^120 fixes the exponent,
 * of subnormals as well. */
static __device__ __forceinline__ uint2 fp8_to_bf16(uint32_t word) {
#ifdef KERNELS_FIBRE
    uint32_t pair[2];
    for (int i = 0; i < 2; i++)
        pair[i] = bf16_from_float(fp8_to_float((fp8)(word >> 8 * i))) |
                  (uint32_t)bf16_from_float(fp8_to_float((fp8)(word >> (8 * i + 16)))) << 16;
    return make_uint2(pair[0], pair[1]);
#else
    uint32_t even = (word << 8 & 0x80008000u) | (word << 4 & 0x07f007f0u);
    uint32_t odd = (word & 0x80008000u) | (word >> 4 & 0x07f007f0u);
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(even) : "r"(0x7b807b80u), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(odd) : "r"(0x7b807b80u), "r"(0x80008000u));
    return make_uint2(even, odd);
#endif
}

/* V values that are read or written by one instruction; the address is aligned to them. */
template <typename T, int V>
struct alignas(sizeof(T) * V) several {
    T v[V];
};
template <int V, typename T>
static __device__ __forceinline__ several<T, V> load_several(const T *p) {
    return *reinterpret_cast<const several<T, V> *>(p);
}
template <int V, typename T>
static __device__ __forceinline__ void store_several(T *p, const several<T, V> &x) {
    *reinterpret_cast<several<T, V> *>(p) = x;
}

static __device__ __forceinline__ float bf16_low(uint32_t pair) {
    const uint32_t bits = pair << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}
static __device__ __forceinline__ float bf16_high(uint32_t pair) {
    const uint32_t bits = pair & 0xffff0000u;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* The slab tree of cpu.md section 3.1 over up to 8 values; absent ones are -0.0f. */
static __device__ __forceinline__ float tree_sum(const float v[8]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

/* Lanes j and j + 16, + 8, + 4, + 2, + 1; the sum in every lane. */
static __device__ __forceinline__ float warp_sum(float v) {
    for (int half = WARP / 2; half > 0; half /= 2) v += __shfl_xor_sync(WARP_ALL, v, half);
    return v;
}

/* Sum over the block in a fixed order (it depends on the block size only), in every thread.
 * scratch: [33] shared floats. All threads call it. */
static __device__ __forceinline__ float block_sum(float v, float *scratch) {
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    v = warp_sum(v);
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    if (warp == 0) {
        const float sum = warp_sum(lane < (int)blockDim.x / WARP ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[WARP] = sum;
    }
    __syncthreads();
    v = scratch[WARP];
    __syncthreads(); /* scratch is free again */
    return v;
}

/* Has everybody else who counts on *counter arrived? What they wrote before is then visible, and
 * the counter is zero again. flag: one shared word. All threads of the block call it. */
static __device__ __forceinline__ bool last_arrival(uint32_t *counter, uint32_t expected,
                                                    uint32_t *flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = atomicAdd(counter, 1u) + 1u == expected;
        if (*flag) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return *flag != 0;
}

static inline unsigned blocks_of(int64_t items, int64_t per_block) {
    return (unsigned)((items + per_block - 1) / per_block);
}

/* product.cu and attention.cu: their shared-memory limits. */
int product_setup(void);
int attention_setup(void);

#endif
