/* j_body.c: request bodies: what each field becomes, where defaults come from, which errors name what.
 *
 * The tokenizer is that of models/tiny; expected values are those of serving.md §2, §3 and soft-thinking.md §2.
 */
#include "serve/reply.h"
#include "suite.h"
#include "support/tiny_facts.h"

int suite_setup(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *file = suite_path("models/tiny/tokenizer.json");
    clearenv(); /* options of whoever runs the tests must not count */
    if (tiny_facts_open(file, PARAMS_GENERATE) != STATUS_OK) return 1;
    config = (struct model_config){.temperature = 0.7f, .top_p = 0.8f, .top_k = -1, .min_p = -1};
    return 0;
}

void suite_teardown(void) { tiny_facts_close(); }

static struct body body;

/* Parses and leaves the result in `body`; the caller ends it with body_fini. */
static const struct think_params *parsed(const char *text) {
    const enum status status = body_parse(&facts, text, strlen(text), &body);
    if (status != STATUS_OK) printf("\n    %s: %s\n", text, fail_text());
    CHECK_EQ(status, STATUS_OK);
    return &body.request.think;
}

static void refused(const char *text, const char *param, const char *code) {
    CHECK_EQ(body_parse(&facts, text, strlen(text), &body), STATUS_REQUEST);
    CHECK_STR(fail_last()->param, param);
    CHECK_STR(fail_last()->code, code);
    body_fini(&body);
}

static void test_defaults(void) {
    const struct think_params *t = parsed("{\"prompt\":[5,6]}");
    CHECK_EQ(t->mode, THINK_SOFT);
    CHECK_EQ(t->max_topk, 10);
    CHECK_NEAR(t->answer.temperature, 0.7, 1e-7); /* generation_config.json */
    CHECK_NEAR(t->answer.top_p, 0.8, 1e-7);
    CHECK_EQ(t->answer.top_k, 30); /* not in it: ours */
    CHECK_NEAR(t->answer.min_p, 0, 0);
    CHECK_NEAR(t->thinking.temperature, 0.7, 1e-7);
    CHECK_EQ(t->thinking.top_k, 30);
    CHECK_NEAR(t->thinking.top_p, 0.95, 1e-7); /* never the request's in soft modes */
    CHECK_NEAR(t->thinking.min_p, 0.001, 1e-9);
    CU_ASSERT(t->cold_stop && t->seed < (1ull << 53));
    CHECK_NEAR(t->cold_stop_entropy, 0.01, 1e-9);
    CHECK_EQ(t->cold_stop_length, 256);
    CHECK_EQ(t->budget, 0);
    CHECK_EQ(t->on_eos, ON_EOS_CLOSE);
    CHECK_EQ(body.request.choices, 1);
    CHECK_EQ(body.prompts[0].max_tokens, 1022); /* what fits */
    CHECK_EQ(body.trace_entries, 0);
    CU_ASSERT(body.skip_special && body.separate_reasoning && !body.request.logprobs);
    body_fini(&body);
}

static void test_request_fields_govern_the_answer(void) {
    const struct think_params *t =
        parsed("{\"prompt\":[5],\"temperature\":0.3,\"top_k\":7,\"top_p\":0.5,\"min_p\":0.1}");
    CHECK_NEAR(t->answer.temperature, 0.3, 1e-7);
    CHECK_EQ(t->answer.top_k, 7);
    CHECK_NEAR(t->thinking.temperature, 0.3, 1e-7); /* the one exception */
    CHECK_EQ(t->thinking.top_k, 30);
    CHECK_NEAR(t->thinking.top_p, 0.95, 1e-7);
    body_fini(&body);
}

static void test_mode_off_thinks_as_it_answers(void) {
    const struct think_params *t =
        parsed("{\"prompt\":[5],\"top_k\":7,\"top_p\":0.5,\"soft_thinking\":{\"mode\":\"off\"}}");
    CHECK_EQ(t->thinking.top_k, 7);
    CHECK_NEAR(t->thinking.top_p, 0.5, 1e-7);
    CHECK_NEAR(t->thinking.min_p, 0, 0);
    CU_ASSERT(!t->cold_stop);
    body_fini(&body);
    t = parsed(
        "{\"prompt\":[5],\"soft_thinking\":{\"mode\":\"off\",\"top_k\":9,\"cold_stop\":{\"length\":"
        "4}}}");
    CHECK_EQ(t->thinking.top_k, 9);
    CU_ASSERT(t->cold_stop);
    CHECK_EQ(t->cold_stop_length, 4);
    CHECK_NEAR(t->cold_stop_entropy, 0.01, 1e-9); /* missing members take the default */
    body_fini(&body);
}

