/* policy_soft.h: the concept token is the filtered distribution itself, cut to max_topk (§4.6). */
#ifndef SFUMATO_THINK_POLICY_SOFT_H
#define SFUMATO_THINK_POLICY_SOFT_H

#include "think/policy.h"

static inline SFUMATO_DEVICE bool policy_soft(const struct policy_input *in,
                                              struct think_decision *out) {
    struct filter_result survivors;
    const struct think_candidates *c = in->candidates;
    if (!filter_run(in->filters, c, in->params->max_topk, &survivors) || survivors.more)
        return false;
    out->count = 0;
    for (int i = 0; i < survivors.count; i++) token_add(out, c->id[i], survivors.mass[i]);
    token_normalise(out);
    return true;
}

#endif
