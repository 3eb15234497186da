/* serve.c: how fast the service is in front of an engine that costs nothing (issue: front-end speed).
 *
 *   client process (epoll, loopback) ─► net thread ─► fake engine thread ─► net thread ─► client
 *
 *   1. small requests: C keep-alive connections, one step each              requests/s
 *   2. streams: S at once, steps as fast as they go                         events/s
 *   3. paced streams: a step of every stream each 10 ms; from the moment the engine has the step to
 *      the moment the client has read its event                             ms a token
 *      and, before it, the floor: the same number of bytes from a bare loop of send(2), which has the
 *      messages ready and knows nothing of HTTP, to the same client; cpu: of the server without the
 *      engine, a token
 *   4. resident memory of the server alone: before, with C idle connections, with S streams
 *
 * The fake engine speaks the messages of serve/messages.h, so everything but the model is the real
 * thing: HTTP, JSON, template, tokenizer, admission, text, events. The client is a process of its own,
 * forked first: what it costs is not the server's. Prints the figures beside their goals.
 * Usage: bench_serve [SECONDS], default 3 per part.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#include "cmd/host.h"
#include "serve/net.h"

enum {
    STREAMS_MAX = 256,
    CONNECTIONS = 64,
    IDLE_CONNECTIONS = 1000,
    PACE_STEPS = 200,
    BUFFER = 1 << 16
};
enum { PACE_NS = 10 * 1000 * 1000 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double cpu_seconds(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) != 0) return 0;
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void pace(void) { thrd_sleep(&(struct timespec){.tv_nsec = PACE_NS}, NULL); }

/* Seen by both processes. */
static struct shared {
    _Atomic int port; /* 0: not yet, < 0: the server did not start */
    _Atomic bool paced;
    _Atomic double engine_cpu; /* seconds of the fake engine's thread */
    double sent[STREAMS_MAX][PACE_STEPS];
} * shared;

/* ---- the fake engine ---- */

struct live {
    uint64_t id;
    int64_t left, made;
    uint64_t stream; /* request's seed: which stream of the client it is */
};
static struct {
    struct wires *wires;
    net *net;
    const struct body_facts *facts;
    struct live live[IDLE_CONNECTIONS];
    int live_count;
} fake;

static void finish(uint64_t id, enum finish why) {
    const struct engine_event end = {.kind = ENGINE_FINISHED, .request_id = id, .finish = why};
    up_event(fake.wires->up, &end);
}

static void step(struct live *l) {
    struct think_decision d = {.trace_id = 300, .phase = PHASE_ANSWER, .p = 1, .count = 1};
    struct engine_event e = {.kind = ENGINE_STEP, .request_id = l->id, .decision = &d};
    e.step = (uint32_t)l->made;
    if (shared->paced && l->stream < STREAMS_MAX && l->made < PACE_STEPS) {
        shared->sent[l->stream][l->made] = now();
    }
    up_event(fake.wires->up, &e);
    l->made++;
    l->left--;
}

static void drop(int i) { fake.live[i] = fake.live[--fake.live_count]; }

static bool obey(const struct down_message *m) {
    if (m->kind == DOWN_STOP) return false;
    if (m->kind == DOWN_CANCEL) {
        for (int i = 0; i < fake.live_count; i++) {
            if (fake.live[i].id != m->id) continue;
            finish(m->id, FINISH_REASON_ABORT);
            drop(i);
            break;
        }
        return true;
    }
    task_free(m->task);
    ASSERT_LT(fake.live_count, IDLE_CONNECTIONS);
    fake.live[fake.live_count++] =
        (struct live){m->request->id, m->request->max_tokens, 0, m->request->think.seed};
    return true;
}

