/* comm_fused.c: sums of device memory by our own kernels, which read and write the peers' GPU memory
 * (kernels/reduce.cu): one launch for the sum over ranks in tree order, residual and norm.
 *
 *   every rank: one region (cudaMalloc) ─ IPC handle ─ all_gather ─► opened by all others of this host
 *
 *   up to some 100 KB one-shot: each pushes its partial to all (lowest latency)
 *   above             two-shot: each sums a piece and pushes that (fewest bytes)
 *
 * A kernel that waits in vain leaves by itself: its watch is host memory, which this file reads while
 * the host waits for the device and before it speaks to other ranks, and then ends the job (code 6)
 * naming the rank that did not come. What the device computed after such a failure is never used.
 *
 * Before it is chosen it is tried (comm_fused_try): sums whose result every rank knows, twice round
 * the buffers, within seconds. --comm auto takes NCCL where that fails.
 *
 * Thread: engine. Memory: the region, whole 2 MiB pages of its own (an IPC handle opens the whole
 * piece it lies in), counted as the backend's scratch; one page of host memory.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/log.h"
#include "comm/comm_path.h"
#include "comm/comm_tree.h"
#include "kernels/kernels.h"

enum { PIECE_BYTES = 2 << 20, GATHER_BYTES_MAX = 1 << 20, BUFFERS = 3, TRY_SECONDS = 5 };

struct fused {
    struct kernels_peers peers;
    struct kernels_watch *watch; /* as the host sees it */
    void *region;
    size_t region_bytes;
    int way; /* COMM_WAY_BY_SIZE or a kernels_way */
};

/* Above this many bytes two-shot wins; published switch points (gpu.md 8.2), to be measured. */
static size_t one_shot_bytes_max(int ranks) {
    return ranks <= 2 ? 2 << 20 : ranks <= 4 ? 512 << 10 : 256 << 10;
}

/* ---- trouble ---- */

static void must(int error, const char *what) {
    if (error != 0) check_device_fault("%s: %s", what, kernels_error_text(error));
}

static void fused_abort(comm *c) {
    struct fused *f = c->sums_state;
    __atomic_store_n(&f->watch->abort, 1, __ATOMIC_RELEASE);
}

static void fused_check(comm *c) {
    const struct fused *f = c->sums_state;
    if (__atomic_load_n(&f->watch->failed, __ATOMIC_ACQUIRE) == 0) return;
    fused_abort(c);
    comm_give_up(c, f->watch->gather ? "fused all-gather" : "fused all-reduce", f->watch->number,
                 (int)f->watch->missing);
}

static void fused_watch(void *user, double waited_seconds) {
    comm *c = user;
    fused_check(c);
    comm_watch_parent(c);
    /* the kernels' own patience comes first; this is for a kernel that does not look at it */
    if (comm_is_late(c, (uint64_t)(1e9 * (waited_seconds > 5 ? waited_seconds - 5 : 0)))) {
        char text[160];
        snprintf(text, sizeof text,
                 "rank %d: the step has not ended after %.0f s: a kernel hangs: stopping all ranks",
                 c->rank, waited_seconds);
        comm_abort(c, STATUS_WATCHDOG, text);
    }
}

/* ---- sums ---- */

static float *fused_slot(comm *c) {
    const struct fused *f = c->sums_state;
    return kernels_peers_slot(&f->peers);
}

static enum kernels_way way_of(const struct fused *f, size_t count) {
    if ((int64_t)count > f->peers.one_shot_floats) return KERNELS_TWO_SHOT;
    return f->way == COMM_WAY_BY_SIZE ? KERNELS_ONE_SHOT : (enum kernels_way)f->way;
}

static void fused_all_reduce(comm *c, size_t count, float *sum) {
    const struct fused *f = c->sums_state;
    must(kernels_peers_sum(c->config.device->stream, way_of(f, count), &f->peers, (int64_t)count,
                           sum),
         "fused all-reduce");
}

