/* gguf.h: what a GGUF file holds beside weights and sizes, and its parser apart from the file.
 *
 *   ┌───────┬─────────┬────────────┬────────┬───────────────┬────────────────┬─────────┬──────────┐
 *   │"GGUF" │ version │ n tensors  │ n keys │ key, type,    │ name, n dims,  │ padding │ tensor   │
 *   │       │ u32     │ u64        │ u64    │ value ...     │ sizes, type,   │         │ data ... │
 *   │       │         │            │        │               │ offset ...     │         │          │
 *   └───────┴─────────┴────────────┴────────┴───────────────┴────────────────┴─────────┴──────────┘
 *
 * Strings are u64 length + bytes, borrowed from the mapping, not NUL-terminated. Everything is
 * little-endian and unaligned up to the data.
 */
#ifndef SFUMATO_LOAD_GGUF_H
#define SFUMATO_LOAD_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/check.h"
#include "load/source.h"
#include "load/tensor_table.h"

struct gguf_string {
    const char *bytes;
    size_t n;
};

/* The tokenizer of a file: the fields of text/tokenizer.h's tokenizer_parts, and the chat template.
 */
struct gguf_tokenizer {
    const struct gguf_string *tokens; /* [token_count] in the byte-level alphabet */
    const int32_t *token_types;       /* [token_count], 1 normal .. 6 byte; NULL when not given */
    size_t token_count;
    const struct gguf_string *merges; /* "left right" */
    size_t merge_count;
    const char *model;  /* tokenizer.ggml.model: "gpt2" is byte-level BPE; "" when not given */
    const char *pre;    /* tokenizer.ggml.pre: "smollm", "qwen2", ...; "" when not given */
    int bos_id, eos_id; /* -1: none */
    bool add_bos, add_eos;
    struct gguf_string chat_template; /* n = 0: none */
};

/* *out is borrowed until the source is closed; NULL (and STATUS_OK) when the source is no GGUF
 * file. Built on the first call: call it on one thread. */
enum status gguf_get_tokenizer(source *s, const struct gguf_tokenizer **out);

/* --- the parser, apart from the file (fuzzing, tests) --- */

/* clang-format off: the numbers of the specification */
enum gguf_value_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
};
/* clang-format on */

enum { GGUF_KEYS_MAX = 1 << 16, GGUF_MERGES_MAX = 1 << 23, GGUF_ALIGNMENT_MAX = 1 << 20 };

struct gguf_value {
    struct gguf_string key;
    enum gguf_value_type type;
    enum gguf_value_type item_type; /* of an array */
    uint64_t count;                 /* items of an array; 1 otherwise */
    const uint8_t *data;            /* first byte of the value or of the first item */
};

struct gguf_file {
    struct gguf_value *values; /* [value_count], in the arena */
    size_t value_count;
    struct tensor_table table; /* under the names of the file, sealed */
};

/* Checks everything up to the tensors' bytes; data is borrowed. The caller frees with
 * gguf_file_fini (and the arena) whatever the status. */
enum status gguf_parse(const uint8_t *bytes, size_t n, arena *a, struct gguf_file *out);
void gguf_file_fini(struct gguf_file *file);
const struct gguf_value *gguf_find(const struct gguf_file *file, const char *key);
/* The text of a value; n = 0 when it is NULL or no string. */
struct gguf_string gguf_string_of(const struct gguf_value *value);
/* Reads sizes, RoPE, end ids from the metadata of a parsed file. */
enum status gguf_read_config(const struct gguf_file *file, struct model_config *out);
/* Arrays in the arena, texts borrowed. */
enum status gguf_read_tokenizer(const struct gguf_file *file, arena *a, struct gguf_tokenizer *out);

#endif
