/* cuda_stub.c: the CUDA runtime of the emulated program: device memory is malloc'ed, everything is done
 * when the call returns. Fresh device memory is full of 0xA5, so that what was never cleared or
 * written shows. Copies check their direction: device memory and host memory are told apart.
 *
 * Capture: from cudaStreamBeginCapture on nothing is done; launches, copies and collectives are written
 * down with their arguments as they are then (tests/fibre, nccl_stub.c), and done once for every
 * cudaGraphLaunch of what was instantiated from them. So what the host does beside them is missing in a
 * replay, as on a GPU. Whatever CUDA refuses while a stream is captured ends the program: taking
 * memory, copies that wait, queries, events, a wait.
 *
 * Eight devices. A piece of whole 2 MiB pages is shared memory, which another process maps by its IPC
 * handle (process, file), as on a GPU: what it writes is there at once. Handles of smaller pieces are
 * refused: on a GPU they would open what lies beside them too.
 *
 * CUDA_STUB=none: no device. one: one for all ranks. no-peer: devices do not reach one another.
 * late:RANK: that rank sleeps for a minute at a query. CUDA_STUB=fault:N: the stream fails at its N-th query, as after a kernel
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

enum {
    PIECES_MAX = 4096,
    DEVICE_MB = 4096,
    DEVICES = 8,
    PAGE_BYTES = 2 << 20,
    LATE_QUERIES = 36,
    LATE_SECONDS = 60
};
static struct piece {
    char *begin;
    size_t bytes;
    int file;  /* > 0: whole pages, shared memory of this file, as other processes may map it */
    int peers; /* another process's */
} pieces[PIECES_MAX];
static int device_now;
static size_t used_bytes;
enum { MAPPED_MAX = 16 };
static struct piece mapped[MAPPED_MAX]; /* host memory that the device sees */
static int mapped_count;

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

/* ---- capture ---- */

struct node {
    void (*run)(void *context), (*drop)(void *context);
    void *context;
};
struct CUgraph_st {
    struct node *nodes;
    int count, capacity, owners; /* the graph, what was instantiated from it */
};
struct CUgraphExec_st {
    struct CUgraph_st *graph;
};
static struct CUgraph_st *captured;
static void *captured_stream;
static int sealed, refused;
static long graph_launches, graph_nodes;
/* cuda_fibre.cpp: asked for every launch */
extern int (*fibre_record)(void *stream, void (*run)(void *), void (*drop)(void *), void *context);

static void not_in_capture(const char *what) {
    if (!captured) return;
    fprintf(stderr, "cuda_stub: %s while a stream is captured\n", what);
    abort();
}

__attribute__((visibility("default"))) int cuda_stub_record(void *stream, void (*run)(void *),
                                                            void (*drop)(void *), void *context) {
    if (!captured || stream != captured_stream) {
        expect(!captured, "work outside the stream that is captured");
        return 0;
    }
    if (captured->count == captured->capacity) {
        captured->capacity = captured->capacity ? 2 * captured->capacity : 64;
        captured->nodes =
            realloc(captured->nodes, (size_t)captured->capacity * sizeof(struct node));
    }
    captured->nodes[captured->count++] = (struct node){run, drop, context};
    return 1;
}

void cuda_stub_seal(int on) { sealed = on; }
void cuda_stub_launches(long *graphs, long *nodes) {
    *graphs = graph_launches;
    *nodes = graph_nodes;
}

