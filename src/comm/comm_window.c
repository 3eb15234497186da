/* comm_window.c: the ranks of one host exchange through shared memory; no MPI here (tests run it
 * over threads).
 *
 *   head      plan number (futex word), sleepers, plan lengths        rank 0 writes
 *   flags     R x { summed, reduced, plan, gather }, a line each      the owner writes, all read
 *   slots     R x 2 x slot                                            the owner writes, all read
 *   plans     2 x bcast_bytes_max                                     rank 0 writes
 *   records   2 x [R][gather_bytes_max]                               all write, rank 0 reads
 *
 * All-reduce number i uses slot i%2: write the partial, publish i (store-release), wait until all
 * have published i (load-acquire), sum all slots in the tree. One wait suffices: who writes slot
 * i%2 again, for i+2, has seen everybody publish i+1, which everybody does after reading i. There
 * is no exit barrier.
 *
 * R >= 4 and more than 64 KB: reading R slots in every rank moves R^2 bytes, so each rank sums only
 * its columns, into its own slot (no other rank reads those columns before `reduced` says so), then
 * all copy the columns of the others. The tree per element is the same, hence the bits.
 *
 * Plans and records alternate between two buffers for the same reason; the reader's flag `plan`
 * (rank 0's flag `gather`) says that it has let go of the one before. Who waits long for a plan
 * sleeps on the plan number, a futex that is not private to its process.
 *
 * Counts and lengths travel beside the flags: ranks that disagree are a bug, not a wrong sum.
 */
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "comm/comm_path.h"
#include "comm/comm_tree.h"

enum { PAGE_BYTES = 4096, SCATTER_RANKS = 4, SCATTER_BYTES = 64 * 1024, PARK_SECONDS = 1 };

/* One flag, one line: a line that is polled must not hold anything another rank writes. size[i%2]
 * is what the owner brought to operation i; it outlives the operation as a slot does. */
struct flag {
    _Alignas(COMM_LINE_BYTES) _Atomic uint64_t number;
    uint64_t size[2];
};
struct rank_flags {
    struct flag summed, reduced, plan, gather;
};
struct head {
    _Alignas(COMM_LINE_BYTES) _Atomic uint32_t plan_number;
    _Atomic uint32_t sleepers, aborting;
    uint64_t plan_bytes[2];
};

struct layout {
    size_t flags, slots, slot_bytes, plans, plan_bytes, records, record_bytes, total;
};

struct window {
    struct layout layout;
    char *base;
    struct head *head;
    struct rank_flags *flags;
    uint64_t all_reduce_number, plan_number, gather_number; /* of the next one, from 1 */
};

/* Rounds up and adds; false on overflow. */
static bool extend(size_t *at, size_t bytes, size_t times) {
    size_t all;
    return !__builtin_mul_overflow(bytes, times, &all) && !__builtin_add_overflow(*at, all, at);
}
static bool round_up(size_t *bytes, size_t unit) {
    if (__builtin_add_overflow(*bytes, unit - 1, bytes)) return false;
    *bytes -= *bytes % unit;
    return true;
}

static bool layout_init(struct layout *l, const struct comm_config *config, int size) {
    const size_t ranks = (size_t)size;
    size_t at = sizeof(struct head);
    l->flags = at;
    if (!extend(&at, sizeof(struct rank_flags), ranks) || !round_up(&at, PAGE_BYTES)) return false;
    l->slots = at;
    /* whole pages, so that each rank's slots lie in the memory of its own core */
    if (__builtin_mul_overflow(config->slot_floats, sizeof(float), &l->slot_bytes)) return false;
    if (!round_up(&l->slot_bytes, PAGE_BYTES) || !extend(&at, l->slot_bytes, 2 * ranks))
        return false;
    l->plans = at;
    l->plan_bytes = config->bcast_bytes_max;
    if (!round_up(&l->plan_bytes, PAGE_BYTES) || !extend(&at, l->plan_bytes, 2)) return false;
    l->records = at;
    if (__builtin_mul_overflow(config->gather_bytes_max, ranks, &l->record_bytes)) return false;
    if (!round_up(&l->record_bytes, PAGE_BYTES) || !extend(&at, l->record_bytes, 2)) return false;
    l->total = at;
    return true;
}

