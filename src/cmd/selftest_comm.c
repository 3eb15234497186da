/* selftest_comm.c: the communication of the job: right, alike on all ranks, and how fast.
 *
 * Every rank makes every rank's numbers, so it knows the sum. The expected one follows the tree of
 * cpu.md §3.1 in code of its own; rank 1 brings an absent operand (-0.0f) in half of the cases. NCCL's
 * own sum (--comm nccl without --deterministic) has another order: R u sum |x| is allowed.
 *
 * A path that has several ways of summing (one-shot, two-shot) is checked and timed in each.
 * Latency: median of bursts, rank 0's clock; with a device until the sum is there. `bench comm` times
 * the host paths beside MPI's own calls.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cmd/selftest.h"

enum { FLOATS_MAX = 1 << 18, BYTES_MAX = 1 << 20, BURSTS = 7, CALLS_MAX = 1000 };
#define SLOW_SECONDS 2e-3 /* a call that takes so long is not measured again: emulation */

/* ---- all-reduce ---- */

static float operand(int rank, bool absent, int64_t i) {
    return absent && rank == 1 ? -0.0f : selftest_random(100 + (uint64_t)rank, i);
}

static float tree_of(float *x, int n) {
    while (n > 1) {
        for (int i = 0; i < n / 2; i++) {
            const volatile float sum = x[2 * i] + x[2 * i + 1];
            x[i] = sum;
        }
        if (n % 2) x[n / 2] = x[n - 1];
        n = (n + 1) / 2;
    }
    return x[0];
}

static uint64_t hash_of(const void *bytes, size_t n) {
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (const unsigned char *b = bytes; n > 0; n--, b++) h = (h ^ *b) * 0x100000001b3u;
    return h;
}

struct sums {
    backend *be;
    float *mine, *got; /* host */
    float *device;     /* where sums go */
    double worst;
    bool alike;
};

static void check_sum(struct selftest *t, struct sums *s, size_t count, bool absent,
                      bool any_order) {
    comm *c = t->h->comm;
    const int R = t->h->ranks;
    for (size_t i = 0; i < count; i++) s->mine[i] = operand(t->h->rank, absent, (int64_t)i);
    selftest_must(t, s->be->ops->write(s->be, comm_slot(c), s->mine, count * sizeof(float)));
    comm_all_reduce(c, count, s->device);
    s->be->ops->read(s->be, s->got, s->device, count * sizeof(float));
    for (size_t i = 0; i < count; i++) {
        float x[COMM_RANKS_MAX];
        double size = 0;
        for (int r = 0; r < R; r++) {
            x[r] = operand(r, absent, (int64_t)i);
            size += fabs((double)x[r]);
        }
        const double error =
            selftest_error(s->got[i], tree_of(x, R), any_order ? R * 0x1p-24 * size : 0);
        if (!(error <= s->worst)) s->worst = error;
    }
    const uint64_t hash = hash_of(s->got, count * sizeof(float));
    const uint64_t *all = comm_gather(c, &hash, sizeof hash);
    for (int r = 0; all && r < R; r++) s->alike &= all[r] == hash;
}

/* ---- broadcast and gather ---- */

static void fill_bytes(unsigned char *out, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        out[i] = (unsigned char)(seed >> 56);
    }
}