static void memory_moves(const char *what) {
    not_in_capture(what);
    expect(!sealed, what);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    expect(!captured && stream && mode == cudaStreamCaptureModeThreadLocal, "a capture");
    captured = calloc(1, sizeof *captured);
    captured->owners = 1;
    captured_stream = stream;
    fibre_record = cuda_stub_record;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    expect(captured && stream == captured_stream, "the end of a capture that was not begun");
    *out = captured;
    captured = NULL;
    fibre_record = NULL;
    return cudaSuccess;
}
static void disown(struct CUgraph_st *graph) {
    if (--graph->owners > 0) return;
    for (int i = 0; i < graph->count; i++) graph->nodes[i].drop(graph->nodes[i].context);
    free(graph->nodes);
    free(graph);
}
void cuda_stub_refuse_graphs(int where) { refused = where; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                 unsigned long long flags) {
    expect(flags == 0 && graph->count > 0, "an empty graph");
    *out = (cudaGraphExec_t)-1; /* not to be looked at */
    if (refused == 1) return cudaErrorMemoryAllocation;
    *out = malloc(sizeof **out);
    (*out)->graph = graph;
    graph->owners++;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    disown(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    disown(exec->graph);
    free(exec);
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
    not_in_capture("the upload of a graph");
    expect(exec && stream, "the upload of a graph");
    return refused == 2 ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    not_in_capture("the launch of a graph");
    expect(stream != NULL, "a graph on the default stream");
    const struct CUgraph_st *graph = exec->graph;
    for (int i = 0; i < graph->count; i++) graph->nodes[i].run(graph->nodes[i].context);
    graph_launches++;
    graph_nodes += graph->count;
    return cudaSuccess;
}

/* ---- the rest ---- */

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
    memory_moves("cudaMalloc");
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
    memory_moves("cudaFree");
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
    memory_moves("cudaHostAlloc");
    *out = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (*out && !(flags & cudaHostAllocMapped)) return cudaSuccess;
    if (!*out || mapped_count == MAPPED_MAX) return cudaErrorMemoryAllocation;
    mapped[mapped_count++] = (struct piece){.begin = *out, .bytes = bytes};
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *memory) {
    memory_moves("cudaFreeHost");
    for (int i = 0; i < mapped_count; i++)
        if (memory && mapped[i].begin == memory) mapped[i] = mapped[--mapped_count];
    free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    expect(flags == 0, "flags of cudaHostGetDevicePointer");
    for (int i = 0; i < mapped_count; i++) {
        const char *at = host;
        if (at < mapped[i].begin || at >= mapped[i].begin + mapped[i].bytes) continue;
        *device = host;
        return cudaSuccess;
    }
    return cudaErrorMemoryAllocation;
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
static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    expect(on_device(to, bytes) == (kind != cudaMemcpyDeviceToHost), "a copy to the wrong side");
    expect(on_device(from, bytes) == (kind != cudaMemcpyHostToDevice),
           "a copy from the wrong side");
    memmove(to, from, bytes);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    not_in_capture("cudaMemcpy");
    if (bytes > 0) copy(to, from, bytes, kind);
    return cudaSuccess;
}

struct later_copy {
    void *to;
    const void *from;
    size_t bytes;
    enum cudaMemcpyKind kind;
};
static void copy_later(void *context) {
    const struct later_copy *c = context;
    copy(c->to, c->from, c->bytes, c->kind);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    expect(stream != NULL, "work on the default stream");
    if (bytes == 0) return cudaSuccess;
    if (!captured) {
        copy(to, from, bytes, kind);
        return cudaSuccess;
    }
    struct later_copy *c = malloc(sizeof *c);
    *c = (struct later_copy){to, from, bytes, kind};
    cuda_stub_record(stream, copy_later, free, c);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    not_in_capture("cudaDeviceSynchronize");
    return cudaSuccess;
}
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
    const char *s = scenario(), *rank = getenv("OMPI_COMM_WORLD_RANK");
    expect(stream != NULL, "a query of the default stream");
    not_in_capture("cudaStreamQuery");
    if (strncmp(s, "fault:", 6) == 0 && ++queries >= atoi(s + 6)) return (cudaError_t)700;
    int late;
    if (sscanf(s, "late:%d", &late) == 1 && rank && atoi(rank) == late && ++queries == LATE_QUERIES)
        sleep(LATE_SECONDS);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    not_in_capture("cudaStreamSynchronize");
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
    not_in_capture("cudaEventRecord");
    expect(event != NULL && stream != NULL, "an event on the default stream");
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    not_in_capture("cudaEventSynchronize");
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
