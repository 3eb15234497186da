/* grpc_sfumato.c: sfumato.v1.Inference: the JSON API as gRPC (proto/sfumato.proto).
 *
 *   Request ─ grpc_tree ─► JSON ─ service_call        step ─► Event{Delta}   finish ─► Event{Finish}
 *
 * Events are put together from packed pieces: records by protobuf-c, then text, which may hold NUL,
 * by hand. A whole reply is its pieces joined: in protobuf the concatenation of messages is the
 * message with their repeated fields appended.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "serve/grpc_parts.h"
#include "sfumato.pb-c.h"

enum { /* field numbers of what is appended by hand */
       EVENT_DELTA = 3,
       EVENT_FINISH = 4,
       DELTA_TEXT = 2,
       DELTA_REASONING = 3,
       FINISH_WHOLE = 6,
};

static int64_t items_max(const struct rpc *r) { return r->site->params->max_body_bytes / 2; }

/* ---- events ---- */

static ProtobufCBinaryData piece_of(const tokenizer *t, uint32_t id) {
    const struct tokenizer_string piece = tokenizer_piece(t, id);
    return (ProtobufCBinaryData){.len = piece.n, .data = (uint8_t *)piece.bytes};
}

/* Appends Delta{ids, logprobs, trace} of one step. */
static void pack_records(const struct body_facts *facts, const struct body *b,
                         const struct engine_event *e, struct json_writer *out) {
    const struct think_decision *d = e->decision;
    Sfumato__V1__Delta delta = SFUMATO__V1__DELTA__INIT;
    Sfumato__V1__LogProb logprob = SFUMATO__V1__LOG_PROB__INIT, *logprobs[] = {&logprob};
    Sfumato__V1__TopLogProb top[REQUEST_TOP_LOGPROBS_MAX], *tops[REQUEST_TOP_LOGPROBS_MAX];
    Sfumato__V1__TraceRecord record = SFUMATO__V1__TRACE_RECORD__INIT, *trace[] = {&record};
    uint32_t id = d->trace_id;
    delta.n_ids = 1;
    delta.ids = &id;
    if (b->request.logprobs) {
        for (int i = 0; i < e->top_count; i++) {
            sfumato__v1__top_log_prob__init(&top[i]);
            top[i].id = e->top[i].id;
            top[i].logprob = e->top[i].logprob;
            top[i].token = piece_of(facts->tokenizer, top[i].id);
            tops[i] = &top[i];
        }
        logprob.id = id;
        logprob.logprob = e->logprob;
        logprob.token = piece_of(facts->tokenizer, id);
        logprob.n_top_logprobs = (size_t)e->top_count;
        logprob.top_logprobs = tops;
        logprob.reasoning = d->phase == PHASE_THINKING;
        delta.n_logprobs = 1;
        delta.logprobs = logprobs;
    }
    if (b->trace_entries > 0) {
        record.step = e->step;
        record.phase = (char *)think_phase_name(d->phase);
        record.id = id;
        record.text = piece_of(facts->tokenizer, id);
        record.entropy = d->entropy;
        if (!d->forced && isfinite(d->p)) {
            record.p_opt_case = SFUMATO__V1__TRACE_RECORD__P_OPT_P;
            record.p = d->p;
        }
        if (d->soft) {
            record.n_ids = record.n_weights =
                (size_t)(d->count < b->trace_entries ? d->count : b->trace_entries);
            record.ids = (uint32_t *)d->ids;
            record.weights = (float *)d->weights;
        }
        delta.n_trace = 1;
        delta.trace = trace;
    }
    grpc_pack(&delta, out);
}

static void write_text(struct json_writer *out, uint32_t field, const char *text, size_t n) {
    if (n) wire_write_field(out, field, text, n);
}

/* Event{request_id, index, FIELD: bytes}. */
static bool send_event(struct rpc *r, call *c, int choice, uint32_t field,
                       const struct json_writer *bytes) {
    struct json_writer *out = &r->front->scratch;
    Sfumato__V1__Event event = SFUMATO__V1__EVENT__INIT;
    event.request_id = (char *)call_request_id(c);
    event.index = (uint32_t)choice;
    json_writer_clear(out);
    grpc_pack(&event, out);
    wire_write_field(out, field, bytes->bytes, bytes->n);
    out->failed |= bytes->failed;
    return grpc_send_bytes(r, out);
}

