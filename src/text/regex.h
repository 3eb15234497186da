/* regex.h: tokenizer patterns (Oniguruma's dialect, as Hugging Face uses) run by PCRE2.
 *
 * Owns the translation of the few things the two dialects read differently (\s, \w, \h, scripts,
 * `^` and
 * `$` at lines) and the limits: patterns come from model files, so matching stops at a step limit,
 * a heap limit and a time limit instead of running for hours. What has no exact translation is
 * refused by name. A compiled regex is immutable; each thread matches with its own regex_match.
 *
 * The subject must be valid UTF-8 (checked once, at the tokenizer's door; checking it again at
 * every match would be quadratic). Matching is unanchored: PCRE2's JIT does not do anchored calls.
 */
#ifndef SFUMATO_TEXT_REGEX_H
#define SFUMATO_TEXT_REGEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

typedef struct regex regex;
typedef struct regex_match regex_match;

/* literal: the pattern is plain text. STATUS_MODEL naming what is wrong with it. */
enum status regex_new(const char *pattern, size_t n, bool literal, regex **out);
void regex_free(regex *r);

/* What all matching for one text may take: two seconds and 2 us a byte, where honest patterns need less
 * than 0.1 us a byte. It is time, because nothing else bounds the work: PCRE2 counts its steps anew at
 * each start of a match, and the characters that a repeat runs over are no steps (\p{L}+\p{N} takes one
 * step at each of n letters, and n characters). Time inside patterns, and time of the thread's own: what
 * else the machine does changes nothing. */
struct regex_budget {
    int64_t left_ns, cpu_end_ns;
};
void regex_budget_init(struct regex_budget *b, size_t text_n);

/* Match state for this regex and a budget that outlives it; one thread, any number of texts. */
enum status regex_match_new(const regex *r, struct regex_budget *budget, regex_match **out);
void regex_match_free(regex_match *m);

/* The next match at or after `from`; false in *found when there is none. An empty match right
 * behind the last match (`last_end`, or SIZE_MAX) is passed over, as Oniguruma's iterator does.
 * STATUS_REQUEST when a limit is reached. */
enum status regex_next(const regex *r, regex_match *m, const char *text, size_t n, size_t from,
                       size_t last_end, bool *found, size_t *begin, size_t *end);

#endif
