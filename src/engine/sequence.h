/* sequence.h: one choice of one request while the engine holds it (engine-internal).
 *
 *   task ──┬─ request (copied, one arena)
 *          └─ sequence[n] ─┬─ inputs made so far: a CSR of concept tokens
 *                          ├─ think_state
 *                          └─ pages and their digests
 *
 * The inputs of a sequence are the request's prompt, shared by its choices, followed by what the
 * sequence made: exactly the (ids, weights) that were fed, which is all a preempted sequence needs
 * to continue bit for bit. `computed` says how many of them have keys and values in `pages`.
 *
 * Refuses to know: queues, batches, ranks. Thread: whoever makes the task (task_new), then the
 * engine. Memory: all in task_new, for the worst a request allows: of `made` that is max_tokens
 * times max_topk entries of 8 bytes, far above what most requests write, but what is not written
 * costs address space only. So a step allocates nothing, and memory that is short refuses a request
 * instead of ending one half-way.
 */
#ifndef SFUMATO_ENGINE_SEQUENCE_H
#define SFUMATO_ENGINE_SEQUENCE_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/batch.h"
#include "base/arena.h"
#include "engine/request.h"
#include "kv/pages.h"
#include "think/think.h"

/* Appended inputs: entry e of position i is ids[begin[i] .. begin[i + 1]). Trace id = first id. */
struct history {
    int64_t count, capacity; /* positions */
    int64_t entry_count, entry_capacity;
    int32_t *begin; /* [count + 1] */
    uint32_t *ids;
    float *weights;
};

/* What may have to be done to a sequence's logits, by id, ascending: bias, penalties, masks. */
struct edit_entry {
    uint32_t id;
    uint32_t generated; /* times it was a trace id; counted only when a penalty needs it */
    float bias;
    uint8_t in_prompt, is_eos, is_stop;
};
struct edit_book {
    int64_t count, capacity;
    struct edit_entry *entries;
};

enum sequence_state {
    SEQUENCE_HELD,    /* waits for choice 0's shared thinking */
    SEQUENCE_WAITING, /* in the queue */
    SEQUENCE_RUNNING, /* has a slot */
    SEQUENCE_DONE
};

struct task;
struct sequence {
    struct task *task;
    int choice;
    enum sequence_state state;
    bool muted;                /* cancelled while its thinking is shared: works on, says nothing */
    bool admitted;             /* had a slot before; waiting again, it was evicted */
    struct think_params think; /* the request's, with this choice's number */
    struct think_state thought;
    struct history made;
    struct edit_book edits;
    int64_t computed; /* positions whose keys and values are in pages */
    int64_t scored;   /* score requests: positions answered */
    int32_t *pages;   /* [pages_max] */
    int32_t page_count;
    int32_t pages_kept;        /* leading pages that are shared or published: never written again */
    struct kv_digest *digests; /* [pages_max]: after each full page of inputs, made on demand */
    int32_t digest_count;
    uint64_t arrival;             /* order of submission, over all sequences */
    double submitted;             /* seconds, monotonic */
    double queue_seconds;         /* from then to its first step; -1: it had none yet */
    struct sequence *prev, *next; /* waiting queue */
    int64_t cached_tokens;
    int64_t shared_steps, shared_thinking, shared_soft; /* taken over from choice 0 */
    int64_t ordinary_until; /* its steps before this one are no matter for a run */
};

enum task_sharing {
    SHARING_NONE,    /* every sequence for itself */
    SHARING_OPENING, /* choice 0 runs; thinking has not started */
    SHARING_THINKING /* choice 0 thinks for all */
};
/* Steps within which shared thinking must start (a model may write the open marker itself first);
 * otherwise each choice answers for itself. */
enum { SHARING_OPEN_STEPS = 4 };

/* A step event kept until it is known whether the other choices share it. */
struct kept_step {
    struct think_decision decision;
    float logprob;
    int top_count;
    struct logprob_entry top[REQUEST_TOP_LOGPROBS_MAX];
};

struct task {
    struct request request; /* its pointers lead into the arena */
    arena memory;
    bool counted; /* its prompt is in the counters */
    int sequence_count, live_count;
    struct sequence *sequences;
    int64_t common; /* leading positions equal in all choices: their full pages may be shared */
    enum task_sharing sharing;
    int kept_count;
    struct kept_step *kept; /* [SHARING_OPEN_STEPS], NULL unless it may be needed */
    struct task *prev, *next;
};

/* Positions whose inputs are known. */
int64_t sequence_total(const struct sequence *s);
/* Inputs of one position. *weights is NULL for a plain id of weight 1. Returns the entry count. */
int sequence_input(const struct sequence *s, int64_t position, const uint32_t **ids,
                   const float **weights);
/* First position whose logits are still wanted; total when none is. */
int64_t sequence_wanted(const struct sequence *s);
/* Records one generated step's concept token. */
void sequence_append(struct sequence *s, const struct think_decision *d);
/* `to` reports from's steps as its own, but they count in from's usage. */
void sequence_share_books(struct sequence *to, const struct sequence *from);
/* `to` continues where `from` is (shared thinking). */
void sequence_fork(struct sequence *to, const struct sequence *from);
/* Digest of the inputs of pages 0 .. page, all full. */
struct kv_digest sequence_digest(struct sequence *s, int32_t page, struct kv_digest start);

/* Logit edits of the step about to be decided: at most sequence_edit_bound of them, ids ascending.
 */
int64_t sequence_edit_bound(const struct sequence *s);
int32_t sequence_edits(const struct sequence *s, struct batch_edit *out);

void sequence_usage(const struct sequence *s, struct request_usage *out);

/* request.c: bounds of everything but the length. */
enum status request_check(const struct request *r, int vocab_count);

#endif
