/* body.c: see body.h. The fields of a request in the order of serving.md §2; the soft_thinking
 * block is in body_think.c, messages and template variables in body_messages.c.
 */
#include "serve/body.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/json.h"
#include "base/log.h"
#include "serve/fields.h"

enum { BODY_MEMORY_MAX = 1 << 28 };

/* ---- fields that are known and not offered, or unknown ---- */

static enum status not_offered(const char *key, const char *why) {
    return fail_param(STATUS_REQUEST, key, "unsupported_parameter", "%s is not offered%s%s", key,
                      *why ? ": " : "", why);
}

static bool is_word(const json_t *value, const char *word) {
    return json_is_string(value) && strcmp(json_string_value(value), word) == 0;
}

/* vLLM's names for structured outputs. */
static bool is_guided(const char *key) { return strncmp(key, "guided_", 7) == 0; }

static enum status refuse_unsupported(const struct body_facts *facts, const json_t *root) {
    static const char *const never[] = {"functions",       "structured_outputs", "suffix",
                                        "prompt_logprobs", "prompt_embeds",      "audio",
                                        "prediction"};
    const json_t *tools = field_get(root, "tools"), *format = field_get(root, "response_format");
    if (json_array_size(tools) > 0 && !is_word(field_get(root, "tool_choice"), "none")) {
        return not_offered("tools", "only with tool_choice none");
    }
    if (tools && !json_is_array(tools)) return field_wrong("", "tools", "an array");
    if (format && !is_word(json_object_get(format, "type"), "text")) {
        return not_offered("response_format", "only {\"type\":\"text\"}");
    }
    for (size_t i = 0; i < sizeof never / sizeof *never; i++) {
        const json_t *value = field_get(root, never[i]);
        const bool neutral = !value || json_is_false(value) || is_word(value, "") ||
                             (json_is_array(value) && json_array_size(value) == 0);
        if (!neutral) return not_offered(never[i], "");
    }
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)root, key, value) {
        if (is_guided(key) && !json_is_null(value)) return not_offered(key, "");
    }
    if (json_is_true(field_get(root, "use_beam_search"))) return not_offered("use_beam_search", "");
    const json_t *best_of = field_get(root, "best_of"), *n = field_get(root, "n");
    if (best_of && json_integer_value(best_of) != (n ? json_integer_value(n) : 1)) {
        return not_offered("best_of", "only equal to n");
    }
    const json_t *modalities = field_get(root, "modalities");
    for (size_t i = 0; i < json_array_size(modalities); i++) {
        if (!is_word(json_array_get(modalities, i), "text"))
            return not_offered("modalities", "text only");
    }
    if (!facts->batch) return STATUS_OK;
    if (json_is_true(field_get(root, "stream")))
        return not_offered("stream", "lines are written whole");
    if (json_is_true(field_get(root, "echo")))
        return not_offered("echo", "`sfumato score` reads prompts");
    if (field_get(root, "timeout_s"))
        return not_offered("timeout_s", "only the service has deadlines");
    return STATUS_OK;
}

/* A typo must not pass unseen, a client's harmless extra must not fail: said once per name. */
static void warn_unknown(const json_t *root) {
    static const char *const known[] = {"model",
                                        "messages",
                                        "prompt",
                                        "max_completion_tokens",
                                        "max_tokens",
                                        "min_tokens",
                                        "n",
                                        "temperature",
                                        "top_p",
                                        "top_k",
                                        "min_p",
                                        "presence_penalty",
                                        "frequency_penalty",
                                        "repetition_penalty",
                                        "logit_bias",
                                        "seed",
                                        "stop",
                                        "stop_token_ids",
                                        "include_stop_str_in_output",
                                        "ignore_eos",
                                        "skip_special_tokens",
                                        "logprobs",
                                        "top_logprobs",
                                        "echo",
                                        "stream",
                                        "stream_options",
                                        "truncate_prompt_tokens",
                                        "add_generation_prompt",
                                        "continue_final_message",
                                        "chat_template_kwargs",
                                        "reasoning_effort",
                                        "reasoning",
                                        "include_reasoning",
                                        "separate_reasoning",
                                        "stream_reasoning",
                                        "thinking_token_budget",
                                        "timeout_s",
                                        "soft_thinking",
                                        "custom_params",
                                        "custom_id",
                                        "tools",
                                        "tool_choice",
                                        "functions",
                                        "response_format",
                                        "structured_outputs",
                                        "best_of",
                                        "suffix",
                                        "use_beam_search",
                                        "modalities",
                                        "user",
                                        "metadata",
                                        "store",
                                        "service_tier",
                                        "parallel_tool_calls",
                                        "prediction",
                                        "audio",
                                        "prompt_logprobs",
                                        "prompt_embeds"};
    enum { SAID_MAX = 64, SAID_BYTES = 64 };
    static char said[SAID_MAX][SAID_BYTES];
    static int said_count;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)root, key, value) {
        size_t i = 0;
        while (i < sizeof known / sizeof *known && strcmp(known[i], key) != 0) i++;
        if (i < sizeof known / sizeof *known || is_guided(key) || said_count == SAID_MAX) continue;
        char name[SAID_BYTES]; /* a client's bytes, made fit for a terminal */
        size_t n = 0;
        for (const char *c = key; *c && n + 1 < sizeof name; c++) {
            name[n++] = (unsigned char)*c < 0x20 || *c == 0x7f ? '?' : *c;
        }
        name[n] = '\0';
        int s = 0;
        while (s < said_count && strcmp(said[s], name) != 0) s++;
        if (s < said_count) continue;
        memcpy(said[said_count++], name, sizeof name);
        log_warn("request field %s is unknown and ignored (said once)", name);
    }
}

