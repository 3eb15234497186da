/* body_think.c: the soft_thinking block of a request (soft-thinking.md §2, serving.md §3).
 *
 * First the aliases of research code, from the block and from custom_params, are rewritten to the
 * block's own names; then every field is read in the order of the table. What is left out comes
 * from the --think-* flags and then from params.def; the exceptions (temperature, filters of mode
 * off) are spelled out below.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/body.h"
#include "serve/fields.h"

#define BLOCK "soft_thinking."

static bool same_value(const json_t *a, const json_t *b) {
    if (json_is_number(a) && json_is_number(b)) return json_number_value(a) == json_number_value(b);
    return json_equal(a, b);
}

/* Puts value (a new reference, stolen) at block[group][key]; group may be NULL. */
static enum status put(json_t *block, const char *group, const char *key, json_t *value,
                       const char *alias) {
    enum status status = STATUS_OK;
    json_t *in = block;
    if (group) {
        in = json_object_get(block, group);
        if (!in) {
            in = json_object();
            json_object_set_new(block, group, in);
        }
    }
    json_t *before = json_object_get(in, key);
    if (!json_is_object(in) || (before && !same_value(before, value))) {
        status = fail_param(STATUS_REQUEST, alias, NULL, "%s contradicts soft_thinking.%s%s%s",
                            alias, group ? group : "", group ? "." : "", key);
    } else if (json_object_set(in, key, value) != 0) {
        status = fail(STATUS_MEMORY, "no memory for a request");
    }
    json_decref(value);
    return status;
}

/* enable_soft_thinking, add_noise_gumbel_softmax, add_noise_dirichlet -> mode. */
static enum status alias_mode(const json_t *from, json_t *block) {
    static const char *const names[] = {"enable_soft_thinking", "add_noise_gumbel_softmax",
                                        "add_noise_dirichlet"};
    bool on[3] = {false, false, false};
    const json_t *enable = field_get(from, names[0]);
    for (int i = 0; i < 3; i++) TRY(field_bool(from, "", names[i], &on[i]));
    if (on[1] && on[2]) {
        return fail_param(STATUS_REQUEST, names[2], NULL, "%s and %s cannot both be true", names[1],
                          names[2]);
    }
    const char *mode = enable && !on[0] ? "off"
                       : on[1]          ? "gumbel"
                       : on[2]          ? "dirichlet"
                       : on[0]          ? "soft"
                                        : NULL;
    return mode ? put(block, NULL, "mode", json_string(mode),
                      names[enable  ? 0
                            : on[1] ? 1
                                    : 2])
                : STATUS_OK;
}

/* early_stopping_{entropy,length}_threshold -> cold_stop; an entropy of 0 turns it off. */
static enum status alias_cold_stop(const json_t *from, json_t *block) {
    static const char *const names[] = {"early_stopping_entropy_threshold",
                                        "early_stopping_length_threshold"};
    json_t *entropy = field_get(from, names[0]), *length = field_get(from, names[1]);
    if (entropy && json_is_number(entropy) && json_number_value(entropy) == 0) {
        return put(block, NULL, "cold_stop", json_false(), names[0]);
    }
    if (json_is_false(json_object_get(block, "cold_stop")) && (entropy || length)) {
        return put(block, NULL, "cold_stop", json_true(), entropy ? names[0] : names[1]);
    }
    if (entropy) TRY(put(block, "cold_stop", "entropy", json_incref(entropy), names[0]));
    if (length) TRY(put(block, "cold_stop", "length", json_incref(length), names[1]));
    return STATUS_OK;
}

static enum status aliases(const struct body_facts *facts, const json_t *from, json_t *block) {
    static const struct {
        const char *alias, *group, *key;
    } plain[] = {
        {"after_thinking_temperature", "answer", "temperature"},
        {"after_thinking_top_p", "answer", "top_p"},
        {"after_thinking_top_k", "answer", "top_k"},
        {"after_thinking_min_p", "answer", "min_p"},
        {"gumbel_softmax_temperature", NULL, "gumbel_temperature"},
    };
    TRY(alias_mode(from, block));
    TRY(alias_cold_stop(from, block));
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        json_t *value = field_get(from, plain[i].alias);
        if (value)
            TRY(put(block, plain[i].group, plain[i].key, json_incref(value), plain[i].alias));
    }
    const char *close = NULL;
    TRY(field_text(from, "", "think_end_str", &close));
    if (close &&
        (facts->close_id < 0 || tokenizer_find(facts->tokenizer, close) != facts->close_id)) {
        return fail_param(STATUS_REQUEST, "think_end_str", NULL,
                          "think_end_str must be the close marker of this process (--think-close)");
    }
    return STATUS_OK;
}

