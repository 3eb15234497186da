/* layer: engine */
/* fuzz_plan.c: patches of a valid plan: (offset, byte) triples. What passes the checks is read as a
 * backend would, and its encoding must pass again. Random messages hardly get past the magic;
 * patched ones do. */
#include <stdlib.h>
#include <string.h>

#include "../i_plan_sample.h"
#include "base/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void read_all(const struct batch *b) {
    double sum = 0;
    for (int i = 0; i < b->segment_count; i++)
        for (int p = 0; p < b->segments[i].page_count; p++)
            sum += b->pages[b->segments[i].page_begin + p];
    for (int i = 0; i < b->row_count; i++)
        for (int e = b->mix_begin[i]; e < b->mix_begin[i + 1]; e++)
            sum += (double)b->mix_ids[e] * (double)b->mix_weights[e];
    for (int i = 0; i < b->probe_count; i++) {
        const struct batch_probe *p = &b->probes[i];
        sum += b->logit_rows[p->logit_row];
        for (int e = 0; e < p->edit_count; e++) sum += b->edits[p->edit_begin + e].id;
        for (int w = 0; w < p->watch_count; w++) sum += b->watch_ids[p->watch_begin + w];
    }
    ASSERT(sum == sum);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    static _Alignas(8) unsigned char whole[SAMPLE_BYTES], again[1 << 16];
    struct sample sample;
    log_init(LOG_OFF, false);
    sample_make(&sample);
    struct sample_run sample_run;
    sample_run_make(&sample_run);
    const enum plan_kind kind_made = n % 2 ? PLAN_FETCH : PLAN_STEP;
    size_t size = n / 2 % 2
                      ? plan_encode_run(9, &sample_run.batch, &sample_run.run, whole, sizeof whole)
                      : plan_encode(kind_made, 9, &sample.batch, n % 2, whole, sizeof whole);
    for (size_t i = 0; i + 2 < n; i += 3)
        whole[(bytes[i] | (size_t)bytes[i + 1] << 8) % size] = bytes[i + 2];
    if (n > 0 && bytes[0] == 0xff) size = size * bytes[n - 1] / 255; /* a message cut short */
    unsigned char *plan =
        malloc(size ? size : 1); /* exact, so that a sanitizer sees a read past the end */
    if (!plan) return 0;
    memcpy(plan, whole, size);
    enum plan_kind kind;
    uint64_t step;
    int probe;
    struct batch batch;
    struct plan_run run;
    if (plan_view(plan, size, &sample_limits, &kind, &step, &probe, &batch, &run) == STATUS_OK) {
        read_all(&batch);
        const size_t m = kind == PLAN_RUN
                             ? plan_encode_run(step, &batch, &run, again, sizeof again)
                             : plan_encode(kind, step, &batch, probe, again, sizeof again);
        ASSERT_EQ(m, size);
        ASSERT(plan_view(again, m, &sample_limits, &kind, &step, &probe, &batch, &run) ==
               STATUS_OK);
    }
    free(plan);
    return 0;
}
