/* tokenizer_build.h: the inside of a tokenizer, shared by the files that build one.
 *
 *   tokenizer_json.c  (tokenizer.json) ─┐
 *                                       ├─► tokenizer_build.c ─► tokenizer.c encodes and decodes
 *   tokenizer_parts.c (GGUF arrays)    ─┘
 *
 * Order of building: begin (an empty tokenizer), model tokens, model (merges), normalizer and
 * pre-tokenizer steps, added tokens, framing ids, end. After end nothing changes any more.
 * Private to src/text.
 */
#ifndef SFUMATO_TEXT_TOKENIZER_BUILD_H
#define SFUMATO_TEXT_TOKENIZER_BUILD_H

#include "base/arena.h"
#include "text/added.h"
#include "text/bpe.h"
#include "text/normalize.h"
#include "text/pretokenize.h"
#include "text/tokenizer.h"

enum { FRAME_IDS_MAX = 16 };

/* An added token as tokenizer.json has it; `text` lives in the arena. */
struct added_entry {
    const char *text;
    size_t n;
    uint32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
};

struct tokenizer {
    arena arena;
    struct tokenizer_string *model; /* [model_count] token texts by id, bytes NULL: no such id */
    size_t model_count;             /* 1 + largest id of the model */
    size_t model_size;              /* how many tokens the model has */
    bpe *bpe;
    normalizer *normalizer;
    pretokenizer *pretokenizer;
    struct added_entry *entries; /* [entry_count] added tokens, malloc'ed */
    size_t entry_count, entry_capacity;
    added *by_text;                  /* the same, to look them up: its ids are indices of entries */
    added *raw, *normalized;         /* the same, as the two sets that text is searched for */
    uint32_t next_added_id;          /* above the model's size and every added id */
    struct tokenizer_string *pieces; /* [vocab_count] what each id decodes to */
    bool *special;                   /* [vocab_count] */
    size_t vocab_count;
    /* What add_special puts around a text. */
    uint32_t before[FRAME_IDS_MAX], after[FRAME_IDS_MAX];
    int before_count, after_count;
    bool decodes_bytes; /* tokenizer.json's decoder is ByteLevel: what pieces[] holds */
    int bos, eos;
};

enum status tokenizer_begin(size_t model_count, tokenizer **out);
/* The text is copied. STATUS_MODEL when the id is taken or out of range. */
enum status tokenizer_add_model_token(tokenizer *t, size_t id, const char *text, size_t n);
/* An added token; its id is the model's when the model has the text, else the next free one, as
 * Hugging Face assigns it (ids written in the file are only checked). Of one that comes twice the later
 * entry's flags count, but special it stays. */
enum status tokenizer_add_entry(tokenizer *t, struct added_entry entry);
/* Puts an id before (or after) the text; ids added later stand further out. */
enum status tokenizer_add_frame(tokenizer *t, bool before, uint32_t id);
enum status tokenizer_end(tokenizer *t);

#endif
