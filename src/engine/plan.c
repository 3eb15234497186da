/* plan.c: see plan.h.
 *
 *   | header | segments | pages | mix_begin | mix_ids | mix_weights |
 *            | logit_rows | probes | edits | watch_ids | run rows |
 *
 * There is one layout for given counts: arrays in this order, each at the next multiple of 8,
 * padding zero. So the header carries counts only, and a message whose length is not exactly what
 * its counts give is refused; a plan has one encoding, and equal plans are equal bytes. plan_view
 * reads nothing before it has checked that it is inside the message, and believes nothing it has
 * not checked: the backend indexes with these numbers. It copies nothing. Byte order and struct
 * layout are the host's: all ranks run one build (comm_agree_equal at start-up).
 *
 * Thread: any. Memory: none.
 */
#include "engine/plan.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kv/pages.h"
#include "think/think.h"

#define PLAN_MAGIC UINT64_C(0x32304e414c504653) /* "SFPLAN02" */

struct plan_header {
    uint64_t magic, step;
    uint32_t kind;
    int32_t fetch_probe, run_steps, run_ahead;
    int32_t row_count, segment_count, logit_row_count, probe_count, candidate_count, watch_max;
    int64_t page_count, mix_count, edit_count, watch_count; /* lengths of the CSR arrays */
};

enum { ARRAY_COUNT = 10 };
struct plan_layout {
    size_t offset[ARRAY_COUNT], size[ARRAY_COUNT], total;
};

/* Counts are >= 0 and bounded (plan_view checks first), so the sums cannot overflow. */
static void lay_out(const struct plan_header *h, struct plan_layout *out) {
    const size_t sizes[ARRAY_COUNT] = {
        (size_t)h->segment_count * sizeof(struct batch_segment),
        (size_t)h->page_count * sizeof(int32_t),
        h->row_count ? ((size_t)h->row_count + 1) * sizeof(int32_t) : 0,
        (size_t)h->mix_count * sizeof(uint32_t),
        (size_t)h->mix_count * sizeof(float),
        (size_t)h->logit_row_count * sizeof(int32_t),
        (size_t)h->probe_count * sizeof(struct batch_probe),
        (size_t)h->edit_count * sizeof(struct batch_edit),
        (size_t)h->watch_count * sizeof(uint32_t),
        h->run_steps ? (size_t)h->segment_count * sizeof(struct run_row) : 0,
    };
    size_t at = sizeof *h;
    for (int i = 0; i < ARRAY_COUNT; i++) {
        out->offset[i] = at;
        out->size[i] = sizes[i];
        at += (sizes[i] + 7) / 8 * 8;
    }
    out->total = at;
}

