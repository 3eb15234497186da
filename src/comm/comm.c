/* comm.c: the public face of comm/: joining, agreement, dispatch to the path, the end of the job.
 *
 * Knows no MPI and no shared memory: it works on the two tables of comm_path.h. Agreement is an
 * all-gather of one small word a rank; only when some rank failed does its fault (text, field,
 * code) travel too.
 *
 * Thread: engine thread. Memory: one struct comm; the path takes the rest in comm_setup.
 */
#include "comm/comm.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "comm/comm_path.h"

/* Variables by which mpirun, srun and other PMI launchers tell a process that it is one of many. */
static bool started_by_launcher(void) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE",
                                        "PMI_FD"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (getenv(names[i])) return true;
    }
    return false;
}

struct comm_place comm_place_here(int host) {
    struct comm_place place = {.host = host};
    if (gethostname(place.name, sizeof place.name - 1) != 0) strcpy(place.name, "?");
    return place;
}

/* A job of this process alone. */
static comm *new_comm(void) {
    cpu_set_t mask;
    comm *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->job = &comm_self_job;
    c->size = c->local_size = 1;
    c->places[0] = comm_place_here(0);
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) c->local_cores = CPU_COUNT(&mask);
    return c;
}

enum status comm_open(int *argc, char ***argv, comm **out) {
    comm *c = new_comm();
    if (!c) return fail(STATUS_MEMORY, "no memory to join the job");
    if (started_by_launcher()) {
        const enum status status = comm_mpi_join(c, argc, argv);
        if (status != STATUS_OK) {
            free(c);
            return status;
        }
    }
    log_set_rank(c->rank);
    *out = c;
    return STATUS_OK;
}

enum status comm_open_alone(comm **out) {
    comm *c = new_comm();
    if (!c) return fail(STATUS_MEMORY, "no memory for a job of one");
    *out = c;
    return STATUS_OK;
}

void comm_close(comm *c) {
    if (!c) return;
    if (c->sums && c->sums->watch) c->config.device->watch = NULL;
    if (c->sums) c->sums->close(c);
    if (c->path) c->path->close(c);
    c->job->close(c);
    free(c);
}

int comm_rank(const comm *c) { return c->rank; }
int comm_size(const comm *c) { return c->size; }
int comm_local_rank(const comm *c) { return c->local_rank; }
int comm_local_size(const comm *c) { return c->local_size; }
int comm_local_cores(const comm *c) { return c->local_cores; }
int comm_host_of(const comm *c, int rank) { return c->places[rank].host; }
const char *comm_host_name(const comm *c, int rank) { return c->places[rank].name; }
const char *comm_path_name(const comm *c) {
    return !c->path ? "none" : c->sums ? c->sums_path_name : c->path->name;
}

/* Nothing a failed device has computed may reach the other ranks, and no rank may wait where
 * there is no deadline for one that waits for it on the device. */
static void check_sums(comm *c) {
    if (c->sums && c->sums->check) c->sums->check(c);
}

enum status comm_agree(comm *c, enum status mine) {
    check_sums(c);
    int32_t own = mine, all[COMM_RANKS_MAX];
    c->job->all_gather(c, &own, sizeof own, all);
    int failing = 0;
    while (failing < c->size && all[failing] == STATUS_OK) failing++;
    if (failing == c->size) return STATUS_OK;

    const enum status agreed = (enum status)all[failing];
    struct fault fault = *fail_last();
    if (fault.status != mine) { /* the caller never said why */
        fault = (struct fault){.status = mine};
        snprintf(fault.text, sizeof fault.text, "failed (%s)", status_name(mine));
    }
    c->job->share(c, failing, &fault, sizeof fault);
    if (failing == 0) return fail_param(agreed, fault.param, fault.code, "%s", fault.text);
    return fail_param(agreed, fault.param, fault.code, "rank %d: %s", failing, fault.text);
}

/* "0a1b…" of the bytes from `at` on, at most 64 of them. */
static const char *hex(char text[132], const unsigned char *bytes, size_t at, size_t n) {
    enum { SHOWN = 64 };
    size_t length = 0;
    for (size_t i = at; i < n && i < at + SHOWN; i++) {
        length += (size_t)snprintf(text + length, 132 - length, "%02x", bytes[i]);
    }
    text[length] = '\0';
    return text;
}

