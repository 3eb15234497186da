/* comm_nccl.c: all-reduces of device memory by NCCL, on the stream of the backend's verbs.
 *
 *   --comm nccl                   ncclAllReduce                          NCCL's own order of sums
 *   --comm nccl --deterministic   ncclAllGather, then the slab tree      the bits of every other path
 *
 * Plans and records stay on the host path. The library is looked for when it is asked for (dlopen), so a
 * program built with CUDA starts where there is no NCCL. The communicator's id travels by
 * comm_share; it is made without blocking, and both here and later the host polls: a peer that is
 * gone shows as an asynchronous error or as a deadline, and then the whole job ends (code 5, 6 for a
 * deadline) with this rank's name instead of waiting for ever inside a kernel that never returns.
 *
 * Where the library has symmetric windows (ncclCommWindowRegister, 2.27 on) slot and gathered
 * partials lie in one each: NCCL then reads and writes the peers' memory itself. A sum is made in
 * place, in the slot, and what follows reads it there.
 *
 * One GPU a rank. NCCL before 2.30.3 refuses two ranks on one; later ones allow it for tests
 * (NCCL_MULTI_RANK_GPU_ENABLE=1).
 *
 * Thread: engine. Memory: a slot on the device; in tree order also [R][slot]. mpi.h stays out.
 */
#include <dlfcn.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/log.h"
#include "comm/comm_path.h"

enum { INIT_SECONDS = 120, CLOSE_SECONDS = 5 };
enum { LIBRARY_BYTES = 512 << 20 }; /* what NCCL takes for itself; it does not say */
static const char library_name[] = "libnccl.so.2";

/* The calls that are used: name and type come from nccl.h. */
#define NCCL_CALLS(X)         \
    X(ncclGetVersion)         \
    X(ncclGetUniqueId)        \
    X(ncclCommInitRankConfig) \
    X(ncclCommGetAsyncError)  \
    X(ncclCommFinalize)       \
    X(ncclCommDestroy)        \
    X(ncclCommAbort)          \
    X(ncclAllReduce)          \
    X(ncclAllGather)          \
    X(ncclGetErrorString)     \
    X(ncclGetLastError)

/* Of later libraries; all of them or none. Their types are told here: nccl.h may be older. */
typedef ncclResult_t mem_alloc(void **out, size_t bytes);
typedef ncclResult_t mem_free(void *memory);
typedef ncclResult_t window_register(ncclComm_t comm, void *memory, size_t bytes, void **window,
                                     int flags);
typedef ncclResult_t window_deregister(ncclComm_t comm, void *window);
enum { WINDOW_SYMMETRIC = 1, WINDOW_ALIGN = 4096, WINDOWS = 2, SHARED_GPU_VERSION = 23003 };

struct nccl {
    void *library;
    struct {
#define X(call) __typeof__(call) *call;
        NCCL_CALLS(X)
#undef X
    } lib;
    mem_alloc *mem_alloc;
    mem_free *mem_free;
    window_register *window_register;
    window_deregister *window_deregister;
    struct window {
        void *memory, *handle;
        size_t bytes;
    } windows[WINDOWS]; /* empty without windows */
    ncclComm_t comm;
    float *slot, *gathered; /* device; gathered: NULL unless sums are in tree order */
    uint64_t number;        /* operations so far */
    char host[64];
};

/* ---- trouble ---- */

/* Ends the job. No ncclCommAbort: it waits until every graph that captured the communicator's operations
 * is gone, and nobody here can drop those while the device hangs. The process ends at once, and the driver
 * takes its kernels away with it. */
static _Noreturn void give_up(comm *c, int exit_code, const char *why) {
    struct nccl *n = c->sums_state;
    char text[400];
    snprintf(text, sizeof text, "rank %d on %s: NCCL operation %llu: %.200s: stopping all ranks",
             c->rank, n->host, (unsigned long long)n->number, why);
    comm_abort(c, exit_code, text);
}

