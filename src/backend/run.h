/* run.h: a run: decode rows that go on for some steps without the host, and what they say meanwhile.
 *
 *   host:    begin(rows) ─► step ─► step ─► step ... launched ahead        stop(row) at any time
 *   device:                 forward ─► gather ─► think_step ─► next input; per row an answer
 *   host:                                     answer(0) ...   answer(1) ...
 *
 * What a row brings is all that its decisions depend on; every rank gets the same bytes and does the
 * same with them, so all come to the same decisions, and the ranks' hashes of each decision travel
 * with the next step to show it. A row that has ended rests: its slot goes on being computed, but
 * touches no page and decides nothing. Rank 0's answers hold the decisions, other ranks' only how
 * things stand. PODs; no memory.
 */
#ifndef SFUMATO_BACKEND_RUN_H
#define SFUMATO_BACKEND_RUN_H

#include <stdint.h>

#include "think/think.h"

enum {
    RUN_ROWS_MAX = 512,
    RUN_STEPS_MAX = 256,
    RUN_AHEAD_MAX = 8, /* answers are kept for so many steps */
};

/* Beside its part of the first step's batch. */
struct run_row {
    struct think_params params;
    struct think_state state;
    int32_t steps; /* it may decide so often: 1 .. steps of the run */
    /* 1: its logit edits hold for one phase, so it rests after a step that changed the phase */
    int32_t phase_bound;
};

enum run_status {
    RUN_IMPOSSIBLE = -2, /* less r: rank r's record cannot be: a faulty device */
    RUN_BROKEN = -1,     /* no finite logit */
    RUN_SHORT = 0,       /* the candidate list was too short: nothing decided, state unchanged */
    RUN_DECIDED = 1,
    RUN_RESTED = 2
};

/* Of one row in one step. */
struct run_answer {
    uint64_t stamp;  /* written last, when the rest is there */
    int32_t status;  /* enum run_status */
    int32_t live;    /* it takes part in the next step */
    int32_t differs; /* 1 + the first rank that decided the step before otherwise than rank 0; 0 */
    struct think_state state; /* after the step; the rest on rank 0 only */
    struct think_decision decision;
};

#endif