/* ---- prompts ---- */

static enum status add_prompt(struct body *b, struct body_prompt p) {
    ASSERT(b->prompt_count < BODY_PROMPTS_MAX);
    b->prompts[b->prompt_count++] = p;
    return STATUS_OK;
}

static enum status ids_prompt(const struct body_facts *facts, struct body *b, const json_t *array) {
    const size_t count = json_array_size(array);
    uint32_t *ids = arena_alloc_array(&b->memory, count ? count : 1, sizeof *ids);
    if (!ids) return STATUS_MEMORY;
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(array, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= facts->vocab_count) {
            return fail_param(STATUS_REQUEST, "prompt", NULL,
                              "prompt: item %zu is no token id in 0..%d", i,
                              facts->vocab_count - 1);
        }
        ids[i] = (uint32_t)json_integer_value(id);
    }
    return add_prompt(b, (struct body_prompt){.ids = ids, .count = (int64_t)count});
}

static enum status read_one_prompt(const struct body_facts *facts, struct body *b,
                                   const json_t *prompt) {
    if (json_is_string(prompt)) {
        return add_prompt(b, (struct body_prompt){.text = json_string_value(prompt),
                                                  .text_bytes = json_string_length(prompt)});
    }
    if (json_is_array(prompt)) return ids_prompt(facts, b, prompt);
    return field_wrong("", "prompt", "a string, an array of token ids, or an array of these");
}

static enum status read_prompts(const struct body_facts *facts, struct body *b) {
    const json_t *prompt = field_get(b->root, "prompt");
    const json_t *first = json_array_get(prompt, 0);
    if (b->chat) return add_prompt(b, (struct body_prompt){0});
    if (!json_is_string(first) && !json_is_array(first)) return read_one_prompt(facts, b, prompt);
    const size_t count = json_array_size(prompt);
    if (count > BODY_PROMPTS_MAX) {
        return fail_param(STATUS_REQUEST, "prompt", NULL,
                          "prompt holds %zu prompts, at most %d are allowed", count,
                          BODY_PROMPTS_MAX);
    }
    for (size_t i = 0; i < count; i++) {
        TRY(read_one_prompt(facts, b, json_array_get(prompt, i)));
    }
    return STATUS_OK;
}

enum status body_give_ids(const struct body_facts *facts, struct body *b, int prompt,
                          const uint32_t *ids, size_t count) {
    struct body_prompt *p = &b->prompts[prompt];
    ASSERT(!p->ids);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < (uint32_t)facts->vocab_count) continue;
        return fail_param(STATUS_REQUEST, b->chat ? "messages" : "prompt", NULL,
                          "the text has token id %u, which has no row in the model's embedding",
                          ids[i]);
    }
    p->ids = arena_alloc_array(&b->memory, count ? count : 1, sizeof *p->ids);
    if (!p->ids) return STATUS_MEMORY;
    if (count) memcpy(p->ids, ids, count * sizeof *p->ids);
    p->count = (int64_t)count;
    return STATUS_OK;
}

