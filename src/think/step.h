/* step.h: one step of one row, from merged candidates to the decision (soft-thinking.md §4).
 *
 *   entropy ─► policy (filters, noise, weights) ─► trace id ─► ends ─► p of the trace id ─► state
 *
 * think_step_row is all of it, for host (think.c) and device. It works on a copy of the state, so a
 * step that has to be repeated with the full logits has changed nothing. A new policy needs its
 * file, its include here and its line in policies.def.
 */
#ifndef SFUMATO_THINK_STEP_H
#define SFUMATO_THINK_STEP_H

#include "think/policy_dirichlet.h"
#include "think/policy_gumbel.h"
#include "think/policy_off.h"
#include "think/policy_soft.h"
#include "think/stop.h"

/* The filters of a step's phase, with what a compat preset says about the answer (§7). */
static inline SFUMATO_DEVICE struct think_filters step_filters(const struct think_params *p,
                                                               enum think_phase phase) {
    if (phase == PHASE_THINKING) return p->thinking;
    struct think_filters f = p->answer;
    if (p->compat == COMPAT_OFFICIAL_2025_05) f.temperature = 0.0f;
    if (p->compat == COMPAT_OFFICIAL_2026_01) f.temperature = p->thinking.temperature;
    return f;
}

static inline SFUMATO_DEVICE bool step_is_greedy(const struct think_filters *f) {
    return f->temperature < THINK_TEMPERATURE_MIN;
}

/* H = ln S - Q/S, over the whole vocabulary and before any filter. S >= 1 and Q <= 0 also in
 * rounded sums, but the logarithm's last bit may be wrong: an entropy below 0 would pass a cold-stop
 * threshold of 0, which nothing is below. */
static inline SFUMATO_DEVICE float step_entropy(const struct think_candidates *c) {
    const float h = fmath_log(c->s) - c->q / c->s;
    return h > 0.0f ? h : 0.0f;
}

/* Probability before the filters, at the row's temperature: of a listed id or of the close marker,
 * which is always watched. NAN for another id; no policy chooses one so far. */
static inline SFUMATO_DEVICE float step_probability(const struct think_candidates *c, uint32_t id,
                                                    int close_id) {
    for (int i = 0; i < c->count; i++)
        if (c->id[i] == id) return token_mass(c, i) / c->s;
    if (stop_is_marker(id, close_id)) return fmath_exp(c->close_z - c->m) / c->s;
    return NAN;
}

static inline SFUMATO_DEVICE bool step_token(enum think_mode mode, const struct policy_input *in,
                                             struct think_decision *out) {
    switch (mode) {
#define POLICY(NAME, name, soft, help) \
    case THINK_##NAME:                 \
        return policy_##name(in, out);
#include "think/policies.def"
#undef POLICY
        default:
            return false; /* think_params_check refuses other values */
    }
}

static inline SFUMATO_DEVICE bool think_step_row(const struct think_params *p,
                                                 struct think_state *s,
                                                 const struct think_candidates *c,
                                                 struct think_decision *out) {
    struct think_state next = *s;
    const bool thinking = s->phase == PHASE_THINKING;
    const struct think_filters filters = step_filters(p, s->phase);
    memset(out, 0, sizeof *out); /* a POD that is hashed and sent: no stale bytes */
    out->phase = s->phase;
    out->entropy = step_entropy(c);
    out->forced = !thinking && s->forced_next >= 0;

    if (out->forced) {
        token_one_hot(out, (uint32_t)p->close_text[s->forced_next]);
        next.forced_next = s->forced_next + 1 < p->close_text_count ? s->forced_next + 1 : -1;
    } else if (step_is_greedy(&filters)) {
        token_one_hot(out, c->id[0]);
    } else {
        struct policy_input in;
        in.params = p;
        in.filters = &filters;
        in.candidates = c;
        in.entropy = out->entropy;
        in.noise.seed = p->seed;
        in.noise.step = s->step;
        in.noise.choice = p->choice;
        in.memory = next.policy;
        if (!step_token(thinking ? p->mode : THINK_OFF, &in, out)) return false;
    }
    out->trace_id = out->ids[0];

    if (thinking) {
        stop_thinking(p, &next, out);
        out->soft = p->mode != THINK_OFF && out->end == END_NONE;
        next.soft_steps += out->soft;
    } else if (!out->forced) {
        stop_answer(p, &next, out);
    }
    out->p = out->forced ? NAN : step_probability(c, out->trace_id, p->close_id);
    next.step = s->step + 1;
    *s = next;
    return true;
}

#endif