static int engine_thread(void *unused) {
    (void)unused;
    net_ready(fake.net, fake.facts);
    for (;;) {
        const struct down_message *m;
        size_t n;
        while ((m = mailbox_peek(fake.wires->down, &n)) != NULL) {
            const bool go_on = obey(m);
            mailbox_pop(fake.wires->down);
            if (!go_on) return 0;
        }
        for (int i = fake.live_count - 1; i >= 0; i--) {
            if (fake.live[i].left > 0) step(&fake.live[i]);
            if (fake.live[i].left > 0) continue;
            finish(fake.live[i].id, FINISH_REASON_LENGTH);
            drop(i);
        }
        mailbox_flush(fake.wires->up);
        shared->engine_cpu = cpu_seconds(CLOCK_THREAD_CPUTIME_ID);
        if (fake.live_count == 0) {
            mailbox_wait(fake.wires->down, -1);
        } else if (shared->paced) {
            pace();
        }
    }
}

/* ---- the client ---- */

struct peer {
    int fd, index;
    int64_t events;
    char bytes[BUFFER];
    size_t n;
};
static struct {
    int port, epoll;
    struct peer *peers;
    double *latencies;
    size_t latency_count, latency_max;
} client;

static void open_peers(int count) {
    client.epoll = epoll_create1(EPOLL_CLOEXEC);
    client.peers = calloc((size_t)count, sizeof *client.peers);
    for (int i = 0; i < count; i++) {
        const struct sockaddr_in to = {.sin_family = AF_INET,
                                       .sin_port = htons((uint16_t)client.port),
                                       .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        const int on = 1;
        struct peer *p = &client.peers[i];
        p->index = i;
        p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(p->fd, (const struct sockaddr *)&to, sizeof to) != 0) exit(1);
        setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = p};
        epoll_ctl(client.epoll, EPOLL_CTL_ADD, p->fd, &e);
    }
}

static void close_peers(int count) {
    for (int i = 0; i < count; i++) close(client.peers[i].fd);
    free(client.peers);
    close(client.epoll);
}

static void send_request(struct peer *p, int steps, bool streaming) {
    char body[256], text[512];
    const int n =
        snprintf(body, sizeof body,
                 "{\"prompt\":\"Tom has\",\"max_tokens\":%d,\"ignore_eos\":true,\"seed\":%d,"
                 "\"stream\":%s}",
                 steps, p->index, streaming ? "true" : "false");
    const int m = snprintf(text, sizeof text,
                           "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                           "application/json\r\nContent-Length: %d\r\n\r\n%s",
                           n, body);
    if (write(p->fd, text, (size_t)m) != m) exit(1);
}

/* Takes what has come. Returns true when an answer is complete; counts events on the way. */
static bool take(struct peer *p, bool streaming) {
    const ssize_t got = read(p->fd, p->bytes + p->n, sizeof p->bytes - p->n - 1);
    const double at = now();
    if (got <= 0) {
        fprintf(stderr, "connection %d: %s\n", p->index, got ? strerror(errno) : "closed");
        exit(1);
    }
    p->n += (size_t)got;
    p->bytes[p->n] = '\0';
    if (!streaming) {
        const char *head = strstr(p->bytes, "\r\n\r\n"),
                   *length = strstr(p->bytes, "Content-Length: ");
        if (!head || !length) return false;
        if (p->n < (size_t)(head - p->bytes) + 4 + (size_t)atoi(length + 16)) return false;
        if (strncmp(p->bytes + 9, "200", 3) != 0) {
            fprintf(stderr, "%s\n", p->bytes);
            exit(1);
        }
        p->n = 0;
        return true;
    }
    char *begin = p->bytes, *end;
    bool done = false;
    while ((end = strstr(begin, "\n\n")) != NULL) {
        *end = '\0';
        if (strstr(begin, "[DONE]")) done = true;
        if (strstr(begin, "data: {")) {
            if (shared->paced && p->events < PACE_STEPS &&
                client.latency_count < client.latency_max) {
                client.latencies[client.latency_count++] = at - shared->sent[p->index][p->events];
            }
            p->events++;
        }
        begin = end + 2;
    }
    p->n = (size_t)(p->bytes + p->n - begin);
    memmove(p->bytes, begin, p->n);
    return done;
}