/* Result of a call or of the communicator's own work, once it is no longer in progress. */
static ncclResult_t settle(comm *c, struct nccl *n, ncclResult_t result, double seconds_max) {
    struct comm_patience p = {0};
    while (result == ncclInProgress) {
        const ncclResult_t asked = n->lib.ncclCommGetAsyncError(n->comm, &result);
        if (asked != ncclSuccess) return asked;
        if (result == ncclInProgress && 1e-9 * (double)comm_pause(c, &p) > seconds_max) break;
    }
    return result;
}

static void must(comm *c, ncclResult_t result) {
    struct nccl *n = c->sums_state;
    const double seconds = c->config.timeout_seconds;
    if (result == ncclInProgress)
        result = settle(c, n, result, seconds > 0 ? seconds : INIT_SECONDS);
    if (result == ncclInProgress) give_up(c, STATUS_WATCHDOG, "a peer has not answered in time");
    if (result != ncclSuccess) give_up(c, STATUS_COMM, n->lib.ncclGetErrorString(result));
}

/* Called while the host waits for the device. */
static void watch(void *user, double waited_seconds) {
    comm *c = user;
    struct nccl *n = c->sums_state;
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = n->lib.ncclCommGetAsyncError(n->comm, &state);
    if (asked != ncclSuccess) state = asked;
    if (state != ncclSuccess && state != ncclInProgress)
        give_up(c, STATUS_COMM, n->lib.ncclGetErrorString(state));
    if (comm_is_late(c, (uint64_t)(1e9 * waited_seconds)))
        give_up(c, STATUS_WATCHDOG, "the step has not ended in time: a peer or a kernel hangs");
    comm_watch_parent(c);
}

/* ---- sums ---- */

static float *nccl_slot(comm *c) {
    const struct nccl *n = c->sums_state;
    return n->slot;
}

/* sum: the slot itself, or elsewhere. */
static void sum_into(comm *c, size_t count, float *sum) {
    struct nccl *n = c->sums_state;
    backend *be = c->config.device;
    n->number++;
    if (!n->gathered) {
        must(c,
             n->lib.ncclAllReduce(n->slot, sum, count, ncclFloat32, ncclSum, n->comm, be->stream));
        return;
    }
    must(c, n->lib.ncclAllGather(n->slot, n->gathered, count, ncclFloat32, n->comm, be->stream));
    be->ops->tree_sum(be, n->gathered, c->size, count, sum);
}

static void nccl_all_reduce(comm *c, size_t count, float *sum) {
    const struct nccl *n = c->sums_state;
    backend *be = c->config.device;
    const bool in_place = n->windows[0].memory && !n->gathered; /* sum lies in no window */
    sum_into(c, count, in_place ? n->slot : sum);
    if (in_place) be->ops->copy(be, sum, n->slot, count * sizeof *sum);
}

static bool nccl_all_reduce_norm(comm *c, const struct comm_norm *norm) {
    const struct nccl *n = c->sums_state;
    backend *be = c->config.device;
    sum_into(c, (size_t)norm->rows * (size_t)norm->hidden, n->slot);
    be->ops->add_norm(be, norm->rows, norm->hidden, norm->first, norm->scale, n->slot, norm->x,
                      norm->weight, norm->eps, norm->dtype, norm->h);
    return true;
}

static void nccl_all_gather(comm *c, const void *mine, size_t n, void *all) {
    struct nccl *nccl = c->sums_state;
    nccl->number++;
    must(c, nccl->lib.ncclAllGather(mine, all, n, ncclInt8, nccl->comm, c->config.device->stream));
}

static bool nccl_capturable(const comm *c) {
    (void)c;
    return true;
}

/* ---- life ---- */

static void release_windows(comm *c, struct nccl *n) {
    for (int i = 0; i < WINDOWS; i++) {
        const struct window *w = &n->windows[i];
        if (w->handle) settle(c, n, n->window_deregister(n->comm, w->handle), CLOSE_SECONDS);
        if (w->memory) n->mem_free(w->memory);
        c->config.device->scratch_bytes -= w->bytes;
        n->windows[i] = (struct window){0};
    }
}

