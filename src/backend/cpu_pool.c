/* cpu_pool.c: see cpu_pool.h.
 *
 * Two counters carry everything. `generation` goes up when a task is posted; workers wait for it to
 * move. `finished` goes up when a worker is done; the caller waits for it to reach the thread
 * count. Both waits end in a futex on the counter itself: the sleeper first announces itself in
 * `*_sleepers`, then sleeps only if the counter still has the value it saw (the kernel compares),
 * and whoever moves the counter looks at the sleepers afterwards. All of it sequentially
 * consistent, so one side always sees the other.
 */
#include "backend/cpu_pool.h"

#include <errno.h>
#include <hwloc.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc_watch.h"
#include "base/log.h"

enum {
    /* 50 us on Zen 4, 140 us on Skylake: several times the imbalance of a task. A thread that yields on
     * a busy core loses a whole time slice, and then the others wait for it. */
    SPIN_PAUSES = 3000,
    YIELDS_PER_CLOCK = 16, /* look at the clock this often while yielding */
    PARK_AFTER_NS = 1000000,
    CORES_MAX = 4096,
};

struct cpu_pool {
    _Alignas(64) atomic_uint generation;
    atomic_int workers_asleep;
    _Alignas(64) atomic_uint finished;
    atomic_int caller_asleep;
    _Alignas(64) cpu_task *run;
    void *context;
    bool stop;
    int threads;
    int spin_pauses;
    bool pinned;
    cpu_set_t caller_mask; /* as it was before open */
    struct worker {
        cpu_pool *pool;
        pthread_t id;
        int index;
        int cpu; /* or -1 */
    } worker[];
};

static void futex_wait(atomic_uint *word, unsigned seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake_all(atomic_uint *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff, NULL, NULL, 0);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Waits until *word differs from `seen`; returns its new value. */
static unsigned wait_change(atomic_uint *word, atomic_int *asleep, unsigned seen, int spin_pauses) {
    unsigned value;
    for (int i = 0; i < spin_pauses; i++) {
        if ((value = atomic_load_explicit(word, memory_order_acquire)) != seen) return value;
        pause_briefly();
    }
    const int64_t start = now_ns();
    do {
        for (int i = 0; i < YIELDS_PER_CLOCK; i++) {
            if ((value = atomic_load_explicit(word, memory_order_acquire)) != seen) return value;
            sched_yield();
        }
    } while (now_ns() - start < PARK_AFTER_NS);
    atomic_fetch_add(asleep, 1);
    while ((value = atomic_load(word)) == seen) futex_wait(word, seen);
    atomic_fetch_sub(asleep, 1);
    return value;
}

static void pin_self(int cpu) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(cpu, &mask);
    sched_setaffinity(0, sizeof mask, &mask); /* a refusal costs speed, not correctness */
}

static void *worker_main(void *argument) {
    struct worker *w = argument;
    cpu_pool *pool = w->pool;
    if (w->cpu >= 0) pin_self(w->cpu);
    alloc_watch_thread(true);
    unsigned seen = 0;
    for (;;) {
        seen = wait_change(&pool->generation, &pool->workers_asleep, seen, pool->spin_pauses);
        if (pool->stop) return NULL;
        pool->run(pool->context, w->index);
        atomic_fetch_add(&pool->finished, 1);
        if (atomic_load(&pool->caller_asleep)) futex_wake_all(&pool->finished);
    }
}

void cpu_pool_run(cpu_pool *pool, cpu_task *run, void *context) {
    if (pool->threads == 1) {
        run(context, 0);
        return;
    }
    pool->run = run;
    pool->context = context;
    atomic_store_explicit(&pool->finished, 0, memory_order_relaxed);
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->workers_asleep)) futex_wake_all(&pool->generation);
    run(context, 0);
    const unsigned all = (unsigned)(pool->threads - 1);
    for (unsigned done = atomic_load(&pool->finished); done != all;)
        done = wait_change(&pool->finished, &pool->caller_asleep, done, pool->spin_pauses);
}

/* One CPU of each core this process may use, in hwloc's order (neighbours share caches and memory).
 * The mask decides, not the launcher's word; hyper-threads of one core share its FMA units, so one
 * each. */
