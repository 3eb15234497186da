/* tokenize.c: `sfumato tokenize`, JSON lines of text, ids or messages (cli.md "tokenize").
 *
 *   {"text"} ─► {"ids"}    --decode {"ids"} ─► {"text"}    --chat {"messages"} ─► {"text","ids"}
 *
 * Loads no weights. Rank 0 alone works; under mpirun the others wait for the end.
 */
#include <stdlib.h>
#include <string.h>

#include "cmd/commands.h"
#include "cmd/lines.h"
#include "serve/fields.h"
#include "serve/reply.h"

static void write_ids(struct json_writer *w, const uint32_t *ids, size_t count) {
    json_key(w, "ids");
    json_begin(w, '[');
    for (size_t i = 0; i < count; i++) json_write_int(w, ids[i]);
    json_end(w, ']');
}

static enum status encode_line(const struct body_facts *f, const json_t *root,
                               struct json_writer *w) {
    const json_t *text = field_get(root, "text");
    bool add_special = true;
    static const char *const known[] = {"text", "add_special", "custom_id"};
    uint32_t *ids = NULL;
    size_t count = 0;
    if (!json_is_string(text)) return field_wrong("", "text", "a string");
    TRY(field_only(root, known, sizeof known / sizeof *known, "a line has text and add_special"));
    TRY(field_bool(root, "", "add_special", &add_special));
    TRY(tokenizer_encode(f->tokenizer, json_string_value(text), json_string_length(text),
                         add_special, &ids, &count));
    write_ids(w, ids, count);
    free(ids);
    return STATUS_OK;
}

static enum status decode_line(const struct body_facts *f, const json_t *root,
                               struct json_writer *w) {
    const json_t *array = field_get(root, "ids");
    const size_t count = json_array_size(array);
    bool skip_special = false;
    static const char *const known[] = {"ids", "skip_special", "custom_id"};
    char *text = NULL;
    size_t n = 0;
    if (!json_is_array(array)) return field_wrong("", "ids", "an array of token ids");
    TRY(field_only(root, known, sizeof known / sizeof *known, "a line has ids and skip_special"));
    TRY(field_bool(root, "", "skip_special", &skip_special));
    uint32_t *ids = calloc(count + 1, sizeof *ids);
    if (!ids) return fail(STATUS_MEMORY, "no memory for ids");
    enum status status = STATUS_OK;
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(array, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= f->vocab_count) {
            TRY_GOTO(fail_param(STATUS_REQUEST, "ids", NULL,
                                "ids: item %zu is no token id in 0..%d", i, f->vocab_count - 1),
                     out);
        }
        ids[i] = (uint32_t)json_integer_value(id);
    }
    TRY_GOTO(tokenizer_decode(f->tokenizer, ids, count, skip_special, &text, &n), out);
    json_key(w, "text");
    json_write_string(w, text, n);
out:
    free(ids);
    free(text);
    return status;
}

static enum status chat_line(const struct body_facts *f, struct body *b, struct json_writer *w) {
    char *text = NULL;
    uint32_t *ids = NULL;
    size_t n = 0, count = 0;
    bool add_special = false;
    enum status status;
    TRY(field_bool(b->root, "", "add_special", &add_special));
    TRY(body_render_messages(f, b->root, &text, &n));
    TRY_GOTO(tokenizer_encode(f->tokenizer, text, n, add_special, &ids, &count), out);
    json_key(w, "text");
    json_write_string(w, text, n);
    write_ids(w, ids, count);
out:
    free(text);
    free(ids);
    return status;
}

static enum status run_line(struct host *h, struct lines *l, struct body *b,
                            struct json_writer *w) {
    TRY(json_load_text(l->line, l->n, STATUS_REQUEST, &b->root));
    if (!json_is_object(b->root)) return fail(STATUS_REQUEST, "a line must be a JSON object");
    b->custom_id = json_object_get(b->root, "custom_id");
    json_begin(w, '{');
    if (b->custom_id) reply_write_custom_id(b->custom_id, w);
    if (h->params.decode) {
        TRY(decode_line(&h->facts, b->root, w));
    } else if (h->params.chat) {
        TRY(chat_line(&h->facts, b, w));
    } else {
        TRY(encode_line(&h->facts, b->root, w));
    }
    json_end(w, '}');
    return STATUS_OK;
}

static enum status run_lines(struct host *h, struct lines *l, struct json_writer *w) {
    for (;;) {
        enum status status = lines_next(l);
        if (status == STATUS_END) return lines_verdict(l);
        struct body b = {0};
        if (status == STATUS_OK) status = run_line(h, l, &b, w);
        if (status == STATUS_REQUEST) {
            json_writer_clear(w);
            reply_write_error_line(&h->facts, &b, w);
            l->failed++;
            status = STATUS_OK;
        }
        body_fini(&b);
        if (status == STATUS_OK) status = lines_write(l, w);
        TRY(status);
    }
}

static enum status tokenize(struct host *h) {
    const struct params *p = &h->params;
    struct lines lines = {0};
    struct json_writer writer;
    json_writer_init(&writer);
    enum status status =
        p->positional          ? fail(STATUS_USAGE, "%s: unexpected argument", p->positional)
        : p->decode && p->chat ? fail(STATUS_USAGE, "--decode contradicts --chat")
                               : lines_open(&lines, p->input ? p->input : "-", p->output);
    if (status == STATUS_OK) status = run_lines(h, &lines, &writer);
    json_writer_fini(&writer);
    return lines_close(&lines, status);
}

enum status cmd_tokenize(struct host *h) {
    TRY(host_open_text(h));
    return h->rank == 0 ? tokenize(h) : STATUS_OK;
}
