/* grpc_vllm.c: vllm.grpc.engine.VllmEngine, as far as proto/vllm_engine.proto describes it.
 *
 *   GenerateRequest ─► completion request (SamplingParams has the JSON names) ─ service_call
 *   step ─► GenerateResponse{chunk}     finish ─► GenerateResponse{complete}
 *
 * Ids go in and out, no text. Routers written for vLLM see an ordinary engine; how it thinks is
 * decided by the server's flags.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "serve/grpc_parts.h"
#include "text/utf8.h"
#include "vllm_engine.pb-c.h"

typedef Vllm__Grpc__Engine__GenerateRequest generate_request;
typedef Vllm__Grpc__Engine__GenerateComplete generate_complete;
typedef Vllm__Grpc__Engine__OutputLogProbs output_logprobs;

enum { RESPONSE_COMPLETE = 2, COMPLETE_LOGPROBS = 6 }; /* fields appended by hand */
enum { ABORT_IDS_MAX = 4096 };                         /* each is looked for among all calls */

/* ---- requests ---- */

static bool has_unknown(const ProtobufCMessage *m, const unsigned *tags, size_t count) {
    for (unsigned i = 0; i < m->n_unknown_fields; i++) {
        for (size_t t = 0; t < count; t++) {
            if (m->unknown_fields[i].tag == tags[t]) return true;
        }
    }
    return false;
}

/* False: the rpc has been ended. */
static bool check_offered(struct rpc *r, const generate_request *m) {
    static const unsigned inputs[] = {6, 7, 8, 10, 11};
    static const unsigned constraints[] = {16, 17, 18, 19, 20, 21};
    const bool other_rank = m->data_parallel_rank_opt_case && m->data_parallel_rank != 0;
    if (other_rank || has_unknown(&m->base, inputs, sizeof inputs / sizeof *inputs)) {
        grpc_end_as(r, REFUSAL_INVALID,
                    "KV transfer, multimodal input and data parallel ranks are not offered");
        return false;
    }
    if (m->sampling_params && has_unknown(&m->sampling_params->base, constraints,
                                          sizeof constraints / sizeof *constraints)) {
        grpc_end_unimplemented(r, "structured outputs are not offered");
        return false;
    }
    return true;
}

static enum status no_memory(void) { return fail(STATUS_MEMORY, "no memory for a request"); }

/* The prompt as the completions API takes it. */
static enum status read_prompt(generate_request *m, int64_t item_max, json_t **out) {
    json_t *input = NULL;
    const bool ids = m->input_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TOKENIZED;
    if (m->input_case == VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT__NOT_SET) {
        return fail_param(STATUS_REQUEST, "input", NULL, "one of tokenized and text is needed");
    }
    if (!ids) {
        const char *text = m->text.len ? (const char *)m->text.data : "";
        if (memchr(text, '\0', m->text.len) || utf8_valid_bytes(text, m->text.len) < m->text.len) {
            return fail_param(STATUS_REQUEST, "text", NULL, "text must be valid UTF-8 without NUL");
        }
        *out = json_stringn(text, m->text.len);
        return *out ? STATUS_OK : no_memory();
    }
    m->tokenized->original_text.len = 0; /* for people who debug */
    TRY(grpc_tree(&m->tokenized->base, item_max, &input));
    json_t *list = json_object_get(input, "input_ids");
    *out = list ? json_incref(list) : json_array();
    json_decref(input);
    return *out ? STATUS_OK : no_memory();
}

/* Unset means off here, not the server's default. */
static bool set_unless_given(json_t *root, const char *key, int value) {
    return json_object_get(root, key) || json_object_set_new(root, key, json_integer(value)) == 0;
}

static enum status to_tree(struct rpc *r, generate_request *m, json_t **out) {
    const int64_t item_max = r->site->params->max_body_bytes / 2;
    json_t *root = NULL, *prompt = NULL;
    if (m->sampling_params) {
        TRY(grpc_tree(&m->sampling_params->base, item_max, &root));
    } else {
        root = json_object();
        if (!root) return no_memory();
    }
    enum status status = read_prompt(m, item_max, &prompt);
    if (status == STATUS_OK &&
        (json_object_set_new(root, "prompt", prompt) != 0 ||
         json_object_set_new(root, "stream", json_boolean(m->stream)) != 0 ||
         !set_unless_given(root, "top_p", 1) || !set_unless_given(root, "top_k", 0) ||
         !set_unless_given(root, "min_p", 0))) {
        status = no_memory();
    }
    if (status != STATUS_OK) {
        json_decref(root);
        return status;
    }
    *out = root;
    return STATUS_OK;
}

