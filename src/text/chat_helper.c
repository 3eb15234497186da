/* chat_helper.c: the process that runs Jinja templates, and the line protocol to it.
 *
 *   rank 0 ── socket pair ── python3 -I -c CHAT_HELPER_PY     (one JSON object a line, in turn)
 *
 * A template is a program from a model file: it may loop, grow or try to escape. So it runs in a
 * process of its own, in Python's jinja2 sandbox, under resource limits, with a deadline for every
 * answer; past it the process is killed and the next request starts a new one. Starting takes longer than
 * most renders: one that nobody waits for any more has a moment left before it is killed too. The
 * process inherits no descriptor but the socket, and little of our environment. A thread of it watches
 * the socket: when we die in whatever way, it ends at once, even in the middle of a render. A socket, not
 * pipes, because writing to a dead pipe would raise SIGPIPE. One thread at a time.
 */
#include "text/chat_helper.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "text/chat_helper_py.h"
#include "text/utf8.h"

enum {
    START_SECONDS = 30, /* importing jinja2 from a cold disk on a busy machine */
    ABANDONED_MS = 100,
    MEMORY_MIB = 512,
    ANSWER_BYTES_MAX = 192 << 20, /* escaped JSON of a prompt at its limit */
};

struct chat_helper {
    pid_t pid; /* 0: not running */
    int fd;
    int abandoned_fd; /* an eventfd: readable when nobody waits */
};

static long long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Ends the process and reaps it. It has nothing to lose: SIGKILL. */
static void helper_kill(chat_helper *h) {
    if (h->fd >= 0) close(h->fd);
    h->fd = -1;
    if (h->pid <= 0) return;
    kill(h->pid, SIGKILL);
    while (waitpid(h->pid, NULL, 0) < 0 && errno == EINTR) {
    }
    h->pid = 0;
}

/* Of our environment the process gets what a python3 (or a version manager's script of that name) needs to
 * start, and the time zone: a template that escapes its sandbox finds no API key there. */
static const char *const environment[] = {"PATH", "LD_LIBRARY_PATH", "HOME", "TZ", "TZDIR"};
enum { ENVIRONMENT_COUNT = sizeof environment / sizeof *environment };

static void pick_environment(char *out[ENVIRONMENT_COUNT + 1]) {
    int count = 0;
    for (int i = 0; i < ENVIRONMENT_COUNT; i++) {
        const size_t n = strlen(environment[i]);
        char **e = environ;
        while (*e && (strncmp(*e, environment[i], n) != 0 || (*e)[n] != '=')) e++;
        if (*e) out[count++] = *e;
    }
    out[count] = NULL;
}

static int spawn_python(const char *python, pid_t *pid, int child_fd) {
    char seconds[16], memory[32];
    snprintf(seconds, sizeof seconds, "%d", CHAT_RENDER_SECONDS);
    snprintf(memory, sizeof memory, "%lld", (long long)MEMORY_MIB << 20);
    char *const argv[] = {(char *)python,         "-I",    "-B",   "-c",
                          (char *)CHAT_HELPER_PY, seconds, memory, NULL};
    char *envp[ENVIRONMENT_COUNT + 1];
    pick_environment(envp);
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    if (posix_spawn_file_actions_init(&actions) != 0) return ENOMEM;
    if (posix_spawnattr_init(&attributes) != 0) {
        posix_spawn_file_actions_destroy(&actions);
        return ENOMEM;
    }
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    /* A group of its own: Ctrl-C is for us, it ends when we close the socket. */
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(
        &attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
    int rc = posix_spawn_file_actions_adddup2(&actions, child_fd, 0);
    if (rc == 0) rc = posix_spawn_file_actions_adddup2(&actions, child_fd, 1);
    if (rc == 0) rc = posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
    if (rc == 0) rc = posix_spawn_file_actions_addclosefrom_np(&actions, 3);
    if (rc == 0) rc = posix_spawn(pid, python, &actions, &attributes, argv, envp);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return rc;
}

/* --- lines in and out, before a deadline ----------------------------------------------------- */

struct deadline {
    long long ms;
    bool abandoned; /* ms is sooner than it was */
};

static struct deadline deadline_in(int seconds) {
    return (struct deadline){.ms = now_ms() + seconds * 1000LL};
}

/* False: time is up, or the socket failed. */
static bool wait_for(const chat_helper *h, short events, struct deadline *d) {
    for (;;) {
        const long long now = now_ms();
        if (now >= d->ms) return false;
        struct pollfd p[] = {{.fd = h->fd, .events = events},
                             {.fd = d->abandoned ? -1 : h->abandoned_fd, .events = POLLIN}};
        const int rc = poll(p, 2, (int)(d->ms - now));
        if (rc < 0 && errno != EINTR) return false;
        if (rc <= 0) continue;
        if (p[0].revents) return true; /* hang-up too: the read or write will tell */
        d->abandoned = true;
        if (now_ms() + ABANDONED_MS < d->ms) d->ms = now_ms() + ABANDONED_MS;
    }
}

static bool put_line(const chat_helper *h, const char *bytes, size_t n, struct deadline *d) {
    while (n > 0) {
        const ssize_t sent = send(h->fd, bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            bytes += sent;
            n -= (size_t)sent;
        } else if (sent < 0 && (errno == EAGAIN || errno == EINTR)) {
            if (!wait_for(h, POLLOUT, d)) return false;
        } else {
            return false;
        }
    }
    return true;
}

/* Reads up to and with the newline; the protocol has nothing behind it. */
static bool get_line(const chat_helper *h, struct text_buffer *line, struct deadline *d) {
    for (;;) {
        if (line->n > ANSWER_BYTES_MAX || text_reserve(line, 65536) != STATUS_OK) return false;
        if (!wait_for(h, POLLIN, d)) return false;
        const ssize_t got = recv(h->fd, line->bytes + line->n, 65536, MSG_DONTWAIT);
        if (got == 0) return false;
        if (got < 0 && errno != EAGAIN && errno != EINTR) return false;
        if (got < 0) continue;
        line->n += (size_t)got;
        if (line->bytes[line->n - 1] == '\n') return true;
    }
}

/* --- start, ask, stop ------------------------------------------------------------------------ */

/* False: it is not there, has no jinja2, or did not come up. */
static bool helper_spawn_as(chat_helper *h, const char *python) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return false;
    pid_t pid = 0;
    const int rc = spawn_python(python, &pid, ends[1]);
    close(ends[1]);
    h->fd = ends[0];
    h->pid = rc == 0 ? pid : 0;
    struct text_buffer line = {0};
    struct deadline deadline = deadline_in(START_SECONDS);
    const bool ready = rc == 0 && get_line(h, &line, &deadline);
    if (ready)
        log_debug("chat templates: helper process %d, %.*s", (int)h->pid, (int)line.n - 1,
                  line.bytes);
    else
        helper_kill(h);
    free(line.bytes);
    return ready;
}

