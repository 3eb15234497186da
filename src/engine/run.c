/* run.c: see run.h. When a run may start, what its answers lead to, how it ends.
 *
 * What a decision leads to is decide_settle, the same code as after an ordinary step; here is only
 * where decisions come from. A row's answer carries its think_state too, so a sequence's books are
 * those of the last step that was read, whatever its row does until it is stopped.
 *
 * Not fit for runs: score requests, penalties (edits that change with every step), logprobs (they
 * need the raw logits), and for a while a row whose candidate list was too short. Masks of end ids
 * hold for a number of steps (min_tokens) or for one phase (phase_bound).
 */
#include "engine/run.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/progress.h"
#include "engine/engine_parts.h"

enum {
    STEPS_MIN = 2,      /* a shorter run is an ordinary step with more to carry */
    ORDINARY_STEPS = 16 /* after a list that was too short: the next one likely is, too */
};

enum status run_init(struct run *run, const struct plan_limits *limits) {
    const size_t rows = (size_t)limits->run_rows_max;
    if (rows == 0) return STATUS_OK;
    run->rows = calloc(rows, sizeof *run->rows);
    run->sequences = calloc(rows, sizeof *run->sequences);
    if (run->rows && run->sequences) return STATUS_OK;
    return fail(STATUS_MEMORY, "no memory for runs of %zu rows: lower --max-num-seqs", rows);
}

void run_fini(struct run *run) {
    free(run->rows);
    free(run->sequences);
}

/* ---- on every rank ---- */

static void begin(struct step_rank *r, struct run *run, uint64_t number, const struct batch *batch,
                  const struct plan_run *plan) {
    run->active = true;
    run->closing = run->leaving = false;
    run->row_count = batch->row_count;
    run->steps = plan->steps;
    run->ahead = plan->ahead;
    run->launched = run->read = 0;
    run->number = number;
    model_run_begin(r->model, batch, plan->rows);
}

static void launch(struct step_rank *r, struct run *run) {
    while (!run->closing && run->launched < run->steps && run->launched - run->read < run->ahead) {
        step_faults();
        model_run_step(r->model);
        run->launched++;
    }
}

static bool is_over(const struct run *run) {
    return run->read == run->launched && (run->closing || run->launched == run->steps);
}

static _Noreturn void give_up(struct step_rank *r, uint64_t step, int row, int rank,
                              const char *why) {
    char text[160];
    snprintf(text, sizeof text, "step %llu, row %d: rank %d %s", (unsigned long long)step, row,
             rank, why);
    comm_abort(r->comm, STATUS_COMM, text);
}

/* Waits for the answers of the next step. */
static void read_step(struct step_rank *r, struct run *run) {
    const uint64_t step = run->number + (uint64_t)run->read;
    progress_at_step(step);
    bool live = false, is_short = false;
    for (int i = 0; i < run->row_count; i++) {
        const struct run_answer *a = model_run_answer(r->model, run->read, i);
        if (a->status <= RUN_IMPOSSIBLE) {
            give_up(r, step, i, RUN_IMPOSSIBLE - a->status,
                    "gave an impossible candidate record: a faulty device");
        }
        if (a->differs) {
            give_up(r, step - 1, i, a->differs - 1,
                    "decided otherwise than rank 0: a faulty device, or ranks of different builds");
        }
        live |= a->live != 0;
        is_short |= a->status == RUN_SHORT;
    }
    run->closing |= !live || is_short;
}

void run_follow(struct step_rank *r, struct run *run, uint64_t number, const struct batch *batch,
                const struct plan_run *plan) {
    struct plan_run mine = *plan;
    if (fault_hit("run-differ")) { /* this rank draws other numbers */
        memcpy(run->rows, plan->rows, (size_t)batch->row_count * sizeof *run->rows);
        for (int i = 0; i < batch->row_count; i++) run->rows[i].params.seed ^= 1;
        mine.rows = run->rows;
    }
    begin(r, run, number, batch, &mine);
    for (launch(r, run); !is_over(run); launch(r, run)) {
        read_step(r, run);
        run->read++;
    }
    run->active = false;
}

/* ---- rank 0: start ---- */

static bool is_fit(const struct sequence *s) {
    const struct request *r = &s->task->request;
    return !r->score && !r->logprobs && r->presence_penalty == 0 && r->frequency_penalty == 0 &&
           r->repetition_penalty == 1 && s->thought.step >= s->ordinary_until;
}

/* Steps whose edits are those of the first: until the reply is old enough for an end. */
static int32_t steps_of(const struct sequence *s, int32_t steps_max) {
    const struct request *r = &s->task->request;
    int64_t steps = r->max_tokens - s->thought.step;
    if (s->thought.step < r->min_tokens && r->min_tokens - s->thought.step < steps)
        steps = r->min_tokens - s->thought.step;
    return steps < steps_max ? (int32_t)steps : steps_max;
}

