/* service.h: the protocol-independent core of the service (serving.md §6, §8), on the net thread.
 *
 *   HTTP, gRPC ─► service_call ─► admission ─► (prompts.h) ─► tickets ══down══► worker ─► engine
 *       ▲                                                                    │
 *       └─ front: step, finish, end ◄─ replies ◄─ tickets ◄══up══ events ◄───┘
 *
 * A *call* is one generation request of one client: a parsed body, one reply per choice (prompts x
 * n), and a front, the table of functions by which a protocol hears of it. A *ticket* is one engine
 * request (one prompt) of a call; it lives until the engine has acknowledged the end of all its
 * sequences, so admission counts what the engine really holds, also after a client has gone.
 *
 * Owns: the state (loading, ready, draining, dead), admission, ids, deadlines, cancels, counters,
 * the fan-out of events. Refuses to know: sockets, HTTP, JSON of replies, protobuf. Thread: net
 * thread, all of it; other threads only talk through mailboxes (messages.h). Memory: malloc per
 * call; two mailboxes of fixed size. The service never blocks.
 *
 * Rules a front can rely on:
 *   - no function of the front runs inside service_call;
 *   - step* (finish) per choice, then exactly one end, which is the last; the call is gone after it;
 *   - after call_cancel nothing more comes, not even end, and the call must not be touched again;
 *   - inside any front function call_cancel(own call) is allowed; the function then returns at once;
 *   - all that is passed in is borrowed until the function returns.
 *
 * A failed ASSERT of another thread is told to clients as engine_dead. One on this thread is not: what it
 * would have to walk to tell them is what no longer holds. The process ends at once with status 7 and
 * without a word on any connection; clients see them close without [DONE] or trailers (a retry is theirs
 * to make), the launcher ends the other ranks, and the supervisor starts the job again.
 */
#ifndef SFUMATO_SERVE_SERVICE_H
#define SFUMATO_SERVE_SERVICE_H

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/time.h>

#include "base/params.h"
#include "serve/body.h"
#include "serve/messages.h"
#include "serve/metrics.h"
#include "serve/refusal.h"
#include "serve/reply.h"

typedef struct service service;
typedef struct call call;

enum { SERVICE_ID_BYTES = 129 }; /* a request id of 1..128 characters, and NUL */

enum service_state { SERVICE_LOADING, SERVICE_READY, SERVICE_DRAINING, SERVICE_DEAD };
const char *service_state_name(enum service_state s); /* "loading", "ok", "draining", "dead" */

double service_clock(void); /* seconds, monotonic */
/* As libevent takes a time to wait. */
struct timeval service_wait(double seconds);

/* ---- life ---- */

/* params, wires and metrics outlive the service. */
enum status service_new(struct event_base *base, const struct params *params, struct wires *wires,
                        struct metrics *metrics, service **out);
void service_free(service *s);

enum service_state service_get_state(const service *s);
double service_load_progress(const service *s); /* 0..1 */
/* Called at every change of state, on the net thread (gRPC health Watch). At most 4 watchers. */
void service_watch(service *s, void (*changed)(void *user, enum service_state state), void *user);

/* NULL while loading. What tokenize, models and templates need; borrowed for the service's life. */
const struct body_facts *service_facts(const service *s);
/* "sfumato-<version>-<8 hex>"; "" while loading. */
const char *service_fingerprint(const service *s);
const char *service_model_name(const service *s);

/* Ready -> draining: new calls are refused, running ones end. Idempotent. */
void service_drain(service *s);
/* Ends every call, and whatever waits for a prompt, now with this refusal (second signal, timeout of the
 * drain, fast stop, watchdog). No new ones come after it. */
void service_end_all(service *s, enum refusal why, const char *text);
/* Watchdog: no call is taken any more, all end with engine_dead. */
void service_die(service *s, const char *text);
int service_calls(const service *s); /* not ended yet, as clients see it */
/* Calls, sequences that the engine holds, prompts being made: what a drain waits for. */
bool service_is_busy(const service *s);
bool service_aborted_any(const service *s); /* a call was ended by service_end_all or service_die */
/* For templates and texts outside of calls. */
struct prompter *service_prompter(const service *s);
/* This thread's last failure as clients are told, --overload-status included. */
struct refused service_refused(const service *s);
/* Up messages, when net.c sees the mailbox's file descriptor readable. */
void service_read(service *s);
/* Gauges that are computed when somebody looks. */
void service_refresh_metrics(service *s);

