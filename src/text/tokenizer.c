/* tokenizer.c: encode and decode with a tokenizer that tokenizer_json.c or tokenizer_parts.c built.
 *
 *   text ─► added tokens (raw) ─► normalize ─► added tokens (normalized) ─► pre-tokenize ─► bpe ─►
 * ids
 *
 * The order is Hugging Face `tokenizers`' (AddedVocabulary::extract_and_normalize): a stretch of
 * text between two added tokens is normalized and cut on its own, as if it were the whole text.
 * Memory: scratch of one call; the ids are the caller's.
 */
#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "text/regex.h"
#include "text/tokenizer_build.h"
#include "text/utf8.h"

enum { CACHE_FROM_BYTES = 4096 };

struct encoding {
    const tokenizer *t;
    struct bpe_scratch bpe;
    struct regex_budget budget;
    pretokenize_scratch *pretokenize;
    struct text_buffer normalized;
    size_t normalized_bytes; /* of all stretches */
    struct id_list ids;
};

static enum status encode_piece(void *context, const char *piece, size_t n) {
    struct encoding *e = context;
    return bpe_encode(e->t->bpe, &e->bpe, piece, n, &e->ids);
}

/* A stretch without raw added tokens. */
static enum status encode_stretch(struct encoding *e, const char *text, size_t n) {
    TRY(normalizer_run(e->t->normalizer, text, n, &e->budget, &e->normalized));
    e->normalized_bytes += e->normalized.n;
    if (e->normalized_bytes > NORMALIZED_BYTES_MAX)
        return fail(STATUS_REQUEST, "the normalized text has more than %d bytes",
                    NORMALIZED_BYTES_MAX);
    struct added_scan scan = {0};
    struct added_span span;
    while (added_next(e->t->normalized, e->normalized.bytes, e->normalized.n, &scan, &span)) {
        if (span.token_id >= 0)
            TRY(id_list_add(&e->ids, (uint32_t)span.token_id));
        else
            TRY(pretokenize_run(e->t->pretokenizer, e->pretokenize,
                                e->normalized.bytes + span.begin, span.end - span.begin,
                                encode_piece, e));
    }
    return STATUS_OK;
}

static enum status encode_text(struct encoding *e, const char *text, size_t n) {
    struct added_scan scan = {0};
    struct added_span span;
    while (added_next(e->t->raw, text, n, &scan, &span)) {
        if (span.token_id >= 0)
            TRY(id_list_add(&e->ids, (uint32_t)span.token_id));
        else
            TRY(encode_stretch(e, text + span.begin, span.end - span.begin));
    }
    return STATUS_OK;
}

enum status tokenizer_encode(const tokenizer *t, const char *text, size_t n, bool add_special,
                             uint32_t **ids, size_t *count) {
    *ids = NULL;
    *count = 0;
    if (n > TOKENIZER_TEXT_BYTES_MAX)
        return fail(STATUS_REQUEST, "the text has %zu bytes, at most %d are allowed", n,
                    TOKENIZER_TEXT_BYTES_MAX);
    const size_t valid = utf8_valid_bytes(text, n);
    if (valid != n) return fail(STATUS_REQUEST, "the text is not UTF-8 at byte %zu", valid);
    enum status status = STATUS_OK;
    struct encoding e = {.t = t};
    if (n >= CACHE_FROM_BYTES) bpe_scratch_use_cache(&e.bpe);
    regex_budget_init(&e.budget, n);
    TRY_GOTO(pretokenize_scratch_new(t->pretokenizer, &e.budget, &e.pretokenize), out);
    for (int i = 0; add_special && i < t->before_count; i++)
        TRY_GOTO(id_list_add(&e.ids, t->before[i]), out);
    TRY_GOTO(encode_text(&e, text, n), out);
    for (int i = 0; add_special && i < t->after_count; i++)
        TRY_GOTO(id_list_add(&e.ids, t->after[i]), out);
    if (e.ids.ids == NULL && (e.ids.ids = malloc(sizeof *e.ids.ids)) == NULL) {
        status = fail(STATUS_MEMORY, "no memory for token ids");
        goto out;
    }
    *ids = e.ids.ids;
    *count = e.ids.count;
    e.ids.ids = NULL;
out:
    bpe_scratch_free(&e.bpe);
    pretokenize_scratch_free(e.pretokenize);
    free(e.normalized.bytes);
    free(e.ids.ids);
    return status;
}

struct tokenizer_string tokenizer_piece(const tokenizer *t, uint32_t id) {
    if (id >= t->vocab_count || t->pieces[id].bytes == NULL)
        return (struct tokenizer_string){"", 0};
    return t->pieces[id];
}

bool tokenizer_is_special(const tokenizer *t, uint32_t id) {
    return id < t->vocab_count && t->special[id];
}

enum status tokenizer_decode(const tokenizer *t, const uint32_t *ids, size_t count,
                             bool skip_special, char **text, size_t *n) {
    *text = NULL;
    *n = 0;
    enum status status = STATUS_OK;
    struct text_buffer raw = {0}, out = {0};
    for (size_t i = 0; i < count; i++) {
        if (skip_special && tokenizer_is_special(t, ids[i])) continue;
        const struct tokenizer_string piece = tokenizer_piece(t, ids[i]);
        if (piece.n > TOKENIZER_TEXT_BYTES_MAX - raw.n)
            TRY_GOTO(fail(STATUS_REQUEST, "the ids have more than %d bytes of text",
                          TOKENIZER_TEXT_BYTES_MAX),
                     out);
        TRY_GOTO(text_add(&raw, piece.bytes, piece.n), out);
    }
    TRY_GOTO(text_add_lossy(&out, raw.bytes, raw.n), out);
    TRY_GOTO(text_finish(&out, text, n), out);
out:
    free(raw.bytes);
    free(out.bytes);
    return status;
}

int tokenizer_vocab_count(const tokenizer *t) { return (int)t->vocab_count; }

int tokenizer_find(const tokenizer *t, const char *text) {
    const size_t n = strlen(text);
    const int entry = added_find(t->by_text, text, n);
    return entry >= 0 ? (int)t->entries[entry].id : bpe_find(t->bpe, text, n);
}

int tokenizer_bos(const tokenizer *t) { return t->bos; }
int tokenizer_eos(const tokenizer *t) { return t->eos; }