/* max_tokens and truncate_prompt_tokens, before any prompt is known. */
static enum status read_lengths(const struct body_facts *facts, struct body *b) {
    const json_t *first = field_get(b->root, "max_completion_tokens");
    const char *key = first ? "max_completion_tokens" : "max_tokens";
    const json_t *truncate = field_get(b->root, "truncate_prompt_tokens");
    b->asked_tokens = -1;
    TRY(field_int(b->root, "", key, b->echo ? 0 : 1, CONFIG_POSITION_MAX, &b->asked_tokens));
    TRY(field_int(b->root, "", "truncate_prompt_tokens", -1, facts->max_model_len, &b->truncate));
    if (truncate && b->truncate == 0) {
        return field_wrong("", "truncate_prompt_tokens", "-1 (what fits) or at least 1");
    }
    return STATUS_OK;
}

/* How many steps a reply may have when nothing was asked for; 0: what fits. */
static int64_t default_tokens(const struct body_facts *facts, const struct body *b) {
    if (b->fills_context) return 0;
    if (facts->params->max_tokens > 0) return facts->params->max_tokens;
    return b->chat ? 0 : facts->completion_max_tokens;
}

static void truncate_prompt(struct body_prompt *p, int64_t most) {
    if (most <= 0 || p->count <= most) return;
    p->ids += p->count - most;
    p->count = most;
}

/* Truncation and max_tokens of a prompt, against the context. */
static enum status fit_prompt(const struct body_facts *facts, struct body *b,
                              struct body_prompt *p) {
    const int64_t context = facts->max_model_len;
    const bool asked = b->asked_tokens >= 0;
    const int64_t wanted = asked ? b->asked_tokens : default_tokens(facts, b);
    if (b->truncate > 0) truncate_prompt(p, b->truncate);
    if (b->truncate < 0) truncate_prompt(p, context - (wanted > 0 ? wanted : 1));
    if (p->count == 0) {
        return fail_param(STATUS_REQUEST, b->chat ? "messages" : "prompt", NULL,
                          "the prompt holds no tokens");
    }
    const int64_t least = asked ? wanted : 1;
    if (p->count > context - least) {
        b->too_long = p->count;
        return fail_param(STATUS_REQUEST, b->chat ? "messages" : "prompt",
                          "context_length_exceeded",
                          "This model's maximum context length is %lld tokens. However, you "
                          "requested %lld tokens (%lld in the messages, %lld in the completion).",
                          (long long)context, (long long)(p->count + least), (long long)p->count,
                          (long long)least);
    }
    p->max_tokens = wanted > 0 || asked ? wanted : context - p->count;
    if (p->max_tokens > context - p->count) p->max_tokens = context - p->count;
    return STATUS_OK;
}

/* ---- the rest of §2 ---- */

static enum status read_sampling(const struct body_facts *facts, struct body *b) {
    const struct params *p = facts->params;
    const struct model_config *c = facts->config;
    double temperature = param_given(p, PARAM_temperature) ? p->temperature
                         : c->temperature >= 0             ? (double)c->temperature
                                                           : 0.6;
    double top_p = param_given(p, PARAM_top_p) ? p->top_p : c->top_p > 0 ? (double)c->top_p : 0.95;
    /* one that nobody asked for may be wider than the vocabulary: it keeps all then */
    int top_k = (int)(param_given(p, PARAM_top_k) ? p->top_k : c->top_k >= 0 ? c->top_k : 30);
    if (top_k < 0) top_k = 0;
    if (top_k > facts->vocab_count) top_k = facts->vocab_count;
    double min_p = param_given(p, PARAM_min_p) ? p->min_p : c->min_p >= 0 ? (double)c->min_p : 0;
    TRY(field_row(b->root, "", "temperature", ".temperature", &temperature, NULL));
    TRY(field_row(b->root, "", "top_p", ".top_p", &top_p, NULL));
    TRY(field_top_k(b->root, "", facts->vocab_count, &top_k));
    TRY(field_row(b->root, "", "min_p", ".min_p", &min_p, NULL));
    b->request.think.answer =
        (struct think_filters){(float)temperature, top_k, (float)top_p, (float)min_p};

    double presence = 0, frequency = 0, repetition = 1;
    TRY(field_real(b->root, "", "presence_penalty", -2, 2, &presence));
    TRY(field_real(b->root, "", "frequency_penalty", -2, 2, &frequency));
    TRY(field_real(b->root, "", "repetition_penalty", 0, 2, &repetition));
    if (repetition <= 0) return field_wrong("", "repetition_penalty", "in (0,2]");
    b->request.presence_penalty = (float)presence;
    b->request.frequency_penalty = (float)frequency;
    b->request.repetition_penalty = (float)repetition;

