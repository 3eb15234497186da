/* plan.h: the flat message rank 0 sends before each step; a POD without pointers.
 *
 * It can be logged, replayed, compared and fuzzed. One plan = header with the counts + arrays, each
 * 8-byte aligned, one after the other; plan_view checks every count and range before any rank uses
 * it (a plan from a broken peer must not crash the others).
 */
#ifndef SFUMATO_ENGINE_PLAN_H
#define SFUMATO_ENGINE_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "backend/batch.h"
#include "backend/run.h"
#include "base/check.h"

enum plan_kind { PLAN_STEP = 1, PLAN_FETCH = 2, PLAN_STOP = 3, PLAN_RUN = 4 };

/* Upper bounds a plan must respect; fixed at start-up, equal on every rank. */
struct plan_limits {
    int rows_max, segments_max, logit_rows_max, probes_max;
    int64_t mix_max, pages_max, edits_max, watch_max;
    int32_t page_count;  /* of the pool */
    int64_t vocab_count; /* ids < this */
    int64_t position_max;
    int run_rows_max, run_steps_max, run_ahead_max; /* 0: no runs */
};

/* A run (backend/run.h): the batch is its first step, one row, logit row and probe a sequence, which
 * brings the pages of all its steps. */
struct plan_run {
    int32_t steps, ahead;       /* 0, 0: not a run */
    const struct run_row *rows; /* [segment_count] */
};

size_t plan_bytes_max(const struct plan_limits *limits);
/* Writes a batch (its arrays may live anywhere) into out[capacity]; returns the bytes used. */
size_t plan_encode(enum plan_kind kind, uint64_t step, const struct batch *batch, int fetch_probe,
                   void *out, size_t capacity);
size_t plan_encode_run(uint64_t step, const struct batch *batch, const struct plan_run *run,
                       void *out, size_t capacity);
/* Points `batch` and `run` into bytes after checking all of it; STATUS_COMM when it breaks a rule
 * (names which). */
enum status plan_view(const void *bytes, size_t n, const struct plan_limits *limits,
                      enum plan_kind *kind, uint64_t *step, int *fetch_probe, struct batch *batch,
                      struct plan_run *run);

#endif
