/* cuda_stub.c: the CUDA runtime of the emulated program: device memory is malloc'ed, everything is done
 * when the call returns. Fresh device memory is full of 0xA5, so that what was never cleared or
 * written shows. Copies check their direction: device memory and host memory are told apart.
 *
 * CUDA_STUB=none: no device. CUDA_STUB=fault:N: the stream fails at its N-th query, as after a kernel
 * that wrote outside its memory.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_runtime_api.h"

enum { PIECES_MAX = 4096, DEVICE_MB = 4096 };
static struct piece {
    char *begin;
    size_t bytes;
} pieces[PIECES_MAX];
static size_t used_bytes;

static int on_device(const void *p, size_t bytes) {
    for (int i = 0; i < PIECES_MAX; i++) {
        const char *at = p;
        if (pieces[i].begin && at >= pieces[i].begin &&
            at + bytes <= pieces[i].begin + pieces[i].bytes)
            return 1;
    }
    return 0;
}

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "cuda_stub: %s\n", what);
    abort();
}

static const char *scenario(void) {
    const char *text = getenv("CUDA_STUB");
    return text ? text : "";
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = strcmp(scenario(), "none") == 0 ? 0 : 1;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    *out = (struct cudaDeviceProp){.name = "emulated", .major = 9, .multiProcessorCount = 4};
    out->totalGlobalMem = (size_t)DEVICE_MB << 20;
    return cudaSetDevice(device);
}
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorNotReady:
            return "device not ready";
    }
    return "an illegal memory access was encountered";
}

cudaError_t cudaMalloc(void **out, size_t bytes) {
    int i = 0;
    while (i < PIECES_MAX && pieces[i].begin) i++;
    expect(i < PIECES_MAX, "too many pieces of device memory");
    if (used_bytes + bytes > (size_t)DEVICE_MB << 20) return cudaErrorMemoryAllocation;
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!*out) return cudaErrorMemoryAllocation;
    memset(*out, 0xA5, bytes);
    pieces[i] = (struct piece){*out, bytes};
    used_bytes += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    int i = 0;
    while (i < PIECES_MAX && pieces[i].begin != memory) i++;
    expect(i < PIECES_MAX, "cudaFree of something else");
    used_bytes -= pieces[i].bytes;
    pieces[i].begin = NULL;
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    (void)flags;
    *out = malloc(bytes);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *memory) {
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t bytes) {
    expect(on_device(memory, bytes), "cudaMemset outside device memory");
    memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *all = (size_t)DEVICE_MB << 20;
    *left = *all - used_bytes;
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (bytes == 0) return cudaSuccess;
    expect(on_device(to, bytes) == (kind != cudaMemcpyDeviceToHost), "a copy to the wrong side");
    expect(on_device(from, bytes) == (kind != cudaMemcpyHostToDevice),
           "a copy from the wrong side");
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    expect(stream != NULL, "work on the default stream");
    return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    (void)flags;
    *out = malloc(1);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    static int queries;
    const char *s = scenario();
    expect(stream != NULL, "a query of the default stream");
    if (strncmp(s, "fault:", 6) == 0 && ++queries >= atoi(s + 6)) return (cudaError_t)700;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    (void)stream;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    (void)flags;
    *out = malloc(1);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    expect(event != NULL && stream != NULL, "an event on the default stream");
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    expect(event != NULL, "an event that was never made");
    return cudaSuccess;
}
