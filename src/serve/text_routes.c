/* text_routes.c: /tokenize, /detokenize, /apply-template and /v1/models: what needs the tokenizer
 * but not the engine (serving.md §1).
 */
#include <stdlib.h>
#include <string.h>

#include "serve/fields.h"
#include "serve/http.h"
#include "serve/prompts.h"

enum { IDS_MAX = 1 << 24 };

static void reply_failure(struct exchange *x) {
    const struct refused why = service_refused(x->site->service);
    http_reply_error(x, &why);
}

/* NULL while loading, after it has been said. */
static const struct body_facts *facts_of(struct exchange *x) {
    const struct body_facts *facts = service_facts(x->site->service);
    if (facts) return facts;
    const struct refused why =
        refused_as(REFUSAL_LOADING, NULL, "the model is loading: try again later");
    http_reply_error(x, &why);
    return NULL;
}

static enum status read_object(struct exchange *x, const struct body_facts *facts, json_t **root) {
    size_t n;
    const char *text = http_body(x, &n), *name = NULL;
    TRY(json_load_text(text, n, STATUS_REQUEST, root));
    if (!json_is_object(*root)) return fail(STATUS_REQUEST, "a request must be a JSON object");
    TRY(field_text(*root, "", "model", &name));
    return body_check_model(facts, name);
}

static void write_tokens(const struct body_facts *facts, const uint32_t *ids, size_t count,
                         bool strings, struct json_writer *w) {
    json_begin(w, '{');
    json_key(w, "count");
    json_write_int(w, (int64_t)count);
    json_key(w, "max_model_len");
    json_write_int(w, facts->max_model_len);
    json_key(w, "tokens");
    json_begin(w, '[');
    for (size_t i = 0; i < count; i++) json_write_int(w, ids[i]);
    json_end(w, ']');
    json_key(w, "token_strs");
    if (strings) {
        json_begin(w, '[');
        for (size_t i = 0; i < count; i++) {
            const struct tokenizer_string piece = tokenizer_piece(facts->tokenizer, ids[i]);
            json_write_string(w, piece.bytes, piece.n);
        }
        json_end(w, ']');
    } else {
        json_write_null(w);
    }
    json_end(w, '}');
}

static void write_prompt(const char *text, size_t n, struct json_writer *w) {
    json_begin(w, '{');
    json_key(w, "prompt");
    json_write_string(w, text, n);
    json_end(w, '}');
}

/* ---- texts: prompt, or messages through the template ---- */

/* A request whose text is being rendered or tokenised, or is short. */
struct text_job {
    struct exchange *x;
    const struct body_facts *facts;
    prompt_job *making;
    bool tokenize; /* else the text itself is wanted */
    bool strings;  /* of /tokenize */
};

static void reply_made(const struct text_job *j, const struct prompt_made *made) {
    struct json_writer w;
    json_writer_init(&w);
    if (j->tokenize) {
        write_tokens(j->facts, made->ids, made->count, j->strings, &w);
    } else {
        write_prompt(made->text, made->n, &w);
    }
    http_reply_json(j->x, 200, &w);
    json_writer_fini(&w);
}

static void on_made(void *user, const struct prompt_made *made, const struct refused *why) {
    struct text_job *j = user;
    if (made) {
        reply_made(j, made);
    } else {
        http_reply_error(j->x, why);
    }
    free(j);
}

static void on_gone(struct exchange *x) {
    struct text_job *j = x->user;
    prompts_cancel(j->making);
    free(j);
}

/* What is to be made: a text, or with messages a template. */
static enum status read_order(const struct text_job *j, const json_t *root,
                              struct prompt_order *o) {
    const json_t *messages = field_get(root, "messages");
    const char *prompt = NULL;
    o->add_special = !messages;
    if (j->tokenize) o->tokenizer = j->facts->tokenizer;
    TRY(field_text(root, "", "prompt", &prompt));
    TRY(field_bool(root, "", "add_special_tokens", &o->add_special));
    if (messages && prompt) {
        return fail_param(STATUS_REQUEST, "prompt", NULL,
                          "a request needs either messages or prompt");
    }
    if (!messages && (!prompt || !j->tokenize)) {
        const char *key = j->tokenize ? "prompt" : "messages";
        return fail_param(STATUS_REQUEST, key, NULL, "%s is missing", key);
    }
    if (messages) return body_read_template(j->facts, root, &o->template);
    return prompt_order_add(o, prompt, json_string_length(json_object_get(root, "prompt")));
}

