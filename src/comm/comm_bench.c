/* comm_bench.c: all-reduce, broadcast and gather from 256 B to 1 MB, own path and MPI's in turn.
 *
 * One figure is the median over ROUNDS of (time of a burst / calls in it), own and MPI bursts
 * alternating, so that whatever else the machine does hits both. Rank 0's clock counts. A root that
 * may run ahead would time only its own copying, so a broadcast is timed with an 8-byte gather
 * behind it and a gather with an 8-byte broadcast before it, for both sides alike: together one
 * step of the engine's protocol.
 *
 * The only place that calls MPI's collectives on data of a step. Memory: malloc, freed here.
 */
#include "comm/comm_bench.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_path.h"

enum { BYTES_MIN = 256, BYTES_MAX = 1 << 20, ROUNDS = 15, CALLS_MAX = 2000, ACK_BYTES = 8 };
static const double BURST_SECONDS = 0.004;

enum operation { ALL_REDUCE, BROADCAST, GATHER, OPERATIONS };
static const char *const operation_names[OPERATIONS] = {"all-reduce", "broadcast", "gather"};

struct buffers {
    char *mine, *all; /* [BYTES_MAX], [R][BYTES_MAX] */
};

struct figure {
    double own_us, mpi_us,
        wait_us; /* wait_us: the part of own_us spent waiting for others, all-reduce only */
};

static void own_call(comm *c, const struct buffers *b, enum operation operation, size_t n) {
    const void *plan;
    switch (operation) {
        case ALL_REDUCE:
            comm_all_reduce(c, n / sizeof(float), (float *)b->all);
            break;
        case BROADCAST:
            comm_bcast(c, b->mine, comm_rank(c) == 0 ? n : 0, &plan);
            comm_gather(c, b->mine, ACK_BYTES);
            break;
        default:
            comm_bcast(c, b->mine, comm_rank(c) == 0 ? ACK_BYTES : 0, &plan);
            comm_gather(c, b->mine, n);
    }
}

static void mpi_call(const struct buffers *b, enum operation operation, size_t n) {
    const int count = (int)n;
    switch (operation) {
        case ALL_REDUCE:
            MPI_Allreduce(b->mine, b->all, count / (int)sizeof(float), MPI_FLOAT, MPI_SUM,
                          MPI_COMM_WORLD);
            break;
        case BROADCAST:
            MPI_Bcast(b->mine, count, MPI_BYTE, 0, MPI_COMM_WORLD);
            MPI_Gather(b->mine, ACK_BYTES, MPI_BYTE, b->all, ACK_BYTES, MPI_BYTE, 0,
                       MPI_COMM_WORLD);
            break;
        default:
            MPI_Bcast(b->mine, ACK_BYTES, MPI_BYTE, 0, MPI_COMM_WORLD);
            MPI_Gather(b->mine, count, MPI_BYTE, b->all, count, MPI_BYTE, 0, MPI_COMM_WORLD);
    }
}

/* Seconds a call takes, over `calls` of them. */
static double burst(comm *c, const struct buffers *b, enum operation operation, size_t n, bool own,
                    int calls) {
    comm_agree_min(c, 0); /* all here */
    const uint64_t begin_ns = comm_clock_ns();
    for (int i = 0; i < calls; i++) {
        if (own) {
            own_call(c, b, operation, n);
        } else {
            mpi_call(b, operation, n);
        }
    }
    return 1e-9 * (double)(comm_clock_ns() - begin_ns) / calls;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double v[ROUNDS]) {
    qsort(v, ROUNDS, sizeof *v, by_value);
    return v[ROUNDS / 2];
}

/* Calls that fill a burst, the same on every rank. */
static int burst_calls(comm *c, double seconds) {
    const double calls = BURST_SECONDS / (seconds + 1e-9);
    return comm_agree_min(c, calls < 4 ? 4 : calls > CALLS_MAX ? CALLS_MAX : (int)calls);
}

