/* step.c: see step.h. Limits, and the two collective acts of a step.
 *
 * Every rank computes the same limits from the same options, and rank 0 schedules within them, so a
 * plan that breaks one is a fault and not a matter of load. Sizes follow the worst plan: with 2,048
 * rows of 64 entries it is about 5 MB, the usual one a few KB. Messages are as long as what is in
 * them.
 */
#include "engine/step.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/fault.h"
#include "base/progress.h"
#include "kv/pages.h"

enum {
    LOGIT_ROWS_MIN = 64,    /* so that a score request alone is answered in chunks of this size */
    PROBES_PER_ROW = 2,     /* the step's own, and the raw one at T = 1 for logprobs */
    EDITS_SHARED = 1 << 18, /* a plan holds at least this many logit edits (3 MB) */
};

int engine_logit_rows_max(const struct engine_options *options) {
    return options->max_seqs > LOGIT_ROWS_MIN ? options->max_seqs : LOGIT_ROWS_MIN;
}
int engine_probes_max(const struct engine_options *options) {
    return PROBES_PER_ROW * engine_logit_rows_max(options);
}
int engine_run_rows_max(const struct engine_options *options) {
    if (options->run_steps == 0) return 0;
    return options->max_seqs < RUN_ROWS_MAX ? options->max_seqs : RUN_ROWS_MAX;
}
struct batch_limits engine_batch_limits(const struct engine_options *options) {
    struct plan_limits limits;
    step_limits(options, 0, &limits);
    return (struct batch_limits){.segments = limits.segments_max,
                                 .mix = limits.mix_max,
                                 .pages = limits.pages_max,
                                 .edits = limits.edits_max,
                                 .watch = limits.watch_max};
}

struct engine_options step_options(const struct engine_options *options) {
    struct engine_options o = *options;
    const int64_t in_pages = (int64_t)o.page_count * KV_PAGE_TOKENS;
    if (o.max_seqs > o.max_batched_tokens) o.max_seqs = o.max_batched_tokens;
    if (o.page_count > 0 && o.max_model_len > in_pages) o.max_model_len = in_pages;
    return o;
}

void step_limits(const struct engine_options *options, int64_t vocab_count,
                 struct plan_limits *out) {
    const struct engine_options o = step_options(options);
    const int64_t pages = (o.max_model_len + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    /* the longest list one sequence can have: a plan must take at least one */
    const int64_t edits_one =
        REQUEST_BIAS_MAX + THINK_EOS_MAX + REQUEST_STOP_IDS_MAX + o.max_model_len;
    *out = (struct plan_limits){
        .rows_max = o.max_batched_tokens,
        .segments_max = o.max_seqs,
        .logit_rows_max = engine_logit_rows_max(&o),
        .probes_max = engine_probes_max(&o),
        .mix_max = (int64_t)o.max_batched_tokens * THINK_TOPK_MAX,
        .pages_max = o.max_seqs * pages,
        .edits_max = edits_one > EDITS_SHARED ? edits_one : EDITS_SHARED,
        .watch_max = (int64_t)engine_probes_max(&o) * THINK_TOPK_MAX,
        .page_count = o.page_count,
        .vocab_count = vocab_count,
        .position_max = o.max_model_len,
        .run_rows_max = engine_run_rows_max(&o),
        .run_steps_max = o.run_steps,
        .run_ahead_max = o.run_steps > 0 ? o.launch_ahead : 0,
    };
}

size_t step_records_bytes_max(const struct plan_limits *limits) {
    return (size_t)limits->probes_max * (size_t)batch_record_bytes(THINK_TOPK_MAX, THINK_TOPK_MAX);
}

size_t step_records_bytes(const struct batch *b) {
    return (size_t)b->probe_count * (size_t)batch_record_bytes(b->candidate_count, b->watch_max);
}

void engine_comm_needs(const struct engine_options *options, size_t *bcast_bytes,
                       size_t *gather_bytes, int64_t vocab_local_max) {
    struct plan_limits limits;
    step_limits(options, 0, &limits);
    const size_t full = (size_t)vocab_local_max * sizeof(float),
                 records = step_records_bytes_max(&limits);
    *bcast_bytes = plan_bytes_max(&limits);
    *gather_bytes = full > records ? full : records;
}

enum status step_init(struct step_rank *r, model *m, comm *c,
                      const struct engine_options *options) {
    *r = (struct step_rank){.model = m, .comm = c, .logits_stride = model_vocab_local_max(m)};
    const int rows = model_get_config(m)->vocab_rows;
    step_limits(options, options->vocab_count > 0 ? options->vocab_count : rows, &r->limits);
    r->plan_capacity = plan_bytes_max(&r->limits);
    if (comm_rank(c) == 0) r->plan = malloc(r->plan_capacity);
    r->records = calloc(1, step_records_bytes_max(&r->limits));
    r->logits = calloc((size_t)r->logits_stride, sizeof *r->logits);
    if ((comm_rank(c) == 0 && !r->plan) || !r->records || !r->logits)
        return fail(STATUS_MEMORY,
                    "no memory for plans and records (%zu bytes): lower --max-num-batched-tokens",
                    r->plan_capacity + step_records_bytes_max(&r->limits));
    return STATUS_OK;
}

void step_fini(struct step_rank *r) {
    free(r->plan);
    free(r->records);
    free(r->logits);
}

void step_send(struct step_rank *r, enum plan_kind kind, uint64_t step, const struct batch *batch,
               int probe) {
    progress_at_step(step);
    const size_t n = plan_encode(kind, step, batch, probe, r->plan, r->plan_capacity);
    comm_bcast(r->comm, r->plan, n, NULL);
}

void step_send_run(struct step_rank *r, uint64_t step, const struct batch *batch,
                   const struct plan_run *run) {
    progress_at_step(step);
    comm_bcast(r->comm, r->plan, plan_encode_run(step, batch, run, r->plan, r->plan_capacity),
               NULL);
}

void step_faults(void) {
    if (fault_hit("step-kill")) raise(SIGKILL);
    ASSERT(!fault_hit("step-bug"));
    if (fault_hit("step-alloc")) {
        void *volatile taken = malloc(1); /* volatile: or the compiler leaves both calls out */
        free(taken);
    }
    const int delay_ms = fault_delay_ms();
    if (delay_ms > 0) usleep((useconds_t)delay_ms * 1000);
}

const void *step_forward(struct step_rank *r, const struct batch *batch) {
    step_faults();
    model_step(r->model, batch, r->records);
    if (batch->probe_count == 0) return NULL; /* chunks only: every rank sees that nobody asks */
    return comm_gather(r->comm, r->records, step_records_bytes(batch));
}

const float *step_fetch(struct step_rank *r, const struct batch *batch, int probe) {
    model_fetch(r->model, batch, probe, r->logits);
    return comm_gather(r->comm, r->logits, (size_t)r->logits_stride * sizeof *r->logits);
}
