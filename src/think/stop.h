/* stop.h: what ends thinking and the answer: markers, end of sequence, cold stop, budget, watchdog.
 *
 * stop_thinking applies §4.8 in its order: close marker, end of sequence, cold stop, budget, then
 * the collapse watchdog (§9). A step that ends thinking becomes the close marker, one-hot; a model
 * without one keeps the step's own trace id, one-hot. stop_answer finishes at an end-of-sequence
 * id, starts thinking after a generated open marker (once), and runs the compat loop breaker (§7).
 * Both change only the copy of the state they are given. Host and device.
 */
#ifndef SFUMATO_THINK_STOP_H
#define SFUMATO_THINK_STOP_H

#include "think/token.h"

static inline SFUMATO_DEVICE bool stop_is_marker(uint32_t id, int marker) {
    return marker >= 0 && id == (uint32_t)marker;
}

static inline SFUMATO_DEVICE bool stop_is_eos(const struct think_params *p, uint32_t id) {
    if (p->ignore_eos) return false;
    for (int i = 0; i < p->eos_count; i++)
        if (id == (uint32_t)p->eos_ids[i]) return true;
    return false;
}

/* What an end-of-sequence id does while thinking. Without a close marker there is nothing to put in
 * its place, so `close` acts as `finish`. */
static inline SFUMATO_DEVICE enum think_on_eos stop_on_eos(const struct think_params *p) {
    if (p->compat != COMPAT_NONE) return ON_EOS_FINISH;
    return p->on_eos == ON_EOS_CLOSE && p->close_id < 0 ? ON_EOS_FINISH : p->on_eos;
}

/* Do the latest trace ids (the newest at index newest, counted from 0 over all thinking steps) end
 * with one n-gram repeated `repeats` times, for any n that fits the ring? */
static inline SFUMATO_DEVICE bool stop_repeats(const uint32_t ring[THINK_WATCHDOG_IDS],
                                               int64_t newest, int repeats) {
    for (int n = 1; n * repeats <= THINK_WATCHDOG_IDS && n * repeats <= newest + 1; n++) {
        bool same = true;
        for (int64_t i = newest; same && i > newest - (int64_t)n * (repeats - 1); i--)
            same = ring[i % THINK_WATCHDOG_IDS] == ring[(i - n) % THINK_WATCHDOG_IDS];
        if (same) return true;
    }
    return false;
}

static inline SFUMATO_DEVICE void stop_thinking(const struct think_params *p, struct think_state *s,
                                                struct think_decision *out) {
    const bool eos = !stop_is_marker(out->trace_id, p->close_id) && stop_is_eos(p, out->trace_id);
    enum think_end end = END_NONE;
    out->marker =
        stop_is_marker(out->trace_id, p->open_id); /* some models repeat it: still no text */
    s->watchdog_ring[s->thinking_steps % THINK_WATCHDOG_IDS] = out->trace_id;
    s->thinking_steps++;
    s->entropy_sum += (double)out->entropy;

    if (stop_is_marker(out->trace_id, p->close_id)) {
        end = END_MODEL;
    } else if (eos && stop_on_eos(p) == ON_EOS_FINISH) {
        end = END_EOS;
        out->finish = FINISH_EOS;
    } else if (eos && stop_on_eos(p) == ON_EOS_CLOSE) {
        end = END_EOS;
    } else {
        s->cold_count = p->cold_stop && out->entropy < p->cold_stop_entropy ? s->cold_count + 1 : 0;
        if (p->cold_stop && s->cold_count >= p->cold_stop_length)
            end = END_COLD_STOP;
        else if (p->budget > 0 && s->thinking_steps >= p->budget)
            end = END_BUDGET;
        else if (p->watchdog_repeats > 0 &&
                 stop_repeats(s->watchdog_ring, s->thinking_steps - 1, p->watchdog_repeats))
            end = END_WATCHDOG;
    }
    if (end == END_NONE) return;

    out->end = s->end = end;
    if (out->finish == FINISH_NONE) {
        if (p->close_id >= 0) {
            out->trace_id = (uint32_t)p->close_id;
            out->marker = true;
        }
        s->phase = PHASE_ANSWER;
        s->thinking_done = true;
        if ((end == END_COLD_STOP || end == END_BUDGET) && p->close_text_count > 0)
            s->forced_next = 0;
    }
    token_one_hot(out, out->trace_id);
}

static inline SFUMATO_DEVICE void stop_answer(const struct think_params *p, struct think_state *s,
                                              struct think_decision *out) {
    if (stop_is_eos(p, out->trace_id)) {
        out->finish = FINISH_EOS;
    } else if (!s->thinking_done && stop_is_marker(out->trace_id, p->open_id)) {
        out->marker = true;
        s->phase = PHASE_THINKING;
    } else if (p->compat != COMPAT_NONE && p->cold_stop) {
        s->loop_count = out->entropy < p->cold_stop_entropy ? s->loop_count + 1 : 0;
        if (s->loop_count >= p->cold_stop_length) {
            out->finish = FINISH_LOOP_BREAK;
            out->loop_break = true;
        }
    }
}

#endif
