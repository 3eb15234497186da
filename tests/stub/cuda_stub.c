/* cuda_stub.c: the CUDA runtime of the emulated program: device memory is malloc'ed, everything is done
 * when the call returns. Fresh device memory is full of 0xA5, so that what was never cleared or
 * written shows. Copies check their direction: device memory and host memory are told apart.
 *
 * Eight devices. A piece of whole 2 MiB pages is shared memory, which another process maps by its IPC
 * handle (process, file), as on a GPU: what it writes is there at once. Handles of smaller pieces are
 * refused: on a GPU they would open what lies beside them too.
 *
 * CUDA_STUB=none: no device. one: one for all ranks. no-peer: devices do not reach one another. CUDA_STUB=fault:N: the stream fails at its N-th query, as after a kernel
 * that wrote outside its memory.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda_runtime_api.h"

enum { PIECES_MAX = 4096, DEVICE_MB = 4096, DEVICES = 8, PAGE_BYTES = 2 << 20 };
static struct piece {
    char *begin;
    size_t bytes;
    int file;  /* > 0: whole pages, shared memory of this file, as other processes may map it */
    int peers; /* another process's */
} pieces[PIECES_MAX];
static int device_now;
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
    *count = strcmp(scenario(), "none") == 0 ? 0 : strcmp(scenario(), "one") == 0 ? 1 : DEVICES;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return cudaErrorNoDevice;
    device_now = device;
    return cudaSuccess;
}
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
        case cudaErrorInvalidValue:
            return "invalid argument";
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
    int file = 0;
    if (bytes % PAGE_BYTES == 0) {
        file = memfd_create("cuda_stub", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, (off_t)bytes) != 0) return cudaErrorMemoryAllocation;
        *out = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (*out == MAP_FAILED) return cudaErrorMemoryAllocation;
    } else {
        *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
        if (!*out) return cudaErrorMemoryAllocation;
    }
    memset(*out, 0xA5, bytes);
    pieces[i] = (struct piece){*out, bytes, file, 0};
    used_bytes += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *memory) {
    if (!memory) return cudaSuccess;
    int i = 0;
    while (i < PIECES_MAX && pieces[i].begin != memory) i++;
    expect(i < PIECES_MAX && !pieces[i].peers, "cudaFree of something else");
    used_bytes -= pieces[i].bytes;
    pieces[i].begin = NULL;
    if (pieces[i].file > 0) {
        munmap(memory, pieces[i].bytes);
        close(pieces[i].file);
    } else {
        free(memory);
    }
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

/* ---- other devices ---- */

cudaError_t cudaGetDevice(int *device) {
    *device = device_now;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *out, int bytes, int device) {
    snprintf(out, (size_t)bytes, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *bus) {
    unsigned number;
    if (sscanf(bus, "0000:%x:00.0", &number) != 1) return cudaErrorInvalidValue;
    *device = (int)number - 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    expect(device != peer, "peer access of a device to itself");
    *can = strcmp(scenario(), "no-peer") != 0;
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned flags) {
    expect(flags == 0, "flags of a device pointer");
    *out = host;
    return cudaSuccess;
}

struct handle {
    int process, file;
    size_t bytes;
};
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *memory) {
    int i = 0;
    while (i < PIECES_MAX && pieces[i].begin != memory) i++;
    expect(i < PIECES_MAX && pieces[i].file > 0 && !pieces[i].peers,
           "an IPC handle of memory that is no whole piece of 2 MiB pages");
    const struct handle handle = {getpid(), pieces[i].file, pieces[i].bytes};
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t opaque, unsigned flags) {
    struct handle handle;
    char path[64];
    int i = 0;
    expect(flags == cudaIpcMemLazyEnablePeerAccess, "flags of an IPC handle");
    memcpy(&handle, &opaque, sizeof handle);
    expect(handle.process != getpid(), "opening one's own memory");
    while (i < PIECES_MAX && pieces[i].begin) i++;
    expect(i < PIECES_MAX, "too many pieces of device memory");
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    const int file = open(path, O_RDWR);
    if (file < 0) return cudaErrorInvalidValue;
    *out = mmap(NULL, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (*out == MAP_FAILED) return cudaErrorInvalidValue;
    pieces[i] = (struct piece){*out, handle.bytes, 0, 1};
    return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void *memory) {
    int i = 0;
    while (i < PIECES_MAX && pieces[i].begin != memory) i++;
    expect(i < PIECES_MAX && pieces[i].peers, "closing what was not opened");
    munmap(memory, pieces[i].bytes);
    pieces[i].begin = NULL;
    return cudaSuccess;
}