static struct figure measure(comm *c, const struct buffers *b, enum operation operation, size_t n) {
    double own[ROUNDS], mpi[ROUNDS], wait[ROUNDS];
    const int own_calls = burst_calls(c, burst(c, b, operation, n, true, 8));
    const int mpi_calls = burst_calls(c, burst(c, b, operation, n, false, 8));
    for (int i = 0; i < ROUNDS; i++) {
        struct comm_times before, after;
        comm_times_get(c, &before);
        own[i] = burst(c, b, operation, n, true, own_calls);
        comm_times_get(c, &after);
        wait[i] = (after.wait_seconds - before.wait_seconds) / own_calls;
        mpi[i] = burst(c, b, operation, n, false, mpi_calls);
    }
    return (struct figure){1e6 * median(own), 1e6 * median(mpi), 1e6 * median(wait)};
}

static void print_row(enum operation operation, size_t n, const struct figure *f, bool json,
                      bool first) {
    const double ratio = f->own_us / f->mpi_us, gb_s = 1e-3 * (double)n / f->own_us;
    if (json) {
        printf(
            "%s{\"operation\":\"%s\",\"bytes\":%zu,\"own_us\":%.3f,\"mpi_us\":%.3f,\"ratio\":%.3f,"
            "\"gb_per_s\":%.3f",
            first ? "" : ",", operation_names[operation], n, f->own_us, f->mpi_us, ratio, gb_s);
        if (operation == ALL_REDUCE) printf(",\"wait_us\":%.3f", f->wait_us);
        printf("}");
    } else {
        printf("%-10s %8zu %10.2f %10.2f %8.2f %8.2f", operation_names[operation], n, f->own_us,
               f->mpi_us, ratio, gb_s);
        if (operation == ALL_REDUCE) printf(" %10.2f", f->wait_us);
        printf("\n");
        fflush(stdout);
    }
}

static void print_head(const comm *c, bool json) {
    if (json) {
        printf("{\"ranks\":%d,\"path\":\"%s\",\"crowded\":%s,\"rows\":[", c->size,
               comm_path_name(c), c->crowded ? "true" : "false");
        return;
    }
    printf(
        "%d ranks, path %s%s; medians of %d bursts, own and MPI in turn; GB/s = bytes / own time\n"
        "broadcast is timed with an 8-byte gather behind it, gather with an 8-byte broadcast "
        "before it\n"
        "%-10s %8s %10s %10s %8s %8s %10s\n",
        c->size, comm_path_name(c), c->crowded ? ", more ranks than cores" : "", ROUNDS,
        "operation", "bytes", "own us", "MPI us", "own/MPI", "GB/s", "waiting us");
}

static size_t bytes_limit(const comm *c, enum operation operation) {
    switch (operation) {
        case ALL_REDUCE:
            return c->config.slot_floats * sizeof(float);
        case BROADCAST:
            return c->config.bcast_bytes_max;
        default:
            return c->config.gather_bytes_max;
    }
}

enum status comm_bench(comm *c, bool json) {
    if (c->size < 2) {
        return fail(STATUS_USAGE,
                    "bench comm needs at least two ranks: mpirun -n 2 sfumato bench comm");
    }
    if (!c->path) {
        const struct comm_config config = {.kind = COMM_AUTO,
                                           .slot_floats = BYTES_MAX / sizeof(float),
                                           .bcast_bytes_max = BYTES_MAX,
                                           .gather_bytes_max = BYTES_MAX};
        TRY(comm_setup(c, &config));
    }
    const size_t ranks = (size_t)c->size;
    struct buffers b = {calloc(1, BYTES_MAX), calloc(ranks, BYTES_MAX)};
    enum status status = STATUS_OK;
    if (!b.mine || !b.all) status = fail(STATUS_MEMORY, "no memory for the buffers of bench comm");
    TRY_GOTO(comm_agree(c, status), out);

    if (c->rank == 0) print_head(c, json);
    bool first = true;
    for (enum operation operation = 0; operation < OPERATIONS; operation++) {
        for (size_t n = BYTES_MIN; n <= BYTES_MAX && n <= bytes_limit(c, operation); n *= 2) {
            const struct figure f = measure(c, &b, operation, n);
            if (c->rank == 0) print_row(operation, n, &f, json, first);
            first = false;
        }
    }
    if (c->rank == 0 && json) printf("]}\n");
out:
    free(b.mine);
    free(b.all);
    return status;
}
