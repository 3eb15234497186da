/* share.c: share_thinking: choice 0 thinks, then n choices answer over the same pages.
 *
 *   SHARING_OPENING   choice 0 runs alone; its first steps are kept, since a model may write the open marker
 *         │           itself. No thinking within SHARING_OPEN_STEPS: the others start from the prompt.
 *         ▼
 *   SHARING_THINKING  each step of choice 0 is reported for every choice, as it happens
 *         │
 *         ▼ thinking ended
 *   SHARING_NONE      the others take over inputs and state, and go on with draws of their own
 *
 * If choice 0 ends inside the shared part, all end alike. Usage counts shared steps for choice 0
 * only. A cancelled choice 0 works on silently while others still need its thinking. All of this
 * follows from choice 0's decisions, never from the schedule.
 */
#include "engine/engine_parts.h"

bool share_needs(const struct sequence *s) {
    if (s->choice != 0 || s->task->sharing == SHARING_NONE) return false;
    for (int i = 1; i < s->task->sequence_count; i++)
        if (s->task->sequences[i].state == SEQUENCE_HELD) return true;
    return false;
}

/* The events of a shared step for the others. A callback may cancel any of them, so look again each
 * time. */
static void report_to_others(struct engine *e, struct task *t, const struct step_report *report) {
    struct step_report shared = *report;
    shared.shared = true;
    for (int i = 1; i < t->sequence_count; i++)
        if (t->sequences[i].state == SEQUENCE_HELD) engine_emit_step(e, &t->sequences[i], &shared);
}

void share_step(struct engine *e, struct sequence *s, const struct step_report *report) {
    struct task *t = s->task;
    if (t->sharing == SHARING_THINKING) {
        report_to_others(e, t, report);
        return;
    }
    struct kept_step *kept = &t->kept[t->kept_count++];
    *kept = (struct kept_step){
        .decision = *report->decision, .logprob = report->logprob, .top_count = report->top_count};
    for (int i = 0; i < report->top_count; i++) kept->top[i] = report->top[i];
}

static void report_kept(struct engine *e, struct task *t) {
    for (int i = 0; i < t->kept_count; i++) {
        const struct kept_step *kept = &t->kept[i];
        report_to_others(e, t,
                         &(struct step_report){.step = (uint32_t)i,
                                               .decision = &kept->decision,
                                               .logprob = kept->logprob,
                                               .top_count = kept->top_count,
                                               .top = kept->top});
    }
}

/* The others go their own ways: from where choice 0 is, or (from == NULL) from the prompt. */
static void part(struct engine *e, struct task *t, const struct sequence *from) {
    t->sharing = SHARING_NONE;
    if (from) t->common = sequence_total(from);
    for (int i = 1; i < t->sequence_count; i++) {
        struct sequence *other = &t->sequences[i];
        if (other->state != SEQUENCE_HELD) continue;
        if (from) sequence_fork(other, from);
        e->held_count--;
        sched_enqueue(&e->sched, other);
    }
}

static void end_others(struct engine *e, struct sequence *s, const struct ending *ending) {
    struct task *t = s->task;
    t->sharing = SHARING_NONE;
    for (int i = 1; i < t->sequence_count; i++) {
        struct sequence *other = &t->sequences[i];
        if (other->state != SEQUENCE_HELD) continue;
        sequence_share_books(other, s);
        engine_end(e, other, ending, false);
    }
}

void share_give_up(struct engine *e, struct sequence *s) {
    static const struct ending broken = {.finish = FINISH_REASON_ERROR};
    if (s->choice == 0 && s->task->sharing != SHARING_NONE) end_others(e, s, &broken);
    if (s->state != SEQUENCE_DONE) engine_end(e, s, &broken, false);
}

void share_after_step(struct engine *e, struct sequence *s, const struct think_decision *d,
                      const struct ending *ending) {
    struct task *t = s->task;
    if (t->sharing == SHARING_NONE) return; /* the last one who shared was cancelled meanwhile */
    if (t->sharing == SHARING_OPENING) {
        if (!ending && s->thought.phase == PHASE_THINKING) {
            t->sharing = SHARING_THINKING;
            report_kept(e, t);
        } else if (ending || t->kept_count == SHARING_OPEN_STEPS) {
            part(e, t, NULL);
        }
    } else if (ending) {
        end_others(e, s, ending);
    } else if (d->end != END_NONE) {
        part(e, t, s);
    }
    if (s->muted && !share_needs(s) && s->state != SEQUENCE_DONE)
        engine_end(e, s, &(struct ending){.finish = FINISH_REASON_ABORT}, true);
}