    int64_t seed = p->seed;
    const bool asked = field_get(b->root, "seed") || param_given(p, PARAM_seed);
    TRY(field_int(b->root, "", "seed", INT64_MIN, INT64_MAX, &seed));
    if (!asked) {
        uint64_t random = 0;
        if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) {
            return fail(STATUS_MEMORY, "the system gives no random numbers: pass seed");
        }
        seed = (int64_t)(random >> 11); /* below 2^53: survives clients that read doubles */
    }
    b->request.think.seed = (uint64_t)seed;
    return STATUS_OK;
}

static enum status read_bias(const struct body_facts *facts, struct body *b) {
    const json_t *bias = field_get(b->root, "logit_bias");
    if (!bias) return STATUS_OK;
    const size_t count = json_object_size(bias);
    if (!json_is_object(bias) || count > REQUEST_BIAS_MAX) {
        return field_wrong("", "logit_bias", "an object of at most 1024 entries id: number");
    }
    struct request_bias *list = arena_alloc_array(&b->memory, count + 1, sizeof *list);
    if (!list) return STATUS_MEMORY;
    int n = 0;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)bias, key, value) {
        char *end;
        const long id = strtol(key, &end, 10);
        if (!*key || *end || id < 0 || id >= facts->vocab_count ||
            strspn(key, "0123456789") != strlen(key)) {
            return fail_param(STATUS_REQUEST, "logit_bias", NULL,
                              "logit_bias: %.40s is no token id in 0..%d", key,
                              facts->vocab_count - 1);
        }
        if (!json_is_number(value) || !(fabs(json_number_value(value)) <= 100)) {
            return fail_param(STATUS_REQUEST, "logit_bias", NULL,
                              "logit_bias of %ld must be a number in [-100,100]", id);
        }
        for (int i = 0; i < n; i++) { /* "7" and "07" */
            if (list[i].id == (uint32_t)id) {
                return fail_param(STATUS_REQUEST, "logit_bias", NULL,
                                  "logit_bias names id %ld twice", id);
            }
        }
        list[n++] = (struct request_bias){(uint32_t)id, (float)json_number_value(value)};
    }
    b->request.bias = list;
    b->request.bias_count = n;
    return STATUS_OK;
}

static enum status read_stops(const struct body_facts *facts, struct body *b) {
    const json_t *stop = field_get(b->root, "stop"), *ids = field_get(b->root, "stop_token_ids");
    const size_t count = json_is_array(stop) ? json_array_size(stop) : stop ? 1 : 0;
    if (count > STREAM_STOP_COUNT_MAX) return field_wrong("", "stop", "at most 16 strings");
    for (size_t i = 0; i < count; i++) {
        const json_t *text = json_is_array(stop) ? json_array_get(stop, i) : stop;
        if (!json_is_string(text) || json_string_length(text) < 1 ||
            json_string_length(text) > STREAM_STOP_BYTES_MAX) {
            return field_wrong("", "stop", "a string, or strings, of 1..256 bytes");
        }
        b->stops[b->stop_count++] = json_string_value(text);
    }
    if (ids && (!json_is_array(ids) || json_array_size(ids) > REQUEST_STOP_IDS_MAX)) {
        return field_wrong("", "stop_token_ids", "an array of at most 64 token ids");
    }
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= facts->vocab_count) {
            return field_wrong("", "stop_token_ids", "token ids of this model");
        }
        b->request.stop_ids[b->request.stop_id_count++] = (uint32_t)json_integer_value(id);
    }
    TRY(field_bool(b->root, "", "include_stop_str_in_output", &b->include_stop));
    TRY(field_bool(b->root, "", "skip_special_tokens", &b->skip_special));
    return field_bool(b->root, "", "ignore_eos", &b->request.think.ignore_eos);
}

static enum status read_logprobs(struct body *b) {
    const json_t *logprobs = field_get(b->root, "logprobs");
    int64_t top = 0;
    if (!b->chat && json_is_integer(logprobs)) { /* the completions form: how many */
        TRY(field_int(b->root, "", "logprobs", 0, REQUEST_TOP_LOGPROBS_MAX, &top));
        b->request.logprobs = true;
    } else {
        TRY(field_bool(b->root, "", "logprobs", &b->request.logprobs));
    }
    if (field_get(b->root, "top_logprobs")) {
        TRY(field_int(b->root, "", "top_logprobs", 0, REQUEST_TOP_LOGPROBS_MAX, &top));
        if (!b->request.logprobs && top > 0)
            return field_wrong("", "top_logprobs", "0 or left out without logprobs");
    }
    b->request.top_logprobs = (int)top;
    return STATUS_OK;
}

