/* comm_mpi.c: joining the job by MPI, memory for the window path, and path "mpi" (messages).
 *
 * The only file that includes mpi.h (comm_bench.c compares with it, too). All ranks on one host:
 * the window path, in memory of MPI_Win_allocate_shared. Otherwise, or with --comm mpi, messages
 * for everything: a job over several hosts does not use windows inside them (that would save
 * copies, not the slow hop).
 *
 * Messages: an all-reduce is MPI_Iallgather of the fp32 partials, then the same tree as everywhere.
 * Never MPI_Allreduce: the order of its sum is not promised. Every call is non-blocking and tested
 * in our own loop, because Open MPI's blocking calls burn a core while they wait and know no
 * deadline. A plan travels as a first piece of fixed size (length + beginning) and, when longer, a
 * second one. Thread: FUNNELED, the engine thread only. Memory: taken in setup; [R][slot] for the
 * partials.
 */
#include <errno.h>
#include <limits.h>
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "comm/comm_path.h"
#include "comm/comm_tree.h"

enum { PAGE_BYTES = 4096, FIRST_PIECE_BYTES = 4096, SHARE_BYTES = 1 << 30 };

struct mpi_job {
    MPI_Comm world; /* a copy: nobody else's messages */
    MPI_Comm host;  /* the ranks of this host */
    MPI_Win window; /* MPI_WIN_NULL on the other paths */
};

struct messages {
    float *slot;     /* [slot_floats] */
    float *partials; /* [R][count of the call] */
    char *plan;      /* FIRST_PIECE_BYTES + bcast_bytes_max, starts with the length */
    char *records;   /* [R][gather_bytes_max], rank 0 only */
    uint64_t all_reduce_number, plan_number, gather_number;
};

static const struct comm_path mpi_path;

/* Who may be late, and what to do meanwhile. */
enum lateness {
    LATE_START, /* others load for minutes: sleep, no deadline */
    LATE_PLAN,  /* nothing to do for hours: sleep after a millisecond, no deadline */
    LATE_STEP   /* a peer is microseconds behind: spin, then yield; deadline */
};

static void complete(comm *c, MPI_Request *request, enum lateness late, const char *operation,
                     uint64_t number) {
    enum { NAP_FIRST_NS = 20 * 1000, NAP_LAST_NS = 1000 * 1000 };
    struct comm_patience p = {0};
    long nap_ns = NAP_FIRST_NS;
    int done = 0;
    while (MPI_Test(request, &done, MPI_STATUS_IGNORE), !done) {
        const uint64_t waited_ns = comm_pause(c, &p);
        if (late == LATE_STEP) {
            comm_check_deadline(c, waited_ns, operation, number, -1);
        } else if (waited_ns > COMM_PARK_NS) {
            nanosleep(&(struct timespec){.tv_nsec = nap_ns}, NULL);
            nap_ns = 2 * nap_ns < NAP_LAST_NS ? 2 * nap_ns : NAP_LAST_NS;
        }
    }
    if (late == LATE_STEP) comm_pause_end(c, &p);
}

/* ---- joining ---- */

static void mpi_all_gather(comm *c, const void *mine, size_t n, void *all) {
    const struct mpi_job *job = c->job_state;
    MPI_Request request;
    MPI_Iallgather(mine, (int)n, MPI_BYTE, all, (int)n, MPI_BYTE, job->world, &request);
    complete(c, &request, LATE_START, "agreement", 0);
}

static void mpi_share(comm *c, int root, void *bytes, size_t n) {
    const struct mpi_job *job = c->job_state;
    for (size_t at = 0; at < n; at += SHARE_BYTES) { /* MPI counts are ints */
        const size_t piece = n - at < SHARE_BYTES ? n - at : SHARE_BYTES;
        MPI_Request request;
        MPI_Ibcast((char *)bytes + at, (int)piece, MPI_BYTE, root, job->world, &request);
        complete(c, &request, LATE_START, "sharing", 0);
    }
}

static void mpi_abort(comm *c, int exit_code) {
    (void)c;
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

static void abort_on_bug(int exit_code) {
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    _exit(exit_code);
}

static void mpi_close(comm *c) {
    struct mpi_job *job = c->job_state;
    if (job->window != MPI_WIN_NULL) {
        MPI_Win_unlock_all(job->window);
        MPI_Win_free(&job->window);
    }
    MPI_Comm_free(&job->host);
    MPI_Comm_free(&job->world);
    check_on_bug(NULL);
    MPI_Finalize();
    free(job);
}

/* More ranks than cores: counted over all ranks of the host, because a launcher may have given each
 * its own core, or all of them the same two. */
static bool host_is_crowded(const struct mpi_job *job, int local_size) {
    cpu_set_t mine, all[COMM_RANKS_MAX];
    CPU_ZERO(&mine);
    if (sched_getaffinity(0, sizeof mine, &mine) != 0)
        return false; /* > 1024 processors: not crowded */
    MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all, sizeof mine, MPI_BYTE, job->host);
    for (int r = 0; r < local_size; r++) CPU_OR(&mine, &mine, &all[r]);
    return local_size > CPU_COUNT(&mine);
}

