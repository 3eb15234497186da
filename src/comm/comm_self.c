/* comm_self.c: one rank. Sums are copies, the plan is the caller's own bytes, nothing waits.
 *
 * Used without a launcher (then MPI is never initialised: 0.3 s saved and no Open MPI threads in
 * the process) and by comm_mpi.c when the job has one rank. Memory: one slot.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm_path.h"

static void self_all_gather(comm *c, const void *mine, size_t n, void *all) {
    (void)c;
    memcpy(all, mine, n);
}

static void self_share(comm *c, int root, void *bytes, size_t n) {
    ASSERT_EQ(root, c->rank);
    (void)bytes;
    (void)n;
}

static void self_job_close(comm *c) { (void)c; }

static void self_abort(comm *c, int exit_code) {
    (void)c;
    _exit(exit_code);
}

enum status comm_self_setup(comm *c) {
    const size_t line = COMM_LINE_BYTES / sizeof(float);
    const size_t floats = (c->config.slot_floats + line) / line * line; /* at least one line */
    if (floats > SIZE_MAX / sizeof(float) / 2) {
        return fail(STATUS_MEMORY, "a communication slot of %zu floats is beyond memory", floats);
    }
    c->path_state = aligned_alloc(COMM_LINE_BYTES, floats * sizeof(float));
    if (!c->path_state) {
        return fail(STATUS_MEMORY,
                    "no memory for a communication slot of %zu bytes: lower the batch limits",
                    floats * sizeof(float));
    }
    memset(c->path_state, 0, floats * sizeof(float));
    c->path = &comm_self_path;
    return STATUS_OK;
}

static void self_close(comm *c) { free(c->path_state); }
static float *self_slot(comm *c) { return c->path_state; }

static void self_all_reduce(comm *c, size_t count, float *sum) {
    memcpy(sum, c->path_state, count * sizeof *sum);
}

static void self_path_all_gather(comm *c, size_t n, void *all, size_t stride) {
    (void)stride;
    memcpy(all, c->path_state, n);
}

static size_t self_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    (void)c;
    if (bytes) *bytes = mine;
    return n;
}

static const void *self_gather(comm *c, const void *mine, size_t n) {
    (void)c;
    (void)n;
    return mine;
}

const struct comm_job comm_self_job = {
    .all_gather = self_all_gather,
    .share = self_share,
    .setup = comm_self_setup,
    .close = self_job_close,
    .abort = self_abort,
};

const struct comm_path comm_self_path = {
    .name = "self",
    .close = self_close,
    .slot = self_slot,
    .all_reduce = self_all_reduce,
    .all_gather = self_path_all_gather,
    .bcast = self_bcast,
    .gather = self_gather,
};
