/* comm_mpi.c: joining the job by MPI, memory for the window path, and path "mpi" (messages).
 *
 * All ranks on one host: the window path, in memory of MPI_Win_allocate_shared. Otherwise, or with
 * --comm mpi, messages for everything: a job over several hosts does not use windows inside them
 * (that would save copies, not the slow hop).
 *
 * Messages are our own sends and receives, one to and from each peer, not MPI's collectives:
 *   - an all-reduce brings every fp32 partial to every rank, then the tree. Never MPI_Allreduce:
 *     the order of its sum is not promised;
 *   - a plan goes straight from rank 0 to each rank: a broadcast tree would pass through ranks
 *     that nap;
 *   - a wait can name the rank it waits for, and has a deadline;
 *   - nothing blocks inside Open MPI, whose blocking calls burn a core for as long as they wait.
 * Open MPI's MPI_Iallgather is the same linear exchange plus a schedule it allocates in each call.
 *
 * Thread: FUNNELED, the engine thread only. Memory: taken in setup; [R][slot] for the partials.
 */
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

#include "base/alloc_watch.h"
#include "base/log.h"
#include "comm/comm_path.h"
#include "comm/comm_tree.h"

enum { PAGE_BYTES = 4096, SHARE_BYTES = 1 << 30 };

struct mpi_job {
    MPI_Comm world; /* a copy: nobody else's messages */
    MPI_Comm host;  /* the ranks of this host */
    MPI_Win window; /* MPI_WIN_NULL on the other paths */
};

struct messages {
    float *slot;     /* [slot_floats] */
    float *partials; /* [R][count of the call], own place unused */
    char *plan;      /* [bcast_bytes_max] */
    char *records;   /* [R][gather_bytes_max], rank 0 only */
    uint64_t all_reduce_number, plan_number, gather_number;
};

/* Messages of one operation that are on their way. */
struct exchange {
    int count;
    MPI_Request requests[2 * COMM_RANKS_MAX];
    int peers[2 * COMM_RANKS_MAX];
};
enum { TAG_PARTIAL = 1, TAG_PLAN, TAG_RECORD };

static const struct comm_path mpi_path;

/* Sleeps longer and longer, up to a millisecond. */
static void nap(long *ns) {
    enum { FIRST_NS = 20 * 1000, LAST_NS = 1000 * 1000 };
    *ns = *ns == 0 ? FIRST_NS : 2 * *ns < LAST_NS ? 2 * *ns : LAST_NS;
    nanosleep(&(struct timespec){.tv_nsec = *ns}, NULL);
}

/* For waits that may last minutes (loading) or hours (no plan): soon sleeps, knows no deadline. */
static void complete_patiently(comm *c, MPI_Request *request, MPI_Status *state) {
    const bool counts = alloc_watch_thread(false);
    struct comm_patience p = {0};
    long nap_ns = 0;
    int done = 0;
    while (MPI_Test(request, &done, state), !done) {
        if (comm_pause(c, &p) > COMM_PARK_NS) nap(&nap_ns);
    }
    alloc_watch_thread(counts);
}

/* For waits inside a step. */
static void complete(comm *c, struct exchange *e, const char *operation, uint64_t number) {
    const bool counts = alloc_watch_thread(false);
    struct comm_patience p = {0};
    int done = 0;
    while (MPI_Testall(e->count, e->requests, &done, MPI_STATUSES_IGNORE), !done) {
        if (!comm_is_late(c, comm_pause(c, &p))) continue;
        for (int i = 0; i < e->count; i++) {
            MPI_Test(&e->requests[i], &done, MPI_STATUS_IGNORE);
            if (!done) comm_give_up(c, operation, number, e->peers[i]);
        }
    }
    comm_pause_end(c, &p);
    alloc_watch_thread(counts);
}

/* ---- joining ---- */

static void mpi_all_gather(comm *c, const void *mine, size_t n, void *all) {
    const struct mpi_job *job = c->job_state;
    MPI_Request request;
    MPI_Iallgather(mine, (int)n, MPI_BYTE, all, (int)n, MPI_BYTE, job->world, &request);
    complete_patiently(c, &request, MPI_STATUS_IGNORE);
}

