/* run.h: the engine's side of a run: k steps of decode rows that decide on the device (backend/run.h;
 * engine-internal).
 *
 *   rank 0:  run_start ─► [launch what may be, read one step, settle it]* ─► run_over
 *   others:  run_follow: the same launches and the same reading, nobody to tell
 *
 * Steps are launched `ahead` of the last one read; whether one more is launched depends on answers
 * only, which are equal on all ranks, so all launch the same number without a word. A run ends early
 * when no row is live, or when a row's list was too short: that row is done again by an ordinary step.
 * A sequence that ends, is cancelled or sent back meanwhile is forgotten at once; its row rests after
 * at most `ahead` further steps, and its pages are written by those at most: nobody else gets them
 * before the run is over.
 *
 * Thread: engine. Memory: fixed, in run_init.
 */
#ifndef SFUMATO_ENGINE_RUN_H
#define SFUMATO_ENGINE_RUN_H

#include "backend/run.h"
#include "engine/plan.h"
#include "engine/step.h"

struct engine;
struct sequence;

struct run {
    bool active;
    bool closing; /* launch no more */
    bool leaving; /* rank 0: all rows were told to stop */
    int row_count, steps, ahead;
    int launched, read;
    uint64_t number;             /* of its first step, as plans count */
    struct run_row *rows;        /* [rows_max] what the plan says */
    struct sequence **sequences; /* rank 0: [rows_max]; NULL: left */
    int waiting, running;        /* rank 0: queue and slots as they were at the start */
};

enum status run_init(struct run *run, const struct plan_limits *limits);
void run_fini(struct run *run);

/* Rank 0. Starts a run with the scheduled works when all are fit for it, and gives up to
 * options.run_steps steps. False: do an ordinary step. */
bool run_start(struct engine *e);
/* Rank 0: launches, reads the answers of one step and does what follows from them. */
void run_tick(struct engine *e);
/* Rank 0: the sequence has left its slot; called before its memory may go. */
void run_forget(struct engine *e, const struct sequence *s);
/* Rank 0: ends it without waiting for its sequences; what was launched is still read. */
void run_stop(struct engine *e);
/* Other ranks, and a warm-up: the whole run of a plan, whose answers nobody settles. */
void run_follow(struct step_rank *r, struct run *run, uint64_t number, const struct batch *batch,
                const struct plan_run *plan);

#endif
