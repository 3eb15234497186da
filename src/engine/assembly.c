/* assembly.c: see assembly.h. Fills the arrays in one pass over the scheduled rows.
 *
 * The order of works is the order of segments, rows, logit rows, probes and asks, so everything
 * ascends as plan_view demands. K of the records is the widest need of the step; each ask remembers
 * its own, because a row must not see more candidates when a neighbour wants more.
 */
#include "engine/assembly.h"

#include <stdlib.h>
#include <string.h>

enum { CANDIDATES_FEW = 32, CANDIDATES_MANY = 64 }; /* K of the records; soft-thinking.md §5 */

static void *array(int64_t count, size_t size) { return calloc((size_t)count + 1, size); }

enum status assembly_init(struct assembly *a, const struct plan_limits *limits) {
    *a = (struct assembly){
        .asks = array(limits->logit_rows_max, sizeof *a->asks),
        .segments = array(limits->segments_max, sizeof *a->segments),
        .pages = array(limits->pages_max, sizeof *a->pages),
        .mix_begin = array(limits->rows_max, sizeof *a->mix_begin),
        .logit_rows = array(limits->logit_rows_max, sizeof *a->logit_rows),
        .mix_ids = array(limits->mix_max, sizeof *a->mix_ids),
        .watch_ids = array(limits->watch_max, sizeof *a->watch_ids),
        .mix_weights = array(limits->mix_max, sizeof *a->mix_weights),
        .probes = array(limits->probes_max, sizeof *a->probes),
        .edits = array(limits->edits_max, sizeof *a->edits),
    };
    if (!a->asks || !a->segments || !a->pages || !a->mix_begin || !a->logit_rows || !a->mix_ids ||
        !a->watch_ids || !a->mix_weights || !a->probes || !a->edits)
        return fail(STATUS_MEMORY,
                    "no memory for a batch of %d rows: lower --max-num-batched-tokens",
                    limits->rows_max);
    return STATUS_OK;
}

void assembly_fini(struct assembly *a) {
    free(a->asks);
    free(a->segments);
    free(a->pages);
    free(a->mix_begin);
    free(a->logit_rows);
    free(a->mix_ids);
    free(a->watch_ids);
    free(a->mix_weights);
    free(a->probes);
    free(a->edits);
}

/* How many candidates a step of the phase needs; wider filters than CANDIDATES_MANY take the slow
 * path. */
static int phase_width(const struct think_params *p, enum think_phase phase) {
    const bool thinks = phase == PHASE_THINKING;
    int widest = thinks ? p->thinking.top_k : p->answer.top_k;
    if (thinks && p->mode != THINK_OFF && p->max_topk > widest) widest = p->max_topk;
    return widest > CANDIDATES_FEW ? CANDIDATES_MANY : CANDIDATES_FEW;
}

static int row_width(const struct sequence *s, bool run) {
    if (s->task->request.score) return CANDIDATES_FEW;
    const enum think_phase phase = s->thought.phase;
    const int own = phase_width(&s->think, phase);
    const int other = phase_width(&s->think, phase ? PHASE_ANSWER : PHASE_THINKING);
    return run && other > own ? other : own;
}

struct cursor { /* ends of the CSR arrays so far */
    int32_t pages, entries, edits, watched;
};

static void add_inputs(struct assembly *a, struct cursor *at, const struct sequence *s,
                       int64_t begin, int32_t count) {
    struct batch *b = &a->batch;
    for (int64_t p = begin; p < begin + count; p++) {
        const uint32_t *ids;
        const float *weights;
        const int n = sequence_input(s, p, &ids, &weights);
        for (int i = 0; i < n; i++) {
            a->mix_ids[at->entries] = ids[i];
            a->mix_weights[at->entries++] = weights ? weights[i] : 1.0f;
        }
        a->mix_begin[++b->row_count] = at->entries;
    }
}

static struct batch_probe *add_probe(struct assembly *a, const struct cursor *at,
                                     float temperature) {
    struct batch_probe *p = &a->probes[a->batch.probe_count++];
    *p = (struct batch_probe){.logit_row = a->batch.logit_row_count - 1,
                              .temperature = temperature,
                              .edit_begin = at->edits,
                              .watch_begin = at->watched};
    return p;
}