size_t comm_window_bytes(const struct comm_config *config, int size) {
    struct layout l;
    return layout_init(&l, config, size) ? l.total : 0;
}

void comm_window_clear(void *base, int size) {
    memset(base, 0, sizeof(struct head) + (size_t)size * sizeof(struct rank_flags));
}

static float *slot_of(const struct window *w, int rank, uint64_t number) {
    return (float *)(w->base + w->layout.slots +
                     (2 * (size_t)rank + number % 2) * w->layout.slot_bytes);
}
static char *plan_of(const struct window *w, uint64_t number) {
    return w->base + w->layout.plans + number % 2 * w->layout.plan_bytes;
}
static char *records_of(const struct window *w, uint64_t number) {
    return w->base + w->layout.records + number % 2 * w->layout.record_bytes;
}

enum status comm_window_attach(comm *c, void *base) {
    struct window *w = calloc(1, sizeof *w);
    if (!w) return fail(STATUS_MEMORY, "no memory for the state of the shared window");
    ASSERT(layout_init(&w->layout, &c->config, c->size)); /* comm_window_bytes was not 0 */
    w->base = base;
    w->head = base;
    w->flags = (struct rank_flags *)(w->base + w->layout.flags);
    w->all_reduce_number = w->plan_number = w->gather_number = 1;
    memset(slot_of(w, c->rank, 0), 0, 2 * w->layout.slot_bytes); /* first touch by the owner */
    /* or a /dev/shm that fills up later ends the job at the first long plan (SIGBUS) */
    if (c->rank == 0) memset(plan_of(w, 0), 0, w->layout.total - w->layout.plans);
    c->path_state = w;
    c->path = &comm_window_path;
    return STATUS_OK;
}

static void window_close(comm *c) { free(c->path_state); }

static float *window_slot(comm *c) {
    const struct window *w = c->path_state;
    return slot_of(w, c->rank, w->all_reduce_number);
}

static void publish(struct flag *own, uint64_t number, uint64_t size) {
    own->size[number % 2] = size;
    atomic_store_explicit(&own->number, number, memory_order_release);
}

static void wait_for(comm *c, struct flag *flag, uint64_t number, int rank, const char *operation) {
    struct comm_patience p = {0};
    while (atomic_load_explicit(&flag->number, memory_order_acquire) < number) {
        if (comm_is_late(c, comm_pause(c, &p))) comm_give_up(c, operation, number, rank);
    }
    comm_pause_end(c, &p);
}

/* [begin, end) of the columns rank r sums, in whole lines. */
static size_t column_begin(size_t count, int ranks, int r) {
    const size_t line = COMM_LINE_BYTES / sizeof(float), lines = (count + line - 1) / line;
    const size_t begin = lines * (size_t)r / (size_t)ranks * line;
    return begin < count ? begin : count;
}

static void scatter_and_gather(comm *c, struct window *w, uint64_t number, size_t count,
                               float *const *slots, float *sum) {
    const float *columns[COMM_RANKS_MAX];
    const size_t begin = column_begin(count, c->size, c->rank);
    const size_t end = column_begin(count, c->size, c->rank + 1);
    for (int r = 0; r < c->size; r++) columns[r] = slots[r] + begin;
    comm_tree_sum(columns, c->size, end - begin, slots[c->rank] + begin);
    publish(&w->flags[c->rank].reduced, number, count);
    for (int i = 0; i < c->size;
         i++) { /* each starts with its own: the copies spread over the slots */
        const int r = (c->rank + i) % c->size;
        wait_for(c, &w->flags[r].reduced, number, r, "all-reduce (second half)");
        const size_t at = column_begin(count, c->size, r);
        memcpy(sum + at, slots[r] + at, (column_begin(count, c->size, r + 1) - at) * sizeof *sum);
    }
}

/* All have filled their slots of this number with `size` of whatever is exchanged. */
static void meet(comm *c, struct window *w, uint64_t size, float **slots, const char *operation) {
    const uint64_t number = w->all_reduce_number;
    publish(&w->flags[c->rank].summed, number, size);
    for (int r = 0; r < c->size; r++) {
        slots[r] = slot_of(w, r, number);
        wait_for(c, &w->flags[r].summed, number, r, operation);
        ASSERT_EQ(w->flags[r].summed.size[number % 2], size);
    }
}

