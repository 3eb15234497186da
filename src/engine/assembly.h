/* assembly.h: the scheduler's rows become a batch: inputs, pages, questions (rank 0).
 *
 * For each row whose logits are wanted an `ask` remembers who asked and which probes answer it:
 *   own probe   at the step's temperature, with the sequence's edits; watches the close marker
 *   raw probe   T = 1 without edits, for logprobs; the same probe when the own one is raw already
 *
 * Refuses to know: why a row was chosen, what becomes of the answer. Thread: engine. Memory: fixed
 * arrays of the plan's limits, taken in assembly_init; `batch` points into them.
 */
#ifndef SFUMATO_ENGINE_ASSEMBLY_H
#define SFUMATO_ENGINE_ASSEMBLY_H

#include "engine/plan.h"
#include "engine/sched.h"
#include "engine/sequence.h"

struct ask {
    struct sequence *sequence;
    int64_t position;
    int own_probe, raw_probe; /* raw_probe -1: no logprobs wanted */
    int keep;                 /* candidates this row looks at, whatever its neighbours need */
};

struct assembly {
    struct batch batch;
    int ask_count;
    struct ask *asks; /* [logit_rows_max] */
    /* the arrays `batch` points to */
    struct batch_segment *segments;
    int32_t *pages, *mix_begin, *logit_rows;
    uint32_t *mix_ids, *watch_ids;
    float *mix_weights;
    struct batch_probe *probes;
    struct batch_edit *edits;
};

enum status assembly_init(struct assembly *a, const struct plan_limits *limits);
void assembly_fini(struct assembly *a);
/* An empty batch over the arrays. */
void assembly_clear(struct assembly *a);
/* run: the batch is the first step of a run: records wide enough for either phase. */
void assembly_make(struct assembly *a, const struct sched_work *works, int work_count, bool run);

#endif
