/* comm_path.h: what the files of comm/ share; nobody outside includes it but its tests, which run
 * the window path over threads and change the path of an open job.
 *
 *   comm.c         the public calls, agreement, times, abort
 *   comm_self.c    path "self": one rank
 *   comm_window.c  path "window": shared memory, no MPI in it
 *   comm_mpi.c     joining the job, the window's memory, path "mpi": messages
 *   comm_device.c  sums of device memory by way of the host path ("staged")
 *   comm_nccl.c    the same by NCCL; only in programs built with CUDA, as the next two
 *   comm_fused.c   the same by own kernels over the peers' memory
 *   comm_gpu.c     which GPU each rank has
 *   comm_tree.c    the sum itself
 *   comm_wait.c    how to wait: pause, yield, give up
 *   comm_guard.c   a launcher that does not end
 *   comm_bench.c   `bench comm`
 *
 * A path is a const table, the instance last in its file. Start-up calls (all_gather, share) belong
 * to how the job was joined and work before comm_setup; the step calls belong to the path chosen
 * there.
 */
#ifndef SFUMATO_COMM_COMM_PATH_H
#define SFUMATO_COMM_COMM_PATH_H

#include <sys/types.h>

#include "comm/comm.h"

enum { COMM_LINE_BYTES = 64 };

/* How the job was joined. All wait without a deadline: loading takes as long as it takes. */
struct comm_job {
    /* all[R][n] = everyone's n bytes, in rank order. */
    void (*all_gather)(comm *c, const void *mine, size_t n, void *all);
    /* The root's n bytes to all. */
    void (*share)(comm *c, int root, void *bytes, size_t n);
    /* Collective: chooses c->path and takes its memory. The same status on all ranks. */
    enum status (*setup)(comm *c);
    void (*close)(comm *c);
    void (*abort)(comm *c, int exit_code); /* does not return */
};

struct comm_path {
    const char *name;
    void (*close)(comm *c);
    float *(*slot)(comm *c);
    void (*all_reduce)(comm *c, size_t count, float *sum);
    /* n bytes of every rank's slot, `stride` bytes apart; n <= the slot, which is used up as by a
     * sum. */
    void (*all_gather)(comm *c, size_t n, void *all, size_t stride);
    size_t (*bcast)(comm *c, const void *mine, size_t n, const void **bytes);
    const void *(*gather)(comm *c, const void *mine, size_t n);
    /* True for the first rank that asks: it alone says why the job ends. NULL: cannot know. */
    bool (*abort_claim)(comm *c);
};

/* How device memory is summed; the rest of the protocol stays with the host path. */
struct comm_sums {
    const char *name;
    float *(*slot)(comm *c);
    void (*all_reduce)(comm *c, size_t count, float *sum);
    void (*all_gather)(comm *c, const void *mine, size_t n, void *all);
    bool (*capturable)(const comm *c);
    /* NULL: all_reduce and add_norm. False: not with this dtype or so many ranks, nothing was done. */
    bool (*all_reduce_norm)(comm *c, const struct comm_norm *norm);
    int way_count; /* 0: only one */
    const char *const *way_names;
    bool (*way_fits)(const comm *c, int way, size_t count);
    void (*use_way)(comm *c, int way);
    /* NULL: cannot fail unnoticed. watch: backend.h; it and check, which is called before ranks speak,
     * end the job when the device cannot go on. abort: the job ends, whoever still waits on the device
     * shall leave. */
    void (*watch)(void *user, double waited_seconds);
    void (*check)(comm *c);
    void (*abort)(comm *c);
    void (*close)(comm *c);
};

struct comm_place {
    int host; /* the lowest rank there */
    char name[64];
};

struct comm {
    const struct comm_job *job;
    const struct comm_path *path;              /* NULL before comm_setup */
    const struct comm_sums *sums;              /* NULL: the path's own, of host memory */
    void *job_state, *path_state, *sums_state; /* each known to the file that made it */
    char sums_path_name[48];                   /* "staged, window" */
    int rank, size, local_rank, local_size;
    struct comm_place places[COMM_RANKS_MAX]; /* of every rank */
    int local_cores;                          /* comm_local_cores */
    bool crowded; /* more ranks than allowed cores on this host: yield at once */
    pid_t parent; /* the launcher's process here; 0: do not watch it */
    struct comm_config config;
    struct comm_times times;
    void (*abort_hook)(void *user, int exit_code, const char *text);
    void *abort_user;
};

extern const struct comm_job comm_self_job, comm_mpi_job;
extern const struct comm_path comm_self_path, comm_window_path;

/* comm_self.c: memory of the one-rank path; sets c->path. */
enum status comm_self_setup(comm *c);

/* comm_device.c, comm_nccl.c: take their memory and set c->sums, after the path is there. Collective;
 * the same status on all ranks. */
enum status comm_device_setup(comm *c);
enum status comm_nccl_setup(comm *c);
enum status comm_fused_setup(comm *c); /* tries itself before it says OK */

/* Device memory the two take. */
int64_t comm_nccl_bytes(const comm *c, const struct comm_config *config);
int64_t comm_fused_bytes(const comm *c, const struct comm_config *config);

/* comm_gpu.c, collective. sharing: the largest number of ranks on one GPU; two of them when > 1.
 * reach: each rank's own status; OK when it may read and write the GPU memory of all others. */
int comm_gpu_sharing(comm *c, int *first, int *second);
enum status comm_gpu_reach(comm *c);

/* Where this process runs. */
struct comm_place comm_place_here(int host);
/* comm_mpi.c: MPI_Init, ranks, hosts, cores. */
enum status comm_mpi_join(comm *c, int *argc, char ***argv);

/* comm_window.c: bytes the window of this configuration needs, 0 when they cannot be counted. The
 * memory is shared and aligned to a page; one rank clears its flags, every rank attaches (which
 * sets c->path), and when all have done so the path may be used. */
size_t comm_window_bytes(const struct comm_config *config, int size);
void comm_window_clear(void *base, int size);
enum status comm_window_attach(comm *c, void *base);

/* One wait. Zero it, then call comm_pause until what is waited for has come; comm_pause_end adds
 * the time. comm_pause spins (pause instruction) for ~50 us, then yields; crowded: yields at once.
 * Returns the time waited so far in ns, 0 while it is too short to be looked at. Ends the process
 * when the launcher is gone. */
struct comm_patience {
    uint64_t begin_ns, now_ns, watched_ns;
    unsigned rounds;
};
uint64_t comm_pause(comm *c, struct comm_patience *p);
void comm_pause_end(comm *c, const struct comm_patience *p);
uint64_t comm_clock_ns(void);
/* Ends the process (code 5) when the launcher that started it no longer exists. */
void comm_watch_parent(comm *c);
/* After this long a rank that waits for a plan sleeps. */
enum { COMM_PARK_NS = 1000 * 1000 };
/* The deadline of waits inside a step: when late, say which rank has not come to operation `number`
 * and abort with code 6. */
bool comm_is_late(const comm *c, uint64_t waited_ns);
_Noreturn void comm_give_up(comm *c, const char *operation, uint64_t number, int missing);

#endif
