/* decide.c: from the ranks' answers about one row to what the sequence does next (rank 0).
 *
 *   records ─► merge ─► think_step ─┬─ list too short ─► fetch the whole row ─► think_step
 *                                   └─► append the concept token ─► event ─► end?
 *
 * Every decision depends on the sequence's own inputs, parameters and seed only: the row looks at
 * its own number of candidates even when neighbours made the records longer, and nothing of the
 * scheduler's state is read here. Thread: engine. Memory: the engine's.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "engine/engine_parts.h"
#include "think/step.h"

static _Noreturn void broken_records(struct engine *e, const struct ask *ask) {
    char text[FAULT_TEXT_BYTES + 128];
    snprintf(text, sizeof text, "step %llu, request %llu, position %lld: %s",
             (unsigned long long)e->step, (unsigned long long)ask->sequence->task->request.id,
             (long long)ask->position, fail_text());
    comm_abort(e->comm, STATUS_COMM, text);
}

static void merge_row_of(struct engine *e, const struct ask *ask, int probe, int keep,
                         struct merge_row *out) {
    if (merge_records(e->gathered, comm_size(e->comm), &e->assembly.batch, probe, keep,
                      e->vocab_begin, out) != STATUS_OK)
        broken_records(e, ask);
}

/* The slow path (counted): the whole row of a probe, best first, into full_z and full_id. */
static int64_t fetch_full(struct engine *e, int probe) {
    const struct batch *b = &e->assembly.batch;
    e->counters.full_fetches++;
    if (e->gathered != e->kept_records) { /* the fetch's gather ends the life of the step's */
        memcpy(e->kept_records, e->gathered, e->gathered_bytes);
        e->gathered = e->kept_records;
    }
    step_send(&e->rank, PLAN_FETCH, e->step, b, probe);
    const float *gathered = step_fetch(&e->rank, b, probe);
    return merge_full(gathered, comm_size(e->comm), e->rank.logits_stride, e->vocab_begin,
                      e->rank.limits.vocab_count, e->full_keys, e->full_z, e->full_id);
}

static void decide_concept(struct engine *e, struct sequence *s, const struct ask *ask,
                           const struct merge_row *row, struct think_decision *d) {
    struct think_candidates c = {.m = row->m,
                                 .s = row->s,
                                 .q = row->q,
                                 .count = row->count,
                                 .z = row->z,
                                 .id = row->id,
                                 .close_z = s->think.close_id >= 0 ? row->watch_z[0] : -INFINITY};
    if (think_step(&s->think, &s->thought, &c, d)) return;
    c.count = (int)fetch_full(e, ask->own_probe);
    c.complete = true;
    c.z = e->full_z;
    c.id = e->full_id;
    const bool decided = think_step(&s->think, &s->thought, &c, d);
    ASSERT(decided);
}

/* ln p of an id in a row at T = 1: listed, watched, or fetched. */
static float raw_logprob(struct engine *e, const struct ask *ask, const struct merge_row *raw,
                         uint32_t id) {
    for (int i = 0; i < raw->count; i++)
        if (raw->id[i] == id) return merge_logprob(raw, raw->z[i]);
    const struct batch_probe *p = &e->assembly.batch.probes[ask->raw_probe];
    for (int w = 0; w < p->watch_count; w++)
        if (e->assembly.batch.watch_ids[p->watch_begin + w] == id)
            return merge_logprob(raw, raw->watch_z[w]);
    const int64_t n = fetch_full(e, ask->raw_probe);
    for (int64_t i = 0; i < n; i++)
        if (e->full_id[i] == id) return merge_logprob(raw, e->full_z[i]);
    return -INFINITY;
}

static int top_logprobs(const struct merge_row *raw, int wanted, struct logprob_entry *top) {
    int n = 0;
    for (; n < wanted && n < raw->count; n++)
        top[n] = (struct logprob_entry){raw->id[n], merge_logprob(raw, raw->z[n])};
    return n;
}

/* FNV-1a over the words of one decision. */
static uint64_t hash_words(uint64_t h, const void *words, int count) {
    for (int i = 0; i < count; i++) {
        uint32_t w;
        memcpy(&w, (const unsigned char *)words + 4 * i, sizeof w);
        h = (h ^ w) * UINT64_C(0x100000001b3);
        h ^= h >> 29;
    }
    return h;
}

/* Decisions are added up, so the hash does not depend on the order in which sequences take turns.
 */
static void count_decision(struct engine *e, const struct sequence *s, uint32_t step,
                           const struct think_decision *d) {
    const uint64_t id = s->task->request.id;
    const uint32_t head[] = {(uint32_t)id, (uint32_t)(id >> 32), (uint32_t)s->choice, step,
                             d->trace_id};
    uint64_t h = hash_words(UINT64_C(0xcbf29ce484222325), head, 5);
    h = hash_words(h, &d->entropy, 1);
    h = hash_words(h, d->ids, d->count);
    h = hash_words(h, d->weights, d->count);
    e->counters.decision_hash += h;
    e->counters.generated_tokens++;
    e->counters.soft_steps += d->soft;
}