static bool is_phase_bound(const struct sequence *s) {
    for (int64_t i = 0; i < s->edits.count; i++)
        if (s->edits.entries[i].is_eos || s->edits.entries[i].is_stop) return true;
    return false;
}

bool run_start(struct engine *e) {
    struct sched *sched = &e->sched;
    struct run *run = &e->run;
    const int count = sched->work_count;
    if (count > e->rank.limits.run_rows_max || count > model_run_rows(e->model)) return false;
    if (!sched_is_steady(sched)) return false;
    for (int i = 0; i < count; i++)
        if (!is_fit(sched->works[i].sequence)) return false;
    struct plan_run plan = {.ahead = e->options.launch_ahead, .rows = run->rows};
    for (int i = 0; i < count; i++) {
        struct sched_work *work = &sched->works[i];
        sched_extend(sched, work, steps_of(work->sequence, e->options.run_steps));
        if (work->reach > plan.steps) plan.steps = work->reach;
    }
    if (plan.steps < STEPS_MIN) return false;
    for (int i = 0; i < count; i++) {
        struct sequence *s = sched->works[i].sequence;
        run->sequences[i] = s;
        run->rows[i] = (struct run_row){.params = s->think,
                                        .state = s->thought,
                                        .steps = sched->works[i].reach,
                                        .phase_bound = is_phase_bound(s)};
    }
    assembly_make(&e->assembly, sched->works, count, true);
    step_send_run(&e->rank, e->step, &e->assembly.batch, &plan);
    run->waiting = sched->waiting_count;
    run->running = sched->running_count;
    begin(&e->rank, run, e->step, &e->assembly.batch, &plan);
    return true;
}

/* ---- rank 0: answers ---- */

static void settle_row(struct engine *e, struct sequence *s, const struct run_answer *a) {
    const struct step_report report = {
        .step = s->thought.step, .decision = &a->decision, .logprob = NAN};
    switch (a->status) {
        case RUN_DECIDED:
            s->thought = a->state;
            decide_settle(e, s, &report);
            break;
        case RUN_BROKEN: /* every id is masked: nothing can follow */
            share_give_up(e, s);
            break;
        case RUN_SHORT:
            s->ordinary_until = s->thought.step + ORDINARY_STEPS;
            break;
        default:
            ASSERT(a->status == RUN_DECIDED);
    }
}

/* As after an ordinary step: first all rows have keys and values, then each is answered. An event
 * may make any sequence leave. */
static void settle_step(struct engine *e, struct run *run) {
    for (int i = 0; i < run->row_count; i++) {
        const struct run_answer *a = model_run_answer(e->model, run->read, i);
        if (run->sequences[i] && a->status != RUN_SHORT)
            sched_advance(&e->sched, run->sequences[i], 1);
    }
    for (int i = 0; i < run->row_count; i++) {
        const struct run_answer *a = model_run_answer(e->model, run->read, i);
        if (!run->sequences[i]) continue;
        settle_row(e, run->sequences[i], a);
        if (!a->live) run->sequences[i] = NULL;
    }
}

static void leave(struct engine *e, struct run *run) {
    run->leaving = true;
    for (int i = 0; i < run->row_count; i++) model_run_stop(e->model, i);
}

/* Could somebody start who could not when the run began? */
static bool is_wanted(const struct engine *e, const struct run *run) {
    return e->sched.waiting_count > 0 &&
           (e->sched.waiting_count != run->waiting || e->sched.running_count != run->running);
}

static void end(struct engine *e, struct run *run) {
    run->active = false;
    for (int i = 0; i < run->row_count; i++) run->sequences[i] = NULL;
    for (int i = 0; i < e->sched.running_count; i++) sched_trim(&e->sched, e->sched.running[i]);
}

void run_tick(struct engine *e) {
    struct run *run = &e->run;
    if (!run->leaving && is_wanted(e, run)) leave(e, run);
    launch(&e->rank, run);
    if (run->read < run->launched) {
        read_step(&e->rank, run);
        settle_step(e, run);
        run->read++;
        e->step++;
    }
    if (is_over(run)) end(e, run);
}

void run_forget(struct engine *e, const struct sequence *s) {
    struct run *run = &e->run;
    for (int i = 0; run->active && i < run->row_count; i++) {
        if (run->sequences[i] != s) continue;
        run->sequences[i] = NULL;
        model_run_stop(e->model, i);
    }
}

void run_stop(struct engine *e) {
    if (!e->run.active) return;
    leave(e, &e->run);
    while (e->run.active) run_tick(e);
}