static void check_exchange(struct selftest *t) {
    static const size_t sizes[] = {1, 64, 4097, BYTES_MAX / 8};
    comm *c = t->h->comm;
    unsigned char *mine = selftest_memory(t, BYTES_MAX), *want = selftest_memory(t, BYTES_MAX);
    bool plans = true, records = true;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const size_t n = sizes[i];
        const void *got = NULL;
        fill_bytes(want, n, i);
        const size_t length =
            comm_bcast(c, t->h->rank == 0 ? want : NULL, t->h->rank == 0 ? n : 0, &got);
        plans &= length == n && memcmp(got, want, n) == 0;
        fill_bytes(mine, n, 1000 + (uint64_t)t->h->rank);
        const unsigned char *all = comm_gather(c, mine, n);
        for (int r = 0; all && r < t->h->ranks; r++) {
            fill_bytes(want, n, 1000 + (uint64_t)r);
            records &= memcmp(all + (size_t)r * n, want, n) == 0;
        }
    }
    backend *be = t->h->backend;
    const size_t ranks = (size_t)t->h->ranks, most = BYTES_MAX / COMM_RANKS_MAX;
    void *on_device = be->ops->alloc(be, BYTES_MAX + most, "bytes of the self-test");
    if (!on_device) selftest_must(t, STATUS_MEMORY);
    bool alike = true;
    for (size_t n = 1; n <= most; n = n * 5 + 3) {
        unsigned char *all = mine; /* [R][n] fits */
        fill_bytes(want, n, 2000 + (uint64_t)t->h->rank);
        selftest_must(t, be->ops->write(be, (char *)on_device + BYTES_MAX, want, n));
        comm_all_gather(c, (char *)on_device + BYTES_MAX, n, on_device);
        be->ops->read(be, all, on_device, ranks * n);
        for (size_t r = 0; r < ranks; r++) {
            fill_bytes(want, n, 2000 + r);
            alike &= memcmp(all + r * n, want, n) == 0;
        }
    }
    selftest_check_true(t, "all-gather", "records of 1 B to 16 KB reach every rank", alike);
    selftest_check_true(t, "broadcast", "plans of 1 B to 128 KB reach every rank", plans);
    selftest_check_true(t, "gather", "records of 1 B to 128 KB reach rank 0", records);
    free(mine), free(want);
}

/* ---- latency ---- */

