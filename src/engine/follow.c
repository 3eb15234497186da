/* follow.c: the whole life of every rank but 0: obey plans until told to stop.
 *
 * A plan that breaks a rule ends the job: this rank could only guess, and the others would wait for
 * it. Thread: engine. Memory: taken before the first plan.
 */
#include "base/alloc_watch.h"
#include "base/check.h"
#include "base/progress.h"
#include "engine/engine.h"
#include "engine/run.h"
#include "engine/step.h"

void engine_follow(model *m, comm *c, const struct engine_options *options) {
    struct step_rank r;
    struct run run = {0};
    if (step_init(&r, m, c, options) != STATUS_OK || run_init(&run, &r.limits) != STATUS_OK)
        comm_abort(c, STATUS_MEMORY, fail_text());
    bool counting = false;
    for (;;) {
        const void *bytes;
        const size_t n = comm_bcast(c, NULL, 0, &bytes);
        enum plan_kind kind;
        uint64_t step;
        int probe;
        struct batch batch;
        struct plan_run run_plan;
        if (plan_view(bytes, n, &r.limits, &kind, &step, &probe, &batch, &run_plan) != STATUS_OK)
            comm_abort(c, STATUS_COMM, fail_text());
        progress_at_step(step);
        /* a warm-up and the first step have number 0: what they take is not counted */
        if (step > 0 && !counting) alloc_watch_begin();
        counting |= step > 0;
        if (kind == PLAN_STOP) break;
        if (kind == PLAN_STEP) step_forward(&r, &batch);
        if (kind == PLAN_FETCH) step_fetch(&r, &batch, probe);
        if (kind == PLAN_RUN) run_follow(&r, &run, step, &batch, &run_plan);
    }
    run_fini(&run);
    step_fini(&r);
}