/* ---- responses ---- */

/* One step: lists of one entry, which the complete answer joins. */
static void fill_logprobs(const struct engine_event *e, uint32_t *id, float *logprob,
                          Vllm__Grpc__Engine__TopLogProbs *top,
                          Vllm__Grpc__Engine__TopLogProbs **tops, output_logprobs *out) {
    static float values[REQUEST_TOP_LOGPROBS_MAX]; /* net thread only, until it is packed */
    static uint32_t ids[REQUEST_TOP_LOGPROBS_MAX];
    for (int i = 0; i < e->top_count; i++) {
        values[i] = e->top[i].logprob;
        ids[i] = e->top[i].id;
    }
    top->n_values = top->n_token_ids = (size_t)e->top_count;
    top->values = values;
    top->token_ids = ids;
    out->n_token_ids = out->n_token_logprobs = out->n_top_logprobs = 1;
    out->token_ids = id;
    out->token_logprobs = logprob;
    out->top_logprobs = tops;
}

static void send_chunk(struct rpc *r, call *c, int choice, uint32_t *id,
                       output_logprobs *logprobs) {
    Vllm__Grpc__Engine__GenerateStreamChunk chunk = VLLM__GRPC__ENGINE__GENERATE_STREAM_CHUNK__INIT;
    Vllm__Grpc__Engine__GenerateResponse response = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__INIT;
    struct json_writer *out = &r->front->scratch;
    struct reply_summary s;
    reply_summarise(call_reply(c, choice), &s);
    chunk.n_token_ids = 1;
    chunk.token_ids = id;
    chunk.prompt_tokens = (uint32_t)call_body(c)->prompts[0].count;
    chunk.completion_tokens = (uint32_t)s.usage.completion_tokens;
    chunk.output_logprobs = logprobs;
    chunk.index = (uint32_t)choice;
    response.response_case = VLLM__GRPC__ENGINE__GENERATE_RESPONSE__RESPONSE_CHUNK;
    response.chunk = &chunk;
    json_writer_clear(out);
    grpc_pack(&response, out);
    grpc_send_bytes(r, out);
}

static void on_step(void *user, call *c, int choice, const struct engine_event *e,
                    const struct stream_delta *delta) {
    struct rpc *r = user;
    generate_complete piece = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__INIT;
    output_logprobs logprobs = VLLM__GRPC__ENGINE__OUTPUT_LOG_PROBS__INIT;
    Vllm__Grpc__Engine__TopLogProbs top = VLLM__GRPC__ENGINE__TOP_LOG_PROBS__INIT, *tops[] = {&top};
    uint32_t id = e->decision->trace_id;
    float logprob = e->logprob;
    (void)delta;
    piece.n_output_ids = 1;
    piece.output_ids = &id;
    const bool with_logprobs = call_body(c)->request.logprobs;
    grpc_pack(&piece, &r->choices[choice].records);
    if (with_logprobs) {
        fill_logprobs(e, &id, &logprob, &top, tops, &logprobs);
        grpc_pack(&logprobs, &r->choices[choice].logprobs);
    }
    reply_forget(call_reply(c, choice)); /* its JSON is not wanted here */
    if (call_streams(c)) send_chunk(r, c, choice, &id, with_logprobs ? &logprobs : NULL);
}