static void on_step(void *user, call *c, int choice, const struct engine_event *e,
                    const struct stream_delta *delta) {
    struct rpc *r = user;
    struct grpc_choice *said = &r->choices[choice];
    pack_records(service_facts(r->site->service), call_body(c), e, &said->records);
    reply_forget(call_reply(c, choice)); /* its JSON is not wanted here */
    if (call_streams(c)) {
        write_text(&said->records, DELTA_TEXT, delta->answer, delta->answer_n);
        write_text(&said->records, DELTA_REASONING, delta->thinking, delta->thinking_n);
        if (send_event(r, c, choice, EVENT_DELTA, &said->records)) {
            json_writer_clear(&said->records);
        }
    } else {
        json_write_bytes(&said->text, delta->answer, delta->answer_n);
        json_write_bytes(&said->reasoning, delta->thinking, delta->thinking_n);
    }
}

/* Appends Finish without the whole reply. */
static void pack_finish(const call *c, const struct reply_summary *s, struct json_writer *out) {
    Sfumato__V1__Finish finish = SFUMATO__V1__FINISH__INIT;
    Sfumato__V1__Usage usage = SFUMATO__V1__USAGE__INIT;
    Sfumato__V1__Info info = SFUMATO__V1__INFO__INIT;
    finish.finish_reason = (char *)finish_name(s->finish);
    if (s->stop_text) {
        finish.stop_reason_case = SFUMATO__V1__FINISH__STOP_REASON_STOP_TEXT;
        finish.stop_text = (char *)s->stop_text;
    } else if (s->stopped_by_id) {
        finish.stop_reason_case = SFUMATO__V1__FINISH__STOP_REASON_STOP_ID;
        finish.stop_id = s->stop_id;
    }
    usage.prompt_tokens = (uint32_t)s->usage.prompt_tokens;
    usage.completion_tokens = (uint32_t)s->usage.completion_tokens;
    usage.reasoning_tokens = (uint32_t)s->usage.reasoning_tokens;
    usage.cached_tokens = (uint32_t)s->usage.cached_tokens;
    info.mode = (char *)think_mode_name(call_body(c)->request.think.mode);
    info.soft_steps = (uint32_t)s->soft_steps;
    info.thinking_end = (char *)think_end_name(s->end);
    if (!isnan(s->mean_entropy)) {
        info.mean_entropy_opt_case = SFUMATO__V1__INFO__MEAN_ENTROPY_OPT_MEAN_ENTROPY;
        info.mean_entropy = s->mean_entropy;
    }
    info.seed = (int64_t)s->seed;
    info.loop_break = s->loop_break;
    finish.usage = &usage;
    finish.info = &info;
    grpc_pack(&finish, out);
}

static void on_finish(void *user, call *c, int choice, const struct stream_delta *last) {
    struct rpc *r = user;
    struct grpc_choice *said = &r->choices[choice];
    struct json_writer finish;
    struct reply_summary s;
    reply_summarise(call_reply(c, choice), &s);
    if (call_streams(c)) {
        write_text(&said->records, DELTA_TEXT, last->answer, last->answer_n);
        write_text(&said->records, DELTA_REASONING, last->thinking, last->thinking_n);
        if (said->records.n && !send_event(r, c, choice, EVENT_DELTA, &said->records)) return;
    } else {
        json_write_bytes(&said->text, last->answer, last->answer_n);
        json_write_bytes(&said->reasoning, last->thinking, last->thinking_n);
        write_text(&said->records, DELTA_TEXT, said->text.bytes, said->text.n);
        write_text(&said->records, DELTA_REASONING, said->reasoning.bytes, said->reasoning.n);
    }
    json_writer_init(&finish);
    pack_finish(c, &s, &finish);
    if (!call_streams(c)) {
        wire_write_field(&finish, FINISH_WHOLE, said->records.bytes, said->records.n);
        finish.failed |= said->records.failed || said->text.failed || said->reasoning.failed;
    }
    send_event(r, c, choice, EVENT_FINISH, &finish);
    json_writer_fini(&finish);
    json_writer_fini(&said->records);
    json_writer_fini(&said->text);
    json_writer_fini(&said->reasoning);
}

static const struct call_front generation_front = {
    .step = on_step, .finish = on_finish, .end = grpc_call_ended};

/* ---- Chat, Generate ---- */

static json_t *read_tree(struct rpc *r, const ProtobufCMessageDescriptor *type,
                         const uint8_t *bytes, size_t n) {
    arena memory;
    json_t *root = NULL;
    arena_init(&memory, grpc_memory_max(r));
    const ProtobufCMessage *m = grpc_unpack(r, type, &memory, bytes, n);
    if (m && grpc_tree(m, items_max(r), &root) != STATUS_OK) grpc_end_last(r);
    arena_fini(&memory);
    return root;
}

