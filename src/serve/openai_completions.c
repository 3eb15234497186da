/* openai_completions.c: POST /v1/completions, its choices whole and in chunks (serving.md §4.3).
 *
 * The text is the raw reply. Logprobs have a form of their own, four arrays beside each other; with
 * `echo` the prompt's items come first, made from scored positions: position i says how likely item
 * i + 1 was. Memory: per choice and per echoed prompt four growing buffers.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "serve/fields.h"
#include "serve/openai.h"

struct columns {
    struct json_writer tokens, logprobs, tops, offsets; /* items of arrays */
    int64_t offset;                                     /* code points so far */
};

struct completions {
    struct columns *choices; /* [choice_count] */
    struct columns *prompts; /* [prompt_count], only with echo and logprobs */
    char **texts;            /* [prompt_count], only with echo */
    size_t *text_bytes;
    int choice_count, prompt_count;
    bool echoed; /* texts and the first items of prompts are there */
    bool failed; /* or there was no memory for them */
};

/* ---- tokens as text ---- */

static bool is_utf8(const char *bytes, size_t n) {
    for (size_t i = 0, skip; i < n;) {
        const size_t length = json_utf8_length(bytes + i, n - i, &skip);
        if (length == 0) return false;
        i += length;
    }
    return true;
}

/* A piece that is no UTF-8 of its own prints as bytes:\xe2\x80. */
static void token_text(const tokenizer *t, uint32_t id, struct json_writer *out) {
    const struct tokenizer_string piece = tokenizer_piece(t, id);
    json_writer_clear(out);
    if (is_utf8(piece.bytes, piece.n)) {
        json_write_bytes(out, piece.bytes, piece.n);
        return;
    }
    json_write_bytes(out, "bytes:", 6);
    for (size_t i = 0; i < piece.n; i++) {
        char hex[8];
        snprintf(hex, sizeof hex, "\\x%02x", (unsigned char)piece.bytes[i]);
        json_write_bytes(out, hex, 4);
    }
}

static int64_t code_points(const char *bytes, size_t n) {
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)bytes[i] & 0xc0) != 0x80;
    return count;
}

/* ---- columns ---- */

static void columns_fini(struct columns *c) {
    json_writer_fini(&c->tokens);
    json_writer_fini(&c->logprobs);
    json_writer_fini(&c->tops);
    json_writer_fini(&c->offsets);
}

static void columns_clear(struct columns *c) {
    json_writer_clear(&c->tokens);
    json_writer_clear(&c->logprobs);
    json_writer_clear(&c->tops);
    json_writer_clear(&c->offsets);
}

/* {text: logprob}: the likeliest ids, which come in order, and the token itself; of equal texts the
 * first has the higher value. */
static void write_top(const tokenizer *t, uint32_t id, float logprob, int count,
                      const struct logprob_entry *top, struct json_writer *w) {
    struct logprob_entry all[REQUEST_TOP_LOGPROBS_MAX + 1];
    struct json_writer texts[REQUEST_TOP_LOGPROBS_MAX + 1];
    bool listed = false;
    int n = 0;
    for (; n < count; n++) {
        all[n] = top[n];
        listed |= top[n].id == id;
    }
    if (!listed) all[n++] = (struct logprob_entry){id, logprob};
    json_begin(w, '{');
    for (int i = 0; i < n; i++) {
        json_writer_init(&texts[i]);
        token_text(t, all[i].id, &texts[i]);
        bool seen = false;
        for (int k = 0; k < i && !seen; k++) {
            seen =
                texts[k].n == texts[i].n && memcmp(texts[k].bytes, texts[i].bytes, texts[i].n) == 0;
        }
        if (seen || texts[i].n == 0) continue;
        json_write_string(w, texts[i].bytes, texts[i].n);
        json_write_bytes(w, ":", 1);
        w->comma = false;
        json_write_real(w, (double)all[i].logprob);
    }
    json_end(w, '}');
    for (int i = 0; i < n; i++) json_writer_fini(&texts[i]);
}