/* The first python3 of PATH that has jinja2: in a virtual environment the first one rarely does, but
 * the system's is behind it. */
static bool helper_spawn(chat_helper *h) {
    const char *path = getenv("PATH");
    char file[PATH_MAX];
    for (const char *at = path ? path : "/usr/bin"; *at;) {
        const size_t n = strcspn(at, ":");
        if (n > 0 && n + sizeof "/python3" <= sizeof file) {
            snprintf(file, sizeof file, "%.*s/python3", (int)n, at);
            if (access(file, X_OK) == 0 && helper_spawn_as(h, file)) return true;
        }
        at += n + (at[n] == ':');
    }
    return false;
}

enum status chat_helper_start(chat_helper **out) {
    *out = NULL;
    chat_helper *h = calloc(1, sizeof *h);
    if (h == NULL) return fail(STATUS_MEMORY, "no memory for the chat template helper");
    h->fd = -1;
    h->abandoned_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (h->abandoned_fd < 0) {
        free(h);
        return fail(STATUS_MEMORY, "no file descriptor for the chat template helper");
    }
    if (helper_spawn(h)) {
        *out = h;
        return STATUS_OK;
    }
    log_debug("chat templates: no helper process (python3 with jinja2 is not there)");
    chat_helper_stop(h);
    return STATUS_OK;
}

void chat_helper_abandon(chat_helper *h) {
    const uint64_t one = 1;
    (void)!write(h->abandoned_fd, &one, sizeof one);
}

void chat_helper_expect(chat_helper *h) {
    uint64_t count;
    (void)!read(h->abandoned_fd, &count, sizeof count);
}

void chat_helper_stop(chat_helper *h) {
    if (h == NULL) return;
    helper_kill(h);
    close(h->abandoned_fd);
    free(h);
}

enum status chat_helper_ask(chat_helper *h, const json_t *request, json_t **answer) {
    *answer = NULL;
    if (h->pid == 0 && !helper_spawn(h))
        return fail(
            STATUS_MODEL,
            "the chat template helper does not start again; look at python3 -c 'import jinja2'");
    enum status status = STATUS_OK;
    struct text_buffer line = {0};
    char *text = json_dumps(request, JSON_COMPACT | JSON_ENSURE_ASCII);
    if (text == NULL) return fail(STATUS_MEMORY, "no memory to render a chat template");
    const size_t n = strlen(text);
    text[n] = '\n'; /* in the terminator's place: the length is known */
    struct deadline deadline = deadline_in(CHAT_RENDER_SECONDS);
    if (!put_line(h, text, n + 1, &deadline) || !get_line(h, &line, &deadline)) {
        const bool late = now_ms() >= deadline.ms;
        helper_kill(h);
        status = late ? fail(STATUS_REQUEST, "the chat template took more than %d seconds",
                             CHAT_RENDER_SECONDS)
                      : fail(STATUS_REQUEST, "the chat template used too much time or memory");
        goto out;
    }
    json_error_t error;
    *answer = json_loadb(line.bytes, line.n, JSON_ALLOW_NUL, &error);
    if (!json_is_object(*answer)) {
        json_decref(*answer);
        *answer = NULL;
        helper_kill(h);
        status =
            fail(STATUS_REQUEST, "the chat template gave text that is not valid: %s", error.text);
    }
out:
    free(text);
    free(line.bytes);
    return status;
}
