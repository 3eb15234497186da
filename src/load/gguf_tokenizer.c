/* gguf_tokenizer.c: the tokenizer's arrays of a GGUF file, as text/tokenizer.h wants them.
 *
 * Owns the keys tokenizer.ggml.* and tokenizer.chat_template. Texts are borrowed from the mapping; the
 * arrays that point to them, and what must be aligned or NUL-terminated, come from the caller's arena.
 * Refuses to know: what the texts mean (text/). Thread: any, one at a time.
 */
#include <string.h>

#include "base/log.h"
#include "load/gguf.h"

/* *out = NULL when there is no such key. */
static enum status find_array(const struct gguf_file *file, const char *key,
                              enum gguf_value_type item_type, const struct gguf_value **out) {
    const struct gguf_value *v = *out = gguf_find(file, key);
    if (!v || (v->type == GGUF_ARRAY && v->item_type == item_type)) return STATUS_OK;
    return fail(STATUS_MODEL, "key %s must be an array of %s", key,
                item_type == GGUF_STRING ? "texts" : "32-bit integers");
}

static enum status copy_strings(const struct gguf_value *v, size_t limit, arena *a,
                                const struct gguf_string **out, size_t *count) {
    if (!v) return STATUS_OK;
    if (v->count > limit) {
        return fail(STATUS_MODEL, "key %.*s has %llu items, the limit is %zu", (int)v->key.n,
                    v->key.bytes, (unsigned long long)v->count, limit);
    }
    struct gguf_string *strings = arena_alloc_array(a, v->count + 1, sizeof *strings);
    const uint8_t *at = v->data;
    if (!strings) return STATUS_MEMORY;
    for (uint64_t i = 0; i < v->count; i++) { /* the parser has walked the same bytes */
        uint64_t n;
        memcpy(&n, at, sizeof n);
        strings[i] = (struct gguf_string){(const char *)at + sizeof n, n};
        at += sizeof n + n;
    }
    *out = strings;
    *count = v->count;
    return STATUS_OK;
}

static enum status copy_text(struct gguf_string text, arena *a, const char **out) {
    *out = arena_strndup(a, text.bytes, text.n);
    return *out ? STATUS_OK : STATUS_MEMORY;
}

static bool find_flag(const struct gguf_file *file, const char *key, bool missing) {
    const struct gguf_value *v = gguf_find(file, key);
    return v && v->type == GGUF_BOOL ? v->data[0] != 0 : missing;
}

/* Files made before the key existed: llama.cpp then adds a bos for these pre-tokenizers only. */
static bool default_add_bos(const char *pre) {
    static const char *const with_bos[] = {"llama3", "llama-v3", "llama-bpe", "tekken"};
    for (size_t i = 0; i < sizeof with_bos / sizeof with_bos[0]; i++) {
        if (strcmp(pre, with_bos[i]) == 0) return true;
    }
    return false;
}

static int find_id(const struct gguf_file *file, const char *key) {
    const struct gguf_value *v = gguf_find(file, key);
    uint32_t id;
    if (!v || (v->type != GGUF_U32 && v->type != GGUF_I32)) return -1;
    memcpy(&id, v->data, sizeof id);
    return id < CONFIG_VOCAB_MAX ? (int)id : -1;
}

enum status gguf_read_tokenizer(const struct gguf_file *f, arena *a, struct gguf_tokenizer *t) {
    *t = (struct gguf_tokenizer){0};
    const struct gguf_value *tokens, *merges, *types;
    TRY(find_array(f, "tokenizer.ggml.tokens", GGUF_STRING, &tokens));
    TRY(find_array(f, "tokenizer.ggml.merges", GGUF_STRING, &merges));
    TRY(find_array(f, "tokenizer.ggml.token_type", GGUF_I32, &types));
    TRY(copy_strings(tokens, CONFIG_VOCAB_MAX, a, &t->tokens, &t->token_count));
    TRY(copy_strings(merges, GGUF_MERGES_MAX, a, &t->merges, &t->merge_count));
    if (types && types->count != t->token_count) {
        return fail(STATUS_MODEL, "key tokenizer.ggml.token_type has %llu items for %zu tokens",
                    (unsigned long long)types->count, t->token_count);
    }
    if (!types)
        log_warn("the file has no tokenizer.ggml.token_type: markers in a text are not seen");
    if (types) {
        int32_t *copy = arena_alloc_array(a, t->token_count + 1, sizeof *copy);
        if (!copy) return STATUS_MEMORY;
        memcpy(copy, types->data, t->token_count * sizeof *copy); /* the mapping may be unaligned */
        t->token_types = copy;
    }
    TRY(copy_text(gguf_string_of(gguf_find(f, "tokenizer.ggml.model")), a, &t->model));
    TRY(copy_text(gguf_string_of(gguf_find(f, "tokenizer.ggml.pre")), a, &t->pre));
    t->bos_id = find_id(f, "tokenizer.ggml.bos_token_id");
    t->eos_id = find_id(f, "tokenizer.ggml.eos_token_id");
    t->add_bos = find_flag(f, "tokenizer.ggml.add_bos_token", default_add_bos(t->pre));
    t->add_eos = find_flag(f, "tokenizer.ggml.add_eos_token", false);
    t->chat_template = gguf_string_of(gguf_find(f, "tokenizer.chat_template"));
    return STATUS_OK;
}