/* Answers at once, or later: then *parked has taken the job. */
static enum status read_text(struct text_job *j, const json_t *root, bool *parked) {
    struct prompt_order o = {0};
    enum status status;
    TRY_GOTO(field_bool(root, "", "return_token_strs", &j->strings), out);
    TRY_GOTO(read_order(j, root, &o), out);
    if (prompt_order_is_short(&o)) {
        TRY_GOTO(prompt_order_make(&o), out);
        reply_made(j, o.all);
        goto out;
    }
    TRY_GOTO(prompts_start(service_prompter(j->x->site->service), &o, on_made, j, &j->making), out);
    *parked = true;
    j->x->user = j;
    j->x->on_gone = on_gone;
    http_hold(j->x);
out:
    prompt_order_fini(&o);
    return status;
}

static void start_text(struct exchange *x, bool tokenize) {
    const struct body_facts *facts = facts_of(x);
    if (!facts) return;
    json_t *root = NULL;
    bool parked = false;
    enum status status;
    struct text_job *j = calloc(1, sizeof *j);
    if (!j) TRY_GOTO(fail(STATUS_MEMORY, "no memory for a request"), out);
    *j = (struct text_job){.x = x, .facts = facts, .tokenize = tokenize};
    TRY_GOTO(read_object(x, facts, &root), out);
    TRY_GOTO(read_text(j, root, &parked), out);
out:
    if (status != STATUS_OK) reply_failure(x);
    json_decref(root);
    if (!parked) free(j);
}

void text_tokenize(struct exchange *x) { start_text(x, true); }
void text_apply_template(struct exchange *x) { start_text(x, false); }

static enum status read_ids(const struct body_facts *facts, const json_t *root, uint32_t **ids,
                            size_t *count) {
    const json_t *array = field_get(root, "tokens");
    *count = json_array_size(array);
    if (!json_is_array(array) || *count > IDS_MAX) {
        return field_wrong("", "tokens", "an array of token ids");
    }
    *ids = malloc((*count + 1) * sizeof **ids);
    if (!*ids) return fail(STATUS_MEMORY, "no memory for tokens");
    for (size_t i = 0; i < *count; i++) {
        const json_t *id = json_array_get(array, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= facts->vocab_count) {
            return fail_param(STATUS_REQUEST, "tokens", NULL,
                              "tokens: item %zu is no token id in 0..%d", i,
                              facts->vocab_count - 1);
        }
        (*ids)[i] = (uint32_t)json_integer_value(id);
    }
    return STATUS_OK;
}

void text_detokenize(struct exchange *x) {
    const struct body_facts *facts = facts_of(x);
    if (!facts) return;
    json_t *root = NULL;
    char *text = NULL;
    uint32_t *ids = NULL;
    size_t n = 0, count = 0;
    struct json_writer w;
    enum status status;
    json_writer_init(&w);
    TRY_GOTO(read_object(x, facts, &root), out);
    TRY_GOTO(read_ids(facts, root, &ids, &count), out);
    TRY_GOTO(body_decode(facts, ids, count, &text, &n), out);
    write_prompt(text, n, &w);
    http_reply_json(x, 200, &w);
out:
    json_writer_fini(&w);
    if (status != STATUS_OK) reply_failure(x);
    json_decref(root);
    free(text);
    free(ids);
}

/* ---- models ---- */

static void write_marker(const struct body_facts *facts, const char *key, int id,
                         struct json_writer *w) {
    json_key(w, key);
    if (id < 0) {
        json_write_null(w);
        return;
    }
    const struct tokenizer_string piece = tokenizer_piece(facts->tokenizer, (uint32_t)id);
    json_write_string(w, piece.bytes, piece.n);
}

