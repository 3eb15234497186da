/* step.h: what every rank does for one plan; with model/dense.c the only place where ranks meet
 * (engine-internal).
 *
 *   rank 0:  step_send ─► step_forward ─► (think) ─► [step_send FETCH ─► step_fetch]* ─► next step
 *   others:  receive, plan_view ─► step_forward | step_fetch | leave          (follow.c)
 *
 * Owns the limits of a plan, derived from the options alike on every rank, and the buffers of this
 * rank's answers. A FETCH repeats the batch of its step, so that no rank must keep a plan. Fault
 * points: step-kill (SIGKILL to itself before the step), delay (random sleep before each step).
 * Thread: engine. Memory: taken in step_init.
 */
#ifndef SFUMATO_ENGINE_STEP_H
#define SFUMATO_ENGINE_STEP_H

#include <stddef.h>
#include <stdint.h>

#include "comm/comm.h"
#include "engine/engine.h"
#include "engine/plan.h"

struct step_rank {
    model *model;
    comm *comm;
    struct plan_limits limits;
    void *plan; /* rank 0: the message being sent */
    size_t plan_capacity;
    unsigned char *records; /* this rank's answers of a step */
    float *logits;          /* this rank's z' of a fetch, padded to logits_stride */
    int64_t logits_stride;  /* largest local vocabulary */
};

/* max_seqs, max_model_len cut to what rows and pages allow. */
struct engine_options step_options(const struct engine_options *options);
void step_limits(const struct engine_options *options, int64_t vocab_count,
                 struct plan_limits *out);

/* One rank's records of a batch. */
size_t step_records_bytes(const struct batch *b);
size_t step_records_bytes_max(const struct plan_limits *limits);

enum status step_init(struct step_rank *r, model *m, comm *c, const struct engine_options *options);
void step_fini(struct step_rank *r);

/* Rank 0: tells the others. */
void step_send(struct step_rank *r, enum plan_kind kind, uint64_t step, const struct batch *batch,
               int probe);
void step_send_run(struct step_rank *r, uint64_t step, const struct batch *batch,
                   const struct plan_run *run);
/* The fault points of a step. */
void step_faults(void);
/* Collective: the forward pass and the gather. Rank 0 gets [R][probes] records until the next
 * gather. */
const void *step_forward(struct step_rank *r, const struct batch *batch);
/* Collective: rank 0 gets [R][logits_stride] z' of one probe of the step that ran last. */
const float *step_fetch(struct step_rank *r, const struct batch *batch, int probe);

#endif
