/* i_plan_sample.h: a plan with every kind of array in it, for i_plan.c and fuzz_plan.c.
 *
 * Three segments (a chunk, a decode row, a chunk with a soft position), two logit rows, three
 * probes.
 */
#ifndef SFUMATO_TESTS_I_PLAN_SAMPLE_H
#define SFUMATO_TESTS_I_PLAN_SAMPLE_H

#include <math.h>

#include "engine/plan.h"

enum { SAMPLE_ROWS = 8, SAMPLE_BYTES = 4096 };

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
                                                 .position_max = 500};

struct sample {
    struct batch_segment segments[3];
    int32_t pages[6], mix_begin[SAMPLE_ROWS + 1], logit_rows[2];
    uint32_t mix_ids[10], watch_ids[4];
    float mix_weights[10];
    struct batch_probe probes[3];
    struct batch_edit edits[3];
    struct batch batch;
};

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