static bool fused_all_reduce_norm(comm *c, const struct comm_norm *n) {
    const struct fused *f = c->sums_state;
    if (n->dtype != BACKEND_BF16) return false;
    const size_t count = (size_t)n->rows * (size_t)n->hidden;
    must(kernels_peers_sum_norm(c->config.device->stream, way_of(f, count), &f->peers, n->rows,
                                n->hidden, n->first, n->scale, n->x, n->weight, n->eps, n->h),
         "fused all-reduce and norm");
    return true;
}

static void fused_all_gather(comm *c, const void *mine, size_t n, void *all) {
    const struct fused *f = c->sums_state;
    const size_t most = 4 * (size_t)f->peers.gather_words;
    for (size_t at = 0, piece; at < n; at += piece) {
        piece = n - at < most ? n - at : most;
        must(kernels_peers_gather(c->config.device->stream, &f->peers, (const char *)mine + at,
                                  piece, (char *)all + at, n),
             "fused all-gather");
    }
}

static bool fused_capturable(const comm *c) {
    (void)c;
    return true;
}

static bool fused_way_fits(const comm *c, int way, size_t count) {
    const struct fused *f = c->sums_state;
    return way == KERNELS_TWO_SHOT || (int64_t)count <= f->peers.one_shot_floats;
}

static void fused_use_way(comm *c, int way) {
    struct fused *f = c->sums_state;
    f->way = way;
}

/* ---- life ---- */

static void release(comm *c, struct fused *f) {
    if (f->region) kernels_wait(c->config.device->stream);
    for (int r = 0; r < c->size && r < KERNELS_PEERS_MAX; r++) {
        if (r != c->rank && f->peers.region[r]) cudaIpcCloseMemHandle(f->peers.region[r]);
    }
    comm_agree_min(c, 0); /* all have let go of it */
    if (f->region) {
        cudaFree(f->region);
        c->config.device->scratch_bytes -= f->region_bytes;
    }
    cudaFreeHost(f->watch);
    free(f);
}

static void fused_close(comm *c) {
    struct fused *f = c->sums_state;
    c->sums = NULL;
    release(c, f);
}

static size_t four(size_t n) { return (n + 3) / 4 * 4; }

/* What the kernels are told, but for pointers. */
static struct kernels_peers plan(const comm *c, const struct comm_config *config, size_t gather,
                                 int blocks) {
    const size_t most = one_shot_bytes_max(c->size) / sizeof(float);
    const size_t slot = four(config->slot_floats);
    return (struct kernels_peers){
        .rank = c->rank,
        .ranks = c->size,
        .buffers = BUFFERS,
        .blocks_max = blocks > 0 ? blocks : 1,
        .one_shot_floats = (int64_t)(slot < most ? slot : most),
        .slot_floats = (int64_t)slot,
        .gather_words =
            (int64_t)four(gather < GATHER_BYTES_MAX ? gather : GATHER_BYTES_MAX) / 4 + 4,
    };
}

static size_t region_bytes(const struct kernels_peers *peers) {
    return (kernels_peers_bytes(peers) + PIECE_BYTES - 1) / PIECE_BYTES * PIECE_BYTES;
}

int64_t comm_fused_bytes(const comm *c, const struct comm_config *config) {
    if (c->size > KERNELS_PEERS_MAX) return 0;
    const struct kernels_peers peers = plan(c, config, GATHER_BYTES_MAX, kernels_multiprocessors());
    return (int64_t)region_bytes(&peers);
}

