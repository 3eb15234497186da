/* nccl_stub.c: a libnccl.so.2 for the emulated program: real sums over processes, injected errors, and
 * a watch over the order of calls.
 *
 *   id (a file's name) ─► every rank maps the file: arrivals | [R][slot of 2 MiB]
 *
 * A collective copies the rank's numbers into its slot, waits for all, reads, waits again. Made without
 * blocking, as comm_nccl.c asks: init, finalize and the first collective answer ncclInProgress until they
 * have been asked twice. Wrong order (work before the communicator is ready, after an abort, destroy
 * without finalize) ends the process by abort(). So does the end of a communicator, abort included, while a
 * graph lives that captured one of its collectives: NCCL would wait for it for ever.
 *
 * NCCL_STUB, "WHAT:RANK": no-id | init | hang-init (never ready) | call:RANK (a collective is refused) |
 * async:RANK (the second collective fails later, on that rank) | hang (no answer to the second one) |
 * garbage:RANK (that rank's second gather of bytes, and what follows, is full of the same byte) |
 * no-window:RANK (memory is not registered there) | version-NUMBER (of that NCCL; 22809)
 */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda_runtime_api.h"
#include "nccl.h"

enum { SLOT_BYTES = 2 << 20, HEAD_BYTES = 4096, ASKED = 2, WINDOWS_MAX = 4, PAGE_BYTES = 2 << 20 };

struct ncclComm {
    int ranks, rank, collectives;
    int left; /* times still in progress */
    ncclResult_t later;
    int ready, finalized, aborted;
    int captured; /* collectives in living graphs */
    struct window {
        char *begin;
        size_t bytes;
    } windows[WINDOWS_MAX];
    char *shared;
    char path[128];
};

static int injected(const char *what, int rank) {
    const char *text = getenv("NCCL_STUB");
    const size_t n = strlen(what);
    if (!text || strncmp(text, what, n) != 0) return 0;
    return text[n] == '\0' || (text[n] == ':' && atoi(text + n + 1) == rank);
}

static void expect(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "nccl_stub: wrong order: %s\n", what);
    abort();
}

ncclResult_t ncclGetVersion(int *version) {
    const char *text = getenv("NCCL_STUB");
    *version = text && strncmp(text, "version-", 8) == 0 ? atoi(text + 8) : 22809;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    if (injected("no-id", 0)) return ncclSystemError;
    snprintf(id->internal, sizeof id->internal, "/dev/shm/nccl_stub_XXXXXX");
    const int file = mkstemp(id->internal);
    if (file < 0) return ncclSystemError;
    close(file);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    const size_t bytes = HEAD_BYTES + (size_t)ranks * SLOT_BYTES;
    *comm = NULL;
    expect(config && config->blocking == 0, "the communicator must be made without blocking");
    if (injected("init", rank)) return ncclSystemError;
    ncclComm_t c = calloc(1, sizeof *c);
    const int file = open(id.internal, O_RDWR);
    if (!c || file < 0 || ftruncate(file, (off_t)bytes) != 0) return ncclSystemError;
    c->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    memcpy(c->path, id.internal, sizeof c->path);
    c->ranks = ranks;
    c->rank = rank;
    c->left = ASKED;
    *comm = c;
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    expect(c && !c->aborted, "asked after the end");
    *error = c->later;
    if (c->left > 0) {
        if (!injected("hang-init", c->rank) || c->ready) c->left--;
        *error = ncclInProgress;
    } else {
        c->ready = 1;
    }
    return ncclSuccess;
}

/* ---- windows ---- */

static int allocations;

