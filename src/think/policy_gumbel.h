/* policy_gumbel.h: Gumbel-softmax over the soft token's entries (§4.7):
 * w_i <- softmax((ln w_i + g_i) / tau), slot i = place in the soft token.
 *
 * The first id is then an exact categorical sample of the soft weights (the Gumbel-max trick), and
 * tau -> 0 makes the token one-hot on it; entries that underflow are dropped.
 */
#ifndef SFUMATO_THINK_POLICY_GUMBEL_H
#define SFUMATO_THINK_POLICY_GUMBEL_H

#include "think/policy_soft.h"

static inline SFUMATO_DEVICE bool policy_gumbel(const struct policy_input *in,
                                                struct think_decision *out) {
    if (!policy_soft(in, out)) return false;
    double y[THINK_TOPK_MAX], largest = 0;
    for (int i = 0; i < out->count; i++) {
        y[i] = (noise_log((double)out->weights[i]) + noise_gumbel(&in->noise, (uint32_t)i)) /
               (double)in->params->gumbel_temperature;
        if (i == 0 || y[i] > largest) largest = y[i];
    }
    for (int i = 0; i < out->count; i++) out->weights[i] = fmath_exp((float)(y[i] - largest));
    token_normalise(out);
    return true;
}

#endif
