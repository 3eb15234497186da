/* policy.h: what a thinking policy sees and gives.
 *
 * A policy is one header policy_<name>.h with one function
 *     bool policy_<name>(const struct policy_input *in, struct think_decision *out)
 * that sets out->count, ids and weights (§4.2 to §4.7) and nothing else; its first id becomes the
 * trace id. False: the list is too short to be exact. It is called at temperatures above 0 only (at
 * 0 the token is one-hot on the most likely id). Pure: no allocation, no libm, host and device.
 * What it wants to remember goes to in->memory, which is kept only when the step succeeds.
 */
#ifndef SFUMATO_THINK_POLICY_H
#define SFUMATO_THINK_POLICY_H

#include "think/filter.h"
#include "think/noise.h"

struct policy_input {
    const struct think_params *params;
    const struct think_filters *filters; /* of this step's phase */
    const struct think_candidates *candidates;
    float entropy;
    struct noise_source noise;
    float *memory; /* [THINK_POLICY_STATE], per sequence, zero at its start */
};

#endif