static enum status take_memory(comm *c, struct fused *f) {
    backend *be = c->config.device;
    void *seen = NULL;
    f->region_bytes = region_bytes(&f->peers);
    if (cudaMalloc(&f->region, f->region_bytes) != cudaSuccess) {
        cudaGetLastError();
        f->region = NULL;
        return fail(STATUS_MEMORY,
                    "--comm fused needs %.1f MB on the GPU: lower the batch limits, or use "
                    "--comm nccl",
                    1e-6 * (double)f->region_bytes);
    }
    be->scratch_bytes += f->region_bytes;
    if (cudaHostAlloc((void **)&f->watch, sizeof *f->watch, cudaHostAllocMapped) != cudaSuccess ||
        cudaHostGetDevicePointer(&seen, f->watch, 0) != cudaSuccess) {
        cudaGetLastError();
        return fail(STATUS_MEMORY, "--comm fused: no host memory that the GPU can see");
    }
    memset(f->watch, 0, sizeof *f->watch);
    f->peers.watch = seen;
    f->peers.region[c->rank] = f->region;
    const int error = kernels_peers_clear(be->stream, &f->peers);
    if (error == 0 && kernels_wait(be->stream) == 0) return STATUS_OK;
    return fail(STATUS_COMM, "--comm fused: GPU memory cannot be cleared: %s",
                kernels_error_text(error));
}

static enum status open_peers(comm *c, struct fused *f, const cudaIpcMemHandle_t *handles) {
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank) continue;
        const cudaError_t error =
            cudaIpcOpenMemHandle(&f->peers.region[r], handles[r], cudaIpcMemLazyEnablePeerAccess);
        if (error == cudaSuccess) continue;
        cudaGetLastError();
        f->peers.region[r] = NULL;
        return fail(STATUS_COMM,
                    "--comm fused: rank %d cannot open the GPU memory of rank %d: %s: containers "
                    "must share the IPC namespace (--ipc=host); or use --comm nccl",
                    c->rank, r, cudaGetErrorString(error));
    }
    return STATUS_OK;
}

static enum status connect(comm *c, struct fused *f) {
    cudaIpcMemHandle_t own = {{0}}, all[KERNELS_PEERS_MAX];
    int first = 0, second = 0;
    if (c->size > KERNELS_PEERS_MAX) {
        return fail(STATUS_USAGE,
                    "--comm fused: %d ranks, at most %d are possible: use --comm nccl", c->size,
                    (int)KERNELS_PEERS_MAX);
    }
    TRY(comm_agree(c, comm_gpu_reach(c)));
    const int sharing = comm_gpu_sharing(c, &first, &second);
    if (sharing > 1 && c->config.kind == COMM_AUTO) {
        return fail(STATUS_USAGE, "ranks %d and %d share a GPU", first, second);
    }
    if (sharing > 1 && c->rank == 0) {
        log_warn(
            "ranks %d and %d share a GPU: their kernels wait for one another in turns; for "
            "tests only",
            first, second);
    }
    /* the region's borders and the rows of a block follow from it: the same on all ranks */
    const int blocks = comm_agree_min(c, kernels_multiprocessors() / sharing);
    f->way = COMM_WAY_BY_SIZE;
    f->peers = plan(c, &c->config, c->config.gather_bytes_max, blocks);
    TRY(comm_agree(c, take_memory(c, f)));
    const cudaError_t error = cudaIpcGetMemHandle(&own, f->region);
    if (error != cudaSuccess) cudaGetLastError();
    TRY(comm_agree(c, error == cudaSuccess
                          ? STATUS_OK
                          : fail(STATUS_COMM, "--comm fused: no IPC handle: %s: use --comm nccl",
                                 cudaGetErrorString(error))));
    c->job->all_gather(c, &own, sizeof own, all);
    return comm_agree(c, open_peers(c, f, all));
}

/* ---- is it right here? ---- */

/* Small integers and fractions with many bits, of rank r. */
static float sample(int r, size_t i) {
    uint32_t word = (uint32_t)i * 2654435761u + (uint32_t)r * 40503u + 977u;
    word ^= word >> 15;
    return r == 1 && i % 7 == 0 ? -0.0f : (float)(int32_t)(word * 2246822519u) * 0x1p-28f;
}

