/* cpu_pool.h: the threads of one rank: parallel-for with static ranges, and where they run.
 *
 * The calling (engine) thread is thread 0; the others wait between tasks. A task is one call
 * `run(context, thread)` on every thread; cpu_pool_run returns when all calls have returned. The
 * wait is in three stages, because a step has ~100 tasks a few hundred microseconds apart but a
 * server may idle for hours, and because somebody else may be using our cores:
 *
 *   spin with pauses (~50 us)  ->  sched_yield (to ~1 ms)  ->  futex: no CPU at all
 *
 * With more threads than cores the spinning stage is left out. Ranges are static: element i of n
 * belongs to the same thread in every step, so weights stay in the memory (and caches) of their
 * thread. Thread: one caller. Memory: fixed at open. Refuses to know: tensors, ranks.
 */
#ifndef SFUMATO_BACKEND_CPU_POOL_H
#define SFUMATO_BACKEND_CPU_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"

enum { CPU_THREADS_MAX = 256 };

typedef struct cpu_pool cpu_pool;
typedef void cpu_task(void *context, int thread);

/* threads = 0: the cores this process may use, divided by the ranks of this host (at least 1).
 * Workers are pinned one to a core of this rank's share; the caller (until close, and threads it
 * starts meanwhile) gets the cores of the share that are left. Nothing is pinned when they do not fit. */
enum status cpu_pool_open(int threads, int local_rank, int local_ranks, cpu_pool **out);
void cpu_pool_close(cpu_pool *pool);
int cpu_pool_threads(const cpu_pool *pool);

void cpu_pool_run(cpu_pool *pool, cpu_task *run, void *context);

/* Thread t's part of n: [floor(n t / threads), floor(n (t + 1) / threads)). */
static inline int64_t cpu_range_begin(int64_t n, int thread, int threads) {
    return n * thread / threads;
}

#endif