static void window_all_reduce(comm *c, size_t count, float *sum) {
    struct window *w = c->path_state;
    const uint64_t number = w->all_reduce_number;
    float *slots[COMM_RANKS_MAX];
    meet(c, w, count, slots, "all-reduce");
    if (c->size >= SCATTER_RANKS && count * sizeof *sum > SCATTER_BYTES) {
        scatter_and_gather(c, w, number, count, slots, sum);
    } else {
        comm_tree_sum((const float *const *)slots, c->size, count, sum);
    }
    w->all_reduce_number++;
}

/* A sum that is not summed: the slots' protocol, so the two may follow one another in any order. */
static void window_all_gather(comm *c, size_t n, void *all, size_t stride) {
    struct window *w = c->path_state;
    float *slots[COMM_RANKS_MAX];
    meet(c, w, n, slots, "all-gather");
    for (int r = 0; r < c->size; r++) memcpy((char *)all + (size_t)r * stride, slots[r], n);
    w->all_reduce_number++;
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value,
                  const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static void send_plan(comm *c, struct window *w, uint64_t number, const void *mine, size_t n) {
    for (int r = 1; number > 1 && r < c->size; r++) { /* all have let go of plan number - 2 */
        wait_for(c, &w->flags[r].plan, number - 1, r, "plan");
    }
    if (n > 0) memcpy(plan_of(w, number), mine, n);
    w->head->plan_bytes[number % 2] = n;
    /* the number before the look at sleepers, as a sleeper counts itself before it looks at the
     * number */
    atomic_store(&w->head->plan_number, (uint32_t)number);
    if (atomic_load(&w->head->sleepers) > 0)
        futex(&w->head->plan_number, FUTEX_WAKE, INT32_MAX, NULL);
}

static void await_plan(comm *c, struct window *w, uint64_t number) {
    struct comm_patience p = {0};
    _Atomic uint32_t *word = &w->head->plan_number;
    for (;;) {
        const uint32_t seen = atomic_load_explicit(word, memory_order_acquire);
        if ((int32_t)(seen - (uint32_t)number) >= 0) return; /* rank 0 may be one plan ahead */
        if (comm_pause(c, &p) < COMM_PARK_NS) continue;
        const struct timespec at_most = {.tv_sec = PARK_SECONDS};
        atomic_fetch_add(&w->head->sleepers, 1);
        futex(word, FUTEX_WAIT, seen, &at_most); /* returns at once when the number has moved */
        atomic_fetch_sub(&w->head->sleepers, 1);
        comm_watch_parent(c);
    }
}

static size_t window_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    struct window *w = c->path_state;
    const uint64_t number = w->plan_number++;
    if (c->rank == 0) {
        send_plan(c, w, number, mine, n);
    } else {
        publish(&w->flags[c->rank].plan, number, 0);
        await_plan(c, w, number);
        n = w->head->plan_bytes[number % 2];
        ASSERT_LE(n, w->layout.plan_bytes);
        mine = plan_of(w, number);
    }
    if (bytes) *bytes = mine;
    return n;
}

static const void *window_gather(comm *c, const void *mine, size_t n) {
    struct window *w = c->path_state;
    const uint64_t number = w->gather_number++;
    char *records = records_of(w, number);
    /* rank 0 has let go of gather number - 2 when it comes to number - 1 */
    if (c->rank != 0 && number > 1) wait_for(c, &w->flags[0].gather, number - 1, 0, "gather");
    if (n > 0) memcpy(records + (size_t)c->rank * n, mine, n);
    publish(&w->flags[c->rank].gather, number, n);
    if (c->rank != 0) return NULL;
    for (int r = 1; r < c->size; r++) {
        wait_for(c, &w->flags[r].gather, number, r, "gather");
        ASSERT_EQ(w->flags[r].gather.size[number % 2], n);
    }
    return records;
}

static bool window_abort_claim(comm *c) {
    const struct window *w = c->path_state;
    return atomic_exchange(&w->head->aborting, 1) == 0;
}

const struct comm_path comm_window_path = {
    .name = "window",
    .close = window_close,
    .slot = window_slot,
    .all_reduce = window_all_reduce,
    .all_gather = window_all_gather,
    .bcast = window_bcast,
    .gather = window_gather,
    .abort_claim = window_abort_claim,
};