enum status comm_agree_equal(comm *c, const char *what, const void *bytes, size_t n) {
    ASSERT_LE(n, COMM_EQUAL_BYTES_MAX);
    uint64_t own_bytes = n, all_bytes[COMM_RANKS_MAX];
    c->job->all_gather(c, &own_bytes, sizeof own_bytes, all_bytes);
    for (int r = 1; r < c->size; r++) {
        if (all_bytes[r] == all_bytes[0]) continue;
        return fail(STATUS_COMM,
                    "ranks differ in %s: rank 0 brings %llu bytes, rank %d brings %llu: start "
                    "all ranks with the same program, model and options",
                    what, (unsigned long long)all_bytes[0], r, (unsigned long long)all_bytes[r]);
    }
    unsigned char first[COMM_EQUAL_BYTES_MAX] = {0}, other[COMM_EQUAL_BYTES_MAX] = {0};
    memcpy(first, bytes, n);
    c->job->share(c, 0, first, n);
    int32_t differs = memcmp(first, bytes, n) != 0, all[COMM_RANKS_MAX];
    c->job->all_gather(c, &differs, sizeof differs, all);
    int rank = 0;
    while (rank < c->size && !all[rank]) rank++;
    if (rank == c->size) return STATUS_OK;

    memcpy(other, bytes, n);
    c->job->share(c, rank, other, n);
    size_t at = 0;
    while (first[at] == other[at]) at++;
    if (n <= 64) at = 0; /* short: show all of it */
    char left[132], right[132];
    return fail(STATUS_COMM,
                "ranks differ in %s: rank 0 has %s, rank %d has %s: start all ranks with the same "
                "program, model and options (SFUMATO_ variables reach other hosts by mpirun -x)",
                what, hex(left, first, at, n), rank, hex(right, other, at, n));
}

int comm_agree_min(comm *c, int value) {
    check_sums(c);
    int32_t own = value, all[COMM_RANKS_MAX];
    c->job->all_gather(c, &own, sizeof own, all);
    for (int r = 0; r < c->size; r++) own = all[r] < own ? all[r] : own;
    return own;
}

void comm_share(comm *c, void *bytes, size_t n) { c->job->share(c, 0, bytes, n); }

#ifdef SFUMATO_WITH_CUDA
/* Our own kernels where they pass their test, else NCCL, else through the host; the log says why. */
static enum status setup_auto(comm *c) {
    if (c->size == 1) return comm_device_setup(c);
    if (comm_fused_setup(c) == STATUS_OK) {
        if (c->rank == 0) log_info("sums over ranks: fused; its self-test passed");
        return STATUS_OK;
    }
    if (c->rank == 0) log_info("sums over ranks: not fused: %s", fail_text());
#ifdef SFUMATO_WITH_NCCL
    if (comm_nccl_setup(c) == STATUS_OK) {
        if (c->rank == 0) log_info("sums over ranks: NCCL");
        return STATUS_OK;
    }
    if (c->rank == 0) log_info("sums over ranks: not NCCL: %s", fail_text());
#endif
    if (c->rank == 0) log_info("sums over ranks: through the host");
    return comm_device_setup(c);
}
#endif

int64_t comm_device_bytes(const comm *c, const struct comm_config *config) {
    int64_t most = config->device ? (int64_t)(config->slot_floats * sizeof(float)) : 0;
    if (!config->device || c->size == 1) return most;
#ifdef SFUMATO_WITH_CUDA
    if (config->kind == COMM_AUTO || config->kind == COMM_FUSED) {
        const int64_t fused = comm_fused_bytes(c, config);
        if (fused > most) most = fused;
    }
#endif
#ifdef SFUMATO_WITH_NCCL
    if (config->kind == COMM_AUTO || config->kind == COMM_NCCL) {
        const int64_t nccl = comm_nccl_bytes(c, config);
        if (nccl > most) most = nccl;
    }
#endif
    return most;
}

/* Which way device memory is summed. */
static enum status setup_device(comm *c) {
    enum status status;
    switch (c->config.kind) {
#ifdef SFUMATO_WITH_NCCL
        case COMM_NCCL:
            status = comm_nccl_setup(c);
            break;
#endif
#ifdef SFUMATO_WITH_CUDA
        case COMM_FUSED:
            status = comm_fused_setup(c);
            break;
        case COMM_AUTO:
            status = setup_auto(c);
            break;
#endif
        default:
            status = comm_device_setup(c);
    }
    if (status == STATUS_OK && c->sums->watch) {
        c->config.device->watch = c->sums->watch;
        c->config.device->watch_user = c;
    }
    return status;
}

enum status comm_setup(comm *c, const struct comm_config *config) {
    ASSERT(!c->path);
    c->config = *config;
    const uint64_t sizes[] = {config->slot_floats, config->bcast_bytes_max,
                              config->gather_bytes_max, (uint64_t)config->kind};
    TRY(comm_agree_equal(c, "communication sizes", sizes, sizeof sizes));
    if ((config->kind == COMM_NCCL || config->kind == COMM_FUSED) && !config->device) {
        return fail(STATUS_USAGE,
                    "--comm %s needs the CUDA backend: use --comm auto, or --backend cuda",
                    config->kind == COMM_NCCL ? "nccl" : "fused");
    }
    enum status status = c->job->setup(c);
    if (status == STATUS_OK && config->device) status = setup_device(c);
    if (status != STATUS_OK) {
        if (c->path) c->path->close(c);
        c->path = NULL;
        return status;
    }
    if (c->sums) {
        snprintf(c->sums_path_name, sizeof c->sums_path_name, "%s, %s", c->sums->name,
                 c->path->name);
    }
    c->times = (struct comm_times){0};
    return STATUS_OK;
}