/* No graph holds the communicator any more (model_close): finalize and abort would wait for it for ever. */
static void release(comm *c, struct nccl *n) {
    if (n->comm) release_windows(c, n);
    if (n->comm && n->lib.ncclCommFinalize) {
        const ncclResult_t result = settle(c, n, n->lib.ncclCommFinalize(n->comm), CLOSE_SECONDS);
        if (result == ncclSuccess) {
            n->lib.ncclCommDestroy(n->comm);
        } else {
            n->lib.ncclCommAbort(n->comm);
        }
    }
    if (n->library) dlclose(n->library);
    free(n);
}

static void nccl_close(comm *c) {
    struct nccl *n = c->sums_state;
    c->sums = NULL;
    release(c, n);
}

static enum status load_library(struct nccl *n, int *version) {
    n->library = dlopen(library_name, RTLD_NOW | RTLD_LOCAL);
    if (!n->library) {
        return fail(STATUS_USAGE,
                    "--comm nccl: %s cannot be loaded (%s): install NCCL, set "
                    "LD_LIBRARY_PATH, or use --comm mpi",
                    library_name, dlerror());
    }
#define X(call)                                        \
    *(void **)&n->lib.call = dlsym(n->library, #call); \
    if (!n->lib.call) {                                \
        return fail(STATUS_USAGE,                      \
                    "--comm nccl: %s has no " #call    \
                    ": NCCL 2.14 or later is "         \
                    "needed",                          \
                    library_name);                     \
    }
    NCCL_CALLS(X)
#undef X
    *(void **)&n->mem_alloc = dlsym(n->library, "ncclMemAlloc");
    *(void **)&n->mem_free = dlsym(n->library, "ncclMemFree");
    *(void **)&n->window_register = dlsym(n->library, "ncclCommWindowRegister");
    *(void **)&n->window_deregister = dlsym(n->library, "ncclCommWindowDeregister");
    if (n->lib.ncclGetVersion(version) != ncclSuccess)
        return fail(STATUS_USAGE, "--comm nccl: %s does not tell its version", library_name);
    return STATUS_OK;
}

static size_t windowed(size_t bytes) {
    return (bytes + WINDOW_ALIGN - 1) / WINDOW_ALIGN * WINDOW_ALIGN;
}

/* Device memory in a window; NULL when this library cannot. Collective, but for the answer. */
static float *take_window(comm *c, struct nccl *n, struct window *w, size_t bytes) {
    w->bytes = windowed(bytes);
    c->config.device->scratch_bytes += w->bytes;
    if (n->mem_alloc(&w->memory, w->bytes) != ncclSuccess) w->memory = NULL;
    if (comm_agree_min(c, w->memory != NULL) == 0) return NULL;
    const ncclResult_t result =
        n->window_register(n->comm, w->memory, w->bytes, &w->handle, WINDOW_SYMMETRIC);
    if (settle(c, n, result, INIT_SECONDS) != ncclSuccess) w->handle = NULL;
    return w->handle ? w->memory : NULL;
}

static bool take_windows(comm *c, struct nccl *n, size_t slot_bytes) {
    const bool can = n->mem_alloc && n->mem_free && n->window_register && n->window_deregister;
    if (comm_agree_min(c, can) == 0) return false;
    n->slot = take_window(c, n, &n->windows[0], slot_bytes);
    bool taken = n->slot != NULL;
    if (comm_agree_min(c, taken) && c->config.tree_sums) {
        n->gathered = take_window(c, n, &n->windows[1], slot_bytes * (size_t)c->size);
        taken = n->gathered != NULL;
    }
    if (comm_agree_min(c, taken)) return true;
    release_windows(c, n);
    n->slot = n->gathered = NULL;
    return false;
}

int64_t comm_nccl_bytes(const comm *c, const struct comm_config *config) {
    const size_t slot = config->slot_floats * sizeof(float);
    const size_t gathered = config->tree_sums ? slot * (size_t)c->size : 0;
    return (int64_t)(windowed(slot) + windowed(gathered)) + LIBRARY_BYTES;
}

static enum status take_memory(comm *c, struct nccl *n) {
    backend *be = c->config.device;
    const size_t bytes = c->config.slot_floats * sizeof(float);
    n->slot = be->ops->alloc(be, bytes, "communication slot");
    if (!n->slot) return STATUS_MEMORY;
    if (!c->config.tree_sums) return STATUS_OK;
    n->gathered = be->ops->alloc(be, bytes * (size_t)c->size, "gathered partial sums");
    return n->gathered ? STATUS_OK : STATUS_MEMORY;
}

static enum status check_sharing(comm *c, int version) {
    int first = 0, second = 0;
    const char *allowed = getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    if (comm_gpu_sharing(c, &first, &second) == 1) return STATUS_OK;
    if (version >= SHARED_GPU_VERSION && allowed && strcmp(allowed, "1") == 0) return STATUS_OK;
    return fail(
        STATUS_USAGE,
        "--comm nccl: ranks %d and %d share a GPU, which NCCL %d.%d.%d does not allow: start "
        "one rank a GPU, or use --comm mpi (for tests, NCCL 2.30.3 or later with "
        "NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=4)",
        first, second, version / 10000, version / 100 % 100, version % 100);
}

static enum status new_id(comm *c, struct nccl *n, ncclUniqueId *id) {
    if (c->rank != 0) return STATUS_OK;
    const ncclResult_t result = n->lib.ncclGetUniqueId(id);
    if (result == ncclSuccess) return STATUS_OK;
    return fail(STATUS_COMM,
                "NCCL cannot start (%s): NCCL_DEBUG=INFO says more, "
                "NCCL_SOCKET_IFNAME chooses the network",
                n->lib.ncclGetErrorString(result));
}

static enum status join(comm *c, struct nccl *n, ncclUniqueId id) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t result = n->lib.ncclCommInitRankConfig(&n->comm, c->size, id, c->rank, &config);
    if (result == ncclInProgress) result = settle(c, n, result, INIT_SECONDS);
    if (result == ncclSuccess) return STATUS_OK;
    enum status status;
    if (result == ncclInProgress) {
        status =
            fail(STATUS_COMM, "NCCL has not connected the ranks after %d s: see NCCL_DEBUG=INFO",
                 (int)INIT_SECONDS);
    } else {
        status = fail(STATUS_COMM,
                      "NCCL cannot connect the ranks: %s (%.200s): one GPU a rank is "
                      "needed; --comm mpi works without",
                      n->lib.ncclGetErrorString(result), n->lib.ncclGetLastError(n->comm));
    }
    if (n->comm) n->lib.ncclCommAbort(n->comm);
    n->comm = NULL;
    return status;
}