ncclResult_t ncclMemAlloc(void **out, size_t bytes) {
    allocations++;
    return cudaMalloc(out, (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES) == cudaSuccess
               ? ncclSuccess
               : ncclSystemError;
}
ncclResult_t ncclMemFree(void *memory) {
    expect(allocations-- > 0, "more frees than allocations");
    return cudaFree(memory) == cudaSuccess ? ncclSuccess : ncclInvalidUsage;
}

static int in_window(ncclComm_t c, const void *p) {
    for (int i = 0; i < WINDOWS_MAX; i++) {
        const struct window *w = &c->windows[i];
        if (w->begin && (const char *)p >= w->begin && (const char *)p < w->begin + w->bytes)
            return 1;
    }
    return 0;
}
static int has_windows(ncclComm_t c) {
    for (int i = 0; i < WINDOWS_MAX; i++)
        if (c->windows[i].begin) return 1;
    return 0;
}

ncclResult_t ncclCommWindowRegister(ncclComm_t c, void *memory, size_t bytes, void **window,
                                    int flags) {
    int i = 0;
    *window = NULL;
    expect(c && c->ready && c->left == 0 && !c->finalized && !c->aborted && c->collectives == 0,
           "a window");
    expect(flags == 1 && (size_t)memory % 4096 == 0 && bytes % 4096 == 0, "arguments of a window");
    if (injected("no-window", c->rank)) return ncclInvalidUsage;
    while (i < WINDOWS_MAX && c->windows[i].begin) i++;
    expect(i < WINDOWS_MAX, "too many windows");
    c->windows[i] = (struct window){memory, bytes};
    *window = &c->windows[i];
    c->left = 1;
    return ncclInProgress;
}
ncclResult_t ncclCommWindowDeregister(ncclComm_t c, void *window) {
    struct window *w = window;
    expect(c && c->ready && !c->finalized && !c->aborted && w && w->begin, "end of a window");
    w->begin = NULL;
    return ncclSuccess;
}

/* All ranks come here `number` times. */
static void meet(ncclComm_t c, unsigned number) {
    _Atomic unsigned *arrivals = (_Atomic unsigned *)c->shared;
    atomic_fetch_add(arrivals, 1);
    while (atomic_load(arrivals) < number * (unsigned)c->ranks) usleep(20);
}

static ncclResult_t exchange(ncclComm_t c, const void *from, size_t bytes) {
    expect(c && c->ready && c->left == 0 && !c->finalized && !c->aborted, "a collective");
    if (injected("call", c->rank)) return ncclInvalidUsage;
    c->collectives++;
    if (c->collectives == 2 && injected("async", c->rank)) {
        c->later = ncclRemoteError;
        c->left = 1;
        return ncclInProgress;
    }
    if (c->collectives == 2 && injected("hang", c->rank)) {
        c->left = 1 << 30;
        return ncclInProgress;
    }
    expect(bytes <= SLOT_BYTES, "too large for the stub");
    memcpy(c->shared + HEAD_BYTES + (size_t)c->rank * SLOT_BYTES, from, bytes);
    meet(c, 2 * (unsigned)c->collectives - 1);
    return ncclSuccess;
}

static ncclResult_t end(ncclComm_t c) {
    meet(c, 2 * (unsigned)c->collectives);
    if (c->collectives > 1) return ncclSuccess;
    c->left = 1; /* the first connects */
    return ncclInProgress;
}

static ncclResult_t all_reduce(const void *from, void *to, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, void *stream) {
    expect(type == ncclFloat32 && op == ncclSum && stream, "arguments of an all-reduce");
    expect(!has_windows(c) || (from == to && in_window(c, from)),
           "a sum outside the window that was made for it");
    const ncclResult_t result = exchange(c, from, count * sizeof(float));
    if (result != ncclSuccess) return result;
    for (size_t i = 0; i < count; i++) { /* from the last rank down: not the tree's order */
        float sum = -0.0f;
        for (int r = c->ranks - 1; r >= 0; r--) {
            float x;
            memcpy(&x, c->shared + HEAD_BYTES + (size_t)r * SLOT_BYTES + i * sizeof x, sizeof x);
            sum += x;
        }
        ((float *)to)[i] = sum;
    }
    return end(c);
}

static ncclResult_t all_gather(const void *from, void *to, size_t count, ncclDataType_t type,
                               ncclComm_t c, void *stream) {
    const size_t bytes = count * (type == ncclInt8 ? 1 : sizeof(float));
    expect((type == ncclInt8 || type == ncclFloat32) && stream, "arguments of an all-gather");
    expect(type == ncclInt8 || !has_windows(c) || (in_window(c, from) && in_window(c, to)),
           "partial sums outside the windows that were made for them");
    static int gathers;
    char garbage[1 << 16];
    gathers += type == ncclInt8;
    if (gathers > 1 && type == ncclInt8 && injected("garbage", c->rank)) {
        expect(bytes <= sizeof garbage, "too large for garbage");
        from = memset(garbage, 0x7f, bytes);
    }
    const ncclResult_t result = exchange(c, from, bytes);
    if (result != ncclSuccess) return result;
    for (int r = 0; r < c->ranks; r++) {
        memcpy((char *)to + (size_t)r * bytes, c->shared + HEAD_BYTES + (size_t)r * SLOT_BYTES,
               bytes);
    }
    return end(c);
}

/* A collective while its stream is captured: cuda_stub.c does it when the graph is launched. */
struct later {
    const void *from;
    void *to;
    size_t count;
    ncclDataType_t type;
    int gather;
    ncclComm_t comm;
    void *stream;
};
static void do_later(void *context) {
    const struct later *l = context;
    const ncclResult_t result =
        l->gather ? all_gather(l->from, l->to, l->count, l->type, l->comm, l->stream)
                  : all_reduce(l->from, l->to, l->count, l->type, ncclSum, l->comm, l->stream);
    expect(result == ncclSuccess, "the first collective inside a graph");
}
static void drop_later(void *context) {
    struct later *l = context;
    l->comm->captured--;
    free(l);
}
__attribute__((weak)) int cuda_stub_record(void *stream, void (*run)(void *), void (*drop)(void *),
                                           void *context);
static int is_captured(struct later l) {
    struct later *kept = malloc(sizeof *kept);
    *kept = l;
    if (cuda_stub_record && cuda_stub_record(l.stream, do_later, drop_later, kept)) {
        l.comm->captured++;
        return 1;
    }
    free(kept);
    return 0;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t c, void *stream) {
    if (is_captured((struct later){from, to, count, type, 0, c, stream})) return ncclSuccess;
    return all_reduce(from, to, count, type, op, c, stream);
}

ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type,
                           ncclComm_t c, void *stream) {
    if (is_captured((struct later){from, to, count, type, 1, c, stream})) return ncclSuccess;
    return all_gather(from, to, count, type, c, stream);
}

ncclResult_t ncclCommFinalize(ncclComm_t c) {
    expect(c && c->ready && !c->finalized && !c->aborted && !has_windows(c), "finalize");
    expect(c->captured == 0, "finalize while a graph holds collectives");
    c->finalized = 1;
    c->left = ASKED;
    return ncclInProgress;
}

static void forget(ncclComm_t c) {
    unlink(c->path);
    munmap(c->shared, HEAD_BYTES + (size_t)c->ranks * SLOT_BYTES);
}

ncclResult_t ncclCommDestroy(ncclComm_t c) {
    expect(c && c->finalized && c->left == 0 && !c->aborted, "destroy");
    forget(c);
    free(c);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t c) {
    expect(c && !c->aborted, "abort");
    expect(c->captured == 0, "abort while a graph holds collectives");
    c->aborted = 1;
    forget(c);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclRemoteError    ? "remote process exited or there was a network error"
           : result == ncclSystemError  ? "unhandled system error"
           : result == ncclInvalidUsage ? "invalid usage"
                                        : "another error";
}
const char *ncclGetLastError(ncclComm_t c) { return c ? "see above" : "no communicator"; }