static double burst(struct selftest *t, const struct sums *s, size_t bytes, bool sum, int calls) {
    comm *c = t->h->comm;
    float probe;
    comm_agree_min(c, 0); /* all here */
    const double start = progress_clock();
    for (int i = 0; i < calls; i++) {
        const void *plan;
        if (sum) {
            comm_all_reduce(c, bytes / sizeof(float), s->device);
        } else {
            comm_bcast(c, s->mine, t->h->rank == 0 ? bytes : 0, &plan);
            comm_gather(c, s->mine, 8);
        }
    }
    s->be->ops->read(s->be, &probe, s->device, sizeof probe); /* the device is done */
    return (progress_clock() - start) / calls;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double latency_us(struct selftest *t, const struct sums *s, size_t bytes, bool sum) {
    double us[BURSTS];
    const double first = burst(t, s, bytes, sum, 2) + 1e-9, wanted = 2e-3 / first;
    if (comm_agree_min(t->h->comm, first < SLOW_SECONDS) == 0) return 1e6 * first;
    const int calls = comm_agree_min(t->h->comm, wanted < 4           ? 4
                                                 : wanted > CALLS_MAX ? CALLS_MAX
                                                                      : (int)wanted);
    for (int i = 0; i < BURSTS; i++) us[i] = 1e6 * burst(t, s, bytes, sum, calls);
    qsort(us, BURSTS, sizeof *us, by_value);
    return us[BURSTS / 2];
}

static void note_latencies(struct selftest *t, const struct sums *s) {
    comm *c = t->h->comm;
    for (size_t bytes = 256; bytes <= BYTES_MAX; bytes *= 4) {
        char name[32], ways[160] = "";
        const double sum = latency_us(t, s, bytes, true), plan = latency_us(t, s, bytes, false);
        for (int way = 0; way < comm_way_count(c); way++) {
            const size_t n = strlen(ways);
            if (!comm_way_fits(c, way, bytes / sizeof(float))) continue;
            comm_use_way(c, way);
            snprintf(ways + n, sizeof ways - n, "   %s %9.2f us", comm_way_name(c, way),
                     latency_us(t, s, bytes, true));
            comm_use_way(c, COMM_WAY_BY_SIZE);
        }
        snprintf(name, sizeof name, "%zu bytes", bytes);
        selftest_note(t, name, "all-reduce %9.2f us   broadcast, 8 bytes back %9.2f us%s", sum,
                      plan, ways);
    }
}

/* ---- sum and norm in one ---- */

/* The bits of the two calls. */
static bool norm_agrees(struct selftest *t, const struct sums *s, int rows, bool first) {
    enum { D = 320 };
    comm *c = t->h->comm;
    const struct backend_ops *ops = s->be->ops;
    const size_t count = (size_t)rows * D, bytes = count * sizeof(float);
    const enum backend_dtype dtype = t->dtypes[t->dtype_count - 1];
    const size_t h_bytes = count * (dtype == BACKEND_BF16 ? 2 : 4);
    float *device[5];
    for (int i = 0; i < 5; i++) {
        device[i] = ops->alloc(s->be, bytes, "rows of the self-test");
        if (!device[i]) selftest_must(t, STATUS_MEMORY);
    }
    float *x = device[0], *weight = device[1], *h = device[2], *x2 = device[3], *h2 = device[4];
    struct comm_norm norm = {rows, D, first, 0.5f, x, weight, 1e-6f, dtype, h};
    selftest_fill(7, s->mine, D);
    selftest_must(t, ops->write(s->be, weight, s->mine, D * sizeof(float)));
    selftest_fill(8, s->mine, (int64_t)count);
    selftest_must(t, ops->write(s->be, x, s->mine, bytes));
    selftest_must(t, ops->write(s->be, x2, s->mine, bytes));
    for (size_t i = 0; i < count; i++) s->mine[i] = operand(t->h->rank, false, (int64_t)i);
    selftest_must(t, ops->write(s->be, comm_slot(c), s->mine, bytes));
    comm_all_reduce_norm(c, s->be, &norm, s->device);
    selftest_must(t, ops->write(s->be, comm_slot(c), s->mine, bytes));
    comm_all_reduce(c, count, s->device);
    ops->add_norm(s->be, rows, D, first, 0.5f, s->device, x2, weight, 1e-6f, dtype, h2);
    ops->read(s->be, s->mine, x, bytes);
    ops->read(s->be, s->got, x2, bytes);
    bool agrees = memcmp(s->mine, s->got, bytes) == 0;
    ops->read(s->be, s->mine, h, h_bytes);
    ops->read(s->be, s->got, h2, h_bytes);
    return agrees && memcmp(s->mine, s->got, h_bytes) == 0;
}

static void check_ways(struct selftest *t, struct sums *s, bool any_order) {
    static const size_t counts[] = {1, 7, 320, 5120, 65536};
    comm *c = t->h->comm;
    for (int way = 0; way < comm_way_count(c); way++) {
        char name[64];
        s->worst = 0;
        comm_use_way(c, way);
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
            if (comm_way_fits(c, way, counts[i])) check_sum(t, s, counts[i], i % 2, any_order);
        }
        comm_use_way(c, COMM_WAY_BY_SIZE);
        snprintf(name, sizeof name, "all-reduce, %s", comm_way_name(c, way));
        selftest_check(t, name, "1 to 65536 floats against the tree", s->worst);
    }
}

void selftest_collectives(struct selftest *t) {
    static const size_t counts[] = {1, 7, 320, 5120, 65536, FLOATS_MAX};
    backend *be = t->h->backend;
    struct sums s = {.be = be,
                     .mine = selftest_memory(t, BYTES_MAX),
                     .got = selftest_memory(t, BYTES_MAX),
                     .device = be->ops->alloc(be, BYTES_MAX, "sums of the self-test"),
                     .alike = true};
    if (!s.device) selftest_must(t, STATUS_MEMORY);
    const bool any_order =
        strncmp(comm_path_name(t->h->comm), "nccl", 4) == 0 && !t->h->params.deterministic;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        check_sum(t, &s, counts[i], false, any_order);
        check_sum(t, &s, counts[i], true, any_order);
    }
    selftest_check(t, "all-reduce", "1 to 262144 floats against the tree", s.worst);
    check_ways(t, &s, any_order);
    selftest_check_true(t, "all-reduce, over ranks", "the same bytes on every rank", s.alike);
    const bool norm = norm_agrees(t, &s, 1, true) & norm_agrees(t, &s, 40, false);
    selftest_check_true(t, "all-reduce and norm", "the bits of the sum, then the norm", norm);
    check_exchange(t);
    note_latencies(t, &s);
    free(s.mine), free(s.got);
}
