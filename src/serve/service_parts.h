/* service_parts.h: what service.c, call.c, events.c and record.c know of one another.
 *
 *   service.c   life, states, drain, numbers
 *   call.c      a request from its text to its last event: admission, tickets, deadline, cancel
 *   events.c    what the engine says ─► replies ─► fronts
 *   record.c    one log line and the metrics of a request that has ended
 */
#ifndef SFUMATO_SERVE_SERVICE_PARTS_H
#define SFUMATO_SERVE_SERVICE_PARTS_H

#include "serve/prompts.h"
#include "serve/service.h"

enum { WATCHERS_MAX = 4 };

/* What a sequence is doing, for the gauge requests_by_phase (its series in this order). */
enum choice_phase { CHOICE_PREFILL, CHOICE_SOFT, CHOICE_HARD_THINK, CHOICE_ANSWER, CHOICE_DONE };

struct choice {
    reply *reply;
    enum choice_phase phase;
    bool stopping; /* a stop string matched; the engine has been told */
    double first, last, thinking_first, thinking_last; /* seconds; 0: not yet */
};

/* One engine request. Its id is serial << 32 | index, so that a late event finds nothing. */
struct ticket {
    uint32_t serial;
    call *call; /* NULL: free */
    int prompt;
    int open_count; /* sequences the engine has not ended */
    bool started;   /* a first event came */
    struct request request;
    struct task *task; /* until the engine has it */
    int next_free;
};

enum call_state {
    CALL_LIVE,
    CALL_OVER, /* the front has heard the end, or is gone; the engine may still hold sequences */
};

struct call {
    struct service *service;
    call *next, *prev;
    enum call_state state;
    bool busy; /* a front function runs: do not free */
    struct body body;
    prompt_job *making; /* its prompts are being made: nothing has gone to the engine; or NULL */
    struct choice *choices; /* [choice_count] */
    int choice_count, open_count;
    int *tickets; /* [ticket_count] indices, -1 when released */
    int ticket_count, tickets_open;
    int sequences;  /* counted by admission */
    int64_t tokens; /* waiting prompt tokens counted by admission */
    const struct call_front *front;
    void *user;
    char request_id[SERVICE_ID_BYTES], trace_id[33], id[33];
    int64_t created;
    double arrival;
    double submitted;     /* to the engine, whose waits count from here */
    double queue_seconds; /* the longest wait of its sequences; -1: none has begun */
    struct event *timer;  /* deadline, or "at once" for calls without engine work */
};

struct service {
    struct event_base *base;
    const struct params *params;
    struct wires *wires;
    struct metrics *metrics;
    prompter *prompter;
    const struct body_facts *facts;
    enum service_state state;
    double start;
    call *calls;
    int call_count, sequence_count, sequences_max, running_max;
    int64_t waiting_tokens;
    bool aborted_any;
    double turning, read_at; /* the loop's own time, and when it was looked at last */
    struct ticket *tickets;  /* [ticket_max] */
    int ticket_max, first_free;
    uint32_t serial;
    int phase_counts[CHOICE_DONE];
    struct event *drain_timer;
    struct {
        void (*changed)(void *user, enum service_state state);
        void *user;
    } watchers[WATCHERS_MAX];
    int watcher_count;
};

void service_set_state(service *s, enum service_state state);

/* call.c */
/* The front hears the end (why NULL: complete), sequences are cancelled; freed when the engine has
 * let go. */
void call_end(call *c, const struct refused *why);
void call_release_ticket(call *c, struct ticket *t);
void call_free_if_over(call *c);
uint64_t ticket_id(const service *s, const struct ticket *t);
struct ticket *ticket_find(service *s, uint64_t id);
void call_send_cancel(service *s, const struct ticket *t, int choice);
void choice_enter(call *c, struct choice *choice, enum choice_phase phase);

/* events.c */
/* All choices of a prompt that is only echoed. */
void call_finish_echoes(call *c, int prompt);

/* record.c */
void record_choice(call *c, struct choice *choice);
/* It never got to the engine. */
void record_refused(const char *request_id, const char *trace_id, const struct refused *why);
void record_call(call *c, const struct refused *why, const char *gone);

#endif