static void on_finish(void *user, call *c, int choice, const struct stream_delta *last) {
    struct rpc *r = user;
    struct json_writer *records = &r->choices[choice].records, *out = &r->front->scratch;
    const struct json_writer *logprobs = &r->choices[choice].logprobs;
    generate_complete rest = VLLM__GRPC__ENGINE__GENERATE_COMPLETE__INIT;
    struct reply_summary s;
    (void)last;
    reply_summarise(call_reply(c, choice), &s);
    rest.finish_reason = (char *)finish_name(s.finish);
    rest.prompt_tokens = (uint32_t)s.usage.prompt_tokens;
    rest.completion_tokens = (uint32_t)s.usage.completion_tokens;
    rest.cached_tokens = (uint32_t)s.usage.cached_tokens;
    rest.index = (uint32_t)choice;
    if (s.stop_text) {
        rest.matched_stop_case =
            VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_STOP_STR;
        rest.matched_stop_str = (char *)s.stop_text;
    } else if (s.stopped_by_id) {
        rest.matched_stop_case =
            VLLM__GRPC__ENGINE__GENERATE_COMPLETE__MATCHED_STOP_MATCHED_TOKEN_ID;
        rest.matched_token_id = s.stop_id;
    }
    grpc_pack(&rest, records);
    if (logprobs->n) wire_write_field(records, COMPLETE_LOGPROBS, logprobs->bytes, logprobs->n);
    json_writer_clear(out);
    wire_write_field(out, RESPONSE_COMPLETE, records->bytes, records->n);
    out->failed |= records->failed || logprobs->failed;
    grpc_send_bytes(r, out);
    json_writer_fini(records);
}

static const struct call_front generation_front = {
    .step = on_step, .finish = on_finish, .end = grpc_call_ended};

/* A router names its requests itself, and aborts them by that name: one that cannot be kept is refused.
 * False: the rpc has been ended. */
static bool take_request_id(struct rpc *r, const ProtobufCBinaryData *given) {
    char id[SERVICE_ID_BYTES] = "";
    if (given->len == 0) return true;
    if (given->len < sizeof id) memcpy(id, given->data, given->len);
    service_request_id(id, r->request_id);
    if (strlen(id) != given->len || strcmp(id, r->request_id) != 0) {
        grpc_end_as(r, REFUSAL_INVALID, "request_id must be 1 to 128 of A-Z a-z 0-9 . _ -");
        return false;
    }
    h2_stream_set_request_id(r->stream, r->request_id);
    return true;
}

static void generate(struct rpc *r, const uint8_t *bytes, size_t n) {
    json_t *root = NULL;
    arena memory;
    arena_init(&memory, grpc_memory_max(r));
    generate_request *m =
        grpc_unpack(r, &vllm__grpc__engine__generate_request__descriptor, &memory, bytes, n);
    if (m && check_offered(r, m) && take_request_id(r, &m->request_id) &&
        to_tree(r, m, &root) != STATUS_OK) {
        grpc_end_last(r);
    }
    arena_fini(&memory);
    if (root) grpc_call(r, root, CALL_COMPLETION, true, &generation_front);
}

/* ---- the rest ---- */

static void health_check(struct rpc *r, const uint8_t *bytes, size_t n) {
    const enum service_state state = service_get_state(r->site->service);
    Vllm__Grpc__Engine__HealthCheckResponse m = VLLM__GRPC__ENGINE__HEALTH_CHECK_RESPONSE__INIT;
    (void)bytes; /* HealthCheckRequest has no fields */
    (void)n;
    m.healthy = state == SERVICE_READY;
    m.message = (char *)service_state_name(state);
    grpc_reply(r, &m);
}

static void abort_calls(struct rpc *r, const uint8_t *bytes, size_t n) {
    Vllm__Grpc__Engine__AbortResponse none = VLLM__GRPC__ENGINE__ABORT_RESPONSE__INIT;
    arena memory;
    arena_init(&memory, grpc_memory_max(r));
    const Vllm__Grpc__Engine__AbortRequest *m =
        grpc_unpack(r, &vllm__grpc__engine__abort_request__descriptor, &memory, bytes, n);
    if (m && m->n_request_ids > ABORT_IDS_MAX) {
        char text[80];
        snprintf(text, sizeof text, "request_ids has %zu ids: at most %d are taken at once",
                 m->n_request_ids, ABORT_IDS_MAX);
        grpc_end_as(r, REFUSAL_INVALID, text);
    } else if (m) {
        for (size_t i = 0; i < m->n_request_ids; i++) {
            const ProtobufCBinaryData *given = &m->request_ids[i];
            char id[SERVICE_ID_BYTES] = "";
            if (given->len == 0 || given->len >= sizeof id) continue; /* no call has such a name */
            memcpy(id, given->data, given->len);
            service_abort(r->site->service, id);
        }
        grpc_reply(r, &none);
    }
    arena_fini(&memory);
}