float *comm_slot(comm *c) { return c->sums ? c->sums->slot(c) : c->path->slot(c); }

/* See stand_in_us in comm.h. on_device: what is waited for is in order with the verbs. */
static void stand_in(comm *c, bool on_device) {
    const double us = c->config.stand_in_us;
    backend *be = c->config.device;
    if (us <= 0) return;
    if (on_device && be) {
        be->ops->delay(be, us);
        return;
    }
    const uint64_t begin_ns = comm_clock_ns();
    while (1e-3 * (double)(comm_clock_ns() - begin_ns) < us) continue;
}

void comm_all_reduce(comm *c, size_t count, float *sum) {
    ASSERT_LE(count, c->config.slot_floats);
    const double waited_before = c->times.wait_seconds;
    const uint64_t begin_ns = comm_clock_ns();
    if (c->sums) {
        c->sums->all_reduce(c, count, sum);
    } else {
        c->path->all_reduce(c, count, sum);
    }
    stand_in(c, true);
    const double seconds = 1e-9 * (double)(comm_clock_ns() - begin_ns);
    c->times.move_seconds += seconds - (c->times.wait_seconds - waited_before);
    c->times.all_reduce_count++;
}

void comm_all_reduce_norm(comm *c, backend *be, const struct comm_norm *n, float *sum) {
    ASSERT_LE((size_t)n->rows * (size_t)n->hidden, c->config.slot_floats);
    if (c->sums && c->sums->all_reduce_norm && c->sums->all_reduce_norm(c, n)) {
        stand_in(c, true);
        c->times.all_reduce_count++;
        return;
    }
    comm_all_reduce(c, (size_t)n->rows * (size_t)n->hidden, sum);
    be->ops->add_norm(be, n->rows, n->hidden, n->first, n->scale, sum, n->x, n->weight, n->eps,
                      n->dtype, n->h);
}

void comm_all_gather(comm *c, const void *mine, size_t n, void *all) {
    const size_t slot_bytes = c->config.slot_floats * sizeof(float);
    stand_in(c, true);
    if (c->sums) {
        c->sums->all_gather(c, mine, n, all);
        return;
    }
    for (size_t at = 0, piece; at < n; at += piece) { /* through the slot, a slotful at a time */
        piece = n - at < slot_bytes ? n - at : slot_bytes;
        memcpy(c->path->slot(c), (const char *)mine + at, piece);
        c->path->all_gather(c, piece, (char *)all + at, n);
    }
}

bool comm_capturable(const comm *c) { return c->sums && c->sums->capturable(c); }

int comm_way_count(const comm *c) { return c->sums ? c->sums->way_count : 0; }
const char *comm_way_name(const comm *c, int way) { return c->sums->way_names[way]; }
bool comm_way_fits(const comm *c, int way, size_t count) {
    return c->sums->way_fits(c, way, count);
}
void comm_use_way(comm *c, int way) { c->sums->use_way(c, way); }

size_t comm_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    check_sums(c);
    if (c->rank == 0) ASSERT_LE(n, c->config.bcast_bytes_max);
    return c->path->bcast(c, mine, n, bytes);
}

const void *comm_gather(comm *c, const void *mine, size_t n) {
    ASSERT_LE(n, c->config.gather_bytes_max);
    stand_in(c, false);
    check_sums(c);
    return c->path->gather(c, mine, n);
}

void comm_times_get(const comm *c, struct comm_times *out) { *out = c->times; }

void comm_on_abort(comm *c, void (*hook)(void *user, int exit_code, const char *text), void *user) {
    c->abort_hook = hook;
    c->abort_user = user;
}

/* Often all ranks see the same trouble at once, and it shall be said once. In a window the first to
 * come speaks; without one, higher ranks leave the lower ones time to end them. */
_Noreturn void comm_abort(comm *c, int exit_code, const char *text) {
    enum { GRACE_SECONDS = 2, TURN_US = 50 * 1000 };
    if (c->sums && c->sums->abort) c->sums->abort(c);
    if (c->abort_hook) c->abort_hook(c->abort_user, exit_code, text);
    if (c->path && c->path->abort_claim) {
        if (c->path->abort_claim(c)) {
            log_failure(text);
        } else {
            sleep(GRACE_SECONDS); /* the other one is ending us */
        }
    } else {
        usleep((useconds_t)c->rank * TURN_US);
        log_failure(text);
    }
    if (c->local_size < c->size) comm_guard(c->parent);
    c->job->abort(c, exit_code);
    _exit(exit_code);
}
