/* messages.h: all that the net thread and the engine thread of rank 0 say to one another.
 *
 *   net ══ down: submit, cancel, stop ══► worker (engine thread)
 *   net ◄══ up: step, finished, scored, refused, ready, failed ══ worker
 *
 * Each direction is a mailbox (base/mailbox.h): one writer, one reader, whole messages, no locks. A
 * message is a fixed head, and for steps as many ids and floats as the step really has. A submit
 * carries a task, which the worker owns from then on, and a pointer to its request, which stays with
 * the net thread until the engine has ended all of its sequences: each choice of a submitted request
 * is answered by exactly one FINISHED, or the whole request by one REFUSED. Numbers for /metrics do
 * not travel: the worker leaves them in atomics (metrics.h).
 */
#ifndef SFUMATO_SERVE_MESSAGES_H
#define SFUMATO_SERVE_MESSAGES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "base/mailbox.h"
#include "engine/request.h"
#include "serve/body.h"

/* ---- down ---- */

enum down_kind { DOWN_SUBMIT, DOWN_CANCEL, DOWN_STOP };
struct down_message {
    enum down_kind kind;
    int choice;                    /* CANCEL: -1 = all */
    uint64_t id;                   /* CANCEL */
    const struct request *request; /* SUBMIT */
    struct task *task;             /* SUBMIT: the request made ready for the engine */
};

/* ---- up ---- */

enum up_kind { UP_STEP, UP_FINISHED, UP_SCORED, UP_REFUSED, UP_READY };
/* Followed by: STEP ids[count], weights[count], top[top_count]; SCORED top[top_count]; REFUSED a
 * struct fault. event.decision and event.top are dangling in the message: up_read sets them. */
struct up_message {
    enum up_kind kind;
    int count; /* entries of the concept token */
    struct engine_event event;
    struct think_decision_head {
        uint32_t trace_id;
        enum think_phase phase;
        bool soft, forced, marker, loop_break;
        enum think_end end;
        enum think_finish finish;
        float entropy, p;
    } decision;
    const struct body_facts *facts; /* READY */
};

enum {
    UP_BYTES = 2 << 20, /* of the up mailbox: some ten thousand steps */
    UP_MESSAGE_BYTES_MAX = sizeof(struct up_message) + sizeof(struct fault) + THINK_TOPK_MAX * 8 +
                           REQUEST_TOP_LOGPROBS_MAX * sizeof(struct logprob_entry),
};

/* Writer, engine thread: waits when the mailbox is full. Visible after mailbox_flush(up). */
void up_event(mailbox *up, const struct engine_event *event);
void up_refused(mailbox *up, uint64_t id, const struct fault *fault);
void up_ready(mailbox *up, const struct body_facts *facts);

/* Reader, net thread: the message as an event again. `decision` is the caller's storage. */
void up_read(const void *bytes, size_t n, struct think_decision *decision,
             struct engine_event *event);
const struct fault *up_fault(const void *bytes, size_t n);

/* ---- the two mailboxes and what is shared without them ---- */

struct wires {
    mailbox *down, *up;
    _Atomic int load_permille; /* progress of loading, set by the main thread */
    _Atomic int running;       /* sequences in the batch, set by the worker after a step */
    _Atomic uint64_t step;     /* the last one, set by the worker: for the log of a failure */
    int page_tokens;           /* of a KV page, set before up_ready */
};
enum status wires_open(struct wires *w, int sequences_max);
void wires_close(struct wires *w);

#endif