/* Runs `peers` connections for some seconds (0: one answer each); returns answers, *events. */
static int64_t run(int peers, int steps, bool streaming, double seconds, int64_t *events) {
    struct epoll_event ready[64];
    int64_t answers = 0;
    int running = peers;
    const double until = now() + seconds;
    open_peers(peers);
    for (int i = 0; i < peers; i++) send_request(&client.peers[i], steps, streaming);
    while (running > 0) {
        const int n = epoll_wait(client.epoll, ready, 64, 10000);
        if (n <= 0) exit(1);
        for (int i = 0; i < n; i++) {
            struct peer *p = ready[i].data.ptr;
            if (!take(p, streaming)) continue;
            answers++;
            if (now() < until) {
                send_request(p, steps, streaming);
            } else {
                running--;
            }
        }
    }
    for (int i = 0; i < peers && events; i++) *events += client.peers[i].events;
    close_peers(peers);
    return answers;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ---- the floor ---- */

/* Sends what the server would send, message by message, to `count` clients that have said something. */
static int floor_thread(void *user) {
    static const char end[] = "data: [DONE]\n\n";
    const int count = *(const int *)((void **)user)[0], listener = *(const int *)((void **)user)[1];
    char event[320], request[512];
    int fds[STREAMS_MAX];
    memset(event, ' ', sizeof event);
    memcpy(event, "data: {", 7);
    memcpy(event + sizeof event - 2, "\n\n", 2);
    for (int i = 0; i < count; i++) {
        const int on = 1;
        fds[i] = accept(listener, NULL, NULL);
        setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (fds[i] < 0) exit(1);
    }
    for (int i = 0; i < count; i++) {
        if (read(fds[i], request, sizeof request) <= 0) exit(1);
    }
    for (int k = 0; k < PACE_STEPS; k++) {
        for (int i = 0; i < count; i++) shared->sent[i][k] = now();
        for (int i = 0; i < count; i++) {
            if (send(fds[i], event, sizeof event, 0) < 0) exit(1);
        }
        pace();
    }
    for (int i = 0; i < count; i++) {
        if (send(fds[i], end, sizeof end - 1, 0) < 0) exit(1);
    }
    for (int i = 0; i < count; i++) {
        while (read(fds[i], request, sizeof request) > 0) continue; /* until the client is done */
        close(fds[i]);
    }
    return 0;
}

/* ---- figures ---- */

static double resident_mb(void) { /* of the server */
    char path[64];
    long pages = 0, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)getppid());
    FILE *file = fopen(path, "re");
    if (!file || fscanf(file, "%ld %ld", &pages, &resident) != 2) resident = 0;
    if (file) fclose(file);
    return (double)resident * 4096e-6;
}

struct latency {
    double median_ms, p99_ms;
};

/* A paced run over `streams` connections to the server, or to a bare loop. */
static struct latency paced(int streams, bool bare) {
    const int port = client.port;
    int listener = -1;
    thrd_t sender;
    void *given[] = {&streams, &listener};
    if (bare) {
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        socklen_t n = sizeof at;
        listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (bind(listener, (struct sockaddr *)&at, n) || listen(listener, STREAMS_MAX)) exit(1);
        getsockname(listener, (struct sockaddr *)&at, &n);
        client.port = ntohs(at.sin_port);
        if (thrd_create(&sender, floor_thread, given) != thrd_success) exit(1);
    }
    client.latency_count = 0;
    shared->paced = true;
    run(streams, PACE_STEPS, true, 0, NULL);
    shared->paced = false;
    if (bare) {
        thrd_join(sender, NULL);
        close(listener);
        client.port = port;
    }
    const size_t n = client.latency_count;
    qsort(client.latencies, n, sizeof *client.latencies, by_value);
    return (struct latency){1e3 * client.latencies[n / 2], 1e3 * client.latencies[n * 99 / 100]};
}

static void measure_paced(clockid_t server) {
    client.latency_max = (size_t)STREAMS_MAX * PACE_STEPS;
    client.latencies = calloc(client.latency_max, sizeof *client.latencies);
    for (int streams = 1; streams <= STREAMS_MAX; streams *= 16) {
        const struct latency bare = paced(streams, true);
        const double before = cpu_seconds(server) - shared->engine_cpu;
        const struct latency real = paced(streams, false);
        const double cpu = cpu_seconds(server) - shared->engine_cpu - before;
        printf(
            "added per token   %8.3f ms median, %.3f ms p99 over %3d streams; bare sends %.3f, "
            "%.3f "
            "(ratio %.1f); cpu %.1f us a token%s\n",
            real.median_ms, real.p99_ms, streams, bare.median_ms, bare.p99_ms,
            real.median_ms / bare.median_ms, 1e6 * cpu / (streams * (double)PACE_STEPS),
            streams <= 16 ? "   (goal 0.2 median)" : "");
    }
    free(client.latencies);
}