static void mpi_share(comm *c, int root, void *bytes, size_t n) {
    const struct mpi_job *job = c->job_state;
    for (size_t at = 0; at < n; at += SHARE_BYTES) { /* MPI counts are ints */
        const size_t piece = n - at < SHARE_BYTES ? n - at : SHARE_BYTES;
        MPI_Request request;
        MPI_Ibcast((char *)bytes + at, (int)piece, MPI_BYTE, root, job->world, &request);
        complete_patiently(c, &request, MPI_STATUS_IGNORE);
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

/* Processors that the ranks of this host may use, counted over all of them, because a launcher may have
 * given each its own, or all the same two. 0: unknown. */
static int count_local_cores(const struct mpi_job *job, int local_size) {
    cpu_set_t mine, all[COMM_RANKS_MAX];
    if (sched_getaffinity(0, sizeof mine, &mine) != 0)
        CPU_ZERO(&mine); /* more than 1024 processors */
    MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all, sizeof mine, MPI_BYTE, job->host);
    for (int r = 0; r < local_size; r++) CPU_OR(&mine, &mine, &all[r]);
    return CPU_COUNT(&mine);
}

/* Collective: which ranks share a host (job->host is in the order of ranks), and its name. */
static void find_places(comm *c) {
    const struct mpi_job *job = c->job_state;
    int host = c->rank;
    MPI_Bcast(&host, 1, MPI_INT, 0, job->host);
    const struct comm_place here = comm_place_here(host);
    mpi_all_gather(c, &here, sizeof here, c->places);
}

/* Open MPI ends the ranks when one of them or mpirun dies. This also covers a launcher that was
 * killed before it could, and one that does not clean up. */
static void die_with_parent(comm *c) {
    c->parent = getppid();
    if (c->rank == 0) return; /* serves: it decides itself how to end */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    comm_watch_parent(c); /* it may have died just before */
}

/* How many processes the launcher says it started, 0 when it does not say. The launcher of another
 * MPI starts R jobs of one rank each: refused, or R servers would run without a word. */
static int launched_size(void) {
    const char *text = getenv("OMPI_COMM_WORLD_SIZE");
    if (!text) text = getenv("PMI_SIZE");
    return text ? atoi(text) : 0;
}

enum status comm_mpi_join(comm *c, int *argc, char ***argv) {
    struct mpi_job *job = calloc(1, sizeof *job);
    if (!job) return fail(STATUS_MEMORY, "no memory to join the job");
    int provided = 0;
    /* Open MPI would read large messages straight from the peer's memory, which containers forbid (an
     * error for every message). The user's own setting wins. */
    setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 0);
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
    } else if (c->size == 1 && launched_size() > 1) {
        status = fail(
            STATUS_COMM,
            "the launcher started %d processes, but MPI sees one: use the mpirun of the Open MPI "
            "this program was built with",
            launched_size());
    } else if (provided < MPI_THREAD_FUNNELED) {
        status = fail(STATUS_COMM,
                      "this MPI does not allow threads (MPI_THREAD_FUNNELED): use another build");
    }
    if (status != STATUS_OK) { /* the same on all ranks: rank 0 says it, as the launcher counts */
        mpi_close(c);
        if (c->rank > 0 || log_rank() > 0) exit(status);
        return status;
    }
    find_places(c);
    c->local_cores = count_local_cores(job, c->local_size);
    c->crowded = c->local_cores > 0 && c->local_size > c->local_cores;
    check_on_bug(abort_on_bug);
    die_with_parent(c);
    return STATUS_OK;
}

/* ---- memory of the window path ---- */

/* A full /dev/shm shows itself as SIGBUS at first touch, so ask before. */
static enum status check_shm_room(size_t bytes) {
    struct statvfs fs;
    if (access("/dev/shm", W_OK) != 0 || statvfs("/dev/shm", &fs) != 0) {
        return STATUS_OK; /* Open MPI then makes its file elsewhere */
    }
    const unsigned long long room = (unsigned long long)fs.f_bavail * fs.f_frsize;
    if (room >= bytes) return STATUS_OK;
    return fail(
        STATUS_COMM,
        "the ranks need %.1f MB of shared memory, /dev/shm has %.1f MB free: make it larger "
        "(docker run --shm-size=1g) or use --comm mpi",
        1e-6 * (double)bytes, 1e-6 * (double)room);
}

/* The same offset in every process, because mappings differ by whole pages. */
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
    if (c->rank == 0) comm_window_clear(base, c->size);
    return comm_agree(c, comm_window_attach(c, base)); /* also the barrier attach asks for */
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
    const size_t ranks = (size_t)c->size, bytes_max = INT_MAX; /* MPI counts are ints */
    if (config->slot_floats > bytes_max / sizeof(float) || config->bcast_bytes_max > bytes_max ||
        config->gather_bytes_max > bytes_max) {
        return fail(STATUS_USAGE, "one message would exceed 2 GB: lower the batch limits");
    }
    struct messages *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "no memory for the state of the message path");
    c->path_state = m;
    c->path = &mpi_path;
    m->slot = take_lines(config->slot_floats, sizeof(float));
    m->partials = take_lines(config->slot_floats * sizeof(float), ranks);
    m->plan = take_lines(config->bcast_bytes_max, 1);
    m->records = take_lines(c->rank == 0 ? config->gather_bytes_max : 0, ranks);
    if (m->slot && m->partials && m->plan && m->records) return STATUS_OK;
    return fail(STATUS_MEMORY,
                "no memory for messages between ranks (%.1f MB): lower the batch limits",
                4e-6 * (double)config->slot_floats * (double)(ranks + 1));
}

