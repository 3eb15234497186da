/* batch.h: what one step works on, as the backend sees it: PODs and borrowed arrays, no requests.
 *
 * T rows; consecutive rows of one sequence form a segment (one row in decode, a chunk in prefill).
 * The arrays live in the plan (engine/plan.h), equal on every rank.
 */
#ifndef SFUMATO_BACKEND_BATCH_H
#define SFUMATO_BACKEND_BATCH_H

#include <math.h>
#include <stdint.h>

#include "base/fmath.h"

struct batch_segment {
    int32_t row_begin, row_count;
    int32_t position;   /* of the first row; row i of the segment sees tokens 0 .. position + i */
    int32_t page_begin; /* into batch.pages; page j holds positions [64 j, 64 j + 64) */
    int32_t page_count;
};

/* One logit edit: z' = (z > 0 ? z / rep : z * rep) + add. add = -inf masks the id. */
struct batch_edit {
    uint32_t id;
    float rep, add;
};

/* One question about a row's logits: statistics and candidates of (edited z) / temperature. */
struct batch_probe {
    int32_t logit_row;              /* index into batch.logit_rows */
    float temperature;              /* > 0 */
    int32_t edit_begin, edit_count; /* into batch.edits, ids distinct */
    /* into batch.watch_ids: ids whose z' is wanted whatever their place */
    int32_t watch_begin, watch_count;
};

struct batch {
    int32_t row_count; /* T */
    int32_t segment_count;
    int32_t logit_row_count;
    int32_t probe_count;
    int32_t candidate_count; /* K of this step's records: 32 or 64 */
    int32_t watch_max;       /* largest watch_count of a probe */
    const struct batch_segment *segments;
    const int32_t *pages;
    const int32_t *mix_begin; /* [T + 1] CSR into mix_ids, mix_weights */
    const uint32_t *mix_ids;
    const float *mix_weights;
    const int32_t *logit_rows; /* rows whose logits are wanted, ascending */
    const struct batch_probe *probes;
    const struct batch_edit *edits;
    const uint32_t *watch_ids;
};

/* Longest arrays of a batch, beside what backend_config says of rows and probes. */
struct batch_limits {
    int64_t segments, mix, pages, edits, watch;
};

/* A rank's answer to one probe; followed by K pairs, then watch_max pairs. count <= K pairs are
 * used, sorted by (z desc, id asc). A watch pair not owned by the rank has z = -inf. A rank with no
 * id with z > -inf has m = -inf, s = q = 0. Stride in bytes: batch_record_bytes. */
struct batch_record {
    float m, s, q; /* over the rank's slabs, merged along the tree (cpu.md §3.1) */
    int32_t count;
};
struct batch_pair {
    float z;
    uint32_t id;
};
/* One node of the slab tree for the statistics (cpu.md §3.1): a = a + b. The same function joins
 * the slabs of a rank and, on rank 0, the ranks. An operand with m = -inf is absent. m is finite
 * otherwise. */
static inline SFUMATO_DEVICE void batch_stats_join(float *m, float *s, float *q, float m_b,
                                                   float s_b, float q_b) {
    if (m_b == -INFINITY) return;
    if (*m == -INFINITY) {
        *m = m_b;
        *s = s_b;
        *q = q_b;
        return;
    }
    const float n = *m > m_b ? *m : m_b;
    const float d = *m - n, d_b = m_b - n; /* one of them 0 */
    const float c = fmath_exp(d), c_b = fmath_exp(d_b);
    /* c = 0 with d = -inf would give 0 * inf */
    const float part = c == 0.0f ? 0.0f : c * (*q + d * *s);
    const float part_b = c_b == 0.0f ? 0.0f : c_b * (q_b + d_b * s_b);
    *m = n;
    *s = c * *s + c_b * s_b;
    *q = part + part_b;
}
static inline SFUMATO_DEVICE int64_t batch_record_bytes(int32_t candidate_count,
                                                        int32_t watch_max) {
    return (int64_t)sizeof(struct batch_record) +
           (int64_t)sizeof(struct batch_pair) * (candidate_count + watch_max);
}

#endif
