/* policy_off.h: one categorical draw from the filtered distribution: thinking in mode off, and
 * every answer step. Inverse CDF in list order: the first id whose cumulative mass is > u * total.
 *
 * Without any filter the total is S, so a draw that falls into the listed part (nearly all do)
 * needs no full logits; the mass that exists only through S's rounding, past the last id of the
 * row, goes to the most likely id. With filters the total is the sum of the survivors.
 */
#ifndef SFUMATO_THINK_POLICY_OFF_H
#define SFUMATO_THINK_POLICY_OFF_H

#include "think/policy.h"

static inline SFUMATO_DEVICE bool policy_off(const struct policy_input *in,
                                             struct think_decision *out) {
    const struct think_candidates *c = in->candidates;
    struct filter_result survivors;
    if (!filter_run(in->filters, c, FILTER_ALL, &survivors)) return false;
    const double total =
        survivors.cut ? filter_total(&survivors, c, survivors.count) : (double)c->s;
    const rng_block draw = noise_draw(&in->noise, RNG_CATEGORICAL, 0, 0);
    const double target = (double)rng_uniform(draw.word[0]) * total;
    double cumulative = 0;
    for (int i = 0; i < survivors.count; i++) {
        cumulative += (double)filter_mass(&survivors, c, i);
        if (cumulative > target) {
            token_one_hot(out, c->id[i]);
            return true;
        }
    }
    token_one_hot(out, c->id[0]);
    return !survivors.more;
}

#endif