static bool is_alias(const char *key) {
    static const char *const names[] = {"enable_soft_thinking",
                                        "add_noise_gumbel_softmax",
                                        "add_noise_dirichlet",
                                        "early_stopping_entropy_threshold",
                                        "early_stopping_length_threshold",
                                        "after_thinking_temperature",
                                        "after_thinking_top_p",
                                        "after_thinking_top_k",
                                        "after_thinking_min_p",
                                        "gumbel_softmax_temperature",
                                        "think_end_str"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], key) == 0) return true;
    }
    return false;
}

static enum status check_keys(const json_t *block) {
    static const char *const known[] = {"mode",
                                        "max_topk",
                                        "temperature",
                                        "top_p",
                                        "top_k",
                                        "min_p",
                                        "cold_stop",
                                        "budget",
                                        "answer",
                                        "seed",
                                        "return_trace",
                                        "share_thinking",
                                        "start",
                                        "on_eos",
                                        "close_text",
                                        "gumbel_temperature",
                                        "dirichlet_alpha",
                                        "compat"};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)block, key, value) {
        size_t i = 0;
        while (i < sizeof known / sizeof *known && strcmp(known[i], key) != 0) i++;
        if (i < sizeof known / sizeof *known || is_alias(key)) continue;
        char path[FAULT_NAME_BYTES];
        snprintf(path, sizeof path, BLOCK "%s", key);
        return fail_param(
            STATUS_REQUEST, path, NULL,
            "%s is not a field of soft_thinking: mode, max_topk, temperature, top_p, top_k, "
            "min_p, cold_stop, budget, answer, seed, return_trace, share_thinking, start, on_eos, "
            "close_text, gumbel_temperature, dirichlet_alpha, compat",
            path);
    }
    return STATUS_OK;
}

/* The block with aliases resolved: a new object. */
static enum status normalised_block(const struct body_facts *facts, const json_t *root,
                                    json_t **out) {
    json_t *given = field_get(root, "soft_thinking"), *custom = field_get(root, "custom_params");
    if (given && !json_is_object(given)) return field_wrong("", "soft_thinking", "an object");
    if (custom && !json_is_object(custom)) return field_wrong("", "custom_params", "an object");
    json_t *block = given ? json_deep_copy(given) : json_object();
    if (!block) return fail(STATUS_MEMORY, "no memory for a request");
    enum status status;
    TRY_GOTO(check_keys(block), out);
    TRY_GOTO(aliases(facts, given, block), out);
    TRY_GOTO(aliases(facts, custom, block), out);
    static const char *const shared[] = {"max_topk", "dirichlet_alpha"}; /* the same name in both */
    for (int i = 0; i < 2; i++) {
        json_t *value = field_get(custom, shared[i]);
        if (value) TRY_GOTO(put(block, NULL, shared[i], json_incref(value), shared[i]), out);
    }
    json_t *budget = field_get(root, "thinking_token_budget");
    double checked; /* an error names the field that was sent */
    TRY_GOTO(field_row(root, "", "thinking_token_budget", "budget", &checked, NULL), out);
    if (budget)
        TRY_GOTO(put(block, NULL, "budget", json_incref(budget), "thinking_token_budget"), out);
    *out = block;
    return STATUS_OK;
out:
    json_decref(block);
    return status;
}

static enum status read_mode(const struct body_facts *facts, const json_t *block,
                             struct think_params *t) {
    const char *mode = NULL;
    TRY(field_text(block, BLOCK, "mode", &mode));
    t->mode = facts->mode;
    if (mode && !think_mode_parse(mode, &t->mode)) {
        return field_wrong(BLOCK, "mode", "off, soft, gumbel or dirichlet");
    }
    return STATUS_OK;
}

/* Filters of thinking. In mode off they are the request's own unless named; otherwise the table's.
 */
static enum status read_filters(const struct body_facts *facts, const json_t *block,
                                const struct body *b, struct think_params *t) {
    const struct params *p = facts->params;
    const bool off = t->mode == THINK_OFF;
    double temperature = t->answer.temperature, top_p = t->answer.top_p, min_p = t->answer.min_p;
    int top_k = t->answer.top_k;
    if (!field_get(b->root, "temperature") && param_given(p, PARAM_think_temperature)) {
        temperature = p->think_temperature;
    }
    if (!off || param_given(p, PARAM_think_top_k)) {
        top_k = p->think_top_k > 0 ? (int)p->think_top_k : 0;
        if (top_k > facts->vocab_count) top_k = facts->vocab_count; /* the default's width */
    }
    if (!off || param_given(p, PARAM_think_top_p)) top_p = p->think_top_p;
    if (!off || param_given(p, PARAM_think_min_p)) min_p = p->think_min_p;
    TRY(field_row(block, BLOCK, "temperature", "temperature", &temperature, NULL));
    TRY(field_top_k(block, BLOCK, facts->vocab_count, &top_k));
    TRY(field_row(block, BLOCK, "top_p", "top_p", &top_p, NULL));
    TRY(field_row(block, BLOCK, "min_p", "min_p", &min_p, NULL));
    t->thinking = (struct think_filters){(float)temperature, top_k, (float)top_p, (float)min_p};
    return STATUS_OK;
}

