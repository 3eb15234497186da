/* comm_wait.c: how a rank waits for another one.
 *
 *   0 ── pause ── 50 us ── yield ── 1 ms ── sleep (who waits for a plan; the path knows how)
 *
 * A decode step has ~60 all-reduces, so the first microseconds decide: a pause loop sees the peer's
 * flag within 0.1 us. With more ranks than cores the peer cannot run while we pause, so yield at
 * once (4-8 us an all-reduce instead of 110). The clock is read only when the first look at the
 * flag failed.
 *
 * Looks at the clock are microseconds apart. Where more than a second lies between two, this process was
 * stopped, as a job that is suspended as a whole: that time is nobody's delay.
 */
#include <sched.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/progress.h"
#include "comm/comm_path.h"

enum { SPIN_NS = 50 * 1000, SPIN_BURST = 32, WATCH_NS = 1000 * 1000 * 1000, GAP_NS = WATCH_NS };

static inline void cpu_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

uint64_t comm_clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void comm_watch_parent(comm *c) {
    if (c->parent == 0 || getppid() == c->parent) return;
    log_error("the launcher (process %d) is gone: leaving", (int)c->parent);
    _exit(STATUS_COMM); /* MPI_Abort would talk to the launcher */
}

uint64_t comm_pause(comm *c, struct comm_patience *p) {
    if (p->rounds++ == 0) {
        p->begin_ns = p->now_ns = p->watched_ns = comm_clock_ns();
    } else if (p->rounds % SPIN_BURST == 0 || c->crowded || p->now_ns - p->begin_ns >= SPIN_NS) {
        const uint64_t before_ns = p->now_ns;
        p->now_ns = comm_clock_ns();
        if (p->now_ns - before_ns > GAP_NS) p->begin_ns += p->now_ns - before_ns;
    }
    const uint64_t waited_ns = p->now_ns - p->begin_ns;
    if (!c->crowded && waited_ns < SPIN_NS) {
        cpu_pause();
    } else {
        sched_yield();
    }
    if (p->now_ns - p->watched_ns >= WATCH_NS) {
        p->watched_ns = p->now_ns;
        comm_watch_parent(c);
    }
    return waited_ns;
}

void comm_pause_end(comm *c, const struct comm_patience *p) {
    if (p->rounds) c->times.wait_seconds += 1e-9 * (double)(comm_clock_ns() - p->begin_ns);
}

/* Other ranks leave rank 0 the time to tell its clients (comm_on_abort). */
bool comm_is_late(const comm *c, uint64_t waited_ns) {
    const double grace = c->rank == 0 ? 0 : 2;
    return c->config.timeout_seconds > 0 &&
           1e-9 * (double)waited_ns >= c->config.timeout_seconds + grace;
}

_Noreturn void comm_give_up(comm *c, const char *operation, uint64_t number, int missing) {
    char text[320];
    snprintf(text, sizeof text,
             "rank %d on %s waited %.1f s at step %llu in %s %llu for rank %d on %s, which has not "
             "arrived: stopping all ranks",
             c->rank, c->places[c->rank].name, c->config.timeout_seconds,
             (unsigned long long)progress_step(), operation, (unsigned long long)number, missing,
             c->places[missing].name);
    comm_abort(c, STATUS_WATCHDOG, text);
}
