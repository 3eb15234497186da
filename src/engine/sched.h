/* sched.h: which rows the next step works on, and who holds which pages (engine-internal, rank 0).
 *
 *   waiting (by arrival) ──admit──► running (by arrival) ──plan──► works: sequence, rows
 *            ▲                          │
 *            └─────preempt youngest─────┘   when pages run out
 *
 * Owns the queue, the slots and the page pool. Every running sequence is treated alike: it has
 * inputs up to `total` and keys and values up to `computed`; decoding is the case where one is
 * missing, prefill and the rebuilding after preemption the case where more are. Decode rows go
 * first, the rest of max_batched_tokens is filled with chunks, oldest first. The oldest sequence
 * can always go on (it may take everyone's pages), so all end.
 *
 * Invariants: running and waiting are sorted by arrival; a page is written by one sequence only, and
 * shared only when it is full. Nothing here may reach a decision: it chooses when rows run, never what
 * they give.
 *
 * Refuses to know: logits, thinking, events. Thread: engine. Memory: fixed, from sched_init.
 */
#ifndef SFUMATO_ENGINE_SCHED_H
#define SFUMATO_ENGINE_SCHED_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/plan.h"
#include "engine/sequence.h"

/* Rows [computed, computed + row_count) of one sequence; the last logit_row_count of them give
 * logits. Pages are there for `reach` rows: more than row_count in a run. */
struct sched_work {
    struct sequence *sequence;
    int32_t row_count, logit_row_count, reach;
};

struct sched {
    struct plan_limits limits;
    bool prefix_cache;
    int running_max;
    kv_pool *pool;
    struct kv_digest digest_start;
    struct sequence *head, *tail; /* waiting */
    int waiting_count;
    struct sequence **running; /* [running_max] */
    int running_count;
    struct sched_work *works; /* [running_max] */
    int work_count;
    uint64_t preemptions, prompt_tokens, cached_tokens;
};

enum status sched_init(struct sched *s, const struct plan_limits *limits, int running_max,
                       bool prefix_cache, uint64_t digest_seed);
void sched_fini(struct sched *s);

/* Puts a sequence into the queue at its place by arrival. */
void sched_enqueue(struct sched *s, struct sequence *seq);
/* Takes it out of queue or slot and releases its pages; state DONE. */
void sched_remove(struct sched *s, struct sequence *seq);
/* Admits and fills s->works with at least one row if any sequence is waiting or running. */
void sched_plan(struct sched *s);
/* The step ran: its rows have keys and values now; full pages become findable. */
void sched_computed(struct sched *s);
/* The same for so many rows of one sequence. */
void sched_advance(struct sched *s, struct sequence *seq, int32_t rows);
/* Sends the youngest running sequence back to the queue; NULL when none runs. */
struct sequence *sched_preempt_youngest(struct sched *s);

/* Is this plan one decode row for every running sequence? */
bool sched_is_steady(const struct sched *s);
/* Takes pages for up to `rows` rows of the work from those nobody needs now; sets reach. */
void sched_extend(struct sched *s, struct sched_work *work, int32_t rows);
/* Gives back the pages of rows that were not run. */
void sched_trim(struct sched *s, struct sequence *seq);

#endif