static enum status mpi_setup(comm *c) {
    if (c->size == 1) return comm_self_setup(c);
    if (c->config.kind != COMM_MPI && c->local_size == c->size) return setup_window(c);
    return comm_agree(c, open_messages(c));
}

static float *mpi_slot(comm *c) {
    const struct messages *m = c->path_state;
    return m->slot;
}

static void add_send(comm *c, struct exchange *e, const void *bytes, size_t n, int peer, int tag) {
    const struct mpi_job *job = c->job_state;
    const bool counts = alloc_watch_thread(false); /* MPI grows its lists of requests at times */
    e->peers[e->count] = peer;
    MPI_Isend(bytes, (int)n, MPI_BYTE, peer, tag, job->world, &e->requests[e->count++]);
    alloc_watch_thread(counts);
}
static void add_receive(comm *c, struct exchange *e, void *bytes, size_t n, int peer, int tag) {
    const struct mpi_job *job = c->job_state;
    const bool counts = alloc_watch_thread(false);
    e->peers[e->count] = peer;
    MPI_Irecv(bytes, (int)n, MPI_BYTE, peer, tag, job->world, &e->requests[e->count++]);
    alloc_watch_thread(counts);
}

/* `bytes` of every rank's slot; those of others come into partials, in rank order. */
static void exchange_slots(comm *c, size_t bytes, const char *operation, const void **slots) {
    struct messages *m = c->path_state;
    struct exchange e = {0};
    for (int r = 0; r < c->size; r++) {
        char *partial = (char *)m->partials + (size_t)r * bytes;
        slots[r] = r == c->rank ? (char *)m->slot : partial;
        if (r != c->rank) add_receive(c, &e, partial, bytes, r, TAG_PARTIAL);
    }
    for (int i = 1; i < c->size;
         i++) { /* each begins with its neighbour: no rank is everybody's first */
        add_send(c, &e, m->slot, bytes, (c->rank + i) % c->size, TAG_PARTIAL);
    }
    complete(c, &e, operation, ++m->all_reduce_number);
}

static void mpi_all_reduce(comm *c, size_t count, float *sum) {
    const void *slots[COMM_RANKS_MAX];
    exchange_slots(c, count * sizeof *sum, "all-reduce", slots);
    comm_tree_sum((const float *const *)slots, c->size, count, sum);
}

static void mpi_slots_gather(comm *c, size_t n, void *all, size_t stride) {
    const void *slots[COMM_RANKS_MAX];
    exchange_slots(c, n, "all-gather", slots);
    for (int r = 0; r < c->size; r++) memcpy((char *)all + (size_t)r * stride, slots[r], n);
}

static size_t mpi_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    const struct mpi_job *job = c->job_state;
    struct messages *m = c->path_state;
    m->plan_number++;
    if (c->rank == 0) {
        struct exchange e = {0};
        for (int r = 1; r < c->size; r++) add_send(c, &e, mine, n, r, TAG_PLAN);
        complete(c, &e, "plan", m->plan_number);
    } else {
        MPI_Request request;
        MPI_Status state;
        int length;
        const bool counts = alloc_watch_thread(false);
        MPI_Irecv(m->plan, (int)c->config.bcast_bytes_max, MPI_BYTE, 0, TAG_PLAN, job->world,
                  &request);
        alloc_watch_thread(counts);
        complete_patiently(c, &request, &state);
        MPI_Get_count(&state, MPI_BYTE, &length);
        n = (size_t)length;
        mine = m->plan;
    }
    if (bytes) *bytes = mine;
    return n;
}

static const void *mpi_gather(comm *c, const void *mine, size_t n) {
    struct messages *m = c->path_state;
    struct exchange e = {0};
    if (c->rank == 0) {
        if (n > 0) memcpy(m->records, mine, n);
        for (int r = 1; r < c->size; r++) {
            add_receive(c, &e, m->records + (size_t)r * n, n, r, TAG_RECORD);
        }
    } else {
        add_send(c, &e, mine, n, 0, TAG_RECORD);
    }
    complete(c, &e, "gather", ++m->gather_number);
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
    .all_gather = mpi_slots_gather,
    .bcast = mpi_bcast,
    .gather = mpi_gather,
};