/* logprob NAN: the first item of a prompt, which nothing predicts. */
static void columns_add(struct columns *c, const tokenizer *t, uint32_t id, double logprob,
                        int count, const struct logprob_entry *top, bool shown) {
    const struct tokenizer_string piece = tokenizer_piece(t, id);
    struct json_writer text;
    json_writer_init(&text);
    token_text(t, id, &text);
    json_write_string(&c->tokens, text.bytes, text.n);
    json_writer_fini(&text);
    json_write_real(&c->logprobs, logprob);
    if (isnan(logprob)) {
        json_write_null(&c->tops);
    } else {
        write_top(t, id, (float)logprob, count, top, &c->tops);
    }
    json_write_int(&c->offsets, c->offset);
    if (shown) c->offset += code_points(piece.bytes, piece.n);
}

static bool is_shown(const struct generation *g, const tokenizer *t, uint32_t id) {
    return !g->body->skip_special || !tokenizer_is_special(t, id);
}

/* ---- the shape ---- */

static const tokenizer *tokenizer_of(const struct generation *g) {
    return service_facts(g->x->site->service)->tokenizer;
}

/* The prompt as it was sent, or its ids as text. */
static enum status echo_text(struct generation *g, struct completions *own, int prompt) {
    const json_t *sent = json_object_get(g->body->root, "prompt");
    const struct body_prompt *p = &g->body->prompts[prompt];
    if (json_is_array(sent) && !json_is_integer(json_array_get(sent, 0))) {
        sent = json_array_get(sent, (size_t)prompt);
    }
    if (json_is_string(sent) && !field_get(g->body->root, "truncate_prompt_tokens")) {
        own->text_bytes[prompt] = json_string_length(sent);
        own->texts[prompt] = strndup(json_string_value(sent), json_string_length(sent));
        return own->texts[prompt] ? STATUS_OK : fail(STATUS_MEMORY, "no memory for an echo");
    }
    return tokenizer_decode(tokenizer_of(g), p->ids, (size_t)p->count, g->body->skip_special,
                            &own->texts[prompt], &own->text_bytes[prompt]);
}

static enum status completions_open(struct generation *g) {
    struct completions *own = calloc(1, sizeof *own);
    g->own = own;
    if (!own) return fail(STATUS_MEMORY, "no memory for a reply");
    own->choice_count = call_choice_count(g->call);
    own->prompt_count = g->body->prompt_count;
    own->choices = calloc((size_t)own->choice_count, sizeof *own->choices);
    own->prompts = calloc((size_t)own->prompt_count, sizeof *own->prompts);
    own->texts = calloc((size_t)own->prompt_count, sizeof *own->texts);
    own->text_bytes = calloc((size_t)own->prompt_count, sizeof *own->text_bytes);
    if (!own->choices || !own->prompts || !own->texts || !own->text_bytes) {
        return fail(STATUS_MEMORY, "no memory for a reply");
    }
    return STATUS_OK;
}

/* What stands before the reply: when something is first heard of it, for then prompts have ids. */
static void begin_echo(struct generation *g) {
    struct completions *own = g->own;
    const tokenizer *t = tokenizer_of(g);
    const int n = g->body->request.choices;
    if (!g->body->echo || own->echoed) return;
    own->echoed = true;
    for (int p = 0; p < own->prompt_count; p++) {
        const uint32_t id = g->body->prompts[p].ids[0];
        if (echo_text(g, own, p) != STATUS_OK) own->failed = true;
        if (!g->body->request.logprobs) continue;
        columns_add(&own->prompts[p], t, id, NAN, 0, NULL, is_shown(g, t, id));
        const int64_t length = code_points(own->texts[p], own->text_bytes[p]);
        for (int i = 0; i < n; i++) own->choices[p * n + i].offset = length;
    }
}

static void completions_close(struct generation *g) {
    struct completions *own = g->own;
    if (!own) return;
    for (int i = 0; own->choices && i < own->choice_count; i++) columns_fini(&own->choices[i]);
    for (int i = 0; own->prompts && i < own->prompt_count; i++) columns_fini(&own->prompts[i]);
    for (int i = 0; own->texts && i < own->prompt_count; i++) free(own->texts[i]);
    free(own->choices);
    free(own->prompts);
    free(own->texts);
    free(own->text_bytes);
    free(own);
}

static void completions_note(struct generation *g, int choice, const struct engine_event *e) {
    struct completions *own = g->own;
    if (!g->body->request.logprobs) return;
    begin_echo(g);
    const tokenizer *t = tokenizer_of(g);
    const uint32_t id = e->decision->trace_id;
    columns_add(&own->choices[choice], t, id, (double)e->logprob, e->top_count, e->top,
                is_shown(g, t, id));
}

