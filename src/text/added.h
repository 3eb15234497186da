/* added.h: added tokens ("<think>", "<|im_start|>") found in text.
 *
 * Owns one set of token texts as a byte trie and says where they are: leftmost, of those the
 * longest. A set has the tokens that match raw text, another one those that match normalized text
 * ("normalized": true in the file). lstrip and rstrip take white space around a token into it,
 * single_word refuses a token that touches a word character. Borrowed texts; immutable once built.
 *
 *   "a <think>b"  ->  gap "a ", token 151667, gap "b"
 */
#ifndef SFUMATO_TEXT_ADDED_H
#define SFUMATO_TEXT_ADDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

typedef struct added added;

enum { ADDED_BYTES_MAX = 1024 /* of one token: bounds the cost of a near-match */ };

struct added_token {
    const char *text;
    size_t n;
    uint32_t id;
    bool single_word, lstrip, rstrip;
};

struct added_span {
    size_t begin, end;
    int token_id; /* -1: a gap */
};

/* Where a scan stands; start with {0}. */
struct added_scan {
    size_t search, covered;
    size_t space_begin, space_end; /* a run of white space; empty at first */
    struct added_span pending;
    bool has_pending;
};

enum status added_new(added **out);
void added_free(added *a);
/* The first of two tokens with the same text stays. */
enum status added_add(added *a, struct added_token token);
/* The id of the token with exactly this text, or -1. */
int added_find(const added *a, const char *text, size_t n);
/* The next gap or token of the text; false at its end. Empty gaps are left out. */
bool added_next(const added *a, const char *text, size_t n, struct added_scan *scan,
                struct added_span *span);

#endif
