/* bench.cu: what the device can do at best: reading memory, multiplying on tensor cores; and a kernel
 * that takes time. */
#include "kernels/device.cuh"

enum { SWEEP_THREADS = 512, SWEEP_UNROLL = 8, PEAK_THREADS = 256, PEAK_CHAINS = 8, PREFETCH_BYTES = 16 << 10 };

/* Blocks take turns at 64 KiB, 8 loads of 16 bytes a thread in flight. */
static __global__ void __launch_bounds__(SWEEP_THREADS)
    sweep(const uint4 *memory, int64_t count, uint32_t *sink) {
    after_previous();
    uint32_t sum = 0;
    const int64_t step = (int64_t)SWEEP_THREADS * SWEEP_UNROLL;
    for (int64_t at = blockIdx.x * step; at < count; at += gridDim.x * step) {
        uint4 v[SWEEP_UNROLL];
#pragma unroll
        for (int u = 0; u < SWEEP_UNROLL; u++) {
            const int64_t i = at + u * SWEEP_THREADS + threadIdx.x;
            v[u] = i < count ? load_stream(memory + i) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < SWEEP_UNROLL; u++) sum += v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    if (sum == 0x9e3779b9u) *sink = sum; /* nearly never: keeps the loads */
}

extern "C" int kernels_sweep(kernels_stream stream, const void *memory, size_t bytes,
                             uint32_t *sink) {
    const int64_t count = (int64_t)(bytes / sizeof(uint4));
    if (count > 0)
        KERNELS_LAUNCH(sweep, dim3((unsigned)kernels_sm_count * 2), dim3(SWEEP_THREADS), 0, stream,
                       (const uint4 *)memory, count, sink);
    return (int)cudaGetLastError();
}

static __global__ void __launch_bounds__(WARP) prefetch(const char *memory, int64_t bytes) {
    after_previous();
    const int64_t begin = (int64_t)blockIdx.x * PREFETCH_BYTES;
    if (threadIdx.x == 0)
        prefetch_weights(memory + begin, min(bytes - begin, (int64_t)PREFETCH_BYTES));
}

extern "C" int kernels_prefetch(kernels_stream stream, const void *memory, size_t bytes) {
    if (bytes > 0)
        KERNELS_LAUNCH(prefetch, dim3(blocks_of((int64_t)bytes, PREFETCH_BYTES)), dim3(WARP), 0, stream,
                       (const char *)memory, (int64_t)bytes);
    return (int)cudaGetLastError();
}

/* Independent chains of products on whatever is in the registers. */
static __global__ void __launch_bounds__(PEAK_THREADS) peak(int64_t rounds, float *sink) {
    after_previous();
    float d[PEAK_CHAINS][4] = {};
    const uint4 a = make_uint4(threadIdx.x, 0, threadIdx.x, 0);
    for (int64_t r = 0; r < rounds; r++)
#pragma unroll
        for (int i = 0; i < PEAK_CHAINS; i++)
            mma_bf16(d[i], a, make_uint2((uint32_t)r, threadIdx.x));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PEAK_CHAINS; i++) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (sum == 12345.0f) *sink = sum;
}

extern "C" int kernels_peak(kernels_stream stream, int64_t rounds, float *sink, double *flops) {
    const unsigned blocks = (unsigned)kernels_sm_count * 4;
    *flops =
        2.0 * 16 * 8 * 16 * PEAK_CHAINS * (PEAK_THREADS / WARP) * (double)blocks * (double)rounds;
    KERNELS_LAUNCH(peak, dim3(blocks), dim3(PEAK_THREADS), 0, stream, rounds, sink);
    return (int)cudaGetLastError();
}

static __global__ void __launch_bounds__(WARP) spin(uint64_t ns) {
    after_previous();
    const uint64_t begin = device_clock_ns();
    while (device_clock_ns() - begin < ns) continue;
}

extern "C" int kernels_spin(kernels_stream stream, uint64_t ns) {
    KERNELS_LAUNCH(spin, dim3(1), dim3(WARP), 0, stream, ns);
    return (int)cudaGetLastError();
}