static const struct comm_sums nccl_sums;

static enum status open_all(comm *c, struct nccl *n) {
    ncclUniqueId id = {0};
    int version = 0;
    TRY(comm_agree(c, load_library(n, &version)));
    TRY(comm_agree_equal(c, "the version of NCCL", &version, sizeof version));
    TRY(check_sharing(c, version));
    TRY(comm_agree(c, new_id(c, n, &id)));
    comm_share(c, &id, sizeof id);
    TRY(comm_agree(c, join(c, n, id)));
    const bool windows = take_windows(c, n, c->config.slot_floats * sizeof(float));
    if (!windows) TRY(comm_agree(c, take_memory(c, n)));
    if (c->rank == 0) {
        log_info("NCCL %d.%d.%d, %s symmetric windows", version / 10000, version / 100 % 100,
                 version % 100, windows ? "with" : "without");
    }
    return STATUS_OK;
}

enum status comm_nccl_setup(comm *c) {
    struct nccl *n = calloc(1, sizeof *n);
    TRY(comm_agree(c, n ? STATUS_OK : fail(STATUS_MEMORY, "no memory for NCCL's state")));
    if (gethostname(n->host, sizeof n->host - 1) != 0) snprintf(n->host, sizeof n->host, "?");
    const enum status status = open_all(c, n);
    if (status != STATUS_OK) {
        release(c, n);
        return status;
    }
    c->sums_state = n;
    c->sums = &nccl_sums;
    return STATUS_OK;
}

static const struct comm_sums nccl_sums = {
    .name = "nccl",
    .slot = nccl_slot,
    .all_reduce = nccl_all_reduce,
    .all_reduce_norm = nccl_all_reduce_norm,
    .all_gather = nccl_all_gather,
    .capturable = nccl_capturable,
    .watch = watch,
    .close = nccl_close,
};