static enum status read_answer(const struct body_facts *facts, const json_t *block,
                               struct think_params *t) {
    const json_t *answer = field_get(block, "answer");
    if (!answer) return STATUS_OK;
    if (!json_is_object(answer)) return field_wrong(BLOCK, "answer", "an object");
    double temperature = t->answer.temperature, top_p = t->answer.top_p, min_p = t->answer.min_p;
    int top_k = t->answer.top_k;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)answer, key, value) {
        if (strcmp(key, "temperature") && strcmp(key, "top_k") && strcmp(key, "top_p") &&
            strcmp(key, "min_p")) {
            return field_wrong(BLOCK "answer.", key,
                               "left out: answer has temperature, top_k, top_p, min_p");
        }
    }
    TRY(field_row(answer, BLOCK "answer.", "temperature", ".temperature", &temperature, NULL));
    TRY(field_top_k(answer, BLOCK "answer.", facts->vocab_count, &top_k));
    TRY(field_row(answer, BLOCK "answer.", "top_p", ".top_p", &top_p, NULL));
    TRY(field_row(answer, BLOCK "answer.", "min_p", ".min_p", &min_p, NULL));
    t->answer = (struct think_filters){(float)temperature, top_k, (float)top_p, (float)min_p};
    return STATUS_OK;
}

static enum status read_cold_stop(const struct body_facts *facts, const json_t *block,
                                  struct think_params *t) {
    const struct params *p = facts->params;
    const json_t *given = field_get(block, "cold_stop");
    double entropy = p->cold_stop_entropy, length = (double)p->cold_stop_length;
    t->cold_stop = t->mode != THINK_OFF || param_given(p, PARAM_cold_stop_entropy) ||
                   param_given(p, PARAM_cold_stop_length);
    if (p->no_cold_stop) t->cold_stop = false;
    if (given) {
        const char *key;
        json_t *value;
        if (!json_is_false(given) && !json_is_object(given)) {
            return field_wrong(BLOCK, "cold_stop", "{\"entropy\":nats,\"length\":steps} or false");
        }
        t->cold_stop = json_is_object(given);
        json_object_foreach((json_t *)given, key, value) {
            if (strcmp(key, "entropy") && strcmp(key, "length")) {
                return field_wrong(BLOCK "cold_stop.", key,
                                   "left out: cold_stop has entropy and length");
            }
        }
        TRY(field_row(given, BLOCK "cold_stop.", "entropy", "cold_stop.entropy", &entropy, NULL));
        TRY(field_row(given, BLOCK "cold_stop.", "length", "cold_stop.length", &length, NULL));
    }
    t->cold_stop_entropy = (float)entropy;
    t->cold_stop_length = (int64_t)length;
    return STATUS_OK;
}

static enum status read_words(const struct body_facts *facts, const json_t *block,
                              struct think_params *t) {
    const struct params *p = facts->params;
    const char *start = NULL, *on_eos = NULL, *compat = NULL;
    const bool known = think_compat_parse(param_word(p, PARAM_compat), &t->compat) &&
                       think_start_parse(param_word(p, PARAM_think_start), &t->start) &&
                       think_on_eos_parse(param_word(p, PARAM_on_eos), &t->on_eos);
    ASSERT(known); /* params.def lists the words of think/ */
    TRY(field_text(block, BLOCK, "compat", &compat));
    if (compat && !think_compat_parse(compat, &t->compat)) {
        return field_wrong(BLOCK, "compat", "none, official-2025-05 or official-2026-01");
    }
    if (t->compat != COMPAT_NONE) { /* §7: the switch brings these two along */
        t->start = START_FIRST_TOKEN;
        t->on_eos = ON_EOS_FINISH;
    }
    TRY(field_text(block, BLOCK, "start", &start));
    if (start && !think_start_parse(start, &t->start)) {
        return field_wrong(BLOCK, "start", "auto or first_token");
    }
    TRY(field_text(block, BLOCK, "on_eos", &on_eos));
    if (on_eos && !think_on_eos_parse(on_eos, &t->on_eos)) {
        return field_wrong(BLOCK, "on_eos", "close, finish or mask");
    }
    return STATUS_OK;
}

