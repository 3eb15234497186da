/* comm_device.c: all-reduces of device memory without a GPU library: through the host path.
 *
 *   device slot ─ read ─► host slot ─ path->all_reduce ─► host sum ─ write ─► device sum
 *
 * Works on any machine, with any number of ranks on one GPU, and gives the host path's bits (the
 * slab tree). Costs two copies over PCIe and a wait for the device per sum, so it is for tests and
 * for machines without NCCL. One rank waits for nothing, and copies only where no norm follows.
 *
 * Knows the device only through verbs of its backend (alloc, read, write, copy, add_norm): no CUDA here.
 * Thread: engine. Memory: one slot on the device, one sum on the host, both taken in setup.
 */
#include <stdlib.h>

#include "backend/backend.h"
#include "comm/comm_path.h"

struct staged {
    float *slot; /* device, [slot_floats] */
    char *host;  /* a sum, or a piece of every rank; NULL with one rank */
    size_t host_bytes;
};

static float *staged_slot(comm *c) {
    const struct staged *s = c->sums_state;
    return s->slot;
}

static void put(comm *c, void *device, const void *host, size_t bytes) {
    backend *be = c->config.device;
    if (be->ops->write(be, device, host, bytes) != STATUS_OK)
        comm_abort(c, STATUS_COMM, fail_text());
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
    c->path->all_reduce(c, count, (float *)(void *)s->host);
    put(c, sum, s->host, bytes);
}

/* One rank: its slot is the sum. */
static bool staged_all_reduce_norm(comm *c, const struct comm_norm *norm) {
    const struct staged *s = c->sums_state;
    backend *be = c->config.device;
    if (c->size > 1) return false;
    be->ops->add_norm(be, norm->rows, norm->hidden, norm->first, norm->scale, s->slot, norm->x,
                      norm->weight, norm->eps, norm->dtype, norm->h);
    return true;
}

static void staged_all_gather(comm *c, const void *mine, size_t n, void *all) {
    const struct staged *s = c->sums_state;
    backend *be = c->config.device;
    const size_t ranks = (size_t)c->size, slot_bytes = c->config.slot_floats * sizeof(float);
    const size_t most = s->host_bytes / ranks < slot_bytes ? s->host_bytes / ranks : slot_bytes;
    if (ranks == 1) {
        be->ops->copy(be, all, mine, n);
        return;
    }
    for (size_t at = 0, piece; at < n; at += piece) {
        piece = n - at < most ? n - at : most;
        be->ops->read(be, c->path->slot(c), (const char *)mine + at, piece);
        c->path->all_gather(c, piece, s->host, piece);
        for (size_t r = 0; r < ranks; r++)
            put(c, (char *)all + r * n + at, s->host + r * piece, piece);
    }
}

static bool staged_capturable(const comm *c) { return c->size == 1; }

static void staged_close(comm *c) {
    struct staged *s = c->sums_state;
    free(s->host);
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
    s->host_bytes = bytes + (size_t)c->size * COMM_LINE_BYTES; /* some bytes a rank at least */
    s->host = malloc(s->host_bytes);
    return s->host ? STATUS_OK : fail(STATUS_MEMORY, "no memory for a sum of %zu bytes", bytes);
}

enum status comm_device_setup(comm *c) {
    struct staged *s = calloc(1, sizeof *s);
    const enum status mine = s ? take_memory(c, s) : fail(STATUS_MEMORY, "no memory for a slot");
    const enum status status = comm_agree(c, mine);
    if (status != STATUS_OK) {
        if (s) free(s->host);
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
    .all_reduce_norm = staged_all_reduce_norm,
    .all_gather = staged_all_gather,
    .capturable = staged_capturable,
    .close = staged_close,
};
