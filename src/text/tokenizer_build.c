/* tokenizer_build.c: see tokenizer_build.h. */
#include "text/tokenizer_build.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "text/regex.h"
#include "text/utf8.h"

enum { ADDED_COUNT_MAX = 1 << 20 };

enum status tokenizer_begin(size_t model_count, tokenizer **out) {
    *out = NULL;
    if (model_count > TOKENIZER_VOCAB_MAX)
        return fail(STATUS_MODEL, "tokenizer: a vocabulary of %zu ids, at most %d are supported",
                    model_count, TOKENIZER_VOCAB_MAX);
    tokenizer *t = calloc(1, sizeof *t);
    if (t == NULL) return fail(STATUS_MEMORY, "no memory for a tokenizer");
    arena_init(&t->arena, 0);
    t->bos = t->eos = -1;
    t->model_count = model_count;
    enum status status = STATUS_OK;
    t->model = arena_alloc_array(&t->arena, model_count + 1, sizeof *t->model);
    if (t->model == NULL) {
        status = fail(STATUS_MEMORY, "no memory for a vocabulary of %zu ids", model_count);
        goto out;
    }
    TRY_GOTO(normalizer_new(&t->normalizer), out);
    TRY_GOTO(pretokenizer_new(&t->pretokenizer), out);
    TRY_GOTO(added_new(&t->by_text), out);
    TRY_GOTO(added_new(&t->raw), out);
    TRY_GOTO(added_new(&t->normalized), out);
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    return status;
}

void tokenizer_close(tokenizer *t) {
    if (t == NULL) return;
    bpe_free(t->bpe);
    normalizer_free(t->normalizer);
    pretokenizer_free(t->pretokenizer);
    added_free(t->by_text);
    added_free(t->raw);
    added_free(t->normalized);
    free(t->entries);
    arena_fini(&t->arena);
    free(t);
}

enum status tokenizer_add_model_token(tokenizer *t, size_t id, const char *text, size_t n) {
    if (id >= t->model_count)
        return fail(STATUS_MODEL, "tokenizer: token id %zu is out of range", id);
    if (t->model[id].bytes != NULL)
        return fail(STATUS_MODEL, "tokenizer: two tokens have the id %zu", id);
    if (utf8_valid_bytes(text, n) != n)
        return fail(STATUS_MODEL, "tokenizer: the token with id %zu is not UTF-8", id);
    const char *copy = arena_strndup(&t->arena, text, n);
    if (copy == NULL) return STATUS_MEMORY;
    t->model[id] = (struct tokenizer_string){copy, n};
    t->model_size++;
    return STATUS_OK;
}

enum status tokenizer_add_entry(tokenizer *t, struct added_entry entry) {
    if (entry.n == 0) return STATUS_OK;
    const int twice = added_find(t->by_text, entry.text, entry.n);
    if (twice >= 0) {
        struct added_entry *first = &t->entries[twice];
        entry.text = first->text;
        entry.id = first->id;
        if (first->special) { /* it is searched for as it was then */
            entry.special = true;
            entry.normalized = first->normalized;
        }
        *first = entry;
        return STATUS_OK;
    }
    if (t->entry_count == ADDED_COUNT_MAX)
        return fail(STATUS_MODEL, "tokenizer: more than %d added tokens", ADDED_COUNT_MAX);
    if (t->entry_count == t->entry_capacity) {
        const size_t capacity = t->entry_capacity == 0 ? 64 : t->entry_capacity * 2;
        struct added_entry *entries = realloc(t->entries, capacity * sizeof *entries);
        if (entries == NULL) return fail(STATUS_MEMORY, "no memory for added tokens");
        t->entries = entries;
        t->entry_capacity = capacity;
    }
    const int known = bpe_find(t->bpe, entry.text, entry.n);
    /* As AddedVocabulary::add_tokens: ids count on from the model's size or the last added one. */
    if (t->next_added_id < t->model_size) t->next_added_id = (uint32_t)t->model_size;
    const uint32_t id = known >= 0 ? (uint32_t)known : t->next_added_id;
    if (id >= t->next_added_id) t->next_added_id = id + 1;
    if (id != entry.id)
        log_warn(
            "tokenizer: the added token \"%.*s\" has id %u in the file, but gets %u as in Hugging "
            "Face tokenizers",
            (int)(entry.n < 64 ? entry.n : 64), entry.text, entry.id, id);
    entry.id = id;
    entry.text = arena_strndup(&t->arena, entry.text, entry.n);
    if (entry.text == NULL) return STATUS_MEMORY;
    t->entries[t->entry_count] = entry;
    return added_add(
        t->by_text,
        (struct added_token){.text = entry.text, .n = entry.n, .id = (uint32_t)t->entry_count++});
}

