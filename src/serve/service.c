/* service.c: see service.h. Life, states, the drain, and numbers. */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/log.h"
#include "serve/service_parts.h"

double service_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct timeval service_wait(double seconds) {
    const time_t whole = (time_t)seconds;
    return (struct timeval){whole, (suseconds_t)(1e6 * (seconds - (double)whole))};
}

const char *service_state_name(enum service_state s) {
    static const char *const names[] = {"loading", "ok", "draining", "dead"};
    return names[s];
}

/* ---- life ---- */

static void on_drain_timeout(evutil_socket_t fd, short what, void *user) {
    service *s = user;
    (void)fd;
    (void)what;
    if (!service_is_busy(s)) return;
    log_warn("%d requests did not end within --shutdown-timeout", s->call_count);
    service_end_all(s, REFUSAL_DRAINING, "the server is shutting down");
}

enum status service_new(struct event_base *base, const struct params *params, struct wires *wires,
                        struct metrics *metrics, service **out) {
    *out = NULL;
    service *s = calloc(1, sizeof *s);
    if (!s) return fail(STATUS_MEMORY, "no memory for the service");
    s->base = base;
    s->params = params;
    s->wires = wires;
    s->metrics = metrics;
    s->start = service_clock();
    s->running_max = (int)params->max_num_seqs;
    s->sequences_max = s->running_max + (int)params->max_num_queued_reqs;
    s->ticket_max = s->sequences_max;
    s->tickets = calloc((size_t)s->ticket_max, sizeof *s->tickets);
    s->drain_timer = evtimer_new(base, on_drain_timeout, s);
    if (!s->tickets || !s->drain_timer) {
        service_free(s);
        return fail(STATUS_MEMORY, "no memory for %d sequences: lower --max-num-queued-reqs",
                    s->sequences_max);
    }
    const enum status status = prompter_new(base, metrics, s->sequences_max, &s->prompter);
    if (status != STATUS_OK) {
        service_free(s);
        return status;
    }
    for (int i = 0; i < s->ticket_max; i++) s->tickets[i].next_free = i + 1;
    s->tickets[s->ticket_max - 1].next_free = -1;
    *out = s;
    return STATUS_OK;
}

/* The loop has ended: what is left belongs to calls whose sequences the engine never ended. */
void service_free(service *s) {
    if (!s) return;
    prompter_free(s->prompter);
    while (s->calls) {
        call *c = s->calls;
        for (int i = 0; i < c->ticket_count; i++) {
            if (c->tickets[i] >= 0) call_release_ticket(c, &s->tickets[c->tickets[i]]);
        }
        c->state = CALL_OVER;
        c->busy = false;
        call_free_if_over(c);
    }
    if (s->drain_timer) event_free(s->drain_timer);
    free(s->tickets);
    free(s);
}

/* ---- states ---- */

enum service_state service_get_state(const service *s) { return s->state; }

double service_load_progress(const service *s) {
    if (s->state != SERVICE_LOADING) return 1;
    return 0.001 * atomic_load_explicit(&s->wires->load_permille, memory_order_relaxed);
}

void service_watch(service *s, void (*changed)(void *user, enum service_state state), void *user) {
    ASSERT_LT(s->watcher_count, WATCHERS_MAX);
    s->watchers[s->watcher_count].changed = changed;
    s->watchers[s->watcher_count++].user = user;
}

void service_set_state(service *s, enum service_state state) {
    if (s->state == state) return;
    s->state = state;
    for (int i = 0; i < s->watcher_count; i++) s->watchers[i].changed(s->watchers[i].user, state);
}

void service_drain(service *s) {
    if (s->state != SERVICE_READY) return;
    const struct timeval wait = service_wait(s->params->shutdown_timeout);
    log_info("draining: %d requests are running", s->call_count);
    service_set_state(s, SERVICE_DRAINING);
    evtimer_add(s->drain_timer, &wait);
}

/* Ending one call may free it, or end others through its front: look afresh each time. */
static call *first_live(const service *s) {
    call *c = s->calls;
    while (c && c->state != CALL_LIVE) c = c->next;
    return c;
}

void service_end_all(service *s, enum refusal why, const char *text) {
    struct refused refused = refused_as(why, NULL, "%s", text);
    if (why == REFUSAL_DEAD) refused.http_status = 500; /* it was running: serving.md §5 */
    if (s->state == SERVICE_READY) service_set_state(s, SERVICE_DRAINING);
    for (call *c; (c = first_live(s)) != NULL;) {
        s->aborted_any = true;
        call_end(c, &refused);
    }
    prompter_end_all(s->prompter, &refused);
}

