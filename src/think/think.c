/* think.c: the host's side of the thinking module: names, ranges, the state's beginning and end.
 *
 * The step itself is step.h, shared with the device; think_step here is that code plus the
 * assertion of its contract. No memory, no globals, any thread.
 */
#include "think/think.h"

#include <stdio.h>
#include <string.h>

#include "think/step.h"

static const struct {
    const char *name, *help;
    bool soft;
} modes[] = {
#define POLICY(NAME, name, soft, help) {#name, help, soft},
#include "think/policies.def"
#undef POLICY
};
static const char modes_range[] = "one of:"
#define POLICY(NAME, name, soft, help) " " #name
#include "think/policies.def"
#undef POLICY
    ;
static const char *const end_names[] = {"none", "model",  "cold_stop", "budget",
                                        "eos",  "length", "watchdog"};
static const char *const phase_names[] = {"answer", "thinking"};
static const char *const on_eos_names[] = {"close", "finish", "mask"};
static const char *const start_names[] = {"auto", "first_token"};
static const char *const compat_names[] = {"none", "official-2025-05", "official-2026-01"};

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

const char *think_mode_name(enum think_mode m) {
    ASSERT_LT((unsigned)m, THINK_MODE_COUNT);
    return modes[m].name;
}

const char *think_mode_help(enum think_mode m) {
    ASSERT_LT((unsigned)m, THINK_MODE_COUNT);
    return modes[m].help;
}

bool think_mode_is_soft(enum think_mode m) {
    ASSERT_LT((unsigned)m, THINK_MODE_COUNT);
    return modes[m].soft;
}

const char *think_end_name(enum think_end e) {
    ASSERT_LT((unsigned)e, COUNT(end_names));
    return end_names[e];
}

const char *think_phase_name(enum think_phase p) {
    ASSERT_LT((unsigned)p, COUNT(phase_names));
    return phase_names[p];
}

/* Index of name, or -1. */
static int name_index(const char *name, const char *const *names, int count) {
    for (int i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0) return i;
    return -1;
}

bool think_mode_parse(const char *name, enum think_mode *out) {
    for (int i = 0; i < THINK_MODE_COUNT; i++)
        if (strcmp(name, modes[i].name) == 0) {
            *out = (enum think_mode)i;
            return true;
        }
    return false;
}

bool think_on_eos_parse(const char *name, enum think_on_eos *out) {
    const int i = name_index(name, on_eos_names, COUNT(on_eos_names));
    if (i >= 0) *out = (enum think_on_eos)i;
    return i >= 0;
}

bool think_start_parse(const char *name, enum think_start *out) {
    const int i = name_index(name, start_names, COUNT(start_names));
    if (i >= 0) *out = (enum think_start)i;
    return i >= 0;
}

bool think_compat_parse(const char *name, enum think_compat *out) {
    const int i = name_index(name, compat_names, COUNT(compat_names));
    if (i >= 0) *out = (enum think_compat)i;
    return i >= 0;
}

static enum status refuse(const char *field, const char *range, double got) {
    char param[FAULT_NAME_BYTES];
    snprintf(param, sizeof param, "soft_thinking.%s", field);
    return fail_param(STATUS_REQUEST, param, NULL, "%s must be %s, not %.9g", param, range, got);
}

/* Comparisons are written so that NaN is refused. */
static enum status filters_check(const struct think_filters *f, const char *prefix,
                                 int vocab_count) {
    const struct {
        const char *field, *range;
        double got;
        bool ok;
    } rows[] = {
        {"temperature", "from 0 to 5", (double)f->temperature,
         f->temperature >= 0 && f->temperature <= 5},
        {"top_k", "0 or -1 (off) or from 1 to the vocabulary size", f->top_k,
         f->top_k >= 0 && f->top_k <= vocab_count},
        {"top_p", "above 0 and at most 1", (double)f->top_p, f->top_p > 0 && f->top_p <= 1},
        {"min_p", "at least 0 and below 1", (double)f->min_p, f->min_p >= 0 && f->min_p < 1},
    };
    for (int i = 0; i < COUNT(rows); i++) {
        char field[FAULT_NAME_BYTES / 2];
        snprintf(field, sizeof field, "%s%s", prefix, rows[i].field);
        if (!rows[i].ok) return refuse(field, rows[i].range, rows[i].got);
    }
    return STATUS_OK;
}