static void generation(struct rpc *r, const uint8_t *bytes, size_t n, enum call_kind kind) {
    json_t *root = read_tree(r, &sfumato__v1__request__descriptor, bytes, n);
    if (root) grpc_call(r, root, kind, false, &generation_front);
}

static void chat_call(struct rpc *r, const uint8_t *bytes, size_t n) {
    generation(r, bytes, n, CALL_CHAT);
}

static void generate_call(struct rpc *r, const uint8_t *bytes, size_t n) {
    generation(r, bytes, n, CALL_COMPLETION);
}

/* ---- Tokenize, Detokenize ---- */

static void reply_tokens(struct rpc *r, const struct prompt_made *made) {
    const struct body_facts *facts = service_facts(r->site->service);
    const size_t count = made->count;
    Sfumato__V1__TokenizeResponse m = SFUMATO__V1__TOKENIZE_RESPONSE__INIT;
    ProtobufCBinaryData *pieces = r->with_pieces ? malloc((count + 1) * sizeof *pieces) : NULL;
    m.count = (uint32_t)count;
    m.max_model_len = (uint32_t)facts->max_model_len;
    m.n_tokens = count;
    m.tokens = made->ids;
    for (size_t i = 0; pieces && i < count; i++) {
        pieces[i] = piece_of(facts->tokenizer, made->ids[i]);
    }
    m.n_token_strs = pieces ? count : 0;
    m.token_strs = pieces;
    grpc_reply(r, &m);
    free(pieces);
}

void grpc_tokens_forget(struct rpc *r) {
    if (!r->making) return;
    prompts_cancel(r->making);
    r->making = NULL;
}

static void on_made(void *user, const struct prompt_made *made, const struct refused *why) {
    struct rpc *r = user;
    r->making = NULL;
    if (made) {
        reply_tokens(r, made);
    } else {
        grpc_end_refused(r, why);
    }
}

static enum status read_order(const struct body_facts *facts, const json_t *root,
                              struct prompt_order *o) {
    const json_t *prompt = json_object_get(root, "prompt");
    const json_t *add = json_object_get(root, "add_special_tokens");
    if (!prompt == !json_object_get(root, "messages")) {
        return fail_param(STATUS_REQUEST, "prompt", NULL, "one of prompt and messages is needed");
    }
    o->tokenizer = facts->tokenizer;
    o->add_special = prompt ? !json_is_false(add) : json_is_true(add);
    if (!prompt) return body_read_template(facts, root, &o->template);
    return prompt_order_add(o, json_string_value(prompt), json_string_length(prompt));
}

/* Answers at once, or when the text has been rendered and tokenised. */
static enum status read_text(struct rpc *r, const struct body_facts *facts, const json_t *root) {
    struct prompt_order o = {0};
    enum status status;
    r->with_pieces = json_is_true(json_object_get(root, "return_token_strs"));
    TRY_GOTO(read_order(facts, root, &o), out);
    if (prompt_order_is_short(&o)) {
        TRY_GOTO(prompt_order_make(&o), out);
        reply_tokens(r, o.all);
        goto out;
    }
    TRY_GOTO(prompts_start(service_prompter(r->site->service), &o, on_made, r, &r->making), out);
    grpc_start_deadline(r);
out:
    prompt_order_fini(&o);
    return status;
}

static void tokenize(struct rpc *r, const uint8_t *bytes, size_t n) {
    const struct body_facts *facts = grpc_facts(r);
    if (!facts) return;
    json_t *root = read_tree(r, &sfumato__v1__tokenize_request__descriptor, bytes, n);
    if (root && read_text(r, facts, root) != STATUS_OK) grpc_end_last(r);
    json_decref(root);
}

static enum status decode(const struct body_facts *facts, const Sfumato__V1__DetokenizeRequest *m,
                          char **text, size_t *n) {
    for (size_t i = 0; i < m->n_tokens; i++) {
        if (m->tokens[i] < (uint32_t)facts->vocab_count) continue;
        return fail_param(STATUS_REQUEST, "tokens", NULL, "tokens: item %zu is no id in 0..%d", i,
                          facts->vocab_count - 1);
    }
    return body_decode(facts, m->tokens, m->n_tokens, text, n);
}

