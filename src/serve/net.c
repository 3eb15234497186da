/* net.c: see net.h. The loop, the signals, and how the service leaves (serving.md §8).
 *
 *   signal, /admin/drain ─► draining ─► no sequence left ─► DOWN_STOP ─► answers written ─► loop ends
 *   a second signal ─► aborting: error events, DOWN_STOP at once
 *   SIGTERM or SIGINT of the launcher ─► fast stop: error events, written for half a second, _exit
 *   watchdog ─► dead: error events, written for half a second, then the engine thread goes on
 *
 * The loop ends when the main thread waits in net_join and nothing is left to write. A main thread
 * that hangs in a collective never comes: a failsafe ends the process then.
 */
#include "serve/net.h"

#include <event2/event.h>
#include <malloc.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <threads.h>
#include <unistd.h>

#include "base/log.h"
#include "serve/grpc.h"
#include "serve/http.h"
#include "serve/notify.h"

/* The protocols. Adding one = a file that ends in its table, and a line here. */
static const struct front *const fronts[] = {
    &http_front,
    &grpc_front,
};
enum { FRONT_COUNT = sizeof fronts / sizeof *fronts };

#define FAST_SECONDS 0.4       /* to write error events when the job is being killed */
#define FLUSH_SECONDS 2.0      /* to write the last answers otherwise */
#define LAST_FLUSH_SECONDS 0.3 /* after a second signal, for which there are 2 s in all */
#define FAILSAFE_SECONDS 1.5   /* for the engine to stop after an abort */
#define FORCE_SECONDS 5.0      /* for the engine to stop after a drain that ran out of time */

enum { POLL_MS = 5 };
/* Blocks from here on are mappings of their own. Left to itself malloc raises this border to the largest
 * block that was ever freed, and keeps such blocks in its arenas, where small ones that live longer hold
 * them back: an hour of mixed load grew by a megabyte with each burst larger than any before. */
enum { MAPPED_BYTES_MIN = 128 << 10 };
enum net_phase { NET_SERVING, NET_STOPPING, NET_FAST, NET_DEAD };

struct net {
    const struct params *params;
    struct event_base *base;
    struct wires wires;
    struct metrics *metrics;
    struct access *access;
    service *service;
    void *fronts[FRONT_COUNT];
    int signal_fd, wake_fd;
    pid_t launcher; /* mpirun, or its daemon on this host; 0: none */
    struct event *on_signal, *on_wake, *on_up, *poll;
    thrd_t thread;
    bool started;
    /* net thread */
    enum net_phase phase;
    double deadline; /* of the phase */
    bool stop_sent, aborting;
    /* set by the main thread, then wake_fd is rung */
    _Atomic bool joining, dying, died, dead_written;
    char death[FAULT_TEXT_BYTES];
};

/* ---- leaving ---- */

static bool is_busy(const net *n) {
    for (int i = 0; i < FRONT_COUNT; i++) {
        if (n->fronts[i] && fronts[i]->busy(n->fronts[i])) return true;
    }
    return false;
}

static void poll_soon(net *n) {
    const struct timeval soon = {.tv_usec = POLL_MS * 1000};
    evtimer_add(n->poll, &soon);
}

static void enter(net *n, enum net_phase phase, double seconds) {
    n->phase = phase;
    n->deadline = service_clock() + seconds;
    poll_soon(n);
}

static void stop_engine(net *n, double seconds) {
    if (n->stop_sent) return;
    struct down_message *m = mailbox_reserve(n->wires.down, sizeof *m);
    *m = (struct down_message){.kind = DOWN_STOP};
    mailbox_commit(n->wires.down, sizeof *m);
    mailbox_flush(n->wires.down);
    n->stop_sent = true;
    enter(n, NET_STOPPING, seconds);
}

static void leave_at_once(int code) {
    /* No finalizers: other threads run, and the launcher ends the other ranks. */
    _exit(code);
}

/* Called whenever something may have become complete. */
static void go_on(net *n) {
    const double now = service_clock();
    switch (n->phase) {
        case NET_SERVING:
            if (service_get_state(n->service) == SERVICE_DRAINING && !service_is_busy(n->service)) {
                stop_engine(n, FORCE_SECONDS);
            } else if (service_get_state(n->service) == SERVICE_DRAINING) {
                poll_soon(n);
            }
            return;
        case NET_STOPPING:
            if (atomic_load(&n->joining) &&
                (!is_busy(n) ||
                 now > n->deadline + (n->aborting ? LAST_FLUSH_SECONDS : FLUSH_SECONDS))) {
                event_base_loopbreak(n->base);
            } else if (!atomic_load(&n->joining) && now > n->deadline) {
                log_error("the engine did not stop: leaving without it");
                leave_at_once(STATUS_PARTIAL);
            }
            break;
        case NET_FAST:
            if (!is_busy(n) || now > n->deadline) leave_at_once(STATUS_PARTIAL);
            break;
        case NET_DEAD:
            if (!is_busy(n) || now > n->deadline) atomic_store(&n->dead_written, true);
            break;
    }
    poll_soon(n);
}