static void get_model_info(struct rpc *r, const uint8_t *bytes, size_t n) {
    static const char *const types[] = {[ARCH_LLAMA] = "llama",
                                        [ARCH_MISTRAL] = "mistral",
                                        [ARCH_QWEN2] = "qwen2",
                                        [ARCH_QWEN3] = "qwen3"};
    const struct body_facts *facts = grpc_facts(r);
    Vllm__Grpc__Engine__GetModelInfoResponse m = VLLM__GRPC__ENGINE__GET_MODEL_INFO_RESPONSE__INIT;
    (void)bytes; /* GetModelInfoRequest has no fields */
    (void)n;
    if (!facts) return;
    const char *path = facts->params->model ? facts->params->model : facts->model_name;
    char *architectures[] = {(char *)facts->config->arch_name};
    m.model_path = m.tokenizer_path = (char *)path;
    m.is_generation = true;
    m.max_context_length = (uint32_t)facts->max_model_len;
    m.vocab_size = (uint32_t)facts->vocab_count;
    m.served_model_name = (char *)facts->model_name;
    m.model_type = (char *)types[facts->config->arch];
    m.n_architectures = 1;
    m.architectures = architectures;
    m.n_eos_token_ids = (size_t)facts->eos_count;
    m.eos_token_ids = (int32_t *)facts->eos_ids;
    m.bos_token_id = facts->config->bos_id > 0 ? facts->config->bos_id : 0;
    grpc_reply(r, &m);
}

static void get_server_info(struct rpc *r, const uint8_t *bytes, size_t n) {
    Vllm__Grpc__Engine__GetServerInfoResponse m =
        VLLM__GRPC__ENGINE__GET_SERVER_INFO_RESPONSE__INIT;
    struct service_load now;
    (void)bytes; /* GetServerInfoRequest has no fields */
    (void)n;
    service_load_get(r->site->service, &now);
    m.active_requests = (uint32_t)service_calls(r->site->service);
    m.uptime_seconds = now.uptime_seconds;
    m.server_type = (char *)"vllm-grpc";
    m.data_parallel_size = 1;
    grpc_reply(r, &m);
}

static void get_loads(struct rpc *r, const uint8_t *bytes, size_t n) {
    Vllm__Grpc__Engine__GetLoadsResponse m = VLLM__GRPC__ENGINE__GET_LOADS_RESPONSE__INIT;
    Vllm__Grpc__Engine__SchedulerLoad load = VLLM__GRPC__ENGINE__SCHEDULER_LOAD__INIT;
    Vllm__Grpc__Engine__SchedulerLoad *loads[] = {&load};
    struct service_load now;
    char stamp[32];
    const time_t second = time(NULL);
    struct tm utc;
    (void)bytes; /* of no use here: there is one rank, and one section */
    (void)n;
    service_load_get(r->site->service, &now);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&second, &utc));
    load.num_running_reqs = now.running;
    load.num_waiting_reqs = now.waiting;
    load.num_total_reqs = now.running + now.waiting;
    load.num_used_tokens = (int32_t)now.tokens_used;
    load.max_total_num_tokens = (int32_t)now.tokens_max;
    load.token_usage = now.tokens_max > 0 ? (double)now.tokens_used / (double)now.tokens_max : 0;
    load.max_running_requests = now.running_max;
    m.timestamp = stamp;
    m.version = (char *)service_fingerprint(r->site->service);
    m.dp_rank_count = 1;
    m.n_loads = 1;
    m.loads = loads;
    grpc_reply(r, &m);
}

#define METHOD(name) "/vllm.grpc.engine.VllmEngine/" name
const struct grpc_method grpc_vllm_methods[] = {
    {METHOD("Generate"), false, generate},
    {METHOD("HealthCheck"), false, health_check},
    {METHOD("Abort"), false, abort_calls},
    {METHOD("GetModelInfo"), false, get_model_info},
    {METHOD("GetServerInfo"), false, get_server_info},
    {METHOD("GetLoads"), false, get_loads},
    {NULL, false, NULL},
};
