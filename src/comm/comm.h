/* comm.h: everything ranks say to one another. mpi.h is included in this folder only.
 *
 *   open ─► agree … ─► setup ─► { bcast ─► n × all_reduce ─► gather }* ─► close
 *
 * Sums are in the fixed slab tree over ranks: adjacent pairs, an odd one out moves up unchanged. An
 * absent operand is a slot full of -0.0f, the identity of IEEE addition (x + -0 = x for every x, -0
 * too), so a sum needs no flags. Window and message paths give equal bits.
 *
 * Thread: the engine thread only. Memory: all in comm_setup; nothing is allocated in a step.
 *
 * Waits: spin ~50 us, then yield; ranks > cores: yield at once. Who waits for a plan soon sleeps,
 * on a futex in the shared window (~0 % of a core) or between polls of MPI, one a millisecond (~2 %).
 */
#ifndef SFUMATO_COMM_COMM_H
#define SFUMATO_COMM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "base/check.h"

typedef struct comm comm;

enum { COMM_RANKS_MAX = 64 /* of a job */, COMM_EQUAL_BYTES_MAX = 1024 };
enum comm_kind { COMM_AUTO, COMM_MPI, COMM_NCCL, COMM_FUSED };

struct comm_config {
    enum comm_kind kind;     /* COMM_MPI forces messages also within a host */
    size_t slot_floats;      /* largest all-reduce, in floats: rows_max * D */
    size_t bcast_bytes_max;  /* largest plan */
    size_t gather_bytes_max; /* largest contribution of one rank to a gather */
    double timeout_seconds;  /* a longer wait in a step aborts the job with code 6; 0 = never */
    /* Slots and sums are memory of this device, and an all-reduce is in order with its verbs. NULL:
     * host memory. The backend must outlive the comm. */
    backend *device;
    bool tree_sums; /* NCCL: sums in tree order (--deterministic); the other paths have no other */
    /* Every sum and gather then takes so much longer. For a bench of one rank that has the share of
     * one of many: what their collectives would cost. */
    double stand_in_us;
};

/* Joins the job: MPI_Init_thread when started by mpirun (or a compatible launcher), else one rank
 * without MPI. Sets log_set_rank and check_on_bug. May rewrite argc/argv as MPI_Init does. */
enum status comm_open(int *argc, char ***argv, comm **out);
/* A job of this process alone, beside the real one: what a whole model is run on to compare. */
enum status comm_open_alone(comm **out);
void comm_close(comm *c); /* MPI_Finalize; collective */

int comm_rank(const comm *c);
int comm_size(const comm *c);
int comm_local_rank(const comm *c); /* among the ranks of this host */
int comm_local_size(const comm *c);
/* Processors that the ranks of this host may use together; 0: unknown. */
int comm_local_cores(const comm *c);
/* Of any rank: the lowest rank of its host, and that host's name. */
int comm_host_of(const comm *c, int rank);
const char *comm_host_name(const comm *c, int rank);
/* "self", "window", "mpi"; with a device also how sums travel, as "nccl, window". For the log. */
const char *comm_path_name(const comm *c);

/* Collective. Every rank brings its status; all leave with STATUS_OK only if all brought it. Else
 * all leave with the status and the text (fail_text, prefixed "rank N: " when N > 0) of the lowest
 * failing rank, so that rank 0 prints it once. Works before comm_setup. */
enum status comm_agree(comm *c, enum status mine);
/* Collective: all ranks must bring equal bytes (a digest of configuration, numeric class, build),
 * else STATUS_COMM naming `what` and the first rank that differs, with both values printed as hex.
 * n <= COMM_EQUAL_BYTES_MAX. */
enum status comm_agree_equal(comm *c, const char *what, const void *bytes, size_t n);
/* Collective minimum, for choices all ranks must share (the lowest numeric class). */
int comm_agree_min(comm *c, int value);
/* Rank 0's bytes to all, any size, before comm_setup (configuration, tokenizer facts). */
void comm_share(comm *c, void *bytes, size_t n);

/* Device memory that comm_setup takes with these sizes (gather_bytes_max does not matter), by the way
 * that needs most where it is free to choose; NCCL's own is an estimate. */
int64_t comm_device_bytes(const comm *c, const struct comm_config *config);
/* Collective; takes all memory. STATUS_MEMORY or STATUS_COMM with the fix (/dev/shm, binding). */
enum status comm_setup(comm *c, const struct comm_config *config);

/* Where this rank writes its fp32 partial for the next all-reduce (valid until that call). */
float *comm_slot(comm *c);
/* sum[count] = tree sum over ranks of their slots. sum may be any buffer but a slot. With one rank,
 * a copy. */
void comm_all_reduce(comm *c, size_t count, float *sum);

/* What follows a sum in the forward pass; all as add_norm of backend.h. */
struct comm_norm {
    int rows, hidden; /* T, D */
    bool first;
    float scale;
    float *x;            /* [T,D] */
    const float *weight; /* [D] */
    float eps;
    enum backend_dtype dtype;
    void *h; /* [T,D] */
};
/* s = tree sum over ranks of their slots [T,D]; x = first ? scale * s : x + s; h = rmsnorm(x) *
 * weight. One kernel where the path has it, else the two calls. sum: [T,D], scratch afterwards. */
void comm_all_reduce_norm(comm *c, backend *be, const struct comm_norm *norm, float *sum);

/* all[R][n] = every rank's n bytes (equal n), for all ranks; with a device both are its memory and
 * the exchange is in order with its verbs. Not between filling the slot and its sum. */
void comm_all_gather(comm *c, const void *mine, size_t n, void *all);

/* Ways in which this path can make a sum, for measuring: their number (0: only one) and names. A path
 * that has several chooses by size; comm_use_way makes it take one where it can. */
enum { COMM_WAY_BY_SIZE = -1 };
int comm_way_count(const comm *c);
const char *comm_way_name(const comm *c, int way);
bool comm_way_fits(const comm *c, int way, size_t count);
void comm_use_way(comm *c, int way);

/* May sums and gathers of device memory be captured into a graph? Not where they pass the host. */
bool comm_capturable(const comm *c);

/* Rank 0: sends n bytes. Others: wait (sleeping if long, without a deadline) and return the length;
 * *bytes is borrowed until the next comm_bcast (on rank 0 it is `mine`). */
size_t comm_bcast(comm *c, const void *mine, size_t n, const void **bytes);
/* Every rank brings n bytes (equal n); rank 0 gets [R][n] back to back, borrowed until the next
 * gather; others get NULL. With one rank the result is `mine` itself. */
const void *comm_gather(comm *c, const void *mine, size_t n);

/* Time spent since comm_setup, for bench: waiting for slower ranks (all-reduce, gather; not for a
 * plan) and moving/summing bytes (all-reduce). */
struct comm_times {
    double wait_seconds, move_seconds;
    uint64_t all_reduce_count;
};
void comm_times_get(const comm *c, struct comm_times *out);

/* Called on this rank by comm_abort, before the job is ended: the last chance to tell clients. It
 * must return within a second. One per comm. */
void comm_on_abort(comm *c, void (*hook)(void *user, int exit_code, const char *text), void *user);
/* Ends every rank with this exit code; the text is printed once, here. */
_Noreturn void comm_abort(comm *c, int exit_code, const char *text);
/* Before this process leaves a failed job over several hosts: sees to it that its launcher (a process
 * id) goes too, which otherwise waits for a host that no longer answers. Any thread. */
void comm_guard(int launcher);

#endif
