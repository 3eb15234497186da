/* policy_dirichlet.h: p replaced by a draw from Dirichlet(alpha p) over the filters' survivors,
 * then the max_topk largest (§4.5, §4.6); slot i = place among the survivors.
 *
 * A Dirichlet draw is independent Gamma(alpha p_i) variates over their sum; the sum cancels when
 * the largest are renormalised. The survivors may be a whole vocabulary (no filters), so the
 * largest are kept while drawing: no array of them exists. All survivors must be known, however
 * small max_topk is.
 */
#ifndef SFUMATO_THINK_POLICY_DIRICHLET_H
#define SFUMATO_THINK_POLICY_DIRICHLET_H

#include "think/policy.h"

static inline SFUMATO_DEVICE bool policy_dirichlet(const struct policy_input *in,
                                                   struct think_decision *out) {
    const struct think_candidates *c = in->candidates;
    struct filter_result survivors;
    if (!filter_run(in->filters, c, FILTER_ALL, &survivors) || survivors.more) return false;
    const double total = filter_total(&survivors, c, survivors.count);

    double largest[THINK_TOPK_MAX]; /* ln of the variates of out->ids, (value desc, id asc) */
    out->count = 0;
    for (int i = 0; i < survivors.count; i++) {
        const double shape =
            (double)in->params->dirichlet_alpha * ((double)filter_mass(&survivors, c, i) / total);
        const double value = noise_gamma_log(&in->noise, shape, (uint32_t)i);
        const uint32_t id = c->id[i];
        int k = out->count;
        while (k > 0 &&
               (largest[k - 1] < value || (largest[k - 1] == value && out->ids[k - 1] > id)))
            k--;
        if (k == in->params->max_topk) continue;
        if (out->count < in->params->max_topk) out->count++;
        for (int j = out->count - 1; j > k; j--) {
            largest[j] = largest[j - 1];
            out->ids[j] = out->ids[j - 1];
        }
        largest[k] = value;
        out->ids[k] = id;
    }
    for (int i = 0; i < out->count; i++)
        out->weights[i] = fmath_exp((float)(largest[i] - largest[0]));
    token_normalise(out);
    return true;
}

#endif