static void measure(double seconds) {
    clockid_t server;
    double begin = now();
    if (clock_getcpuclockid(getppid(), &server) != 0) exit(1);
    const double at_first = resident_mb();
    const int64_t requests = run(CONNECTIONS, 1, false, seconds, NULL);
    printf("small requests    %8.0f /s over %d connections   (goal 20000)\n",
           (double)requests / (now() - begin), CONNECTIONS);
    const double before = resident_mb();
    int64_t events = 0;
    begin = now();
    run(STREAMS_MAX, 200, true, seconds, &events);
    const double with_streams = resident_mb();
    printf("stream events     %8.0f /s over %d streams       (goal 40000)\n",
           (double)events / (now() - begin), STREAMS_MAX);
    measure_paced(server);
    const double before_idle = resident_mb();
    open_peers(IDLE_CONNECTIONS);
    for (int i = 0; i < IDLE_CONNECTIONS; i++) send_request(&client.peers[i], 1, false);
    for (int i = 0; i < IDLE_CONNECTIONS; i++) {
        while (!take(&client.peers[i], false)) continue;
    }
    const double with_idle = resident_mb();
    close_peers(IDLE_CONNECTIONS);
    printf(
        "server resident   %8.1f MB at first, %.1f MB before the streams, %.1f MB after %d: %.0f "
        "KB a "
        "stream   (goal 30 MB + 64 KB a stream)\n",
        at_first, before, with_streams, STREAMS_MAX, 1e3 * (with_streams - before) / STREAMS_MAX);
    printf("                  %8.1f MB before, %.1f MB with %d kept connections: %.1f KB each\n",
           before_idle, with_idle, IDLE_CONNECTIONS,
           1e3 * (with_idle - before_idle) / IDLE_CONNECTIONS);
}

static void drain_server(void) { kill(getppid(), SIGUSR1); }

static void client_process(double seconds) {
    while (shared->port == 0) usleep(10 * 1000);
    if (shared->port < 0) exit(1);
    atexit(drain_server);
    client.port = shared->port;
    usleep(200 * 1000);
    measure(seconds);
}

static enum status command_run(struct host *h) {
    (void)h;
    return STATUS_OK;
}

int main(int argc, char **argv) {
    static char *options[] = {"serve",
                              "--port",
                              "0",
                              "--quiet",
                              "--max-num-seqs",
                              "512",
                              "--max-num-queued-reqs",
                              "1024",
                              "--max-connections",
                              "2048",
                              NULL};
    static const struct command command = {"serve", PARAMS_SERVE, "", "", command_run, NULL};
    struct host host = {0};
    enum status status;
    thrd_t engine_id;
    int ended = 0;
    net_block_signals();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return 1;
    const pid_t peer = fork();
    if (peer == 0) {
        client_process(argc > 1 ? atof(argv[1]) : 3);
        exit(0);
    }
    TRY_GOTO(host_join(&host, &command, 10, options), out);
    TRY_GOTO(host_open_text(&host), out);
    TRY_GOTO(net_open(&host.params, host.model_name, 1, &fake.net), out);
    fake.wires = net_wires(fake.net);
    fake.facts = &host.facts;
    TRY_GOTO(net_start(fake.net), out);
    if (thrd_create(&engine_id, engine_thread, NULL) != thrd_success) return 1;
    shared->port = net_port(fake.net);
    thrd_join(engine_id, NULL);
    net_join(fake.net);
out:
    if (shared->port == 0) shared->port = -1;
    waitpid(peer, &ended, 0);
    net_free(fake.net);
    status = host_leave(&host, status);
    return status != STATUS_OK ? (int)status : ended != 0;
}
