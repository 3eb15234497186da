/* engine_parts.h: what engine.c, decide.c and share.c know of one another (rank 0).
 *
 *   engine.c   life: new, submit, cancel, tick, counters
 *   decide.c   one row's answer: merge ─► think_step ─► books ─► events
 *   share.c    one thinking, n answers: whose events the others repeat, when they part
 *   run.c      steps that decide on the device
 *   warm.c     the heaviest step, once before a service is ready
 *
 * All of it runs on the engine thread of rank 0, inside engine_submit, engine_cancel or
 * engine_tick. Events go out in the middle of this code and may come back as cancels: a sequence
 * that was SEQUENCE_DONE once stays so, and its memory stays until the tick ends.
 */
#ifndef SFUMATO_ENGINE_PARTS_H
#define SFUMATO_ENGINE_PARTS_H

#include "engine/assembly.h"
#include "engine/engine.h"
#include "engine/merge.h"
#include "engine/run.h"
#include "engine/sched.h"
#include "engine/step.h"

struct engine {
    model *model;
    comm *comm;
    struct engine_options options; /* as step_options cut them */
    engine_event_fn on_event;
    void *user;
    struct step_rank rank;
    struct sched sched;
    struct assembly assembly;
    struct run run;
    int64_t vocab_begin[MERGE_RANKS_MAX + 1]; /* first id of each rank */
    struct task *tasks;                       /* live requests */
    uint64_t arrivals, step;
    int held_count, finished_tasks; /* sequences waiting for a shared thought; tasks to free */
    bool in_tick;
    struct engine_counters counters;
    const void *gathered; /* [R][probes] records of this step */
    size_t gathered_bytes;
    /* the slow path */
    unsigned char *kept_records; /* copy of gathered, from the step's first fetch on */
    uint64_t *full_keys;         /* [2 V] */
    float *full_z;               /* [V] */
    uint32_t *full_id;           /* [V] */
};

/* What an answered step says to the outside, besides the decision. */
struct step_report {
    uint32_t step;
    bool shared; /* choice 0 did it, for others too */
    const struct think_decision *decision;
    float logprob;
    int top_count;
    const struct logprob_entry *top;
};
struct ending {
    enum finish finish;
    bool loop_break, stopped_by_id;
    uint32_t stop_id;
};

/* engine.c */
void engine_emit_step(struct engine *e, struct sequence *s, const struct step_report *report);
/* Releases everything of the sequence and, unless quiet, sends its last event. */
void engine_end(struct engine *e, struct sequence *s, const struct ending *ending, bool quiet);

/* decide.c: answers one row from e->gathered. */
void decide_row(struct engine *e, const struct ask *ask);
/* What follows from a generated step's decision, wherever it was made: counts, the next input, the
 * event, the end. The sequence's state is already that after the step. */
void decide_settle(struct engine *e, struct sequence *s, const struct step_report *report);

/* share.c: after choice 0 of a sharing task was decided (and its event sent). ending: NULL while it
 * goes on. */
void share_step(struct engine *e, struct sequence *s, const struct step_report *report);
void share_after_step(struct engine *e, struct sequence *s, const struct think_decision *d,
                      const struct ending *ending);
/* Nothing can follow in this row: it ends with an error, and so do those that wait for its thinking. */
void share_give_up(struct engine *e, struct sequence *s);
/* Choice 0 may leave only quietly while others need its thinking. */
bool share_needs(const struct sequence *s);

#endif