/* Open MPI ends the ranks when one of them or mpirun dies. This also covers a launcher that was
 * killed before it could, and one that does not clean up. */
static void die_with_parent(comm *c) {
    c->parent = getppid();
    if (c->rank == 0) return; /* serves: it decides itself how to end */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    comm_watch_parent(c); /* it may have died just before */
}

enum status comm_mpi_join(comm *c, int *argc, char ***argv) {
    struct mpi_job *job = calloc(1, sizeof *job);
    if (!job) return fail(STATUS_MEMORY, "no memory to join the job");
    int provided = 0;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        free(job);
        return fail(STATUS_COMM,
                    "MPI_Init failed: start with the mpirun of the MPI this was built with");
    }
    MPI_Comm_dup(MPI_COMM_WORLD, &job->world);
    MPI_Comm_rank(job->world, &c->rank);
    MPI_Comm_size(job->world, &c->size);
    MPI_Comm_split_type(job->world, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &job->host);
    MPI_Comm_rank(job->host, &c->local_rank);
    MPI_Comm_size(job->host, &c->local_size);
    job->window = MPI_WIN_NULL;
    c->job = &comm_mpi_job;
    c->job_state = job;

    enum status status = STATUS_OK;
    if (c->size > COMM_RANKS_MAX) {
        status = fail(STATUS_USAGE, "%d ranks: at most %d are possible", c->size, COMM_RANKS_MAX);
    } else if (provided < MPI_THREAD_FUNNELED) {
        status = fail(STATUS_COMM,
                      "this MPI does not allow threads (MPI_THREAD_FUNNELED): use another build");
    }
    if (status != STATUS_OK) { /* the same on all ranks */
        mpi_close(c);
        return status;
    }
    c->crowded = host_is_crowded(job, c->local_size);
    check_on_bug(abort_on_bug);
    die_with_parent(c);
    return STATUS_OK;
}

/* ---- memory of the window path ---- */

/* A full /dev/shm shows itself as SIGBUS at first touch, so ask before. */
static enum status check_shm_room(size_t bytes) {
    struct statvfs fs;
    if (statvfs("/dev/shm", &fs) != 0 || access("/dev/shm", W_OK) != 0)
        return STATUS_OK; /* MPI: elsewhere */
    const unsigned long long room = (unsigned long long)fs.f_bavail * fs.f_frsize;
    if (room >= bytes) return STATUS_OK;
    return fail(
        STATUS_COMM,
        "the ranks need %.1f MB of shared memory, /dev/shm has %.1f MB free: make it larger "
        "(docker run --shm-size=1g) or use --comm mpi",
        1e-6 * (double)bytes, 1e-6 * (double)room);
}

/* An address of the same offset in every process, aligned to a page: mappings differ by whole
 * pages. */
static char *page_aligned(char *base) {
    return base + (PAGE_BYTES - (uintptr_t)base % PAGE_BYTES) % PAGE_BYTES;
}

static enum status allocate_window(comm *c, MPI_Win *window, char **base) {
    struct mpi_job *job = c->job_state;
    const size_t bytes = comm_window_bytes(&c->config, c->size);
    if (bytes == 0 || bytes > PTRDIFF_MAX - PAGE_BYTES) {
        return fail(STATUS_MEMORY,
                    "the communication window would be beyond memory: lower the batch limits");
    }
    TRY(comm_agree(c, c->rank == 0 ? check_shm_room(bytes) : STATUS_OK));
    /* rank 0 brings all of it: one block, laid out by comm_window.c */
    MPI_Comm_set_errhandler(job->host, MPI_ERRORS_RETURN);
    const MPI_Aint own = c->rank == 0 ? (MPI_Aint)(bytes + PAGE_BYTES) : 0;
    MPI_Aint size;
    int unit;
    if (MPI_Win_allocate_shared(own, 1, MPI_INFO_NULL, job->host, base, window) != MPI_SUCCESS ||
        MPI_Win_shared_query(*window, 0, &size, &unit, base) != MPI_SUCCESS) {
        return fail(
            STATUS_COMM,
            "a shared window of %.1f MB cannot be made: check the free space and permissions "
            "of /dev/shm, or use --comm mpi",
            1e-6 * (double)bytes);
    }
    *base = page_aligned(*base);
    return STATUS_OK;
}

static enum status setup_window(comm *c) {
    struct mpi_job *job = c->job_state;
    MPI_Win window = MPI_WIN_NULL;
    char *base = NULL;
    TRY(comm_agree(c, allocate_window(c, &window, &base)));
    job->window = window;
    MPI_Win_lock_all(MPI_MODE_NOCHECK, window); /* MPI's rule for plain loads and stores */
    enum status status = STATUS_OK;
    if (c->rank == 0) comm_window_clear(base, c->size);
    status = comm_window_attach(c, base);
    return comm_agree(c, status); /* also the barrier attach asks for */
}

/* ---- path "mpi" ---- */