enum status think_params_check(const struct think_params *p, int vocab_count) {
    if ((unsigned)p->mode >= THINK_MODE_COUNT) return refuse("mode", modes_range, (double)p->mode);
    if (p->max_topk < 1 || p->max_topk > THINK_TOPK_MAX)
        return refuse("max_topk", "from 1 to 64", p->max_topk);
    TRY(filters_check(&p->thinking, "", vocab_count));
    TRY(filters_check(&p->answer, "answer.", vocab_count));
    if (p->cold_stop && !(p->cold_stop_entropy >= 0 && p->cold_stop_entropy <= 20))
        return refuse("cold_stop.entropy", "from 0 to 20 nats", (double)p->cold_stop_entropy);
    if (p->cold_stop && (p->cold_stop_length < 1 || p->cold_stop_length > 1000000))
        return refuse("cold_stop.length", "from 1 to 1000000 steps", (double)p->cold_stop_length);
    if (p->budget < 0 || p->budget > INT32_MAX)
        return refuse("budget", "from 1 to 2147483647 thinking steps", (double)p->budget);
    if (!(p->gumbel_temperature > 0 && p->gumbel_temperature <= 100))
        return refuse("gumbel_temperature", "above 0 and at most 100",
                      (double)p->gumbel_temperature);
    if (!(p->dirichlet_alpha > 0 && p->dirichlet_alpha <= 1e6f))
        return refuse("dirichlet_alpha", "above 0 and at most 1000000", (double)p->dirichlet_alpha);
    if (p->watchdog_repeats != 0 &&
        (p->watchdog_repeats < 2 || p->watchdog_repeats > THINK_WATCHDOG_IDS))
        return refuse("watchdog_repeats", "0 (off) or from 2 to 32", p->watchdog_repeats);
    if (p->close_text_count < 0 || p->close_text_count > THINK_CLOSE_TEXT_MAX)
        return refuse("close_text", "at most 256 tokens long", p->close_text_count);
    for (int i = 0; i < p->close_text_count; i++)
        if (p->close_text[i] < 0 || p->close_text[i] >= vocab_count)
            return refuse("close_text", "made of ids of the vocabulary", p->close_text[i]);
    if (modes[p->mode].soft && p->close_id < 0 && p->budget == 0)
        return fail_param(
            STATUS_REQUEST, "soft_thinking.budget", NULL,
            "this model has no end-of-thinking marker, so mode %s needs a budget: set "
            "soft_thinking.budget, or mode off",
            modes[p->mode].name);
    /* From the model, not from the request. */
    ASSERT(p->open_id < vocab_count && p->close_id < vocab_count);
    ASSERT(p->eos_count >= 0 && p->eos_count <= THINK_EOS_MAX);
    return STATUS_OK;
}

void think_state_init(struct think_state *s, const struct think_params *p,
                      const uint32_t *prompt_ids, int64_t prompt_count) {
    memset(s, 0, sizeof *s);
    s->forced_next = -1;
    if (p->compat != COMPAT_NONE || p->start == START_FIRST_TOKEN) {
        s->phase = PHASE_THINKING;
        return;
    }
    for (int64_t i = prompt_count - 1; i >= 0; i--) {
        if (stop_is_marker(prompt_ids[i], p->close_id)) return;
        if (stop_is_marker(prompt_ids[i], p->open_id)) {
            s->phase = PHASE_THINKING;
            return;
        }
    }
}

float think_row_temperature(const struct think_params *p, const struct think_state *s) {
    const struct think_filters f = step_filters(p, s->phase);
    return step_is_greedy(&f) ? 1.0f : f.temperature;
}

bool think_row_masks_eos(const struct think_params *p, const struct think_state *s) {
    return s->phase == PHASE_THINKING && stop_on_eos(p) == ON_EOS_MASK && !p->ignore_eos;
}

bool think_step(const struct think_params *p, struct think_state *s,
                const struct think_candidates *c, struct think_decision *out) {
    ASSERT(c->count >= 1 && c->m > -INFINITY && c->m < INFINITY && c->z[0] == c->m);
    return think_step_row(p, s, c, out);
}

void think_finish_length(struct think_state *s) {
    if (s->phase == PHASE_THINKING && s->end == END_NONE) s->end = END_LENGTH;
}