static void watch(struct assembly *a, struct cursor *at, struct batch_probe *p, uint32_t id) {
    a->watch_ids[at->watched++] = id;
    p->watch_count++;
    if (p->watch_count > a->batch.watch_max) a->batch.watch_max = p->watch_count;
}

static void ask_generated(struct assembly *a, struct cursor *at, struct ask *ask) {
    const struct sequence *s = ask->sequence;
    const struct request *r = &s->task->request;
    struct batch_probe *own = add_probe(a, at, think_row_temperature(&s->think, &s->thought));
    own->edit_count = sequence_edits(s, a->edits + at->edits);
    at->edits += own->edit_count;
    if (s->think.close_id >= 0) watch(a, at, own, (uint32_t)s->think.close_id);
    ask->own_probe = a->batch.probe_count - 1;
    if (!r->logprobs) return;
    ask->raw_probe = ask->own_probe;
    if (own->temperature == 1.0f && own->edit_count == 0) return;
    struct batch_probe *raw = add_probe(a, at, 1.0f);
    ask->raw_probe = a->batch.probe_count - 1;
    /* ids that may be forced on the step whatever its logits: their logprob is asked for in advance
     */
    if (s->think.close_id >= 0) watch(a, at, raw, (uint32_t)s->think.close_id);
    if (s->thought.forced_next >= 0 && s->thought.forced_next < s->think.close_text_count)
        watch(a, at, raw, (uint32_t)s->think.close_text[s->thought.forced_next]);
}

static void ask_scored(struct assembly *a, struct cursor *at, struct ask *ask) {
    const struct sequence *s = ask->sequence;
    float temperature = s->think.thinking.temperature;
    if (temperature < THINK_TEMPERATURE_MIN)
        temperature = 1.0f; /* as for the H of a generated step */
    struct batch_probe *raw = add_probe(a, at, 1.0f);
    ask->raw_probe = ask->own_probe = a->batch.probe_count - 1;
    if (ask->position + 1 < sequence_total(s)) {
        const uint32_t *ids;
        const float *weights;
        const int n = sequence_input(s, ask->position + 1, &ids, &weights);
        for (int i = 0; i < n; i++) watch(a, at, raw, ids[i]);
    }
    if (temperature == 1.0f) return;
    add_probe(a, at, temperature);
    ask->own_probe = a->batch.probe_count - 1;
}

void assembly_clear(struct assembly *a) {
    a->ask_count = 0;
    a->batch = (struct batch){.candidate_count = CANDIDATES_FEW,
                              .segments = a->segments,
                              .pages = a->pages,
                              .mix_begin = a->mix_begin,
                              .mix_ids = a->mix_ids,
                              .mix_weights = a->mix_weights,
                              .logit_rows = a->logit_rows,
                              .probes = a->probes,
                              .edits = a->edits,
                              .watch_ids = a->watch_ids};
    a->mix_begin[0] = 0;
}

void assembly_make(struct assembly *a, const struct sched_work *works, int work_count, bool run) {
    struct batch *b = &a->batch;
    struct cursor at = {0};
    assembly_clear(a);
    for (int w = 0; w < work_count; w++) {
        struct sequence *s = works[w].sequence;
        const int64_t end = s->computed + works[w].row_count;
        const int64_t reach = s->computed + works[w].reach;
        const int32_t page_count = (int32_t)((reach + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
        a->segments[b->segment_count++] = (struct batch_segment){.row_begin = b->row_count,
                                                                 .row_count = works[w].row_count,
                                                                 .position = (int32_t)s->computed,
                                                                 .page_begin = at.pages,
                                                                 .page_count = page_count};
        memcpy(a->pages + at.pages, s->pages, (size_t)page_count * sizeof *a->pages);
        at.pages += page_count;
        add_inputs(a, &at, s, s->computed, works[w].row_count);
        for (int32_t i = works[w].logit_row_count; i > 0; i--) {
            a->logit_rows[b->logit_row_count++] = b->row_count - i;
            struct ask *ask = &a->asks[a->ask_count++];
            *ask = (struct ask){
                .sequence = s, .position = end - i, .raw_probe = -1, .keep = row_width(s, run)};
            if (s->task->request.score) {
                ask_scored(a, &at, ask);
            } else {
                ask_generated(a, &at, ask);
            }
            if (ask->keep > b->candidate_count) b->candidate_count = ask->keep;
        }
    }
}
