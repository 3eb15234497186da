/* token.h: building a concept token in place, inside the decision: add, normalise, sort.
 *
 * A concept token is ids[count], weights[count] with distinct ids, weights > 0 that sum to 1 up to
 * rounding, sorted by (weight desc, id asc). Policies add entries with any positive mass and call
 * token_normalise once. Host and device; no memory of its own.
 */
#ifndef SFUMATO_THINK_TOKEN_H
#define SFUMATO_THINK_TOKEN_H

#include <float.h>

#include "base/fmath.h"
#include "think/think.h"

/* Mass of candidate i before any normalisation: e^(z' - M), in (0, 1]; 0 when it underflows. */
static inline SFUMATO_DEVICE float token_mass(const struct think_candidates *c, int i) {
    return fmath_exp(c->z[i] - c->m);
}

static inline SFUMATO_DEVICE void token_one_hot(struct think_decision *out, uint32_t id) {
    out->count = 1;
    out->ids[0] = id;
    out->weights[0] = 1.0f;
}

static inline SFUMATO_DEVICE void token_add(struct think_decision *out, uint32_t id, float mass) {
    out->ids[out->count] = id;
    out->weights[out->count++] = mass;
}

/* Insertion sort: the lists are short and nearly always sorted already. Needed even where the
 * masses came in sorted: two different masses may round to the same weight, and then the lower id
 * goes first. */
static inline SFUMATO_DEVICE void token_sort(struct think_decision *out) {
    for (int i = 1; i < out->count; i++) {
        const uint32_t id = out->ids[i];
        const float w = out->weights[i];
        int k = i;
        while (k > 0 &&
               (out->weights[k - 1] < w || (out->weights[k - 1] == w && out->ids[k - 1] > id))) {
            out->weights[k] = out->weights[k - 1];
            out->ids[k] = out->ids[k - 1];
            k--;
        }
        out->weights[k] = w;
        out->ids[k] = id;
    }
}

/* Sum in double, one rounding a weight: |sum of weights - 1| <= count * 2^-24. Weights that would
 * be subnormal are dropped: a device that flushes them would disagree, and no sum can tell. */
static inline SFUMATO_DEVICE void token_normalise(struct think_decision *out) {
    double sum = 0;
    for (int i = 0; i < out->count; i++) sum += (double)out->weights[i];
    int kept = 0;
    for (int i = 0; i < out->count; i++) {
        const float w = (float)((double)out->weights[i] / sum);
        if (!(w >= FLT_MIN)) continue;
        out->ids[kept] = out->ids[i];
        out->weights[kept++] = w;
    }
    out->count = kept;
    token_sort(out);
}

#endif
