/* i_fake_run.h: runs over the fake model of i_fake.h: a step computes and decides at once, when it is
 * launched, as a device that is infinitely fast. So what the host does between launching and reading
 * comes as late as it ever can. Rows decide by merge_records and think_step on the records that
 * model_step makes. Included by i_fake.h.
 */
#ifndef SFUMATO_TESTS_I_FAKE_RUN_H
#define SFUMATO_TESTS_I_FAKE_RUN_H

#include "engine/merge.h"

enum { FAKE_RUN_ROWS = 64 };

static struct {
    int rows, steps;
    int begun, ended_short, late; /* late: steps of a row in which it had already been stopped */
    struct fake_slot {
        struct run_row row;
        int32_t position, page_count, pages[16]; /* position -1: rests */
        int count;
        uint32_t ids[THINK_TOPK_MAX];
        float weights[THINK_TOPK_MAX];
        struct batch_edit edits[REQUEST_BIAS_MAX];
        int32_t edit_count;
        bool stop, stopped;
    } slots[FAKE_RUN_ROWS];
    struct run_answer answers[RUN_AHEAD_MAX][FAKE_RUN_ROWS];
    int candidate_count, differs_at; /* differs_at > 0: rank 1 decides otherwise in that step */
} fake_run;

int model_run_rows(const model *m) {
    (void)m;
    return FAKE_RUN_ROWS;
}

void model_run_begin(model *m, const struct batch *b, const struct run_row *rows) {
    (void)m;
    fake_run.rows = b->row_count;
    fake_run.steps = 0;
    fake_run.begun++;
    fake_run.candidate_count = b->candidate_count;
    for (int i = 0; i < b->row_count; i++) {
        struct fake_slot *s = &fake_run.slots[i];
        const struct batch_segment *segment = &b->segments[i];
        const struct batch_probe *p = &b->probes[i];
        *s = (struct fake_slot){.row = rows[i],
                                .position = segment->position,
                                .page_count = segment->page_count,
                                .count = b->mix_begin[i + 1] - b->mix_begin[i],
                                .edit_count = p->edit_count};
        CHECK_EQ(segment->row_count, 1);
        ASSERT_LE(segment->page_count, 16);
        memcpy(s->pages, b->pages + segment->page_begin, (size_t)s->page_count * sizeof *s->pages);
        memcpy(s->ids, b->mix_ids + b->mix_begin[i], (size_t)s->count * sizeof *s->ids);
        memcpy(s->weights, b->mix_weights + b->mix_begin[i], (size_t)s->count * sizeof *s->weights);
        memcpy(s->edits, b->edits + p->edit_begin, (size_t)s->edit_count * sizeof *s->edits);
        CU_ASSERT(p->temperature == think_row_temperature(&rows[i].params, &rows[i].state));
    }
}

/* The records of one row alone. */
static void fake_run_row(struct fake_slot *s, struct run_answer *a) {
    static unsigned char records[4096];
    const int32_t mix_begin[2] = {0, s->count}, logit_row = 0;
    const struct batch_segment segment = {0, 1, s->position, 0, s->page_count};
    const uint32_t close = (uint32_t)s->row.params.close_id;
    const struct batch_probe probe = {
        .temperature = think_row_temperature(&s->row.params, &s->row.state),
        .edit_count = s->edit_count,
        .watch_count = s->row.params.close_id >= 0};
    const struct batch b = {.row_count = 1,
                            .segment_count = 1,
                            .logit_row_count = 1,
                            .probe_count = 1,
                            .candidate_count = fake_run.candidate_count,
                            .watch_max = probe.watch_count,
                            .segments = &segment,
                            .pages = s->pages,
                            .mix_begin = mix_begin,
                            .mix_ids = s->ids,
                            .mix_weights = s->weights,
                            .logit_rows = &logit_row,
                            .probes = &probe,
                            .edits = s->edits,
                            .watch_ids = &close};
    int64_t vocab_begin[MERGE_RANKS_MAX + 1];
    struct merge_row row;
    for (int r = 0; r <= fake.ranks; r++)
        vocab_begin[r] = fake_slab_begin(fake_rank_slab(r, fake.ranks));
    CU_ASSERT_FATAL(s->position < s->page_count * KV_PAGE_TOKENS);
    model_step(NULL, &b, records);
    CHECK_EQ(merge_records(fake.gather, fake.ranks, &b, 0, b.candidate_count, vocab_begin, &row),
             STATUS_OK);
    const struct think_candidates c = {
        row.m, row.s, row.q,  row.count,
        false, row.z, row.id, probe.watch_count ? row.watch_z[0] : -INFINITY};
    a->status = row.count == 0                                                ? RUN_BROKEN
                : think_step(&s->row.params, &s->row.state, &c, &a->decision) ? RUN_DECIDED
                                                                              : RUN_SHORT;
    const bool left = s->row.phase_bound && s->row.state.phase != a->decision.phase;
    a->live = a->status == RUN_DECIDED && !s->stop && a->decision.finish == FINISH_NONE && !left &&
              --s->row.steps > 0;
    a->state = s->row.state;
    fake_run.ended_short += a->status == RUN_SHORT;
}

void model_run_step(model *m) {
    (void)m;
    struct run_answer *answers = fake_run.answers[fake_run.steps++ % RUN_AHEAD_MAX];
    for (int i = 0; i < fake_run.rows; i++) {
        struct fake_slot *s = &fake_run.slots[i];
        struct run_answer *a = &answers[i];
        memset(a, 0xee, sizeof *a);
        a->stamp = (uint64_t)fake_run.steps;
        a->differs = fake_run.differs_at == fake_run.steps ? 2 : 0;
        if (s->position < 0) {
            a->status = RUN_RESTED;
            a->live = 0;
            continue;
        }
        fake_run.late += s->stopped;
        s->stopped = s->stop;
        fake_run_row(s, a);
        s->position = a->live ? s->position + 1 : -1;
        s->count = a->decision.count;
        if (!a->live) continue;
        memcpy(s->ids, a->decision.ids, (size_t)s->count * sizeof *s->ids);
        memcpy(s->weights, a->decision.weights, (size_t)s->count * sizeof *s->weights);
    }
}

const struct run_answer *model_run_answer(model *m, int step, int row) {
    (void)m;
    CU_ASSERT_FATAL(step < fake_run.steps && step >= fake_run.steps - RUN_AHEAD_MAX);
    return &fake_run.answers[step % RUN_AHEAD_MAX][row];
}

void model_run_stop(model *m, int row) {
    (void)m;
    fake_run.slots[row].stop = true;
}

#endif