static void on_poll(evutil_socket_t fd, short what, void *user) {
    (void)fd;
    (void)what;
    go_on(user);
}

void net_drain(net *n) {
    if (service_get_state(n->service) != SERVICE_READY) return;
    notify_supervisor("STOPPING=1");
    service_drain(n->service);
    for (int i = 0; i < FRONT_COUNT; i++) {
        if (n->fronts[i] && fronts[i]->drain) fronts[i]->drain(n->fronts[i]);
    }
    poll_soon(n); /* not at once: whoever asked is answered first */
}

static void abort_drain(net *n) {
    if (n->aborting) return;
    n->aborting = true;
    log_warn("a second signal: %d requests are aborted", service_calls(n->service));
    service_end_all(n->service, REFUSAL_DRAINING, "the server is shutting down");
    n->stop_sent = false;
    stop_engine(n, FAILSAFE_SECONDS);
}

/* ---- signals ---- */

/* Its stop, or (PR_SET_PDEATHSIG) its death. */
static bool is_from_launcher(const net *n, const struct signalfd_siginfo *s) {
    return n->launcher && s->ssi_signo != SIGUSR1 &&
           ((pid_t)s->ssi_pid == n->launcher || getppid() != n->launcher);
}

static void on_signal(evutil_socket_t fd, short what, void *user) {
    net *n = user;
    struct signalfd_siginfo s;
    (void)what;
    while (read(fd, &s, sizeof s) == (ssize_t)sizeof s) {
        const enum service_state state = service_get_state(n->service);
        if (state == SERVICE_LOADING) {
            log_warn("stopped by signal %d while loading", (int)s.ssi_signo);
            leave_at_once(STATUS_PARTIAL);
        } else if (is_from_launcher(n, &s)) {
            log_warn("the launcher stops this job at step %llu: %d requests are aborted",
                     (unsigned long long)atomic_load(&n->wires.step), service_calls(n->service));
            service_end_all(n->service, REFUSAL_DRAINING, "the server is shutting down");
            enter(n, NET_FAST, FAST_SECONDS);
        } else if (state == SERVICE_READY) {
            net_drain(n);
        } else {
            abort_drain(n);
        }
    }
}

void net_block_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGPIPE);
    sigprocmask(SIG_BLOCK, &set, NULL);
}

/* ---- the main thread and the engine ---- */

static void on_wake(evutil_socket_t fd, short what, void *user) {
    net *n = user;
    uint64_t count;
    (void)what;
    if (read(fd, &count, sizeof count) < 0) return;
    if (atomic_load(&n->died) && n->phase != NET_DEAD) {
        metric_add(n->metrics, METRIC_timeouts, 0, 1);
        service_die(n->service, n->death);
        enter(n, NET_DEAD, FAST_SECONDS);
    }
    if (atomic_load(&n->joining)) {
        if (service_get_state(n->service) == SERVICE_LOADING) event_base_loopbreak(n->base);
        go_on(n);
    }
}

static void on_up(evutil_socket_t fd, short what, void *user) {
    net *n = user;
    (void)fd;
    (void)what;
    service_read(n->service);
    for (int i = 0; i < FRONT_COUNT; i++) {
        if (n->fronts[i] && fronts[i]->flush) fronts[i]->flush(n->fronts[i]);
    }
    if (n->phase != NET_SERVING || service_get_state(n->service) == SERVICE_DRAINING) go_on(n);
}

static void ring(const net *n) {
    const uint64_t one = 1;
    (void)!write(n->wake_fd, &one, sizeof one);
}

/* ---- ready ---- */

static void on_state(void *user, enum service_state state) {
    net *n = user;
    char where[256] = "";
    const bool bare_v6 = strchr(n->params->host, ':') && *n->params->host != '[';
    if (state != SERVICE_READY) return;
    for (int i = 0; i < FRONT_COUNT; i++) {
        if (!n->fronts[i]) continue;
        const size_t at = strlen(where);
        snprintf(where + at, sizeof where - at, "%s%s%s://%s%.100s%s:%d", i ? ", " : "",
                 fronts[i]->name, n->params->ssl_certfile ? "s" : "", bare_v6 ? "[" : "",
                 n->params->host, bare_v6 ? "]" : "", fronts[i]->port(n->fronts[i]));
    }
    log_info("serving %s at %s", service_model_name(n->service), where);
    notify_supervisor("READY=1");
}

/* ---- life ---- */

/* One descriptor a connection, and some. */
static void raise_file_limit(const struct params *p) {
    struct rlimit limit;
    const rlim_t fronts_open = param_given(p, PARAM_grpc_port) ? 2 : 1;
    const rlim_t wanted = fronts_open * (rlim_t)p->max_connections + 512;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < wanted) {
        log_warn(
            "only %llu file descriptors are allowed, --max-connections %lld needs %llu: raise "
            "ulimit -n",
            (unsigned long long)limit.rlim_cur, (long long)p->max_connections,
            (unsigned long long)wanted);
    }
}