static void completions_note_prompt(struct generation *g, int prompt,
                                    const struct engine_event *e) {
    struct completions *own = g->own;
    const struct body_prompt *p = &g->body->prompts[prompt];
    const tokenizer *t = tokenizer_of(g);
    begin_echo(g);
    if (e->position + 1 >= p->count) return;
    const uint32_t id = p->ids[e->position + 1];
    columns_add(&own->prompts[prompt], t, id, e->next_logprob, e->top_count, e->top,
                is_shown(g, t, id));
}

static void write_column(struct json_writer *w, const char *key, const struct json_writer *first,
                         const struct json_writer *second) {
    json_key(w, key);
    json_begin(w, '[');
    if (first && first->n) json_write_raw(w, first->bytes, first->n);
    if (second->n) json_write_raw(w, second->bytes, second->n);
    json_end(w, ']');
    w->failed |= second->failed || (first && first->failed);
}

static void write_logprobs(const struct generation *g, const struct columns *prompt,
                           const struct columns *c, struct json_writer *w) {
    json_key(w, "logprobs");
    if (!g->body->request.logprobs) {
        json_write_null(w);
        return;
    }
    json_begin(w, '{');
    write_column(w, "tokens", prompt ? &prompt->tokens : NULL, &c->tokens);
    write_column(w, "token_logprobs", prompt ? &prompt->logprobs : NULL, &c->logprobs);
    write_column(w, "top_logprobs", prompt ? &prompt->tops : NULL, &c->tops);
    write_column(w, "text_offset", prompt ? &prompt->offsets : NULL, &c->offsets);
    json_end(w, '}');
}

static void write_begin(int choice, const char *before, size_t before_n, const char *text, size_t n,
                        struct json_writer *w) {
    struct json_writer whole;
    json_begin(w, '{');
    json_key(w, "index");
    json_write_int(w, choice);
    json_key(w, "text");
    if (before_n == 0) {
        json_write_string(w, text, n);
        return;
    }
    json_writer_init(&whole);
    json_write_bytes(&whole, before, before_n);
    json_write_bytes(&whole, text, n);
    json_write_string(w, whole.bytes, whole.n);
    json_writer_fini(&whole);
}

static bool completions_delta(struct generation *g, int choice, const struct stream_delta *delta,
                              struct json_writer *w) {
    struct completions *own = g->own;
    struct columns *c = &own->choices[choice];
    struct reply_parts parts;
    reply_get_parts(call_reply(g->call, choice), &parts);
    if (delta->answer_n == 0 && c->tokens.n == 0 && parts.trace->n == 0) return false;
    write_begin(choice, NULL, 0, delta->answer, delta->answer_n, w);
    write_logprobs(g, NULL, c, w);
    columns_clear(c);
    openai_end_delta(&parts, w);
    return true;
}

static void completions_last(struct generation *g, int choice, struct json_writer *w) {
    const reply *r = call_reply(g->call, choice);
    write_begin(choice, NULL, 0, "", 0, w);
    json_key(w, "logprobs");
    json_write_null(w);
    openai_end_choice(r, false, w);
}

static void completions_whole(struct generation *g, int choice, struct json_writer *w) {
    const struct completions *own = g->own;
    const reply *r = call_reply(g->call, choice);
    const int prompt = choice / g->body->request.choices;
    const bool echo = g->body->echo;
    struct reply_parts parts;
    begin_echo(g);
    w->failed |= own->failed;
    reply_get_parts(r, &parts);
    write_begin(choice, own->texts[prompt], own->text_bytes[prompt], parts.answer->bytes,
                parts.answer->n, w);
    write_logprobs(g, echo ? &own->prompts[prompt] : NULL, &own->choices[choice], w);
    openai_end_choice(r, true, w);
}

static const struct shape completions_shape = {
    .kind = CALL_COMPLETION,
    .id_prefix = "cmpl",
    .object = "text_completion",
    .chunk_object = "text_completion",
    .note = completions_note,
    .note_prompt = completions_note_prompt,
    .delta = completions_delta,
    .last = completions_last,
    .whole = completions_whole,
    .open = completions_open,
    .close = completions_close,
};

void openai_completions(struct exchange *x) { generation_start(x, &completions_shape); }