static enum status try_sum(comm *c, size_t count, float *host, float *sum) {
    struct fused *f = c->sums_state;
    backend *be = c->config.device;
    const float *operands[KERNELS_PEERS_MAX];
    float values[KERNELS_PEERS_MAX], want;
    for (size_t i = 0; i < count; i++) host[i] = sample(c->rank, i);
    TRY(be->ops->write(be, kernels_peers_slot(&f->peers), host, count * sizeof *host));
    fused_all_reduce(c, count, sum);
    be->ops->read(be, host, sum, count * sizeof *host);
    if (f->watch->failed) {
        return fail(STATUS_COMM, "rank %d did not arrive in sum %llu within %d s",
                    (int)f->watch->missing, (unsigned long long)f->watch->number, (int)TRY_SECONDS);
    }
    for (int r = 0; r < c->size; r++) operands[r] = &values[r];
    for (size_t i = 0; i < count; i++) {
        for (int r = 0; r < c->size; r++) values[r] = sample(r, i);
        comm_tree_sum(operands, c->size, 1, &want);
        if (memcmp(&want, &host[i], sizeof want) == 0) continue;
        return fail(STATUS_COMM, "element %zu of a sum of %zu is %a, not %a", i, count,
                    (double)host[i], (double)want);
    }
    return STATUS_OK;
}

static enum status try_sums(comm *c) {
    enum { ROUNDS = 2 * BUFFERS };
    static const size_t counts[] = {64, 1003, 8192};
    struct fused *f = c->sums_state;
    backend *be = c->config.device;
    float host[8192], *sum = be->ops->alloc(be, sizeof host, "sums of the fused self-test");
    enum status status = sum ? STATUS_OK : STATUS_MEMORY;
    TRY(comm_agree(c, status));
    f->peers.patience_ns = TRY_SECONDS * (uint64_t)1000000000;
    for (int way = KERNELS_ONE_SHOT; way <= KERNELS_TWO_SHOT; way++) {
        f->way = way;
        for (int i = 0; i < ROUNDS && status == STATUS_OK; i++) {
            const size_t count = counts[i % 3];
            status = try_sum(c, count <= c->config.slot_floats ? count : c->config.slot_floats,
                             host, sum);
        }
    }
    f->way = COMM_WAY_BY_SIZE;
    TRY(comm_agree(c, status));
    const double seconds = c->config.timeout_seconds + (c->rank == 0 ? 0 : 2); /* comm_is_late */
    f->peers.patience_ns = c->config.timeout_seconds > 0 ? (uint64_t)(1e9 * seconds) : 0;
    return STATUS_OK;
}

static const struct comm_sums fused_sums;

enum status comm_fused_setup(comm *c) {
    if (c->size == 1) return comm_device_setup(c);
    struct fused *f = calloc(1, sizeof *f);
    TRY(comm_agree(c, f ? STATUS_OK : fail(STATUS_MEMORY, "no memory for the fused path")));
    enum status status = connect(c, f);
    if (status == STATUS_OK) {
        c->sums_state = f;
        status = try_sums(c);
        c->sums = status == STATUS_OK ? &fused_sums : NULL;
        if (status != STATUS_OK) {
            const struct fault why = *fail_last();
            status =
                fail(status, "--comm fused: its self-test failed: %s: use --comm nccl", why.text);
        }
    }
    if (status != STATUS_OK) release(c, f);
    return status;
}

static const char *const way_names[] = {
    [KERNELS_ONE_SHOT] = "one-shot", [KERNELS_TWO_SHOT] = "two-shot"};

static const struct comm_sums fused_sums = {
    .name = "fused",
    .slot = fused_slot,
    .all_reduce = fused_all_reduce,
    .all_reduce_norm = fused_all_reduce_norm,
    .all_gather = fused_all_gather,
    .capturable = fused_capturable,
    .way_count = 2,
    .way_names = way_names,
    .way_fits = fused_way_fits,
    .use_way = fused_use_way,
    .watch = fused_watch,
    .check = fused_check,
    .abort = fused_abort,
    .close = fused_close,
};
