/* warm.c: the heaviest step there can be, run once before a service says it is ready.
 *
 *   rows      rows_max, in as many segments as there are sequences, each row a concept token of 64 ids
 *   context   one segment ends at the last position a sequence may have
 *   logits    logit_rows_max rows, every probe of them, 64 candidates; then one whole row (PLAN_FETCH)
 *
 * What only a first step would take (pages of scratch never touched, lazily made memory of a device,
 * cold code) is taken here, where failing is still start-up. Its answers are thrown away: the KV
 * pages it writes are in no table, and a page is always written before it is read. It uses the
 * arrays of the assembly and counts nowhere. Thread: engine, rank 0; the others obey its plans.
 */
#include "engine/engine_parts.h"

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

/* The last segment ends where the context does; the others begin at 0. */
static void fill_segments(struct assembly *a, const struct plan_limits *l) {
    struct batch *b = &a->batch;
    int32_t row = 0, page = 0;
    for (int i = 0; i < b->segment_count; i++) {
        const int32_t left = b->row_count - row, others = b->segment_count - i;
        int32_t rows = left / others;
        if (rows > l->position_max) rows = (int32_t)l->position_max;
        const bool last = i == b->segment_count - 1;
        const int32_t position = last ? (int32_t)l->position_max - rows : 0;
        const int32_t pages = (position + rows + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
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

void engine_warm_up(engine *e) {
    const struct plan_limits *l = &e->rank.limits;
    struct assembly *a = &e->assembly;
    struct batch *b = &a->batch;
    assembly_clear(a);
    b->row_count = l->rows_max;
    b->segment_count = l->segments_max;
    b->candidate_count = THINK_TOPK_MAX;
    fill_segments(a, l);
    fill_rows(a, l, l->vocab_count < THINK_TOPK_MAX ? l->vocab_count : THINK_TOPK_MAX);
    fill_probes(a, l);
    step_send(&e->rank, PLAN_STEP, e->step, b, 0);
    step_forward(&e->rank, b);
    step_send(&e->rank, PLAN_FETCH, e->step, b, 0);
    step_fetch(&e->rank, b, 0);
}