static void test_block(void) {
    const struct think_params *t = parsed(
        "{\"prompt\":[5],\"seed\":1,\"soft_thinking\":{\"mode\":\"gumbel\",\"max_topk\":3,"
        "\"temperature\":0,"
        "\"top_k\":-1,\"top_p\":1,\"min_p\":0.2,\"cold_stop\":false,\"budget\":9,\"answer\":{"
        "\"temperature\":1.5,"
        "\"top_k\":2},\"seed\":-1,\"return_trace\":7,\"share_thinking\":true,\"start\":\"first_"
        "token\","
        "\"on_eos\":\"mask\",\"close_text\":\"So\",\"gumbel_temperature\":2,\"dirichlet_alpha\":3,"
        "\"compat\":null}}");
    CHECK_EQ(t->mode, THINK_GUMBEL);
    CHECK_EQ(t->max_topk, 3);
    CHECK_NEAR(t->thinking.temperature, 0, 0);
    CHECK_EQ(t->thinking.top_k, 0);
    CHECK_EQ(t->budget, 9);
    CHECK_NEAR(t->answer.temperature, 1.5, 0);
    CHECK_EQ(t->answer.top_k, 2);
    CHECK_NEAR(t->answer.top_p, 0.8, 1e-7);
    CU_ASSERT(t->seed == UINT64_MAX && !t->cold_stop && body.request.share_thinking);
    CHECK_EQ(body.trace_entries, 7);
    CHECK_EQ(t->start, START_FIRST_TOKEN);
    CHECK_EQ(t->on_eos, ON_EOS_MASK);
    CU_ASSERT(t->close_text_count > 0);
    CHECK_NEAR(t->gumbel_temperature, 2, 0);
    CHECK_NEAR(t->dirichlet_alpha, 3, 0);
    body_fini(&body);
}

static void test_aliases(void) {
    const struct think_params *t = parsed(
        "{\"prompt\":[5],\"thinking_token_budget\":4,\"custom_params\":{\"enable_soft_thinking\":"
        "true,"
        "\"add_noise_dirichlet\":true,\"early_stopping_entropy_threshold\":0.5,"
        "\"early_stopping_length_threshold\":3,\"after_thinking_temperature\":0.25,\"max_topk\":2,"
        "\"think_end_str\":\"</think>\",\"gumbel_softmax_temperature\":0.75,\"something\":1}}");
    CHECK_EQ(t->mode, THINK_DIRICHLET);
    CHECK_EQ(t->budget, 4);
    CHECK_NEAR(t->cold_stop_entropy, 0.5, 0);
    CHECK_EQ(t->cold_stop_length, 3);
    CHECK_NEAR(t->answer.temperature, 0.25, 0);
    CHECK_EQ(t->max_topk, 2);
    CHECK_NEAR(t->gumbel_temperature, 0.75, 0);
    body_fini(&body);
    t = parsed(
        "{\"prompt\":[5],\"soft_thinking\":{\"enable_soft_thinking\":false,"
        "\"early_stopping_entropy_threshold\":0}}");
    CHECK_EQ(t->mode, THINK_OFF);
    CU_ASSERT(!t->cold_stop);
    body_fini(&body);
    refused("{\"prompt\":[5],\"soft_thinking\":{\"mode\":\"soft\",\"enable_soft_thinking\":false}}",
            "enable_soft_thinking", "");
    refused(
        "{\"prompt\":[5],\"soft_thinking\":{\"max_topk\":3},\"custom_params\":{\"max_topk\":4}}",
        "max_topk", "");
    refused("{\"prompt\":[5],\"soft_thinking\":{\"budget\":3},\"thinking_token_budget\":4}",
            "thinking_token_budget", "");
    refused("{\"prompt\":[5],\"custom_params\":{\"think_end_str\":\"</other>\"}}", "think_end_str",
            "");
    refused(
        "{\"prompt\":[5],\"soft_thinking\":{\"cold_stop\":false,\"early_stopping_length_"
        "threshold\":4}}",
        "early_stopping_length_threshold", "");
}