static void messages_close(comm *c) {
    struct messages *m = c->path_state;
    if (!m) return;
    free(m->slot);
    free(m->partials);
    free(m->plan);
    free(m->records);
    free(m);
}

/* Zeroed and on a line border; at least one line, so that no size is special. */
static void *take_lines(size_t bytes, size_t times) {
    size_t all;
    if (__builtin_mul_overflow(bytes, times, &all) || all > PTRDIFF_MAX - COMM_LINE_BYTES)
        return NULL;
    all = (all + COMM_LINE_BYTES) / COMM_LINE_BYTES * COMM_LINE_BYTES;
    void *memory = aligned_alloc(COMM_LINE_BYTES, all);
    if (memory) memset(memory, 0, all);
    return memory;
}

static enum status open_messages(comm *c) {
    const struct comm_config *config = &c->config;
    const size_t int_max = INT_MAX, ranks = (size_t)c->size;
    if (config->slot_floats > int_max || config->bcast_bytes_max > int_max - FIRST_PIECE_BYTES ||
        config->gather_bytes_max > int_max) {
        return fail(STATUS_USAGE, "one message would exceed 2^31 elements: lower the batch limits");
    }
    struct messages *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for the state of the message path");
    c->path_state = m;
    c->path = &mpi_path;
    m->slot = take_lines(config->slot_floats, sizeof(float));
    m->partials = take_lines(config->slot_floats * sizeof(float), ranks);
    m->plan = take_lines(config->bcast_bytes_max + FIRST_PIECE_BYTES, 1);
    m->records = take_lines(c->rank == 0 ? config->gather_bytes_max : 0, ranks);
    if (m->slot && m->partials && m->plan && m->records) return STATUS_OK;
    return fail(STATUS_MEMORY,
                "no memory for messages between ranks (%.1f MB): lower the batch limits",
                4e-6 * (double)config->slot_floats * (double)(ranks + 1));
}

static enum status mpi_setup(comm *c) {
    if (c->size == 1) return comm_self_setup(c);
    if (c->config.kind == COMM_AUTO && c->local_size == c->size) return setup_window(c);
    return comm_agree(c, open_messages(c));
}

static float *mpi_slot(comm *c) {
    const struct messages *m = c->path_state;
    return m->slot;
}

static void mpi_all_reduce(comm *c, size_t count, float *sum) {
    const struct mpi_job *job = c->job_state;
    struct messages *m = c->path_state;
    MPI_Request request;
    MPI_Iallgather(m->slot, (int)count, MPI_FLOAT, m->partials, (int)count, MPI_FLOAT, job->world,
                   &request);
    complete(c, &request, LATE_STEP, "all-reduce", ++m->all_reduce_number);
    const float *slots[COMM_RANKS_MAX];
    for (int r = 0; r < c->size; r++) slots[r] = m->partials + (size_t)r * count;
    comm_tree_sum(slots, c->size, count, sum);
}

static size_t mpi_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    const struct mpi_job *job = c->job_state;
    struct messages *m = c->path_state;
    const enum lateness late = c->rank == 0 ? LATE_STEP : LATE_PLAN;
    uint64_t length = n;
    if (c->rank == 0) {
        memcpy(m->plan, &length, sizeof length);
        if (n > 0) memcpy(m->plan + sizeof length, mine, n);
    }
    MPI_Request request;
    MPI_Ibcast(m->plan, FIRST_PIECE_BYTES, MPI_BYTE, 0, job->world, &request);
    complete(c, &request, late, "plan", ++m->plan_number);
    memcpy(&length, m->plan, sizeof length);
    ASSERT_LE(length, c->config.bcast_bytes_max);
    const size_t whole = sizeof length + length;
    if (whole > FIRST_PIECE_BYTES) {
        MPI_Ibcast(m->plan + FIRST_PIECE_BYTES, (int)(whole - FIRST_PIECE_BYTES), MPI_BYTE, 0,
                   job->world, &request);
        complete(c, &request, LATE_STEP, "plan", m->plan_number);
    }
    if (bytes) *bytes = c->rank == 0 ? mine : m->plan + sizeof length;
    return length;
}

static const void *mpi_gather(comm *c, const void *mine, size_t n) {
    const struct mpi_job *job = c->job_state;
    struct messages *m = c->path_state;
    MPI_Request request;
    MPI_Igather(mine, (int)n, MPI_BYTE, m->records, (int)n, MPI_BYTE, 0, job->world, &request);
    complete(c, &request, LATE_STEP, "gather", ++m->gather_number);
    return c->rank == 0 ? m->records : NULL;
}

const struct comm_job comm_mpi_job = {
    .all_gather = mpi_all_gather,
    .share = mpi_share,
    .setup = mpi_setup,
    .close = mpi_close,
    .abort = mpi_abort,
};

static const struct comm_path mpi_path = {
    .name = "mpi",
    .close = messages_close,
    .slot = mpi_slot,
    .all_reduce = mpi_all_reduce,
    .bcast = mpi_bcast,
    .gather = mpi_gather,
};