static int usable_cores(const cpu_set_t *mask, int *cpus, int cpus_max) {
    int count = 0;
    hwloc_topology_t topology;
    if (hwloc_topology_init(&topology) == 0) {
        if (hwloc_topology_load(topology) == 0) {
            const int cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);
            for (int i = 0; i < cores && count < cpus_max; i++) {
                const hwloc_obj_t core =
                    hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, (unsigned)i);
                int cpu = hwloc_bitmap_first(core->cpuset);
                while (cpu >= 0 && !(cpu < CPU_SETSIZE && CPU_ISSET(cpu, mask)))
                    cpu = hwloc_bitmap_next(core->cpuset, cpu);
                if (cpu >= 0) cpus[count++] = cpu;
            }
        }
        hwloc_topology_destroy(topology);
    }
    if (count == 0) { /* a machine hwloc cannot read: every CPU of the mask */
        for (int cpu = 0; cpu < CPU_SETSIZE && count < cpus_max; cpu++)
            if (CPU_ISSET(cpu, mask)) cpus[count++] = cpu;
    }
    return count;
}

enum status cpu_pool_open(int threads, int local_rank, int local_ranks, cpu_pool **out) {
    static int cpus[CORES_MAX];
    cpu_set_t mask;
    CPU_ZERO(&mask);
    int cores = 0;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) cores = usable_cores(&mask, cpus, CORES_MAX);
    if (cores < 1) cores = 1;
    if (local_ranks < 1) local_ranks = 1;
    /* This rank's share of the cores. A mask narrower than the ranks of the host either was made by
     * the launcher for this rank alone, or the host is oversubscribed: then nothing is pinned. */
    const int first = (int)cpu_range_begin(cores, local_rank, local_ranks);
    const int share = (int)cpu_range_begin(cores, local_rank + 1, local_ranks) - first;
    if (threads == 0) threads = share < 1 ? 1 : share < CPU_THREADS_MAX ? share : CPU_THREADS_MAX;
    if (threads < 1 || threads > CPU_THREADS_MAX)
        return fail(STATUS_USAGE, "%d threads per rank: use 1 to %d, or leave --threads out",
                    threads, CPU_THREADS_MAX);
    cpu_pool *pool = NULL;
    const size_t bytes = (sizeof *pool + sizeof pool->worker[0] * (size_t)threads + 63) / 64 * 64;
    pool = aligned_alloc(64, bytes);
    if (!pool) return fail(STATUS_MEMORY, "no memory for %d threads", threads);
    atomic_init(&pool->generation, 0);
    atomic_init(&pool->workers_asleep, 0);
    atomic_init(&pool->finished, 0);
    atomic_init(&pool->caller_asleep, 0);
    pool->stop = false;
    pool->threads = 1;
    const bool fits = threads <= share;
    pool->spin_pauses = fits ? SPIN_PAUSES : 0;
    pool->pinned = fits && (threads > 1 || local_ranks > 1);
    pool->caller_mask = mask;
    for (int i = 1; i < threads; i++) {
        struct worker *w = &pool->worker[i];
        *w = (struct worker){.pool = pool, .index = i, .cpu = pool->pinned ? cpus[first + i] : -1};
        const int error = pthread_create(&w->id, NULL, worker_main, w);
        if (error) {
            cpu_pool_close(pool);
            return fail(STATUS_MEMORY,
                        "cannot start compute thread %d of %d (%s): use fewer threads", i + 1,
                        threads, error == EAGAIN ? "limit reached" : "refused");
        }
        pool->threads = i + 1;
    }
    if (pool->pinned) {
        /* The caller keeps off the workers' cores but may use spare ones, and so may the threads it
         * starts later (network), which inherit its mask. */
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(cpus[first], &own);
        for (int i = threads; i < share; i++) CPU_SET(cpus[first + i], &own);
        sched_setaffinity(0, sizeof own, &own);
    }
    log_debug("cpu: %d threads on %d cores%s", threads, cores, pool->pinned ? ", pinned" : "");
    *out = pool;
    return STATUS_OK;
}

void cpu_pool_close(cpu_pool *pool) {
    if (!pool) return;
    pool->stop = true;
    atomic_fetch_add(&pool->generation, 1);
    futex_wake_all(&pool->generation);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->worker[i].id, NULL);
    if (pool->pinned) sched_setaffinity(0, sizeof pool->caller_mask, &pool->caller_mask);
    free(pool);
}

int cpu_pool_threads(const cpu_pool *pool) { return pool->threads; }