/* ---- calls ---- */

/* What a protocol hears of its call. */
struct call_front {
    /* One step of one choice. delta: what became visible (may be empty); event: the raw step, for
     * ids, logprobs and traces of protocols that do not use the JSON rendered by reply.h. The reply
     * (call_reply) has counted it already. */
    void (*step)(void *user, call *c, int choice, const struct engine_event *event,
                 const struct stream_delta *delta);
    /* A choice is complete; last: text that was held back. reply_summarise has its numbers. */
    void (*finish)(void *user, call *c, int choice, const struct stream_delta *last);
    /* One position of prompt `prompt` was scored (echo with logprobs): event->position, top,
     * next_logprob. In order of positions, before the prompt's choices finish. NULL: never asked. */
    void (*scored)(void *user, call *c, int prompt, const struct engine_event *event);
    /* why NULL: every choice is complete. The call is gone when this returns. */
    void (*end)(void *user, call *c, const struct refused *why);
};

enum call_kind { CALL_CHAT, CALL_COMPLETION, CALL_EITHER };

struct call_options {
    /* The request: JSON text, or (when text is NULL) a tree whose reference is taken over. */
    const char *text;
    size_t n;
    json_t *root;
    enum call_kind kind;    /* which of messages and prompt it must have */
    const char *request_id; /* valid (service_request_id) */
    const char *trace_id;   /* of traceparent, for the log; NULL or "" */
    double timeout_seconds; /* grpc-timeout; 0: the body's timeout_s and --request-timeout alone */
    bool fills_context;     /* max_tokens left out means what fits, whatever the defaults are */
    const struct call_front *front;
    void *user;
};

/* Parses, validates and admits a request, whole or not at all. NULL: refused, *why says how. What
 * is found out only when its prompts have been made (prompts.h) comes as its end. */
call *service_call(service *s, const struct call_options *options, struct refused *why);

/* How far behind a stream's reader is. Zero at first. */
struct service_pace {
    double over_since; /* in the loop's own time; 0: it is not behind */
};
/* The rule for slow readers of all protocols (serving.md §6), asked before each event: true when more
 * than --stream-buffer was left unsent before it, and has been while the loop had PATIENCE_SECONDS to
 * get rid of it. A loop that did not come round for a while (a burst of the engine, a busy machine) and
 * a peer that must first open its window make nobody slow; what may wait meanwhile has a limit too. */
bool service_too_slow(const service *s, struct service_pace *pace, size_t unsent);

enum call_gone { CALL_DISCONNECTED, CALL_SLOW_READER };
/* The client is gone. Steps stop within two; pages are free then. */
void call_cancel(call *c, enum call_gone reason);
/* Ends a call of another client connection by its request id (gRPC Abort): its front gets
 * end(REFUSAL_CANCELLED). False: there is none. */
bool service_abort(service *s, const char *request_id);

const struct body *call_body(const call *c);
reply *call_reply(const call *c, int choice); /* choice = prompt * n + index */
int call_choice_count(const call *c);
const char *call_request_id(const call *c);
const char *call_id(const call *c);  /* 32 hex digits, of the reply: "chatcmpl-ID" */
int64_t call_created(const call *c); /* seconds since 1970 */
bool call_streams(const call *c);
/* Sums over choices, each prompt counted once. */
struct request_usage call_usage(const call *c);

/* "X-Request-Id" of a client when it is 1..128 of [A-Za-z0-9._-], else 32 random hex digits. */
void service_request_id(const char *given, char out[SERVICE_ID_BYTES]);
void service_random_hex(char out[33]);
/* The trace id of a W3C traceparent, or "". */
void service_trace_id(const char *traceparent, char out[33]);

/* ---- numbers for health, metrics, GetLoads ---- */

struct service_load {
    int running, waiting, running_max, queue_max; /* sequences */
    int64_t tokens_used, tokens_max;              /* of the KV cache */
    double uptime_seconds;
};
void service_load_get(const service *s, struct service_load *out);

#endif
