/* watch.c: see watch.h.
 *
 *   every 100 ms:  stage over its limit? ─┐
 *                  a sibling in state T?  ─┼─► one line ─► hook (rank 0: error events) ─► _exit
 *                  another host silent?   ─┘
 *                  launcher gone?         ────► one line ─► _exit, where there is no hook
 *
 * Siblings are the children of the launcher, known by their parent in /proc/N/stat; their ranks
 * stand in their environment. A stop is counted in looks, not in time, so that a job that was
 * suspended and resumed as a whole is not taken for one with a rank missing; silence likewise.
 */
#include "cmd/watch.h"

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <threads.h>
#include <unistd.h>

#include "base/log.h"
#include "base/progress.h"
#include "cmd/beat.h"

enum { LOOK_MS = 100, LATER_SECONDS = 2, LIMIT_LATER_SECONDS = 3, LATE_SCANS = 10 };
/* The launcher's SIGTERM comes a second after a rank was lost. */
enum { GONE_LOOKS = 3, SILENT_LOOKS = 5 };
#define MARGIN_SECONDS 0.2 /* a step's own deadline, with the better message, comes first */

struct sibling {
    pid_t pid;
    int rank, stopped_looks, gone_looks;
};

static struct {
    thrd_t thread;
    bool running;
    int stop_fd; /* an eventfd: readable when the thread shall end */
    int rank;
    bool is_spread; /* over several hosts */
    double seconds;
    pid_t launcher;
    int orphan_looks;
    char host[64];
    struct sibling siblings[COMM_RANKS_MAX];
    int sibling_count;
    _Atomic int expected; /* siblings there must be; -1: not known yet, as the next three */
    int rank_count;
    char hosts[COMM_RANKS_MAX][64];
    bool speaks;      /* for rank 0 when that is gone; until it has, or was stopped itself */
    double last_look; /* clock */
    _Atomic(const struct watch_stage *) stage;
    _Atomic double limit; /* clock; 0: none */
    int late_scans;       /* of /proc, since all ranks are there */
    mtx_t hook_lock;      /* held from the call to the end: what the hook uses stays */
    void *hook_user;
    void (*hook)(void *user, int exit_code, const char *text);
} watch;

/* ---- /proc ---- */

/* The whole of a small file, NUL-terminated; its length, or -1. */
static ssize_t slurp(pid_t pid, const char *name, char *text, size_t size) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    FILE *file = fopen(path, "re");
    if (!file) return -1;
    const size_t n = fread(text, 1, size - 1, file);
    fclose(file);
    text[n] = '\0';
    return (ssize_t)n;
}

/* "pid (name) state parent ...": the name may hold anything, so look from its end. */
static bool read_state(pid_t pid, char *state, pid_t *parent) {
    char text[512];
    int ppid;
    if (slurp(pid, "stat", text, sizeof text) < 0) return false;
    const char *after = strrchr(text, ')');
    if (!after || sscanf(after + 1, " %c %d", state, &ppid) != 2) return false;
    *parent = ppid;
    return true;
}

static int read_rank(pid_t pid) {
    static const char name[] = "OMPI_COMM_WORLD_RANK=";
    static char text[1 << 16];
    const ssize_t n = slurp(pid, "environ", text, sizeof text);
    for (ssize_t at = 0; at < n; at += (ssize_t)strlen(text + at) + 1) {
        if (strncmp(text + at, name, sizeof name - 1) == 0)
            return atoi(text + at + sizeof name - 1);
    }
    return -1;
}

static bool is_known(pid_t pid) {
    for (int i = 0; i < watch.sibling_count; i++) {
        if (watch.siblings[i].pid == pid) return true;
    }
    return false;
}

static void find_siblings(void) {
    DIR *all = opendir("/proc");
    if (!all) return;
    for (const struct dirent *d; (d = readdir(all)) && watch.sibling_count < COMM_RANKS_MAX;) {
        const pid_t pid = (pid_t)atoi(d->d_name), self = getpid();
        char state;
        pid_t parent;
        if (pid <= 0 || pid == self || is_known(pid)) continue;
        if (!read_state(pid, &state, &parent) || parent != watch.launcher) continue;
        const int rank = read_rank(pid);
        if (rank < 0) continue; /* not a rank (yet): the launcher may have other children */
        watch.siblings[watch.sibling_count++] = (struct sibling){.pid = pid, .rank = rank};
    }
    closedir(all);
}