static void test_limits(void) {
    static const struct {
        const char *field, *param;
    } rows[] = {
        {"\"n\":65", "n"},
        {"\"temperature\":5.1", "temperature"},
        {"\"temperature\":-0.1", "temperature"},
        {"\"temperature\":true", "temperature"},
        {"\"top_k\":1.5", "top_k"},
        {"\"presence_penalty\":2.1", "presence_penalty"},
        {"\"repetition_penalty\":0", "repetition_penalty"},
        {"\"seed\":1.0", "seed"},
        {"\"stop\":[1]", "stop"},
        {"\"stop_token_ids\":[99999]", "stop_token_ids"},
        {"\"logit_bias\":{\"-1\":1}", "logit_bias"},
        {"\"logit_bias\":{\"1\":1,\"01\":1}", "logit_bias"},
        {"\"logprobs\":21", "logprobs"},
        {"\"logprobs\":true,\"top_logprobs\":21", "top_logprobs"},
        {"\"ignore_eos\":1", "ignore_eos"},
        {"\"truncate_prompt_tokens\":0", "truncate_prompt_tokens"},
        {"\"stream_options\":{}", "stream_options"},
        {"\"soft_thinking\":[]", "soft_thinking"},
        {"\"soft_thinking\":{\"budget\":0}", "soft_thinking.budget"},
        {"\"soft_thinking\":{\"return_trace\":65}", "soft_thinking.return_trace"},
        {"\"soft_thinking\":{\"cold_stop\":true}", "soft_thinking.cold_stop"},
        {"\"soft_thinking\":{\"cold_stop\":{\"length\":0}}", "soft_thinking.cold_stop.length"},
        {"\"soft_thinking\":{\"answer\":{\"seed\":1}}", "soft_thinking.answer.seed"},
        {"\"soft_thinking\":{\"gumbel_temperature\":0}", "soft_thinking.gumbel_temperature"},
        {"\"soft_thinking\":{\"wibble\":null}", "soft_thinking.wibble"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[256];
        snprintf(text, sizeof text, "{\"prompt\":[5],%s}", rows[i].field);
        refused(text, rows[i].param, "");
    }
    refused("{\"prompt\":[5],\"model\":\"gpt\"}", "model", "model_not_found");
    refused("{\"prompt\":[5],\"tools\":[{}]}", "tools", "unsupported_parameter");
    refused("{\"prompt\":[5],\"timeout_s\":3}", "timeout_s", "unsupported_parameter");
    refused("[]", "", "");
}

static void test_no_close_marker(void) {
    const int close_id = facts.close_id;
    facts.close_id = -1;
    refused("{\"prompt\":[5],\"soft_thinking\":{\"mode\":\"soft\"}}", "soft_thinking.budget", "");
    CHECK_EQ(parsed("{\"prompt\":[5],\"soft_thinking\":{\"mode\":\"soft\",\"budget\":8}}")->budget,
             8);
    body_fini(&body);
    facts.close_id = close_id;
}

static void test_lengths(void) {
    refused("{\"prompt\":[5,6,7],\"max_tokens\":1022}", "prompt", "context_length_exceeded");
    parsed("{\"prompt\":[5,6,7],\"max_tokens\":1021}");
    CHECK_EQ(body.prompts[0].max_tokens, 1021);
    body_fini(&body);
    parsed(
        "{\"prompt\":[5,6,7],\"truncate_prompt_tokens\":2,\"max_completion_tokens\":4,\"max_"
        "tokens\":9}");
    CHECK_EQ(body.prompts[0].count, 2);
    CHECK_EQ(body.prompts[0].ids[0], 6); /* the last ids are kept */
    CHECK_EQ(body.prompts[0].max_tokens, 4);
    body_fini(&body);
    parsed("{\"prompt\":[[5],[6,7]],\"n\":3}");
    CHECK_EQ(body.prompt_count, 2);
    const struct request r = body_request(&body, 1, 42);
    CHECK_EQ(r.prompt.count, 2);
    CHECK_EQ(r.id, 42);
    CHECK_EQ(r.choices, 3);
    body_fini(&body);
}

static void flattened(const char *messages, const char *expected) {
    json_t *root = NULL, *flat = NULL;
    CHECK_EQ(json_load_text(messages, strlen(messages), STATUS_REQUEST, &root), STATUS_OK);
    CHECK_EQ(body_flatten_messages(root, &flat), STATUS_OK);
    char *text = json_dumps(flat, JSON_COMPACT | JSON_SORT_KEYS);
    CHECK_STR(text, expected);
    free(text);
    json_decref(flat);
    json_decref(root);
}

static void test_messages(void) {
    flattened(
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\","
        "\"text\":\"b\"}]}]",
        "[{\"content\":\"a\\nb\",\"role\":\"user\"}]");
    flattened(
        "[{\"role\":\"assistant\",\"content\":null,\"reasoning\":\"r\",\"name\":\"x\"}]",
        "[{\"content\":\"\",\"name\":\"x\",\"reasoning_content\":\"r\",\"role\":\"assistant\"}]");
    flattened(
        "[{\"role\":\"assistant\",\"reasoning_content\":\"first\",\"reasoning\":\"second\","
        "\"content\":\"c\"}]",
        "[{\"content\":\"c\",\"reasoning_content\":\"first\",\"role\":\"assistant\"}]");
    flattened(
        "[{\"role\":\"assistant\",\"content\":[{\"type\":\"thinking\",\"thinking\":\"t\"},"
        "{\"type\":\"text\",\"text\":\"c\"}]}]",
        "[{\"content\":\"c\",\"reasoning_content\":\"t\",\"role\":\"assistant\"}]");
    refused("{\"messages\":[{\"role\":\"user\",\"content\":null}]}", "messages[0].content", "");
    refused(
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"user\",\"content\":[{"
        "\"type\":\"audio\"}]}]}",
        "messages[1].content", "");
    refused(
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"add_generation_prompt\":true,"
        "\"continue_final_message\":true}",
        "continue_final_message", "");
}

/* A reply fed by hand: two thinking steps, the close marker, an answer cut by a stop string. */
static void test_reply(void) {
    struct think_decision d = {.count = 1, .weights = {1}, .entropy = 0.5f, .p = 0.25f};
    struct engine_event e = {.kind = ENGINE_STEP, .decision = &d, .logprob = NAN};
    struct stream_delta delta;
    struct json_writer w;
    reply *r = NULL;
    uint32_t *ids = NULL;
    size_t count = 0;
    json_writer_init(&w);
    parsed(
        "{\"prompt\":[5],\"custom_id\":{\"k\":1},\"seed\":3,\"stop\":\"cd\",\"soft_thinking\":{"
        "\"return_trace\":1}}");
    CHECK_EQ(reply_new(&facts, &body, 0, &r), STATUS_OK);
    d.phase = PHASE_THINKING;
    d.soft = true;
    d.count = 2;
    for (uint32_t i = 0; i < 2; i++) {
        d.trace_id = d.ids[0] = (uint32_t)tokenizer_find(facts.tokenizer, i ? "b" : "a");
        d.ids[1] = 9;
        d.weights[0] = 0.75f;
        e.step = i;
        CHECK_EQ(reply_step(r, &e, &delta), STATUS_OK);
    }
    d = (struct think_decision){.trace_id = (uint32_t)facts.close_id,
                                .phase = PHASE_THINKING,
                                .marker = true,
                                .end = END_MODEL,
                                .count = 1,
                                .entropy = 0.5f,
                                .p = 1};
    e.step = 2;
    CHECK_EQ(reply_step(r, &e, &delta), STATUS_OK);
    CHECK_EQ(tokenizer_encode(facts.tokenizer, "b", 1, false, &ids, &count), STATUS_OK);
    free(ids);
    d = (struct think_decision){
        .phase = PHASE_ANSWER, .count = 1, .entropy = 9, .p = NAN, .forced = true};
    static const char *const letters[] = {"b", "c", "d"};
    for (uint32_t i = 0; i < 3; i++) {
        d.trace_id = (uint32_t)tokenizer_find(facts.tokenizer, letters[i]);
        e.step = 3 + i;
        CHECK_EQ(reply_step(r, &e, &delta), STATUS_OK);
        CHECK_EQ(delta.stopped, i == 2);
    }
    CHECK_EQ(reply_finish(r, NULL, &delta), STATUS_OK);
    reply_write_line(r, &w);
    json_t *line = json_loadb(w.bytes, w.n, 0, NULL);
    CHECK_STR(json_string_value(json_object_get(line, "thinking")), "ab");
    CHECK_STR(json_string_value(json_object_get(line, "answer")), "b");
    CHECK_STR(json_string_value(json_object_get(line, "finish_reason")), "stop");
    CHECK_STR(json_string_value(json_object_get(line, "stop_reason")), "cd");
    CHECK_STR(json_string_value(json_object_get(line, "thinking_end")), "model");
    CHECK_EQ(json_integer_value(json_object_get(json_object_get(line, "custom_id"), "k")), 1);
    CHECK_EQ(json_integer_value(json_object_get(line, "seed")), 3);
    CHECK_NEAR(json_number_value(json_object_get(line, "mean_entropy")), 0.5, 0);
    json_t *usage = json_object_get(line, "usage"), *trace = json_object_get(line, "trace");
    CHECK_EQ(json_integer_value(json_object_get(usage, "completion_tokens")), 6);
    CHECK_EQ(json_integer_value(json_object_get(usage, "reasoning_tokens")), 3);
    CHECK_EQ(json_integer_value(json_object_get(usage, "soft_steps")), 2);
    CHECK_EQ(json_array_size(trace), 6);
    CHECK_EQ(json_array_size(json_object_get(json_array_get(trace, 0), "ids")),
             1); /* cut to return_trace */
    CU_ASSERT(json_object_get(json_array_get(trace, 2), "ids") == NULL);
    CU_ASSERT(json_is_null(json_object_get(json_array_get(trace, 4), "p")));
    json_decref(line);
    json_writer_fini(&w);
    reply_free(r);
    body_fini(&body);
}

/* A marker that switches nothing has no text, and nothing about the answer changes: c </think> d. */
static void test_idle_marker(void) {
    struct think_decision d = {.phase = PHASE_ANSWER, .count = 1};
    const struct engine_event e = {.kind = ENGINE_STEP, .decision = &d, .logprob = NAN};
    const char *const letters[] = {"b", "c", NULL, "d"}, *const shown[] = {"b", "", "", ""};
    struct stream_delta delta;
    reply *r = NULL;
    parsed("{\"prompt\":[5],\"stop\":\"cd\"}");
    CHECK_EQ(reply_new(&facts, &body, 0, &r), STATUS_OK);
    for (int i = 0; i < 4; i++) {
        d.trace_id =
            (uint32_t)(letters[i] ? tokenizer_find(facts.tokenizer, letters[i]) : facts.close_id);
        CHECK_EQ(reply_step(r, &e, &delta), STATUS_OK);
        CHECK_EQ(delta.answer_n, strlen(shown[i]));
        CHECK_EQ(delta.stopped, i == 3);
    }
    reply_free(r);
    body_fini(&body);
}

const struct suite_case suite_cases[] = {
    {"defaults: flags, generation_config.json, then ours", test_defaults},
    {"a request's sampling fields govern the answer", test_request_fields_govern_the_answer},
    {"mode off thinks as it answers", test_mode_off_thinks_as_it_answers},
    {"every field of the soft_thinking block", test_block},
    {"aliases of research code, and contradictions", test_aliases},
    {"values out of range name their field", test_limits},
    {"without a close marker soft modes need a budget", test_no_close_marker},
    {"lengths, truncation, several prompts", test_lengths},
    {"messages in every spelling", test_messages},
    {"events to a line: text, stop string, counts, trace", test_reply},
    {"a marker that switches nothing", test_idle_marker},
    {NULL, NULL},
};
