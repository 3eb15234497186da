/* tokenizer.h: text <-> ids, exactly as Hugging Face `tokenizers` does for byte-level BPE.
 *
 * Owns the vocabulary, merges, added tokens, normalizer, pre-tokenizer and post-processor of one
 * model. Immutable after open: any number of threads may encode and decode at once (each call has its
 * own scratch). Rank 0 only. Refuses to know: templates (chat.h), streaming
 * (stream.h), files of weights (GGUF's arrays arrive as a tokenizer_parts).
 */
#ifndef SFUMATO_TEXT_TOKENIZER_H
#define SFUMATO_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

typedef struct tokenizer tokenizer;

enum {
    TOKENIZER_FILE_BYTES_MAX = 256 << 20,
    TOKENIZER_VOCAB_MAX = 1 << 22,
    TOKENIZER_TEXT_BYTES_MAX = 64 << 20,
};

/* What a GGUF file says of its tokenizer; strings are borrowed, not NUL-terminated. */
struct tokenizer_string {
    const char *bytes;
    size_t n;
};
enum tokenizer_token_type {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN,
    TOKEN_CONTROL,
    TOKEN_USER,
    TOKEN_UNUSED,
    TOKEN_BYTE
};
struct tokenizer_parts {
    const struct tokenizer_string *tokens; /* [vocab] in the byte-level alphabet */
    const int32_t *token_types;            /* [vocab], enum tokenizer_token_type, or NULL */
    size_t vocab_count;
    const struct tokenizer_string *merges; /* "left right"; NULL: the file has none, refused */
    size_t merge_count;
    const char *model;  /* tokenizer.ggml.model: only "gpt2" is byte-level BPE */
    const char *pre;    /* tokenizer.ggml.pre: "smollm", "qwen2", "llama-bpe", ... */
    int bos_id, eos_id; /* -1: none */
    bool add_bos, add_eos;
};

/* json: the text of tokenizer.json. config_json: tokenizer_config.json or NULL (bos/eos, added
 * tokens). STATUS_MODEL naming what is not supported. */
enum status tokenizer_open_json(const char *json, size_t n, const char *config_json,
                                size_t config_n, tokenizer **out);
enum status tokenizer_open_parts(const struct tokenizer_parts *parts, tokenizer **out);
void tokenizer_close(tokenizer *t);

/* Ids known to the tokenizer: 1 + the largest id, added tokens included (V of soft-thinking.md §4).
 */
int tokenizer_vocab_count(const tokenizer *t);

/* ids as `encode(text, add_special_tokens = add_special)`. *ids is malloc'ed (the caller frees).
 * STATUS_REQUEST when the text is not UTF-8 or longer than TOKENIZER_TEXT_BYTES_MAX, or when one of the
 * tokenizer's patterns takes too long on it (regex.h) or normalizing makes it longer than that. */
enum status tokenizer_encode(const tokenizer *t, const char *text, size_t n, bool add_special,
                             uint32_t **ids, size_t *count);

/* The bytes of one id (may be a part of a UTF-8 sequence), borrowed from the tokenizer. An unknown
 * id gives n = 0. Added tokens give their content. */
struct tokenizer_string tokenizer_piece(const tokenizer *t, uint32_t id);
bool tokenizer_is_special(const tokenizer *t, uint32_t id);
/* As Hugging Face `decode(ids, skip_special_tokens)`: broken UTF-8 becomes U+FFFD. malloc'ed, with
 * NUL. STATUS_REQUEST when the ids have more than TOKENIZER_TEXT_BYTES_MAX bytes. */
enum status tokenizer_decode(const tokenizer *t, const uint32_t *ids, size_t count,
                             bool skip_special, char **text, size_t *n);
/* The id whose added or ordinary token is exactly this text, or -1. */
int tokenizer_find(const tokenizer *t, const char *text);
/* bos of the tokenizer's own configuration, -1 none. */
int tokenizer_bos(const tokenizer *t);
int tokenizer_eos(const tokenizer *t);

#endif