/* ---- the end ---- */

static void leave(int exit_code, const char *text) {
    log_failure(text);
    mtx_lock(&watch.hook_lock);
    if (watch.hook) watch.hook(watch.hook_user, exit_code, text);
    if (watch.is_spread) comm_guard(watch.launcher);
    _exit(exit_code);
}

/* "rank 1 on b: running, at step 7" */
static const char *own_place(char text[160]) {
    const struct watch_stage *stage = atomic_load(&watch.stage);
    snprintf(text, 160, "rank %d on %s: %s, at step %llu", watch.rank, watch.host, stage->name,
             (unsigned long long)progress_step());
    return text;
}

static void check_siblings(void) {
    for (int i = 0; i < watch.sibling_count; i++) {
        struct sibling *s = &watch.siblings[i];
        char state, text[480], place[160];
        pid_t parent;
        /* one that is gone is the launcher's business */
        const bool gone = !read_state(s->pid, &state, &parent) || state == 'Z';
        s->gone_looks = gone ? s->gone_looks + 1 : 0;
        s->stopped_looks = !gone && state == 'T' ? s->stopped_looks + 1 : 0;
        double patience = watch.seconds + MARGIN_SECONDS;
        if (watch.rank > 0 && s->rank > 0) patience += LATER_SECONDS;
        if (1e-3 * LOOK_MS * s->stopped_looks < patience) continue;
        snprintf(text, sizeof text,
                 "rank %d on %s (process %d) has been stopped for %.1f s (%s): stopping all ranks",
                 s->rank, watch.host, (int)s->pid, watch.seconds, own_place(place));
        leave(STATUS_WATCHDOG, text);
    }
}

static void check_hosts(void) {
    beat_look();
    for (int r = 0; r < watch.rank_count; r++) {
        char text[480], place[160];
        if (1e-3 * LOOK_MS * beat_silent_looks(r) < watch.seconds + MARGIN_SECONDS) continue;
        snprintf(text, sizeof text,
                 "rank %d on %s has not been heard from for %.1f s (%s): stopping all ranks", r,
                 watch.hosts[r], watch.seconds, own_place(place));
        leave(STATUS_WATCHDOG, text);
    }
}

/* Only rank 0 knows why a job that serves is stopped, and says so: unless it is gone. Before the first
 * step there is no number to tell. */
static void speak_for_rank_0(void) {
    sigset_t pending;
    char place[160];
    if (!watch.speaks || progress_step() == 0 || sigpending(&pending) != 0 ||
        !sigismember(&pending, SIGTERM))
        return;
    watch.speaks = false;
    bool gone = beat_silent_looks(0) >= SILENT_LOOKS;
    for (int i = 0; i < watch.sibling_count; i++) {
        gone |= watch.siblings[i].rank == 0 && watch.siblings[i].gone_looks >= GONE_LOOKS;
    }
    if (gone) {
        log_error("rank 0 on %s is gone, the launcher ends the job (%s)", watch.hosts[0],
                  own_place(place));
    }
}

static void check_limit(const struct watch_stage *stage) {
    const double limit = atomic_load(&watch.limit), now = progress_clock();
    char text[480];
    /* over hosts the launcher's own end takes longer */
    const double later = watch.rank == 0   ? 0
                         : watch.is_spread ? LATER_SECONDS
                                           : LIMIT_LATER_SECONDS;
    if (limit == 0 || now < limit + later) return;
    const struct sibling *stopped = NULL;
    for (int i = 0; i < watch.sibling_count && !stopped; i++) {
        if (watch.siblings[i].stopped_looks > 1) stopped = &watch.siblings[i];
    }
    if (stopped) { /* not stopped long enough for check_siblings, but the reason all the same */
        snprintf(text, sizeof text,
                 "rank %d on %s: %s takes too long: rank %d (process %d) is stopped", watch.rank,
                 watch.host, stage->name, stopped->rank, (int)stopped->pid);
    } else {
        snprintf(text, sizeof text, "rank %d on %s: %s takes too long: %s", watch.rank, watch.host,
                 stage->name, stage->advice);
    }
    leave(stage->exit_code, text);
}