static bool is_stop_id(const struct request *r, const struct think_decision *d) {
    if (d->phase != PHASE_ANSWER || d->forced) return false;
    for (int i = 0; i < r->stop_id_count; i++)
        if (r->stop_ids[i] == d->trace_id) return true;
    return false;
}

/* False: the sequence goes on. */
static bool decide_ending(struct sequence *s, const struct think_decision *d, struct ending *out) {
    const struct request *r = &s->task->request;
    *out = (struct ending){.finish = FINISH_REASON_STOP};
    if (d->finish == FINISH_EOS) return true;
    if (d->finish == FINISH_LOOP_BREAK) {
        out->loop_break = true;
        return true;
    }
    if (is_stop_id(r, d)) {
        out->stopped_by_id = true;
        out->stop_id = d->trace_id;
        return true;
    }
    if ((int64_t)s->thought.step < r->max_tokens) return false;
    out->finish = FINISH_REASON_LENGTH;
    think_finish_length(&s->thought);
    return true;
}

void decide_settle(struct engine *e, struct sequence *s, const struct step_report *report) {
    const struct think_decision *d = report->decision;
    struct ending ending;
    count_decision(e, s, report->step, d);
    const bool ends = decide_ending(s, d, &ending);
    if (!ends) sequence_append(s, d);
    engine_emit_step(e, s, report);
    if (s->task->sharing != SHARING_NONE && s->choice == 0) {
        share_step(e, s, report);
        share_after_step(e, s, d, ends ? &ending : NULL);
    }
    if (ends && s->state != SEQUENCE_DONE) engine_end(e, s, &ending, false);
}

static void decide_generated(struct engine *e, const struct ask *ask) {
    struct sequence *s = ask->sequence;
    const struct request *r = &s->task->request;
    struct merge_row row, other;
    merge_row_of(e, ask, ask->own_probe, ask->keep, &row);
    if (row.count == 0) { /* every id is masked: nothing can follow */
        share_give_up(e, s);
        return;
    }
    const uint32_t step = s->thought.step;
    struct think_decision d;
    decide_concept(e, s, ask, &row, &d);
    struct logprob_entry top[REQUEST_TOP_LOGPROBS_MAX];
    struct step_report report = {.step = step, .decision = &d, .logprob = NAN, .top = top};
    if (r->logprobs) {
        const struct merge_row *raw = &row;
        if (ask->raw_probe != ask->own_probe) {
            merge_row_of(e, ask, ask->raw_probe, ask->keep, &other);
            raw = &other;
        }
        report.logprob = raw_logprob(e, ask, raw, d.trace_id);
        report.top_count = top_logprobs(raw, r->top_logprobs, top);
    }
    decide_settle(e, s, &report);
}

/* One position of a score request. ln p of a concept token is the weighted sum of its entries'. */
static void decide_scored(struct engine *e, const struct ask *ask) {
    struct sequence *s = ask->sequence;
    const struct request *r = &s->task->request;
    struct merge_row raw, own;
    merge_row_of(e, ask, ask->raw_probe, ask->keep, &raw);
    const struct merge_row *row = &raw;
    if (ask->own_probe != ask->raw_probe) {
        merge_row_of(e, ask, ask->own_probe, ask->keep, &own);
        row = &own;
    }
    const struct think_candidates statistics = {.m = row->m, .s = row->s, .q = row->q};
    double next = NAN;
    if (ask->position + 1 < sequence_total(s)) {
        const uint32_t *ids;
        const float *weights;
        const int n = sequence_input(s, ask->position + 1, &ids, &weights);
        next = 0;
        for (int i = 0; i < n; i++) {
            const double w = weights ? (double)weights[i] : 1.0;
            if (w > 0) next += w * (double)merge_logprob(&raw, raw.watch_z[i]);
        }
    }
    struct logprob_entry top[REQUEST_TOP_LOGPROBS_MAX];
    const struct engine_event event = {.kind = ENGINE_SCORED,
                                       .request_id = r->id,
                                       .position = ask->position,
                                       .entropy = step_entropy(&statistics),
                                       .next_logprob = next,
                                       .top_count = top_logprobs(&raw, r->top_logprobs, top),
                                       .top = top};
    s->scored = ask->position + 1;
    e->on_event(e->user, &event);
    if (s->state == SEQUENCE_DONE || s->scored < r->prompt.count) return;
    engine_end(e, s, &(struct ending){.finish = FINISH_REASON_LENGTH}, false);
}

void decide_row(struct engine *e, const struct ask *ask) {
    if (ask->sequence->state == SEQUENCE_DONE) return; /* cancelled by an event of this step */
    if (ask->sequence->task->request.score) {
        decide_scored(e, ask);
    } else {
        decide_generated(e, ask);
    }
}
