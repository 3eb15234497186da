/* comm_device.c: all-reduces of device memory without a GPU library: through the host path.
 *
 *   device slot ─ read ─► host slot ─ path->all_reduce ─► host sum ─ write ─► device sum
 *
 * Works on any machine, with any number of ranks on one GPU, and gives the host path's bits (the
 * slab tree). Costs two copies over PCIe and a wait for the device per sum, so it is for tests and
 * for machines without NCCL. One rank copies on the device and waits for nothing.
 *
 * Knows the device only through four verbs of its backend (alloc, read, write, copy): no CUDA here.
 * Thread: engine. Memory: one slot on the device, one sum on the host, both taken in setup.
 */
#include <stdlib.h>

#include "backend/backend.h"
#include "comm/comm_path.h"

struct staged {
    float *slot; /* device, [slot_floats] */
    float *sum;  /* host, [slot_floats]; NULL with one rank */
};

static float *staged_slot(comm *c) {
    const struct staged *s = c->sums_state;
    return s->slot;
}

static void staged_all_reduce(comm *c, size_t count, float *sum) {
    const struct staged *s = c->sums_state;
    backend *be = c->config.device;
    const size_t bytes = count * sizeof *sum;
    if (c->size == 1) {
        be->ops->copy(be, sum, s->slot, bytes);
        return;
    }
    be->ops->read(be, c->path->slot(c), s->slot, bytes);
    c->path->all_reduce(c, count, s->sum);
    if (be->ops->write(be, sum, s->sum, bytes) != STATUS_OK) {
        comm_abort(c, STATUS_COMM, fail_text());
    }
}

static void staged_close(comm *c) {
    struct staged *s = c->sums_state;
    free(s->sum);
    free(s);
    c->sums = NULL;
}

static const struct comm_sums staged_sums;

static enum status take_memory(comm *c, struct staged *s) {
    backend *be = c->config.device;
    const size_t bytes = c->config.slot_floats * sizeof(float);
    s->slot = be->ops->alloc(be, bytes, "communication slot");
    if (!s->slot) return STATUS_MEMORY;
    if (c->size == 1) return STATUS_OK;
    s->sum = malloc(bytes);
    return s->sum ? STATUS_OK : fail(STATUS_MEMORY, "no memory for a sum of %zu bytes", bytes);
}

enum status comm_device_setup(comm *c) {
    struct staged *s = calloc(1, sizeof *s);
    const enum status mine = s ? take_memory(c, s) : fail(STATUS_MEMORY, "no memory for a slot");
    const enum status status = comm_agree(c, mine);
    if (status != STATUS_OK) {
        if (s) free(s->sum);
        free(s);
        return status;
    }
    c->sums_state = s;
    c->sums = &staged_sums;
    return STATUS_OK;
}

static const struct comm_sums staged_sums = {
    .name = "staged",
    .slot = staged_slot,
    .all_reduce = staged_all_reduce,
    .close = staged_close,
};
