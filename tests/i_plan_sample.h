/* i_plan_sample.h: a plan with every kind of array in it, for i_plan.c and fuzz_plan.c.
 *
 * Three segments (a chunk, a decode row, a chunk with a soft position), two logit rows, three
 * probes. And a run.
 */
#ifndef SFUMATO_TESTS_I_PLAN_SAMPLE_H
#define SFUMATO_TESTS_I_PLAN_SAMPLE_H

#include <math.h>

#include "engine/plan.h"

enum { SAMPLE_ROWS = 8, SAMPLE_BYTES = 12288 };

static const struct plan_limits sample_limits = {.rows_max = 16,
                                                 .segments_max = 4,
                                                 .logit_rows_max = 4,
                                                 .probes_max = 8,
                                                 .mix_max = 64,
                                                 .pages_max = 32,
                                                 .edits_max = 16,
                                                 .watch_max = 16,
                                                 .page_count = 50,
                                                 .vocab_count = 1000,
                                                 .position_max = 500,
                                                 .run_rows_max = 3,
                                                 .run_steps_max = 32,
                                                 .run_ahead_max = 4};

struct sample {
    struct batch_segment segments[3];
    int32_t pages[6], mix_begin[SAMPLE_ROWS + 1], logit_rows[2];
    uint32_t mix_ids[10], watch_ids[4];
    float mix_weights[10];
    struct batch_probe probes[3];
    struct batch_edit edits[3];
    struct batch batch;
};

/* A run of three rows: 20 steps, 70 tokens in; the last one watches nothing. */
struct sample_run {
    struct batch_segment segments[3];
    int32_t pages[5], mix_begin[4], logit_rows[3];
    uint32_t mix_ids[4], watch_ids[2];
    float mix_weights[4];
    struct batch_probe probes[3];
    struct batch_edit edits[1];
    struct run_row rows[3];
    struct batch batch;
    struct plan_run run;
};

static void sample_run_make(struct sample_run *s) {
    *s = (struct sample_run){
        .segments = {{0, 1, 70, 0, 2}, {1, 1, 60, 2, 2}, {2, 1, 0, 4, 1}},
        .pages = {7, 49, 0, 3, 12},
        .mix_begin = {0, 2, 3, 4},
        .mix_ids = {10, 11, 999, 13},
        .mix_weights = {0.5f, 0.5f, 1, 1},
        .logit_rows = {0, 1, 2},
        .probes = {{0, 0.6f, 0, 0, 0, 1}, {1, 1, 0, 1, 1, 1}, {2, 1, 1, 0, 2, 0}},
        .edits = {{3, 1, -INFINITY}},
        .watch_ids = {5, 5},
    };
    for (int i = 0; i < 3; i++) {
        s->rows[i].params = (struct think_params){.max_topk = 10,
                                                  .thinking = {0.6f, 30, 0.95f, 0},
                                                  .answer = {0.6f, 30, 0.95f, 0},
                                                  .gumbel_temperature = 1,
                                                  .dirichlet_alpha = 1,
                                                  .open_id = -1,
                                                  .close_id = i < 2 ? 5 : -1,
                                                  .close_text_count = 2};
        s->rows[i].state = (struct think_state){.forced_next = i - 1};
        s->rows[i].steps = 20 - i;
        s->rows[i].phase_bound = i == 1;
    }
    s->batch = (struct batch){.row_count = 3,
                              .segment_count = 3,
                              .logit_row_count = 3,
                              .probe_count = 3,
                              .candidate_count = 64,
                              .watch_max = 1,
                              .segments = s->segments,
                              .pages = s->pages,
                              .mix_begin = s->mix_begin,
                              .mix_ids = s->mix_ids,
                              .mix_weights = s->mix_weights,
                              .logit_rows = s->logit_rows,
                              .probes = s->probes,
                              .edits = s->edits,
                              .watch_ids = s->watch_ids};
    s->run = (struct plan_run){20, 2, s->rows};
}

static void sample_make(struct sample *s) {
    *s = (struct sample){
        .segments = {{0, 4, 62, 0, 2}, {4, 1, 191, 2, 3}, {5, 3, 0, 5, 1}},
        .pages = {7, 49, 0, 3, 12, 8},
        .mix_begin = {0, 1, 2, 3, 4, 5, 6, 9, 10},
        .mix_ids = {10, 11, 12, 13, 999, 1, 2, 3, 4, 5},
        .mix_weights = {1, 1, 1, 1, 1, 1, 0.5f, 0.25f, 0.25f, 1},
        .logit_rows = {4, 7},
        .probes = {{0, 0.6f, 0, 2, 0, 1}, {0, 1, 2, 0, 1, 2}, {1, 2.5f, 2, 1, 3, 1}},
        .edits = {{3, 1.2f, -0.5f}, {900, 1, -INFINITY}, {5, 1, 100}},
        .watch_ids = {5, 5, 6, 999},
    };
    s->batch = (struct batch){.row_count = SAMPLE_ROWS,
                              .segment_count = 3,
                              .logit_row_count = 2,
                              .probe_count = 3,
                              .candidate_count = 32,
                              .watch_max = 2,
                              .segments = s->segments,
                              .pages = s->pages,
                              .mix_begin = s->mix_begin,
                              .mix_ids = s->mix_ids,
                              .mix_weights = s->mix_weights,
                              .logit_rows = s->logit_rows,
                              .probes = s->probes,
                              .edits = s->edits,
                              .watch_ids = s->watch_ids};
}

#endif
