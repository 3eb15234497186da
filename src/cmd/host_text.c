/* host_text.c: the tokenizer, the chat template and the markers, from the model's files, on rank 0.
 *
 * A Hugging Face folder has tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja; a GGUF
 * file carries the same in its metadata. Afterwards h->facts is complete but for lengths.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/log.h"
#include "cmd/host.h"
#include "load/gguf.h"

/* tokenizer_config.json's chat_template: a string, or a list of named ones ("default" counts). Read as
 * leniently as in tokenizer_open_json, which refuses the model where this fails: model_max_length may be
 * 10^30. */
static char *template_from_config(const char *config, size_t n) {
    json_error_t error;
    json_t *root = config ? json_loadb(config, n, JSON_DECODE_INT_AS_REAL, &error) : NULL;
    char *found = NULL;
    const json_t *value = json_object_get(root, "chat_template");
    for (size_t i = 0; json_is_array(value) && i < json_array_size(value); i++) {
        const json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name && strcmp(name, "default") == 0) {
            value = json_object_get(entry, "template");
            break;
        }
    }
    if (json_is_string(value)) found = strdup(json_string_value(value));
    json_decref(root);
    return found;
}

static enum status open_from_folder(struct host *h, char **template_text) {
    enum status status = STATUS_OK;
    char *json = NULL, *config = NULL;
    size_t json_n = 0, config_n = 0, template_n = 0;
    TRY_GOTO(
        source_read_text(h->source, "tokenizer.json", TOKENIZER_FILE_BYTES_MAX, &json, &json_n),
        out);
    if (!json) {
        TRY_GOTO(fail(STATUS_MODEL, "%s: tokenizer.json is missing: byte-level BPE needs it",
                      h->source->path),
                 out);
    }
    TRY_GOTO(source_read_text(h->source, "tokenizer_config.json", CONFIG_FILE_BYTES_MAX, &config,
                              &config_n),
             out);
    TRY_GOTO(source_read_text(h->source, "chat_template.jinja", CHAT_TEMPLATE_BYTES_MAX,
                              template_text, &template_n),
             out);
    if (!*template_text) *template_text = template_from_config(config, config_n);
    status = tokenizer_open_json(json, json_n, config, config_n, &h->tokenizer);
    if (status != STATUS_OK) fail_prefix(status, "%s", h->source->path);
out:
    free(json);
    free(config);
    return status;
}

static enum status open_from_gguf(struct host *h, const struct gguf_tokenizer *g,
                                  char **template_text) {
    /* The two string structs are alike; text and load are leaves that do not know one another. */
    _Static_assert(sizeof(struct gguf_string) == sizeof(struct tokenizer_string) &&
                       offsetof(struct gguf_string, n) == offsetof(struct tokenizer_string, n),
                   "strings of load/ and text/ have one layout");
    const struct tokenizer_parts parts = {
        .tokens = (const struct tokenizer_string *)g->tokens,
        .token_types = g->token_types,
        .vocab_count = g->token_count,
        .merges = (const struct tokenizer_string *)g->merges,
        .merge_count = g->merge_count,
        .model = g->model,
        .pre = g->pre,
        .bos_id = g->bos_id,
        .eos_id = g->eos_id,
        .add_bos = g->add_bos,
        .add_eos = g->add_eos,
    };
    if (g->chat_template.n > 0 && g->chat_template.n <= CHAT_TEMPLATE_BYTES_MAX) {
        *template_text = strndup(g->chat_template.bytes, g->chat_template.n);
    }
    const enum status status = tokenizer_open_parts(&parts, &h->tokenizer);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", h->source->path);
}

/* A template that cannot be used (no Python, nothing built in) only matters to requests with messages. */
static enum status open_chat(struct host *h, const char *template_text) {
    const bool own = h->params.chat_template == 0;
    const char *builtin = own ? NULL : param_word(&h->params, PARAM_chat_template);
    if (!template_text && own) return STATUS_OK;
    char bos[256] = "", eos[256] = "";
    struct tokenizer_string piece = {0};
    if (tokenizer_bos(h->tokenizer) >= 0) {
        piece = tokenizer_piece(h->tokenizer, (uint32_t)tokenizer_bos(h->tokenizer));
        snprintf(bos, sizeof bos, "%.*s", (int)piece.n, piece.bytes);
    }
    if (tokenizer_eos(h->tokenizer) >= 0) {
        piece = tokenizer_piece(h->tokenizer, (uint32_t)tokenizer_eos(h->tokenizer));
        snprintf(eos, sizeof eos, "%.*s", (int)piece.n, piece.bytes);
    }
    const enum status status = chat_open(h->helper, template_text, builtin, bos, eos, &h->chat);
    if (status == STATUS_MODEL && own) {
        log_warn("%s", fail_text());
        snprintf(h->chat_fault, sizeof h->chat_fault, "%s", fail_text());
        return STATUS_OK;
    }
    return status;
}

