/* cuda_fibre.h: CUDA's execution model on one CPU thread, enough of it to run the kernels under
 * g++.
 *
 * Every thread of a block is a fibre (ucontext) with its own stack; blocks run one after the other.
 * A fibre runs until it meets a barrier and then lets the next one run:
 *
 *   __syncthreads          all threads of the block that have not returned
 *   __syncwarp, shuffles,  the 32 threads of the warp; masks must be full, block sizes multiples of
 *   ballots, mma_bf16      32, and no lane may have returned
 *
 * A round in which nobody gets past his barrier is a divergent barrier: it is reported and the
 * program ends. Shared memory starts each block full of NaN and is of the exact size asked for, so
 * AddressSanitizer and wrong numbers find what a GPU would hide. A thread that does not call
 * after_previous() exactly once, before it meets others, ends the program. Not modelled: blocks running at
 * once, memory ordering, anything of speed. Atomics are plain operations.
 *
 * Ranks as threads: every OS thread is a device of its own, with its own fibres and shared memory.
 * Memory that several devices see goes through kernels/peer.cuh, whose accesses are real atomics
 * here; a kernel that polls calls fibre_spin. ThreadSanitizer is told about the fibres.
 */
#ifndef SFUMATO_TESTS_CUDA_FIBRE_H
#define SFUMATO_TESTS_CUDA_FIBRE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <tuple>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

/* ---- the running fibre ---- */

struct fibre_place {
    dim3 thread, block, block_size, grid;
};
extern __thread fibre_place fibre_here;      /* of the fibre that runs now */
extern __thread unsigned char *fibre_shared; /* dynamic shared memory of the block */

#define threadIdx (fibre_here.thread)
#define blockIdx (fibre_here.block)
#define blockDim (fibre_here.block_size)
#define gridDim (fibre_here.grid)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __thread

typedef void fibre_body(void *context);
void fibre_run(dim3 grid, dim3 block, size_t shared_bytes, fibre_body *body, void *context);
/* Set while a stream is captured (tests/stub/cuda_stub.c): takes the launch instead, to run it any number
 * of times before it drops it. */
extern "C" int (*fibre_record)(void *stream, void (*run)(void *), void (*drop)(void *),
                               void *context);

/* A launch with its arguments, which are copied when it is made. */
template <typename... Wanted>
struct fibre_call {
    dim3 grid, block;
    size_t shared_bytes;
    void (*kernel)(Wanted...);
    std::tuple<Wanted...> arguments;
    static void run(void *context) {
        fibre_call *c = static_cast<fibre_call *>(context);
        fibre_run(
            c->grid, c->block, c->shared_bytes,
            [](void *me) {
                fibre_call *call = static_cast<fibre_call *>(me);
                std::apply(call->kernel, call->arguments);
            },
            c);
    }
    static void drop(void *context) { delete static_cast<fibre_call *>(context); }
};
template <typename... Wanted, typename... Given>
void fibre_launch(dim3 grid, dim3 block, size_t shared_bytes, void *stream,
                  void (*kernel)(Wanted...), Given... given) {
    typedef fibre_call<Wanted...> call;
    if (!fibre_record) {
        call now = {grid, block, shared_bytes, kernel, std::tuple<Wanted...>(given...)};
        call::run(&now);
        return;
    }
    call *later = new call{grid, block, shared_bytes, kernel, std::tuple<Wanted...>(given...)};
    if (fibre_record(stream, call::run, call::drop, later)) return;
    call::run(later);
    call::drop(later);
}

void __syncthreads();
/* Lets the other threads of the block run, and other devices: for loops that poll. */
void fibre_spin();
uint64_t fibre_clock_ns();
/* Called by every access of memory that several devices see, before it is made; a test's hook (of
 * this OS thread; NULL: none) may delay it. */
void fibre_touch(const void *p, bool store);
extern "C" void fibre_on_touch(void (*hook)(const void *p, bool store));
void fibre_after_previous();
/* Reads the first and the last byte. */
void fibre_prefetch(const void *p, int64_t bytes);
/* Gives 8 bytes to the warp, gets everybody's: the one primitive under shuffles and ballots. The
 * answer is valid until the fibre's next warp operation. */
const uint64_t *fibre_exchange(uint64_t mine);
/* The same with `bytes` a lane, [32][bytes]; bytes <= 64. */
const unsigned char *fibre_exchange_bytes(const void *mine, size_t bytes);

static inline unsigned fibre_lane() { return threadIdx.x % 32; }
static inline void __syncwarp(unsigned = 0xffffffffu) { fibre_exchange(0); }

template <typename T>
T fibre_from(T value, unsigned lane) {
    static_assert(sizeof(T) <= 8, "one word");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    const uint64_t answer = fibre_exchange(word)[lane];
    memcpy(&value, &answer, sizeof value);
    return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return fibre_from(value, (unsigned)lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return fibre_from(value, fibre_lane() ^ (unsigned)mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
    const unsigned from = fibre_lane() + delta;
    return fibre_from(value, from < 32 ? from : fibre_lane());
}
static inline unsigned __ballot_sync(unsigned, bool vote) {
    const uint64_t *votes = fibre_exchange(vote);
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (unsigned)(votes[i] != 0) << i;
    return out;
}

/* ---- intrinsics ---- */

template <typename T>
T atomicAdd(T *where, T what) {
    const T old = *where;
    *where = old + what;
    return old;
}
static inline void __threadfence() {}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T __ldg(const T *p) {
    return *p;
}
template <typename T>
T __ldcg(const T *p) {
    return *p;
}
using std::max;
using std::min;

/* ---- the runtime ---- */

typedef struct CUstream_st *kernels_stream;
typedef int cudaError_t;
enum { cudaSuccess = 0 };
static inline int cudaGetLastError() { return 0; }
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrPageableMemoryAccess,
    cudaDevAttrComputeCapabilityMajor
};
static inline cudaError_t cudaGetDevice(int *device) { return *device = 0; }
static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
    *value = what == cudaDevAttrMultiProcessorCount      ? 132
             : what == cudaDevAttrComputeCapabilityMajor ? 9
                                                         : 1;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(kernels_stream) { return cudaSuccess; }
static inline const char *cudaGetErrorString(int) { return "no error"; }

#endif
