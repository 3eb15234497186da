/* warm.c: the heaviest step there can be, run once before a service says it is ready.
 *
 *   rows      rows_max, in as many segments as there are sequences, each row a concept token of 64 ids
 *   context   one segment ends at the last position a sequence may have
 *   logits    logit_rows_max rows, every probe of them, 64 candidates; then one whole row (PLAN_FETCH)
 *   runs      where there are any, steps of as many rows as a run may have: queued one by one, captured,
 *             launched as a graph
 *
 * What only a first step would take (pages of scratch never touched, lazily made memory of a device,
 * cold code) is taken here, where failing is still start-up. Its answers are thrown away: the KV
 * pages it writes are in no table, and a page is always written before it is read. It uses the
 * arrays of the assembly and counts nowhere. Thread: engine, rank 0; the others obey its plans.
 */
#include "engine/engine_parts.h"

enum { RUN_STEPS = 3 }; /* the three ways of the picture */

static void fill_rows(struct assembly *a, const struct plan_limits *l, int64_t ids) {
    struct batch *b = &a->batch;
    int64_t entries = 0;
    for (int row = 0; row < b->row_count; row++) {
        for (int64_t i = 0; i < ids; i++, entries++) {
            a->mix_ids[entries] = (uint32_t)((row + i) % l->vocab_count);
            a->mix_weights[entries] = 1.0f / (float)ids;
        }
        a->mix_begin[row + 1] = (int32_t)entries;
    }
}

/* The last segment ends where the context does, `more` positions after its rows; the others begin at 0. */
static void fill_segments(struct assembly *a, const struct plan_limits *l, int32_t more) {
    struct batch *b = &a->batch;
    int32_t row = 0, page = 0;
    for (int i = 0; i < b->segment_count; i++) {
        const int32_t left = b->row_count - row, others = b->segment_count - i;
        int32_t rows = left / others;
        if (rows > l->position_max) rows = (int32_t)l->position_max;
        const bool last = i == b->segment_count - 1;
        const int32_t position = last ? (int32_t)l->position_max - rows - more : 0;
        const int32_t pages = (position + rows + more + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        a->segments[i] = (struct batch_segment){row, rows, position, page, pages};
        /* segments may write one another's pages: nobody reads them */
        for (int32_t p = 0; p < pages; p++, page++) a->pages[page] = p % l->page_count;
        row += rows;
    }
    b->row_count = row;
}

static void fill_probes(struct assembly *a, const struct plan_limits *l) {
    struct batch *b = &a->batch;
    b->logit_row_count = b->row_count < l->logit_rows_max ? b->row_count : l->logit_rows_max;
    for (int i = 0; i < b->logit_row_count; i++)
        a->logit_rows[i] = b->row_count - b->logit_row_count + i;
    /* two of a row: its own, and the raw one for logprobs */
    b->probe_count =
        2 * b->logit_row_count < l->probes_max ? 2 * b->logit_row_count : l->probes_max;
    for (int i = 0; i < b->probe_count; i++) {
        a->probes[i] = (struct batch_probe){.logit_row = i / 2,
                                            .temperature = i % 2 ? 1.0f : 0.5f,
                                            .watch_begin = i,
                                            .watch_count = 1};
        a->watch_ids[i] = 0;
    }
    b->watch_max = 1;
}

/* One probe a row, the answer greedy: no list is too short for it, and no id ends it. */
static void fill_run(struct assembly *a, struct run_row *rows, int steps) {
    struct batch *b = &a->batch;
    b->logit_row_count = b->probe_count = b->row_count;
    for (int i = 0; i < b->row_count; i++) {
        a->logit_rows[i] = i;
        a->probes[i] = (struct batch_probe){.logit_row = i, .temperature = 1.0f};
        rows[i] = (struct run_row){.params = {.mode = THINK_OFF,
                                              .max_topk = 1,
                                              .thinking = {.top_p = 1},
                                              .answer = {.top_p = 1},
                                              .ignore_eos = true,
                                              .gumbel_temperature = 1,
                                              .dirichlet_alpha = 1,
                                              .open_id = -1,
                                              .close_id = -1},
                                   .steps = steps};
        think_state_init(&rows[i].state, &rows[i].params, NULL, 0);
    }
}

/* Rank 0 reads answers as the others do: nobody settles what they say. */
static void warm_runs(engine *e, int64_t ids) {
    const struct plan_limits *l = &e->rank.limits;
    struct assembly *a = &e->assembly;
    struct batch *b = &a->batch;
    int steps = l->run_steps_max < RUN_STEPS ? l->run_steps_max : RUN_STEPS;
    if (steps > l->position_max) steps = (int)l->position_max;
    const struct plan_run plan = {
        .steps = steps, .ahead = e->options.launch_ahead, .rows = e->run.rows};
    assembly_clear(a);
    b->row_count = b->segment_count = l->run_rows_max;
    b->candidate_count = THINK_TOPK_MAX;
    fill_segments(a, l, steps - 1);
    fill_rows(a, l, ids);
    fill_run(a, e->run.rows, steps);
    for (int done = 0; done < RUN_STEPS; done += steps) {
        step_send_run(&e->rank, e->step, b, &plan);
        run_follow(&e->rank, &e->run, e->step, b, &plan);
    }
}

void engine_warm_up(engine *e) {
    const struct plan_limits *l = &e->rank.limits;
    struct assembly *a = &e->assembly;
    struct batch *b = &a->batch;
    const int64_t ids = l->vocab_count < THINK_TOPK_MAX ? l->vocab_count : THINK_TOPK_MAX;
    assembly_clear(a);
    b->row_count = l->rows_max;
    b->segment_count = l->segments_max;
    b->candidate_count = THINK_TOPK_MAX;
    fill_segments(a, l, 0);
    fill_rows(a, l, ids);
    fill_probes(a, l);
    step_send(&e->rank, PLAN_STEP, e->step, b, 0);
    step_forward(&e->rank, b);
    step_send(&e->rank, PLAN_FETCH, e->step, b, 0);
    step_fetch(&e->rank, b, 0);
    if (l->run_rows_max > 0 && model_run_rows(e->model) > 0) warm_runs(e, ids);
}