static enum status read_reply_form(struct body *b) {
    const json_t *options = field_get(b->root, "stream_options");
    TRY(field_bool(b->root, "", "include_reasoning", &b->include_reasoning));
    TRY(field_bool(b->root, "", "separate_reasoning", &b->separate_reasoning));
    TRY(field_bool(b->root, "", "stream_reasoning", &b->stream_reasoning));
    TRY(field_bool(b->root, "", "stream", &b->stream));
    TRY(field_bool(b->root, "", "echo", &b->echo));
    if (b->echo && (b->stream || b->chat)) {
        return field_wrong("", "echo", "left out of streams and of chat requests");
    }
    if (options && !b->stream) return field_wrong("", "stream_options", "left out without stream");
    if (options && !json_is_object(options)) return field_wrong("", "stream_options", "an object");
    TRY(field_bool(options, "stream_options.", "include_usage", &b->include_usage));
    TRY(field_bool(options, "stream_options.", "continuous_usage_stats", &b->continuous_usage));
    return field_real(b->root, "", "timeout_s", 0, 1e9, &b->timeout_seconds);
}

const char *body_next_name(const char **at, size_t *n) {
    *at += strspn(*at, ", ");
    const char *name = *at;
    *n = strcspn(name, ",");
    *at += *n;
    while (*n > 0 && name[*n - 1] == ' ') --*n;
    return *n > 0 ? name : NULL;
}

enum status body_check_model(const struct body_facts *facts, const char *name) {
    const char *at = facts->model_names, *known;
    size_t n;
    if (!name) return STATUS_OK;
    while ((known = body_next_name(&at, &n)) != NULL) {
        if (strlen(name) == n && memcmp(name, known, n) == 0) return STATUS_OK;
    }
    return fail_param(STATUS_REQUEST, "model", "model_not_found",
                      "the model here is %s, not %.100s", facts->model_names, name);
}

static enum status read_fields(const struct body_facts *facts, struct body *b) {
    const json_t *messages = field_get(b->root, "messages"), *prompt = field_get(b->root, "prompt");
    int64_t n = 1;
    const char *name = NULL;
    TRY(field_text(b->root, "", "model", &name));
    TRY(body_check_model(facts, name));
    TRY(refuse_unsupported(facts, b->root));
    TRY(field_int(b->root, "", "n", 1, REQUEST_CHOICES_MAX, &n));
    b->request.choices = (int)n;
    b->chat = messages != NULL;
    TRY(read_sampling(facts, b));
    TRY(read_bias(facts, b));
    TRY(read_stops(facts, b));
    TRY(read_logprobs(b));
    TRY(read_reply_form(b));
    if (!messages == !prompt) {
        return fail_param(STATUS_REQUEST, messages ? "prompt" : "messages", NULL,
                          "a request needs either messages or prompt");
    }
    TRY(body_think_block(facts, b));
    TRY(read_lengths(facts, b));
    return read_prompts(facts, b);
}

enum status body_end(const struct body_facts *facts, struct body *b) {
    int64_t min_tokens = 0;
    for (int i = 0; i < b->prompt_count; i++) TRY(fit_prompt(facts, b, &b->prompts[i]));
    TRY(field_int(b->root, "", "min_tokens", 0, CONFIG_POSITION_MAX, &min_tokens));
    for (int i = 0; i < b->prompt_count; i++) {
        if (min_tokens > b->prompts[i].max_tokens) {
            return fail_param(STATUS_REQUEST, "min_tokens", NULL,
                              "min_tokens is %lld: it must be in 0..%lld (max_tokens)",
                              (long long)min_tokens, (long long)b->prompts[i].max_tokens);
        }
    }
    b->request.min_tokens = min_tokens;
    return STATUS_OK;
}

static void body_init(struct body *b) {
    *b = (struct body){.skip_special = true,
                       .include_reasoning = true,
                       .separate_reasoning = true,
                       .stream_reasoning = true};
    arena_init(&b->memory, BODY_MEMORY_MAX);
}

