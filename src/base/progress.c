/* progress.c: see progress.h. */
#include "base/progress.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"

enum { BAR_CELLS = 24 };
/* A line each 10 %, but not for what is quick; and one of life when that takes long. */
#define TENTH_SECONDS 0.5
#define LINE_SECONDS 2.0

double progress_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

bool progress_is_terminal(int fd) {
    char link[64], target[64];
    if (isatty(fd) != 1) return false;
    if (!getenv("OMPI_COMM_WORLD_SIZE")) return true;
    snprintf(link, sizeof link, "/proc/%ld/fd/%d", (long)getppid(), fd);
    const ssize_t n = readlink(link, target, sizeof target - 1);
    if (n < 0) return false;
    target[n] = '\0';
    return strncmp(target, "/dev/pts/", 9) == 0 || strncmp(target, "/dev/tty", 8) == 0;
}

const char *progress_bytes(double bytes, char out[32]) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
    int u = 0;
    while (fabs(bytes) >= 1000 && u < 4) {
        bytes /= 1000;
        u++;
    }
    snprintf(out, 32, u ? "%.2f %s" : "%.0f %s", bytes, units[u]);
    return out;
}

const char *progress_seconds(double seconds, char out[32]) {
    const long s = seconds > 0 && seconds < 1e9 ? lround(seconds) : 0;
    if (s >= 3600) {
        snprintf(out, 32, "%ldh%02ldm", s / 3600, s / 60 % 60);
    } else if (s >= 60) {
        snprintf(out, 32, "%ldm%02lds", s / 60, s % 60);
    } else {
        snprintf(out, 32, "%lds", s);
    }
    return out;
}

void progress_begin(struct progress *p, const char *what, int64_t total, bool shown) {
    const double now = progress_clock();
    *p = (struct progress){.what = what,
                           .total = total,
                           .shown = shown && log_enabled(LOG_INFO),
                           .terminal = progress_is_terminal(STDERR_FILENO),
                           .start = now,
                           .last = now};
}

static void draw_bar(struct progress *p, int64_t done, const char *note, double now) {
    char bar[BAR_CELLS + 1], eta[32], line[256];
    const double share = p->total > 0 ? fmin(1.0, (double)done / (double)p->total) : 0;
    const int full = (int)(share * BAR_CELLS);
    for (int i = 0; i < BAR_CELLS; i++) bar[i] = i < full ? '#' : '.';
    bar[BAR_CELLS] = '\0';
    const double left = share > 0 ? (now - p->start) * (1 - share) / share : 0;
    const int n =
        snprintf(line, sizeof line, "\r\033[K%s [%s] %3.0f %%  %s%s%s left", p->what, bar,
                 100 * share, note ? note : "", note ? "  " : "", progress_seconds(left, eta));
    if (n > 0 && write(STDERR_FILENO, line, (size_t)(n < 255 ? n : 255)) < 0) p->shown = false;
    p->drawn = true;
}

static _Atomic uint64_t current_step;

void progress_at_step(uint64_t step) {
    atomic_store_explicit(&current_step, step, memory_order_relaxed);
}
uint64_t progress_step(void) { return atomic_load_explicit(&current_step, memory_order_relaxed); }

void progress_update(struct progress *p, int64_t done, const char *note) {
    if (!p->shown) return;
    const double now = progress_clock();
    if (p->terminal) {
        if (now - p->last < 0.1) return;
        draw_bar(p, done, note, now);
        p->last = now;
        return;
    }
    const int tenth = p->total > 0 ? (int)(10 * done / p->total) : 0;
    if (now - p->last < (tenth == p->last_tenth ? LINE_SECONDS : TENTH_SECONDS)) return;
    char eta[32];
    const double share = p->total > 0 ? (double)done / (double)p->total : 0;
    log_info("%s: %.0f %%%s%s, %s left", p->what, 100 * share, note ? ", " : "", note ? note : "",
             progress_seconds(share > 0 ? (now - p->start) * (1 - share) / share : 0, eta));
    p->last = now;
    p->last_tenth = tenth;
}

void progress_break(struct progress *p) {
    if (p->drawn && write(STDERR_FILENO, "\r\033[K", 4) < 0) p->shown = false;
    p->drawn = false;
}

void progress_end(struct progress *p) { progress_break(p); }