enum status tokenizer_add_frame(tokenizer *t, bool before, uint32_t id) {
    uint32_t *ids = before ? t->before : t->after;
    int *count = before ? &t->before_count : &t->after_count;
    if (*count == FRAME_IDS_MAX)
        return fail(STATUS_MODEL, "tokenizer: more than %d ids around a text", FRAME_IDS_MAX);
    if (before) memmove(ids + 1, ids, (size_t)*count * sizeof *ids);
    ids[before ? 0 : *count] = id;
    (*count)++;
    return STATUS_OK;
}

/* What the ByteLevel decoder makes of one token: the bytes its characters stand for, or the text
 * itself when any character is outside the alphabet. (It does so for added tokens too.) */
static enum status decode_piece(tokenizer *t, const char *text, size_t n,
                                struct tokenizer_string *out) {
    char *bytes = arena_strndup(&t->arena, text, n);
    if (bytes == NULL) return STATUS_MEMORY;
    *out = (struct tokenizer_string){bytes, n};
    size_t count = 0;
    for (size_t i = 0; i < n;) {
        const struct utf8_unit u = utf8_next(text + i, n - i);
        const int byte = utf8_byte_of_alphabet(u.code);
        if (byte < 0) {
            memcpy(bytes, text, n);
            return STATUS_OK;
        }
        bytes[count++] = (char)byte;
        i += (size_t)u.n;
    }
    bytes[count] = '\0';
    out->n = count;
    return STATUS_OK;
}

/* Fills what text is searched for, and what the ids of added tokens decode to. A "normalized" token
 * is both found as and decoded to its normalized text. */
static enum status finish_entries(tokenizer *t) {
    enum status status = STATUS_OK;
    struct text_buffer text = {0};
    struct regex_budget budget;
    regex_budget_init(&budget, 0);
    for (size_t i = 0; i < t->entry_count; i++) {
        const struct added_entry *e = &t->entries[i];
        struct added_token token = {e->text, e->n, e->id, e->single_word, e->lstrip, e->rstrip};
        if (e->normalized) {
            TRY_GOTO(normalizer_run(t->normalizer, e->text, e->n, &budget, &text), out);
            token.n = text.n;
            token.text = arena_strndup(&t->arena, text.n == 0 ? "" : text.bytes, text.n);
            if (token.text == NULL) {
                status = STATUS_MEMORY;
                goto out;
            }
        }
        TRY_GOTO(added_add(e->normalized ? t->normalized : t->raw, token), out);
        TRY_GOTO(decode_piece(t, token.text, token.n, &t->pieces[e->id]), out);
        t->special[e->id] = e->special;
    }
out:
    free(text.bytes);
    return status == STATUS_REQUEST ? fail_prefix(STATUS_MODEL, "tokenizer: added tokens") : status;
}

static enum status check_frame(const tokenizer *t, const uint32_t *ids, int count) {
    for (int i = 0; i < count; i++)
        if (ids[i] >= t->vocab_count)
            return fail(STATUS_MODEL, "tokenizer: the post-processor uses the unknown id %u",
                        ids[i]);
    return STATUS_OK;
}

enum status tokenizer_end(tokenizer *t) {
    t->vocab_count = t->model_count;
    for (size_t i = 0; i < t->entry_count; i++)
        if (t->entries[i].id >= t->vocab_count) t->vocab_count = t->entries[i].id + 1;
    t->pieces = arena_alloc_array(&t->arena, t->vocab_count + 1, sizeof *t->pieces);
    t->special = arena_alloc_array(&t->arena, t->vocab_count + 1, sizeof *t->special);
    if (t->pieces == NULL || t->special == NULL) return STATUS_MEMORY;
    for (size_t id = 0; id < t->model_count; id++)
        if (t->model[id].bytes != NULL)
            TRY(decode_piece(t, t->model[id].bytes, t->model[id].n, &t->pieces[id]));
    TRY(check_frame(t, t->before, t->before_count));
    TRY(check_frame(t, t->after, t->after_count));
    return finish_entries(t);
}