static void write_defaults(const struct body_facts *facts, struct json_writer *w) {
    const struct params *p = facts->params;
    json_key(w, "defaults");
    json_begin(w, '{');
    json_key(w, "mode");
    json_write_text(w, think_mode_name(facts->mode));
    json_key(w, "max_topk");
    json_write_int(w, p->max_topk);
    json_key(w, "temperature");
    if (param_given(p, PARAM_think_temperature)) {
        json_write_real(w, p->think_temperature);
    } else {
        json_write_null(w); /* the request's */
    }
    json_key(w, "top_p");
    json_write_real(w, p->think_top_p);
    json_key(w, "top_k");
    json_write_int(w, p->think_top_k);
    json_key(w, "min_p");
    json_write_real(w, p->think_min_p);
    json_key(w, "cold_stop");
    if (p->no_cold_stop) {
        json_write_bool(w, false);
    } else {
        json_begin(w, '{');
        json_key(w, "entropy");
        json_write_real(w, p->cold_stop_entropy);
        json_key(w, "length");
        json_write_int(w, p->cold_stop_length);
        json_end(w, '}');
    }
    json_key(w, "budget");
    if (p->budget > 0) {
        json_write_int(w, p->budget);
    } else {
        json_write_null(w);
    }
    json_key(w, "start");
    json_write_text(w, param_word(p, PARAM_think_start));
    json_key(w, "on_eos");
    json_write_text(w, param_word(p, PARAM_on_eos));
    json_key(w, "close_text");
    json_write_text(w, p->close_text);
    json_key(w, "compat");
    json_write_text(w, param_word(p, PARAM_compat));
    json_key(w, "share_thinking");
    json_write_bool(w, p->share_thinking);
    json_key(w, "return_trace");
    if (p->return_trace > 0) {
        json_write_int(w, p->return_trace);
    } else {
        json_write_bool(w, false);
    }
    json_key(w, "gumbel_temperature");
    json_write_real(w, p->gumbel_temperature);
    json_key(w, "dirichlet_alpha");
    json_write_real(w, p->dirichlet_alpha);
    json_end(w, '}');
}

static void write_model(const struct body_facts *facts, const char *name, size_t n,
                        struct json_writer *w) {
    json_begin(w, '{');
    json_key(w, "id");
    json_write_string(w, name, n);
    json_key(w, "object");
    json_write_text(w, "model");
    json_key(w, "created");
    json_write_int(w, facts->created);
    json_key(w, "owned_by");
    json_write_text(w, "sfumato");
    json_key(w, "root");
    json_write_text(w, facts->model_name);
    json_key(w, "parent");
    json_write_null(w);
    json_key(w, "max_model_len");
    json_write_int(w, facts->max_model_len);
    json_key(w, "sfumato");
    json_begin(w, '{');
    json_key(w, "modes");
    json_begin(w, '[');
    for (int m = 0; m < THINK_MODE_COUNT; m++) {
        json_write_text(w, think_mode_name((enum think_mode)m));
    }
    json_end(w, ']');
    write_marker(facts, "think_open", facts->open_id, w);
    write_marker(facts, "think_close", facts->close_id, w);
    write_defaults(facts, w);
    json_end(w, '}');
    json_end(w, '}');
}

void openai_models(struct exchange *x) {
    const struct body_facts *facts = facts_of(x);
    struct json_writer w;
    if (!facts) return;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "object");
    json_write_text(&w, "list");
    json_key(&w, "data");
    json_begin(&w, '[');
    const char *at = facts->model_names, *name;
    size_t n;
    while ((name = body_next_name(&at, &n)) != NULL) write_model(facts, name, n, &w);
    json_end(&w, ']');
    json_end(&w, '}');
    http_reply_json(x, 200, &w);
    json_writer_fini(&w);
}

void openai_model(struct exchange *x) {
    const struct body_facts *facts = facts_of(x);
    struct json_writer w;
    if (!facts) return;
    size_t n = 0;
    char *id = evhttp_uridecode(x->path + strlen(x->route->path), 0, &n);
    if (id && strlen(id) == n && body_check_model(facts, id) == STATUS_OK) { /* no %00 in it */
        json_writer_init(&w);
        write_model(facts, id, n, &w);
        http_reply_json(x, 200, &w);
        json_writer_fini(&w);
    } else {
        const struct refused why =
            refused_as(REFUSAL_NO_MODEL, "model", "the model here is %s", facts->model_names);
        http_reply_error(x, &why);
    }
    free(id);
}