static enum status open_events(net *n) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    n->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    n->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    const short often = EV_READ | EV_PERSIST;
    n->on_signal = event_new(n->base, n->signal_fd, often, on_signal, n);
    n->on_wake = event_new(n->base, n->wake_fd, often, on_wake, n);
    n->on_up = event_new(n->base, mailbox_fd(n->wires.up), often, on_up, n);
    n->poll = evtimer_new(n->base, on_poll, n);
    if (n->signal_fd < 0 || n->wake_fd < 0 || !n->on_signal || !n->on_wake || !n->on_up ||
        !n->poll || event_add(n->on_signal, NULL) || event_add(n->on_wake, NULL) ||
        event_add(n->on_up, NULL)) {
        return fail(STATUS_MEMORY, "no memory or no file descriptors for the event loop");
    }
    return STATUS_OK;
}

enum status net_open(const struct params *params, const char *model_name, int ranks, net **out) {
    enum status status;
    *out = NULL;
    mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES_MIN);
    net *n = calloc(1, sizeof *n);
    if (!n) return fail(STATUS_MEMORY, "no memory for the service");
    n->params = params;
    n->signal_fd = n->wake_fd = -1;
    if (getenv("OMPI_COMM_WORLD_SIZE")) {
        n->launcher = getppid();
        prctl(PR_SET_PDEATHSIG, SIGTERM);
    }
    raise_file_limit(params);
    n->base = event_base_new();
    if (!n->base) TRY_GOTO(fail(STATUS_MEMORY, "no event loop"), out);
    TRY_GOTO(wires_open(&n->wires, (int)(params->max_num_seqs + params->max_num_queued_reqs)), out);
    const struct metrics_options options = {.model_name = model_name,
                                            .prefix = params->metrics_prefix,
                                            .handlers = http_handlers(),
                                            .methods = grpc_methods(),
                                            .ranks = ranks,
                                            .vllm = params->metrics_compat == 1};
    TRY_GOTO(metrics_new(&options, &n->metrics), out);
    TRY_GOTO(access_new(params, &n->access), out);
    TRY_GOTO(service_new(n->base, params, &n->wires, n->metrics, &n->service), out);
    service_watch(n->service, on_state, n);
    TRY_GOTO(open_events(n), out);
    const struct front_site site = {n->base, n->service, n->access, n->metrics, params, n};
    for (int i = 0; i < FRONT_COUNT; i++) TRY_GOTO(fronts[i]->open(&site, &n->fronts[i]), out);
    *out = n;
    return STATUS_OK;
out:
    net_free(n);
    return status;
}

static int run(void *user) {
    net *n = user;
    event_base_loop(n->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return 0;
}

enum status net_start(net *n) {
    if (thrd_create(&n->thread, run, n) != thrd_success) {
        return fail(STATUS_MEMORY, "the system gives no thread for the service");
    }
    n->started = true;
    return STATUS_OK;
}

struct wires *net_wires(net *n) {
    return &n->wires;
}
struct metrics *net_metrics(net *n) {
    return n->metrics;
}

int net_port(const net *n) { return fronts[0]->port(n->fronts[0]); }

void net_progress(net *n, double ratio) {
    atomic_store_explicit(&n->wires.load_permille, (int)(1000 * ratio), memory_order_relaxed);
}

void net_ready(net *n, const struct body_facts *facts) {
    up_ready(n->wires.up, facts);
    mailbox_flush(n->wires.up);
}

void net_engine_died(net *n, int exit_code, const char *text) {
    enum { WAIT_MS = 600 };
    if (!atomic_exchange(&n->dying, true)) { /* two threads may find out at once */
        snprintf(n->death, sizeof n->death, "the engine stopped (status %d): %.900s", exit_code,
                 text);
        atomic_store(&n->died, true);
        ring(n);
    }
    for (int ms = 0; n->started && ms < WAIT_MS && !atomic_load(&n->dead_written); ms += POLL_MS) {
        thrd_sleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000}, NULL);
    }
}

bool net_is_this_thread(const net *n) {
    return n->started && thrd_equal(n->thread, thrd_current());
}

bool net_join(net *n) {
    if (n->started) {
        atomic_store(&n->joining, true);
        ring(n);
        thrd_join(n->thread, NULL);
        n->started = false;
    }
    return service_aborted_any(n->service);
}

void net_free(net *n) {
    if (!n) return;
    for (int i = FRONT_COUNT - 1; i >= 0; i--) {
        if (n->fronts[i]) fronts[i]->close(n->fronts[i]);
    }
    service_free(n->service);
    access_free(n->access);
    metrics_free(n->metrics);
    struct event *events[] = {n->on_signal, n->on_wake, n->on_up, n->poll};
    for (int i = 0; i < 4; i++) {
        if (events[i]) event_free(events[i]);
    }
    if (n->signal_fd >= 0) close(n->signal_fd);
    if (n->wake_fd >= 0) close(n->wake_fd);
    wires_close(&n->wires);
    if (n->base) event_base_free(n->base);
    free(n);
}