static void detokenize(struct rpc *r, const uint8_t *bytes, size_t n) {
    enum { DETOKENIZE_PROMPT = 1 };
    const struct body_facts *facts = grpc_facts(r);
    char *text = NULL;
    size_t text_n = 0;
    arena memory;
    if (!facts) return;
    arena_init(&memory, grpc_memory_max(r));
    const Sfumato__V1__DetokenizeRequest *m =
        grpc_unpack(r, &sfumato__v1__detokenize_request__descriptor, &memory, bytes, n);
    if (m && decode(facts, m, &text, &text_n) == STATUS_OK) {
        struct json_writer *out = &r->front->scratch;
        json_writer_clear(out);
        write_text(out, DETOKENIZE_PROMPT, text, text_n);
        if (grpc_send_bytes(r, out)) grpc_end_ok(r);
    } else if (m) {
        grpc_end_last(r);
    }
    free(text);
    arena_fini(&memory);
}

/* ---- ModelInfo, Abort, Load ---- */

static char *text_of_id(const tokenizer *t, int id, arena *memory) {
    if (id < 0) return (char *)"";
    const struct tokenizer_string piece = tokenizer_piece(t, (uint32_t)id);
    char *text = arena_strndup(memory, piece.bytes, piece.n);
    return text ? text : (char *)"";
}

static ProtobufCBinaryData word(const char *text) {
    return (ProtobufCBinaryData){.len = strlen(text), .data = (uint8_t *)text};
}

static ProtobufCBinaryData word_of(const struct params *p, enum param_id id, arena *memory) {
    const char *text = param_word(p, id), *kept = arena_strndup(memory, text, strlen(text));
    return word(kept ? kept : "");
}

/* What a request gets that leaves everything out: taken from such a request. */
static void fill_defaults(const struct body *b, const struct params *p, arena *memory,
                          Sfumato__V1__SoftThinking *m, Sfumato__V1__ColdStop *cold_stop) {
    const struct think_params *t = &b->request.think;
    m->mode_opt_case = SFUMATO__V1__SOFT_THINKING__MODE_OPT_MODE;
    m->mode = word(think_mode_name(t->mode));
    m->max_topk_opt_case = SFUMATO__V1__SOFT_THINKING__MAX_TOPK_OPT_MAX_TOPK;
    m->max_topk = (uint32_t)t->max_topk;
    m->temperature_opt_case = SFUMATO__V1__SOFT_THINKING__TEMPERATURE_OPT_TEMPERATURE;
    m->temperature = t->thinking.temperature;
    m->top_p_opt_case = SFUMATO__V1__SOFT_THINKING__TOP_P_OPT_TOP_P;
    m->top_p = t->thinking.top_p;
    m->top_k_opt_case = SFUMATO__V1__SOFT_THINKING__TOP_K_OPT_TOP_K;
    m->top_k = t->thinking.top_k;
    m->min_p_opt_case = SFUMATO__V1__SOFT_THINKING__MIN_P_OPT_MIN_P;
    m->min_p = t->thinking.min_p;
    m->cold_stop_opt_case = SFUMATO__V1__SOFT_THINKING__COLD_STOP_OPT_COLD_STOP;
    m->cold_stop = cold_stop;
    cold_stop->off = !t->cold_stop;
    if (t->cold_stop) {
        cold_stop->entropy_opt_case = SFUMATO__V1__COLD_STOP__ENTROPY_OPT_ENTROPY;
        cold_stop->entropy = t->cold_stop_entropy;
        cold_stop->length_opt_case = SFUMATO__V1__COLD_STOP__LENGTH_OPT_LENGTH;
        cold_stop->length = t->cold_stop_length;
    }
    if (t->budget > 0) {
        m->budget_opt_case = SFUMATO__V1__SOFT_THINKING__BUDGET_OPT_BUDGET;
        m->budget = t->budget;
    }
    m->start_opt_case = SFUMATO__V1__SOFT_THINKING__START_OPT_START;
    m->start = word_of(p, PARAM_think_start, memory);
    m->on_eos_opt_case = SFUMATO__V1__SOFT_THINKING__ON_EOS_OPT_ON_EOS;
    m->on_eos = word_of(p, PARAM_on_eos, memory);
    m->compat_opt_case = SFUMATO__V1__SOFT_THINKING__COMPAT_OPT_COMPAT;
    m->compat = word_of(p, PARAM_compat, memory);
    if (p->close_text) {
        m->close_text_opt_case = SFUMATO__V1__SOFT_THINKING__CLOSE_TEXT_OPT_CLOSE_TEXT;
        m->close_text = word(p->close_text);
    }
    m->share_thinking_opt_case = SFUMATO__V1__SOFT_THINKING__SHARE_THINKING_OPT_SHARE_THINKING;
    m->share_thinking = b->request.share_thinking;
    m->return_trace_opt_case = SFUMATO__V1__SOFT_THINKING__RETURN_TRACE_OPT_RETURN_TRACE;
    m->return_trace = (uint32_t)b->trace_entries;
    m->gumbel_temperature_opt_case =
        SFUMATO__V1__SOFT_THINKING__GUMBEL_TEMPERATURE_OPT_GUMBEL_TEMPERATURE;
    m->gumbel_temperature = t->gumbel_temperature;
    m->dirichlet_alpha_opt_case = SFUMATO__V1__SOFT_THINKING__DIRICHLET_ALPHA_OPT_DIRICHLET_ALPHA;
    m->dirichlet_alpha = t->dirichlet_alpha;
}