enum { CLOSE_TEXT_BYTES_MAX = 16 << 10 };

static enum status read_close_text(const struct body_facts *facts, const json_t *block,
                                   struct think_params *t) {
    const char *text = facts->params->close_text;
    TRY(field_text(block, BLOCK, "close_text", &text));
    if (!text || !*text) return STATUS_OK;
    uint32_t *ids;
    size_t count;
    if (strlen(text) > CLOSE_TEXT_BYTES_MAX) { /* not worth a tokenizer's time */
        return fail_param(STATUS_REQUEST, BLOCK "close_text", NULL,
                          "soft_thinking.close_text is %zu bytes long, at most %d are allowed",
                          strlen(text), CLOSE_TEXT_BYTES_MAX);
    }
    TRY(tokenizer_encode(facts->tokenizer, text, strlen(text), false, &ids, &count));
    enum status status = STATUS_OK;
    if (count > THINK_CLOSE_TEXT_MAX) {
        status = fail_param(STATUS_REQUEST, BLOCK "close_text", NULL,
                            "soft_thinking.close_text is %zu tokens long, at most %d are allowed",
                            count, THINK_CLOSE_TEXT_MAX);
    } else {
        t->close_text_count = (int)count;
        for (size_t i = 0; i < count; i++) t->close_text[i] = (int32_t)ids[i];
    }
    free(ids);
    return status;
}

static enum status read_trace(const struct body_facts *facts, const json_t *block, struct body *b) {
    const json_t *trace = field_get(block, "return_trace");
    double entries = (double)facts->params->return_trace;
    if (json_is_boolean(trace)) {
        entries = json_is_true(trace) ? THINK_TOPK_MAX : 0;
    } else {
        TRY(field_row(block, BLOCK, "return_trace", "return_trace", &entries, NULL));
    }
    b->trace_entries = (int)entries;
    b->request.share_thinking = facts->params->share_thinking;
    return field_bool(block, BLOCK, "share_thinking", &b->request.share_thinking);
}

/* Everything but the answer filters, which body.c has put into request.think.answer already. */
static enum status read_block(const struct body_facts *facts, const json_t *block, struct body *b) {
    const struct params *p = facts->params;
    struct think_params *t = &b->request.think;
    double topk = (double)p->max_topk, gumbel = p->gumbel_temperature, alpha = p->dirichlet_alpha,
           budget = (double)p->budget;
    TRY(read_mode(facts, block, t));
    TRY(read_filters(facts, block, b,
                     t)); /* before the answer's own: mode off inherits the request's */
    TRY(read_answer(facts, block, t));
    TRY(read_cold_stop(facts, block, t));
    TRY(read_words(facts, block, t));
    TRY(read_close_text(facts, block, t));
    TRY(read_trace(facts, block, b));
    TRY(field_row(block, BLOCK, "max_topk", "max_topk", &topk, NULL));
    TRY(field_row(block, BLOCK, "gumbel_temperature", "gumbel_temperature", &gumbel, NULL));
    TRY(field_row(block, BLOCK, "dirichlet_alpha", "dirichlet_alpha", &alpha, NULL));
    TRY(field_row(block, BLOCK, "budget", "budget", &budget, NULL));
    int64_t seed = (int64_t)t->seed;
    TRY(field_int(block, BLOCK, "seed", INT64_MIN, INT64_MAX, &seed));
    t->seed = (uint64_t)seed;
    t->max_topk = (int)topk;
    t->gumbel_temperature = (float)gumbel;
    t->dirichlet_alpha = (float)alpha;
    t->budget = (int64_t)budget;
    t->watchdog_repeats = (int)p->watchdog_repeats;
    t->open_id = facts->open_id;
    t->close_id = facts->close_id;
    t->eos_count = facts->eos_count;
    memcpy(t->eos_ids, facts->eos_ids, sizeof t->eos_ids);
    if (facts->close_id < 0 && t->mode != THINK_OFF && t->budget == 0) {
        return fail_param(
            STATUS_REQUEST, BLOCK "budget", NULL,
            "soft_thinking.budget is needed: this model has no close marker, so nothing else "
            "would end the thinking of mode %s",
            think_mode_name(t->mode));
    }
    return think_params_check(t, facts->vocab_count);
}

enum status body_think_block(const struct body_facts *facts, struct body *b) {
    json_t *block = NULL;
    TRY(normalised_block(facts, b->root, &block));
    const enum status status = read_block(facts, block, b);
    json_decref(block);
    return status;
}