static enum status read_root(const struct body_facts *facts, struct body *b) {
    if (!json_is_object(b->root)) return fail(STATUS_REQUEST, "a request must be a JSON object");
    b->custom_id = json_object_get(b->root, "custom_id");
    warn_unknown(b->root);
    return read_fields(facts, b);
}

enum status body_begin(const struct body_facts *facts, const char *text, size_t n,
                       struct body *out) {
    body_init(out);
    TRY(json_load_text(text, n, STATUS_REQUEST, &out->root));
    return read_root(facts, out);
}

enum status body_begin_tree(const struct body_facts *facts, json_t *root, struct body *out) {
    body_init(out);
    out->root = root;
    return read_root(facts, out);
}

static enum status encode(const struct body_facts *facts, struct body *b, int prompt,
                          const char *text, size_t n) {
    uint32_t *ids = NULL;
    size_t count = 0;
    TRY(tokenizer_encode(facts->tokenizer, text, n, !b->chat, &ids, &count));
    const enum status status = body_give_ids(facts, b, prompt, ids, count);
    free(ids);
    return status;
}

static enum status encode_chat(const struct body_facts *facts, struct body *b) {
    char *text = NULL;
    size_t n = 0;
    TRY(body_render_messages(facts, b->root, &text, &n));
    const enum status status = encode(facts, b, 0, text, n);
    free(text);
    return status;
}

/* All that body_begin leaves to do, here and now. */
static enum status finish(const struct body_facts *facts, struct body *b) {
    if (b->chat) TRY(encode_chat(facts, b));
    for (int i = 0; i < b->prompt_count; i++) {
        const struct body_prompt *p = &b->prompts[i];
        if (!p->ids) TRY(encode(facts, b, i, p->text, p->text_bytes));
    }
    return body_end(facts, b);
}

enum status body_parse(const struct body_facts *facts, const char *text, size_t n,
                       struct body *out) {
    TRY(body_begin(facts, text, n, out));
    return finish(facts, out);
}

enum status body_parse_tree(const struct body_facts *facts, json_t *root, struct body *out) {
    TRY(body_begin_tree(facts, root, out));
    return finish(facts, out);
}

void body_fini(struct body *b) {
    json_decref(b->root);
    arena_fini(&b->memory);
    b->root = NULL;
}

struct request body_request(const struct body *b, int prompt, uint64_t id) {
    struct request r = b->request;
    ASSERT_LT(prompt, b->prompt_count);
    const struct body_prompt *p = &b->prompts[prompt];
    r.id = id;
    r.prompt = (struct request_inputs){.count = p->count, .ids = p->ids};
    r.max_tokens = p->max_tokens;
    return r;
}

enum status body_decode(const struct body_facts *facts, const uint32_t *ids, size_t count,
                        char **text, size_t *n) {
    const size_t most = BODY_DECODED_FACTOR * (size_t)facts->params->max_body_bytes;
    size_t bytes = 0;
    for (size_t i = 0; i < count && bytes <= most; i++) {
        bytes += tokenizer_piece(facts->tokenizer, ids[i]).n;
    }
    if (bytes > most) {
        return fail_param(STATUS_REQUEST, "tokens", NULL,
                          "the text of tokens has more than %zu bytes (%d x --max-body-bytes)",
                          most, BODY_DECODED_FACTOR);
    }
    return tokenizer_decode(facts->tokenizer, ids, count, false, text, n);
}

/* Flags whose range is the model's. */
static enum status check_top_k(const struct body_facts *facts, enum param_id id, const char *flag,
                               int64_t top_k) {
    if (!param_given(facts->params, id) || top_k <= facts->vocab_count) return STATUS_OK;
    return fail(STATUS_USAGE, "%s %lld: this model knows %d ids; 0 keeps all", flag,
                (long long)top_k, facts->vocab_count);
}

enum status body_facts_check(const struct body_facts *facts) {
    struct body b;
    TRY(check_top_k(facts, PARAM_top_k, "--top-k", facts->params->top_k));
    TRY(check_top_k(facts, PARAM_think_top_k, "--think-top-k", facts->params->think_top_k));
    const char probe[] = "{\"prompt\":[0]}";
    enum status status = body_parse(facts, probe, sizeof probe - 1, &b);
    body_fini(&b);
    if (status == STATUS_REQUEST && facts->max_model_len > 1) {
        const struct fault fault = *fail_last();
        status = fail(STATUS_USAGE, "options: %s", fault.text);
    } else if (status == STATUS_REQUEST) {
        status = STATUS_OK;
    }
    return status;
}