static enum status find_marker(const tokenizer *t, const char *flag, const char *given,
                               const char *usual, int *id) {
    *id = tokenizer_find(t, given ? given : usual);
    if (*id >= 0 || !given) return STATUS_OK;
    uint32_t *ids = NULL;
    size_t count = 0;
    TRY(tokenizer_encode(t, given, strlen(given), false, &ids, &count));
    if (count == 1) *id = (int)ids[0];
    free(ids);
    if (count == 1) return STATUS_OK;
    return fail(STATUS_USAGE, "%s %s: a marker must be exactly one id, this text has %zu", flag,
                given, count);
}

static void add_eos(struct body_facts *f, int id) {
    if (id < 0 || id >= f->vocab_count || f->eos_count == THINK_EOS_MAX) return;
    for (int i = 0; i < f->eos_count; i++) {
        if (f->eos_ids[i] == id) return;
    }
    f->eos_ids[f->eos_count++] = id;
}

static void collect_eos(struct host *h, bool gguf) {
    /* Ends of turn that GGUF metadata leaves out (Qwen's second end id, Llama 3's two). */
    static const char *const ends[] = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>",
                                       "<|end_of_text|>"};
    struct body_facts *f = &h->facts;
    for (int i = 0; i < h->source->config.eos_count; i++) add_eos(f, h->source->config.eos_ids[i]);
    if (f->eos_count == 0) add_eos(f, tokenizer_eos(h->tokenizer));
    for (size_t i = 0; gguf && i < sizeof ends / sizeof *ends; i++) {
        const int id = tokenizer_find(h->tokenizer, ends[i]);
        if (id >= 0 && tokenizer_is_special(h->tokenizer, (uint32_t)id)) add_eos(f, id);
    }
}

static enum status choose_mode(struct host *h) {
    const struct params *p = &h->params;
    struct body_facts *f = &h->facts;
    if (h->command != PARAMS_GENERATE && h->command != PARAMS_SERVE) return STATUS_OK;
    if (!think_mode_parse(p->think, &f->mode)) {
        char known[128] = "";
        for (int m = 0; m < THINK_MODE_COUNT; m++) {
            const size_t n = strlen(known);
            snprintf(known + n, sizeof known - n, "%s%s", m ? ", " : "",
                     think_mode_name((enum think_mode)m));
        }
        return fail(STATUS_USAGE, "--think %s: it must be one of %s", p->think, known);
    }
    if (f->mode == THINK_OFF || f->close_id >= 0) return STATUS_OK;
    if (p->budget > 0) {
        if (f->open_id < 0 && strcmp(param_word(p, PARAM_think_start), "auto") == 0) {
            log_warn(
                "this model has no <think> marker, so thinking would never start: pass "
                "--think-start first_token");
        }
        return STATUS_OK;
    }
    if (param_given(p, PARAM_think)) {
        return fail(
            STATUS_USAGE,
            "--think %s: this model has no </think> marker: pass --budget N, which ends the "
            "thinking, and --think-start first_token (or name its marker by --think-close)",
            p->think);
    }
    f->mode = THINK_OFF;
    log_info(
        "this model has no </think> marker: requests that ask for nothing else run with --think "
        "off");
    return STATUS_OK;
}

enum status host_open_tokenizer(struct host *h) {
    const struct gguf_tokenizer *gguf = NULL;
    char *template_text = NULL;
    struct body_facts *f = &h->facts;
    enum status status;
    TRY(gguf_get_tokenizer(h->source, &gguf));
    TRY_GOTO(gguf ? open_from_gguf(h, gguf, &template_text) : open_from_folder(h, &template_text),
             out);
    const int known = tokenizer_vocab_count(h->tokenizer), rows = h->source->config.vocab_rows;
    if (known > rows) {
        log_warn(
            "the tokenizer knows ids up to %d, the embedding has %d rows: the others cannot be "
            "used",
            known - 1, rows);
    }
    f->vocab_count = known < rows ? known : rows;
    f->params = &h->params;
    f->config = &h->source->config;
    f->tokenizer = h->tokenizer;
    f->model_name = f->model_names = h->model_name;
    f->batch = h->command != PARAMS_SERVE;
    f->completion_max_tokens = h->command == PARAMS_SERVE ? 16 : 0;
    f->max_model_len =
        h->params.max_model_len > 0 ? h->params.max_model_len : f->config->max_positions;
    TRY_GOTO(open_chat(h, template_text), out);
    f->chat = h->chat;
    f->chat_fault = h->chat_fault[0] ? h->chat_fault : NULL;
    TRY_GOTO(
        find_marker(h->tokenizer, "--think-open", h->params.think_open, "<think>", &f->open_id),
        out);
    TRY_GOTO(
        find_marker(h->tokenizer, "--think-close", h->params.think_close, "</think>", &f->close_id),
        out);
    if (f->open_id >= f->vocab_count) f->open_id = -1;
    if (f->close_id >= f->vocab_count) f->close_id = -1;
    collect_eos(h, gguf != NULL);
    status = choose_mode(h);
out:
    free(template_text);
    return status;
}