size_t plan_bytes_max(const struct plan_limits *limits) {
    const struct plan_header h = {.row_count = limits->rows_max,
                                  .segment_count = limits->segments_max,
                                  .logit_row_count = limits->logit_rows_max,
                                  .probe_count = limits->probes_max,
                                  .page_count = limits->pages_max,
                                  .mix_count = limits->mix_max,
                                  .edit_count = limits->edits_max,
                                  .watch_count = limits->watch_max};
    struct plan_layout layout;
    lay_out(&h, &layout);
    return layout.total + (size_t)limits->run_rows_max * sizeof(struct run_row);
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static size_t encode(struct plan_header h, const struct batch *b, const struct run_row *run_rows,
                     void *out, size_t capacity) {
    h.magic = PLAN_MAGIC;
    h.row_count = b->row_count;
    h.segment_count = b->segment_count;
    h.logit_row_count = b->logit_row_count;
    h.probe_count = b->probe_count;
    h.candidate_count = b->candidate_count;
    h.watch_max = b->watch_max;
    for (int i = 0; i < b->segment_count; i++) {
        h.page_count =
            larger(h.page_count, (int64_t)b->segments[i].page_begin + b->segments[i].page_count);
    }
    h.mix_count = b->row_count ? b->mix_begin[b->row_count] : 0;
    for (int i = 0; i < b->probe_count; i++) {
        h.edit_count =
            larger(h.edit_count, (int64_t)b->probes[i].edit_begin + b->probes[i].edit_count);
        h.watch_count =
            larger(h.watch_count, (int64_t)b->probes[i].watch_begin + b->probes[i].watch_count);
    }
    struct plan_layout layout;
    lay_out(&h, &layout);
    ASSERT_LE(layout.total, capacity);
    const void *arrays[ARRAY_COUNT] = {b->segments,    b->pages,      b->mix_begin, b->mix_ids,
                                       b->mix_weights, b->logit_rows, b->probes,    b->edits,
                                       b->watch_ids,   run_rows};
    unsigned char *bytes = out;
    memcpy(bytes, &h, sizeof h);
    for (int i = 0; i < ARRAY_COUNT; i++) {
        const size_t next = i + 1 < ARRAY_COUNT ? layout.offset[i + 1] : layout.total;
        if (layout.size[i]) memcpy(bytes + layout.offset[i], arrays[i], layout.size[i]);
        memset(bytes + layout.offset[i] + layout.size[i], 0,
               next - layout.offset[i] - layout.size[i]);
    }
    return layout.total;
}

size_t plan_encode(enum plan_kind kind, uint64_t step, const struct batch *batch, int fetch_probe,
                   void *out, size_t capacity) {
    static const struct batch none;
    const struct plan_header h = {
        .step = step, .kind = kind, .fetch_probe = kind == PLAN_FETCH ? fetch_probe : 0};
    return encode(h, kind == PLAN_STOP ? &none : batch, NULL, out, capacity);
}

size_t plan_encode_run(uint64_t step, const struct batch *batch, const struct plan_run *run,
                       void *out, size_t capacity) {
    const struct plan_header h = {
        .step = step, .kind = PLAN_RUN, .run_steps = run->steps, .run_ahead = run->ahead};
    return encode(h, batch, run->rows, out, capacity);
}

/* One broken rule: says which, with the number that broke it. */
#define RULE(condition, what, value)                                                      \
    do {                                                                                  \
        if (!(condition))                                                                 \
            return fail(STATUS_COMM, "broken plan: %s (%lld)", what, (long long)(value)); \
    } while (0)

static enum status check_header(const struct plan_header *h, const struct plan_limits *limits) {
    RULE(h->magic == PLAN_MAGIC, "not a plan, or from another build", h->magic);
    RULE(h->kind >= PLAN_STEP && h->kind <= PLAN_RUN, "kind", h->kind);
    RULE(h->row_count >= 0 && h->row_count <= limits->rows_max, "row count", h->row_count);
    RULE(h->segment_count >= 0 && h->segment_count <= limits->segments_max, "segment count",
         h->segment_count);
    RULE(h->logit_row_count >= 0 && h->logit_row_count <= limits->logit_rows_max, "logit row count",
         h->logit_row_count);
    RULE(h->probe_count >= 0 && h->probe_count <= limits->probes_max, "probe count",
         h->probe_count);
    RULE(h->page_count >= 0 && h->page_count <= limits->pages_max, "page count", h->page_count);
    RULE(h->mix_count >= 0 && h->mix_count <= limits->mix_max, "mixture size", h->mix_count);
    RULE(h->edit_count >= 0 && h->edit_count <= limits->edits_max, "edit count", h->edit_count);
    RULE(h->watch_count >= 0 && h->watch_count <= limits->watch_max, "watch count", h->watch_count);
    RULE(h->watch_max >= 0 && h->watch_max <= THINK_TOPK_MAX, "watch_max", h->watch_max);
    if (h->kind == PLAN_RUN) {
        RULE(h->run_steps >= 1 && h->run_steps <= limits->run_steps_max, "steps of a run",
             h->run_steps);
        RULE(h->run_ahead >= 1 && h->run_ahead <= limits->run_ahead_max, "steps launched ahead",
             h->run_ahead);
        RULE(h->row_count <= limits->run_rows_max, "rows of a run", h->row_count);
        RULE(h->segment_count == h->row_count && h->logit_row_count == h->row_count &&
                 h->probe_count == h->row_count,
             "a run of other rows than decode rows", h->row_count);
    } else {
        RULE(h->run_steps == 0 && h->run_ahead == 0, "steps of something else than a run",
             h->run_steps);
    }
    if (h->kind == PLAN_STOP) {
        RULE(h->row_count == 0 && h->segment_count == 0 && h->logit_row_count == 0 &&
                 h->probe_count == 0,
             "a stop with rows", h->row_count);
        RULE(h->page_count == 0 && h->mix_count == 0 && h->edit_count == 0 && h->watch_count == 0,
             "a stop with arrays", h->mix_count);
        return STATUS_OK;
    }
    RULE(h->row_count > 0, "a step without rows", h->row_count);
    RULE(h->candidate_count >= 1 && h->candidate_count <= THINK_TOPK_MAX, "candidate count",
         h->candidate_count);
    if (h->kind == PLAN_FETCH) {
        RULE(h->fetch_probe >= 0 && h->fetch_probe < h->probe_count, "fetched probe",
             h->fetch_probe);
    } else {
        RULE(h->fetch_probe == 0, "fetched probe without a fetch", h->fetch_probe);
    }
    return STATUS_OK;
}

/* Segments cover the rows without gap or overlap, and each brings exactly the pages its rows see
 * (run_rows not NULL: the rows of all its steps). */
static enum status check_segments(const struct batch *b, int64_t page_count,
                                  const struct run_row *run_rows,
                                  const struct plan_limits *limits) {
    int64_t row = 0, page = 0;
    for (int i = 0; i < b->segment_count; i++) {
        const struct batch_segment *s = &b->segments[i];
        RULE(s->row_begin == row, "segments must follow one another", s->row_begin);
        RULE(s->row_count >= 1 && s->row_count <= b->row_count - row, "rows of a segment",
             s->row_count);
        const int32_t reach = run_rows ? run_rows[i].steps : s->row_count;
        RULE(s->position >= 0 && s->position <= limits->position_max - reach, "position",
             s->position);
        const int64_t pages = ((int64_t)s->position + reach + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
        RULE(s->page_begin == page, "page tables must follow one another", s->page_begin);
        RULE(s->page_count == pages, "pages of a segment", s->page_count);
        RULE(page + pages <= page_count, "page table", page + pages);
        row += s->row_count;
        page += pages;
    }
    RULE(row == b->row_count, "rows without a segment", b->row_count - row);
    RULE(page == page_count, "pages without a segment", page_count - page);
    for (int64_t i = 0; i < page_count; i++)
        RULE(b->pages[i] >= 0 && b->pages[i] < limits->page_count, "page number", b->pages[i]);
    return STATUS_OK;
}

static enum status check_mixtures(const struct batch *b, int64_t mix_count,
                                  const struct plan_limits *limits) {
    RULE(b->mix_begin[0] == 0, "mixtures must start at 0", b->mix_begin[0]);
    for (int i = 0; i < b->row_count; i++) {
        const int64_t n = (int64_t)b->mix_begin[i + 1] - b->mix_begin[i];
        RULE(n >= 1 && n <= THINK_TOPK_MAX, "entries of a mixture", n);
    }
    RULE(b->mix_begin[b->row_count] == mix_count, "mixture size", b->mix_begin[b->row_count]);
    for (int64_t i = 0; i < mix_count; i++) {
        RULE(b->mix_ids[i] < limits->vocab_count, "id of a mixture", b->mix_ids[i]);
        RULE(isfinite(b->mix_weights[i]) && b->mix_weights[i] >= 0, "weight of entry", i);
    }
    return STATUS_OK;
}

/* Probes own consecutive runs of edits and watched ids; the ids of a run of edits ascend. */
static enum status check_probes(const struct batch *b, const struct plan_header *h,
                                const struct plan_limits *limits) {
    int64_t edit = 0, watch = 0, watch_max = 0;
    for (int i = 0; i < b->logit_row_count; i++) {
        RULE(b->logit_rows[i] >= 0 && b->logit_rows[i] < b->row_count, "logit row",
             b->logit_rows[i]);
        RULE(i == 0 || b->logit_rows[i] > b->logit_rows[i - 1], "logit rows must ascend",
             b->logit_rows[i]);
    }
    for (int i = 0; i < b->probe_count; i++) {
        const struct batch_probe *p = &b->probes[i];
        RULE(p->logit_row >= 0 && p->logit_row < b->logit_row_count, "logit row of a probe",
             p->logit_row);
        RULE(isfinite(p->temperature) && p->temperature > 0, "temperature of probe", i);
        RULE(p->edit_begin == edit, "edits must follow one another", p->edit_begin);
        RULE(p->edit_count >= 0 && p->edit_count <= h->edit_count - edit, "edits of a probe",
             p->edit_count);
        RULE(p->watch_begin == watch, "watched ids must follow one another", p->watch_begin);
        RULE(p->watch_count >= 0 && p->watch_count <= h->watch_count - watch,
             "watched ids of a probe", p->watch_count);
        for (int64_t e = edit; e < edit + p->edit_count; e++) {
            RULE(b->edits[e].id < limits->vocab_count, "id of an edit", b->edits[e].id);
            RULE(e == edit || b->edits[e].id > b->edits[e - 1].id, "ids of edits must ascend",
                 b->edits[e].id);
            RULE(isfinite(b->edits[e].rep) && b->edits[e].rep > 0, "factor of edit", e);
            RULE(isfinite(b->edits[e].add) || b->edits[e].add == -INFINITY, "addend of edit", e);
        }
        edit += p->edit_count;
        watch += p->watch_count;
        watch_max = larger(watch_max, p->watch_count);
    }
    RULE(edit == h->edit_count, "edits without a probe", h->edit_count - edit);
    RULE(watch == h->watch_count, "watched ids without a probe", h->watch_count - watch);
    RULE(watch_max == b->watch_max, "watch_max", b->watch_max);
    for (int64_t i = 0; i < watch; i++)
        RULE(b->watch_ids[i] < limits->vocab_count, "watched id", b->watch_ids[i]);
    return STATUS_OK;
}

/* A bool that is neither 0 nor 1 must not even be looked at as one. */
static bool is_bool(const bool *b) {
    unsigned char byte;
    memcpy(&byte, b, 1);
    return byte <= 1;
}

/* Counters a device indexes with or adds to. */
static enum status check_run_state(int row, const struct think_params *p,
                                   const struct think_state *s) {
    RULE(is_bool(&s->thinking_done), "switches of run row", row);
    RULE((unsigned)s->phase <= PHASE_THINKING, "phase of run row", row);
    RULE((unsigned)s->end <= END_WATCHDOG, "end of run row", row);
    RULE(s->thinking_steps >= 0 && s->thinking_steps <= UINT32_MAX, "thinking steps of run row",
         row);
    RULE(s->soft_steps >= 0 && s->soft_steps <= UINT32_MAX, "soft steps of run row", row);
    RULE(s->cold_count >= 0 && s->cold_count <= UINT32_MAX, "cold steps of run row", row);
    RULE(s->loop_count >= 0 && s->loop_count <= UINT32_MAX, "loop steps of run row", row);
    RULE(s->forced_next >= -1 && s->forced_next < (s->forced_next < 0 ? 0 : p->close_text_count),
         "forced text of run row", row);
    return STATUS_OK;
}

static enum status check_run_params(int row, const struct think_params *p,
                                    const struct plan_limits *limits) {
    const int vocab = (int)limits->vocab_count;
    RULE(is_bool(&p->cold_stop) && is_bool(&p->ignore_eos), "switches of run row", row);
    RULE(p->open_id < vocab && p->close_id < vocab, "markers of run row", row);
    RULE(p->eos_count >= 0 && p->eos_count <= THINK_EOS_MAX, "ends of run row", row);
    RULE((unsigned)p->on_eos <= ON_EOS_MASK && (unsigned)p->compat <= COMPAT_OFFICIAL_2026_01,
         "parameters of run row", row);
    if (think_params_check(p, vocab) == STATUS_OK) return STATUS_OK;
    char text[FAULT_TEXT_BYTES]; /* what it says goes where ours will be written */
    snprintf(text, sizeof text, "%s", fail_text());
    return fail(STATUS_COMM, "broken plan: run row %d: %s", row, text);
}

/* Row i of a run is segment, row, logit row and probe i, and watches its close marker. */
static enum status check_run(const struct batch *b, const struct plan_run *run,
                             const struct plan_limits *limits) {
    for (int i = 0; i < b->row_count; i++) {
        const struct run_row *row = &run->rows[i];
        const struct batch_probe *p = &b->probes[i];
        RULE(row->phase_bound == 0 || row->phase_bound == 1, "bond of a run row", row->phase_bound);
        TRY(check_run_params(i, &row->params, limits));
        TRY(check_run_state(i, &row->params, &row->state));
        RULE(p->logit_row == i, "logit row of a run's probe", p->logit_row);
        RULE(p->watch_count == (row->params.close_id >= 0), "watched ids of a run's probe",
             p->watch_count);
        RULE(p->watch_count == 0 || b->watch_ids[p->watch_begin] == (uint32_t)row->params.close_id,
             "watched id of a run's probe", i);
    }
    return STATUS_OK;
}

enum status plan_view(const void *bytes, size_t n, const struct plan_limits *limits,
                      enum plan_kind *kind, uint64_t *step, int *fetch_probe, struct batch *batch,
                      struct plan_run *run) {
    struct plan_header h;
    RULE((uintptr_t)bytes % 8 == 0, "alignment of the message", (uintptr_t)bytes % 8);
    RULE(n >= sizeof h, "length", n);
    memcpy(&h, bytes, sizeof h);
    TRY(check_header(&h, limits));
    struct plan_layout layout;
    lay_out(&h, &layout);
    RULE(n == layout.total, "length", n);
    const unsigned char *base = bytes;
    *kind = (enum plan_kind)h.kind;
    *step = h.step;
    *fetch_probe = h.fetch_probe;
    *batch = (struct batch){.row_count = h.row_count,
                            .segment_count = h.segment_count,
                            .logit_row_count = h.logit_row_count,
                            .probe_count = h.probe_count,
                            .candidate_count = h.candidate_count,
                            .watch_max = h.watch_max,
                            .segments = (const void *)(base + layout.offset[0]),
                            .pages = (const void *)(base + layout.offset[1]),
                            .mix_begin = (const void *)(base + layout.offset[2]),
                            .mix_ids = (const void *)(base + layout.offset[3]),
                            .mix_weights = (const void *)(base + layout.offset[4]),
                            .logit_rows = (const void *)(base + layout.offset[5]),
                            .probes = (const void *)(base + layout.offset[6]),
                            .edits = (const void *)(base + layout.offset[7]),
                            .watch_ids = (const void *)(base + layout.offset[8])};
    *run = (struct plan_run){
        .steps = h.run_steps,
        .ahead = h.run_ahead,
        .rows = h.kind == PLAN_RUN ? (const void *)(base + layout.offset[9]) : NULL};
    if (h.kind == PLAN_STOP) return STATUS_OK;
    for (int i = 0; h.kind == PLAN_RUN && i < h.row_count; i++) /* pages are counted with these */
        RULE(run->rows[i].steps >= 1 && run->rows[i].steps <= run->steps, "steps of a run row",
             run->rows[i].steps);
    TRY(check_segments(batch, h.page_count, run->rows, limits));
    TRY(check_mixtures(batch, h.mix_count, limits));
    TRY(check_probes(batch, &h, limits));
    return h.kind == PLAN_RUN ? check_run(batch, run, limits) : STATUS_OK;
}