static void model_info(struct rpc *r, const uint8_t *bytes, size_t n) {
    const struct body_facts *facts = grpc_facts(r);
    Sfumato__V1__ModelInfoResponse m = SFUMATO__V1__MODEL_INFO_RESPONSE__INIT;
    Sfumato__V1__SoftThinking defaults = SFUMATO__V1__SOFT_THINKING__INIT;
    Sfumato__V1__ColdStop cold_stop = SFUMATO__V1__COLD_STOP__INIT;
    char *modes[THINK_MODE_COUNT];
    const char probe[] = "{\"prompt\":[0]}";
    struct body b;
    arena memory;
    (void)bytes; /* ModelInfoRequest has no fields */
    (void)n;
    if (!facts) return;
    arena_init(&memory, ARENA_BLOCK_BYTES);
    for (int i = 0; i < THINK_MODE_COUNT; i++) {
        modes[i] = (char *)think_mode_name((enum think_mode)i);
    }
    m.id = (char *)facts->model_name;
    m.root = (char *)facts->model_name;
    m.created = facts->created;
    m.max_model_len = (uint32_t)facts->max_model_len;
    m.vocab_count = (uint32_t)facts->vocab_count;
    m.n_modes = THINK_MODE_COUNT;
    m.modes = modes;
    m.think_open = text_of_id(facts->tokenizer, facts->open_id, &memory);
    m.think_close = text_of_id(facts->tokenizer, facts->close_id, &memory);
    m.system_fingerprint = (char *)service_fingerprint(r->site->service);
    if (body_parse(facts, probe, sizeof probe - 1, &b) == STATUS_OK) {
        fill_defaults(&b, facts->params, &memory, &defaults, &cold_stop);
        m.defaults = &defaults;
    }
    grpc_reply(r, &m);
    body_fini(&b);
    arena_fini(&memory);
}

static void abort_call(struct rpc *r, const uint8_t *bytes, size_t n) {
    Sfumato__V1__AbortResponse m = SFUMATO__V1__ABORT_RESPONSE__INIT;
    json_t *root = read_tree(r, &sfumato__v1__abort_request__descriptor, bytes, n);
    if (!root) return;
    const char *id = json_string_value(json_object_get(root, "request_id"));
    m.found = id && service_abort(r->site->service, id);
    grpc_reply(r, &m);
    json_decref(root);
}

static void load(struct rpc *r, const uint8_t *bytes, size_t n) {
    const service *s = r->site->service;
    Sfumato__V1__LoadResponse m = SFUMATO__V1__LOAD_RESPONSE__INIT;
    struct service_load now;
    (void)bytes; /* LoadRequest has no fields */
    (void)n;
    service_load_get(s, &now);
    m.state = (char *)service_state_name(service_get_state(s));
    m.load_progress = service_load_progress(s);
    m.running = (uint32_t)now.running;
    m.waiting = (uint32_t)now.waiting;
    m.running_max = (uint32_t)now.running_max;
    m.queue_max = (uint32_t)now.queue_max;
    m.tokens_used = now.tokens_used;
    m.tokens_max = now.tokens_max;
    m.uptime_seconds = now.uptime_seconds;
    grpc_reply(r, &m);
}

#define METHOD(name) "/sfumato.v1.Inference/" name
const struct grpc_method grpc_sfumato_methods[] = {
    {METHOD("Chat"), false, chat_call},
    {METHOD("Generate"), false, generate_call},
    {METHOD("Tokenize"), false, tokenize},
    {METHOD("Detokenize"), false, detokenize},
    {METHOD("ModelInfo"), false, model_info},
    {METHOD("Abort"), false, abort_call},
    {METHOD("Load"), false, load},
    {NULL, false, NULL},
};