void service_die(service *s, const char *text) {
    service_set_state(s, SERVICE_DEAD);
    service_end_all(s, REFUSAL_DEAD, text);
}

struct prompter *service_prompter(const service *s) {
    return s->prompter;
}

int service_calls(const service *s) { return s->call_count; }
bool service_is_busy(const service *s) {
    return s->call_count > 0 || s->sequence_count > 0 || prompter_count(s->prompter) > 0;
}
bool service_aborted_any(const service *s) { return s->aborted_any; }

struct refused service_refused(const service *s) {
    struct refused why = refused_last();
    if (why.kind == REFUSAL_OVERLOADED && s->params->overload_status == 1) why.http_status = 429;
    return why;
}

/* ---- facts ---- */

const struct body_facts *service_facts(const service *s) { return s->facts; }

const char *service_fingerprint(const service *s) {
    return s->facts && s->facts->fingerprint ? s->facts->fingerprint : "";
}

const char *service_model_name(const service *s) { return s->facts ? s->facts->model_name : ""; }

/* ---- readers ---- */

#define PATIENCE_SECONDS 0.25
enum { OVER_BYTES_MAX = 2 * UP_BYTES }; /* above --stream-buffer: then there is no patience */

bool service_too_slow(const service *s, struct service_pace *pace, size_t unsent) {
    const size_t limit = (size_t)s->params->stream_buffer;
    if (unsent <= limit) {
        pace->over_since = 0;
        return false;
    }
    if (pace->over_since == 0) pace->over_since = s->turning;
    return unsent > limit + OVER_BYTES_MAX || s->turning - pace->over_since > PATIENCE_SECONDS;
}

/* ---- ids ---- */

void service_random_hex(char out[33]) {
    static const char digits[] = "0123456789abcdef";
    unsigned char bytes[16];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes) {
        const uint64_t clock = (uint64_t)(1e9 * service_clock()); /* unique enough for a log */
        memcpy(bytes, &clock, sizeof clock);
    }
    for (int i = 0; i < 16; i++) {
        out[2 * i] = digits[bytes[i] >> 4];
        out[2 * i + 1] = digits[bytes[i] & 15];
    }
    out[32] = '\0';
}

void service_request_id(const char *given, char out[SERVICE_ID_BYTES]) {
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    const size_t n = given ? strlen(given) : 0;
    if (n >= 1 && n < SERVICE_ID_BYTES && strspn(given, allowed) == n) {
        memcpy(out, given, n + 1);
    } else {
        service_random_hex(out);
    }
}

/* version "-" 32 hex "-" 16 hex "-" 2 hex (https://www.w3.org/TR/trace-context/) */
void service_trace_id(const char *traceparent, char out[33]) {
    static const char hex[] = "0123456789abcdef", zeros[] = "00000000000000000000000000000000";
    out[0] = '\0';
    if (!traceparent || strlen(traceparent) < 55 || strspn(traceparent, hex) != 2) return;
    if (traceparent[2] != '-' || strspn(traceparent + 3, hex) != 32 || traceparent[35] != '-')
        return;
    if (strncmp(traceparent + 3, zeros, 32) == 0 || strncmp(traceparent, "ff", 2) == 0) return;
    memcpy(out, traceparent + 3, 32);
    out[32] = '\0';
}

/* ---- numbers ---- */

void service_load_get(const service *s, struct service_load *out) {
    const struct metrics *m = s->metrics;
    const int running = atomic_load_explicit(&s->wires->running, memory_order_relaxed);
    const int page_tokens = s->wires->page_tokens;
    enum { FREE, CACHED, USED };
    const double used = metric_get(m, METRIC_pages, USED);
    const double all =
        used + metric_get(m, METRIC_pages, FREE) + metric_get(m, METRIC_pages, CACHED);
    *out = (struct service_load){
        .running = running < s->sequence_count ? running : s->sequence_count,
        .running_max = s->running_max,
        .queue_max = s->sequences_max - s->running_max,
        .tokens_used = (int64_t)(used * page_tokens),
        .tokens_max = (int64_t)(all * page_tokens),
        .uptime_seconds = service_clock() - s->start,
    };
    out->waiting = s->sequence_count - out->running;
}

void service_refresh_metrics(service *s) {
    struct service_load load;
    service_load_get(s, &load);
    metric_set(s->metrics, METRIC_running, 0, load.running); /* running + waiting = in flight */
    metric_set(s->metrics, METRIC_waiting, 0, load.waiting);
    metric_set(s->metrics, METRIC_load_progress, 0, service_load_progress(s));
    for (int p = 0; p < CHOICE_DONE; p++) {
        metric_set(s->metrics, METRIC_phases, p, s->phase_counts[p]);
    }
}
