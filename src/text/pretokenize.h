/* pretokenize.h: text -> words, the pieces inside which merging happens.
 *
 * Owns the steps of a tokenizer.json's "pre_tokenizer", flattened to three kinds:
 *
 *   SPLIT   cut by a pattern (what to do with the matches: enum split_behavior)
 *   SPACE   put a space before a piece that has none (add_prefix_space)
 *   BYTES   write the piece in the byte-level alphabet
 *
 * Runs depth first: a piece goes through all its steps before the next one is cut, so memory is one
 * buffer a step whatever the text's length. Steps are immutable once built; each thread has its own
 * pretokenize_scratch. Semantics are Hugging Face `tokenizers`' (NormalizedString::split).
 */
#ifndef SFUMATO_TEXT_PRETOKENIZE_H
#define SFUMATO_TEXT_PRETOKENIZE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/check.h"

typedef struct pretokenizer pretokenizer;
typedef struct pretokenize_scratch pretokenize_scratch;
struct regex_budget; /* regex.h */

enum split_behavior {
    SPLIT_ISOLATED,             /* matches and gaps are pieces */
    SPLIT_REMOVED,              /* gaps are pieces */
    SPLIT_MERGED_WITH_PREVIOUS, /* a match joins the gap before it */
    SPLIT_MERGED_WITH_NEXT,     /* a match joins the gap after it */
    SPLIT_CONTIGUOUS,           /* neighbouring matches are one piece */
};

/* GPT-2's words: what ByteLevel cuts by when use_regex is true. */
extern const char PRETOKENIZE_GPT2[];

enum status pretokenizer_new(pretokenizer **out);
void pretokenizer_free(pretokenizer *p);
enum status pretokenizer_add_split(pretokenizer *p, const char *pattern, size_t n, bool literal,
                                   enum split_behavior behavior, bool invert);
enum status pretokenizer_add_byte_level(pretokenizer *p, bool add_prefix_space, bool use_regex);

/* The budget is that of all texts the scratch is used for, and outlives it. */
enum status pretokenize_scratch_new(const pretokenizer *p, struct regex_budget *budget,
                                    pretokenize_scratch **out);
void pretokenize_scratch_free(pretokenize_scratch *s);

/* Calls sink for every piece, in order; stops at its first status that is not OK. */
typedef enum status pretokenize_sink(void *context, const char *piece, size_t n);
enum status pretokenize_run(const pretokenizer *p, pretokenize_scratch *s, const char *text,
                            size_t n, pretokenize_sink *sink, void *context);

#endif