/* The job was suspended and goes on: time that no rank had is not taken from a stage's. */
static void notice_stop(void) {
    const double before = watch.last_look;
    watch.last_look = progress_clock();
    if (before == 0 || watch.last_look <= before + 1) return;
    watch.speaks = false;
    double limit = atomic_load(&watch.limit);
    if (limit > 0)
        atomic_compare_exchange_strong(&watch.limit, &limit, limit + watch.last_look - before);
}

/* Where this rank serves, the net thread tells its clients. Open MPI's own threads see it too, when there are any. */
static void check_launcher(void) {
    watch.orphan_looks = getppid() == watch.launcher ? 0 : watch.orphan_looks + 1;
    if (watch.orphan_looks < GONE_LOOKS) return;
    mtx_lock(&watch.hook_lock);
    const bool serves = watch.hook != NULL;
    mtx_unlock(&watch.hook_lock);
    if (serves) return;
    log_error("the launcher (process %d) is gone: leaving", (int)watch.launcher);
    _exit(STATUS_COMM);
}

static int look(void *unused) {
    (void)unused;
    struct pollfd stop = {.fd = watch.stop_fd, .events = POLLIN};
    while (poll(&stop, 1, LOOK_MS) <= 0) {
        notice_stop();
        check_launcher();
        const int expected = atomic_load(&watch.expected);
        /* not children of the same process, perhaps: a few times, not for ever */
        if (expected < 0 || (watch.sibling_count < expected && watch.late_scans++ < LATE_SCANS))
            find_siblings();
        check_limit(atomic_load(&watch.stage));
        if (watch.seconds == 0) continue;
        check_siblings();
        if (expected < 0) continue;
        check_hosts();
        speak_for_rank_0();
    }
    return 0;
}

/* ---- the main thread ---- */

enum status watch_start(int launcher, int rank, double seconds) {
    static const struct watch_stage starting = {"starting", "", STATUS_WATCHDOG};
    const char *all = getenv("OMPI_COMM_WORLD_SIZE"), *here = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    if (!all) return STATUS_OK;
    watch.rank = rank;
    watch.is_spread = here && atoi(here) < atoi(all);
    watch.seconds = seconds;
    watch.launcher = launcher;
    atomic_store(&watch.expected, -1);
    atomic_store(&watch.stage, &starting);
    if (gethostname(watch.host, sizeof watch.host - 1) != 0) strcpy(watch.host, "?");
    watch.stop_fd = eventfd(0, EFD_CLOEXEC);
    if (watch.stop_fd < 0 || mtx_init(&watch.hook_lock, mtx_plain) != thrd_success ||
        thrd_create(&watch.thread, look, NULL) != thrd_success)
        return fail(STATUS_MEMORY, "the system gives no thread to watch the other ranks");
    watch.running = true;
    return STATUS_OK;
}

void watch_enter(const struct watch_stage *stage, double limit_seconds) {
    atomic_store(&watch.limit, 0);
    atomic_store(&watch.stage, stage);
    if (limit_seconds > 0) atomic_store(&watch.limit, progress_clock() + limit_seconds);
}

void watch_joined(comm *c) {
    if (!watch.running) return;
    watch.rank_count = comm_size(c);
    /* the launcher gets to other hosts later, perhaps when rank 0 has said why and left: these speak
     * only where rank 0 had no other rank beside it */
    const int first = comm_host_of(c, watch.rank) == 0;
    watch.speaks =
        watch.rank > 0 && comm_local_rank(c) == first && (first == 1 || comm_host_of(c, 1) != 0);
    for (int r = 0; r < watch.rank_count; r++)
        snprintf(watch.hosts[r], sizeof watch.hosts[r], "%s", comm_host_name(c, r));
    if (watch.seconds > 0) beat_join(c);
    atomic_store(&watch.expected, comm_local_size(c) - 1);
}

void watch_on_end(void (*hook)(void *user, int exit_code, const char *text), void *user) {
    if (!watch.running) return;
    mtx_lock(&watch.hook_lock);
    watch.hook = hook;
    watch.hook_user = user;
    mtx_unlock(&watch.hook_lock);
}

void watch_stop(void) {
    if (!watch.running) return;
    eventfd_write(watch.stop_fd, 1);
    thrd_join(watch.thread, NULL);
    close(watch.stop_fd);
    watch.running = false;
}
