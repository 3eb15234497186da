/* bpe.h: the vocabulary and the merge loop of byte-pair encoding.
 *
 * Owns two hash tables: token text -> id, and (left id, right id) -> (rank, merged id). A piece
 * (one word of the pre-tokenizer, already in the byte-level alphabet) becomes one symbol a
 * character; then the pair with the lowest rank, leftmost first, is merged until none is left. A
 * heap of (rank, position) over a doubly linked list makes that O(n log n) for a piece of any
 * length.
 *
 *   "Ġ t h e"   heap: (0,"Ġ t") (1,"h e")  ->  "Ġt h e" -> "Ġt he" -> "Ġthe"
 *
 * Same result as Hugging Face `tokenizers` models/bpe, including ignore_merges (a piece that is a
 * token is that token), byte_fallback (<0xXX> tokens for a character that is none) and unk. Token
 * texts are borrowed from the tokenizer's arena. Immutable after bpe_new; scratch belongs to the
 * caller.
 */
#ifndef SFUMATO_TEXT_BPE_H
#define SFUMATO_TEXT_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"
#include "text/tokenizer.h"

typedef struct bpe bpe;

struct bpe_options {
    bool ignore_merges, byte_fallback, fuse_unk;
    int unk_id; /* -1: a character without a token disappears */
};

/* Ids that grow; zero it before use, free .ids after. */
struct id_list {
    uint32_t *ids;
    size_t count, capacity;
};
enum status id_list_add(struct id_list *l, uint32_t id);

/* Working memory of one encode call; zero it before use. */
struct bpe_scratch {
    struct bpe_symbol *symbols;
    size_t symbol_capacity;
    uint64_t *heap;
    size_t heap_capacity;
    struct bpe_word *words; /* recent pieces and their ids, or NULL: see bpe_scratch_use_cache */
};
void bpe_scratch_free(struct bpe_scratch *s);
/* Worth it for long texts only: words come again. Without memory it simply stays off. */
void bpe_scratch_use_cache(struct bpe_scratch *s);

/* tokens[count]: by id, .bytes NULL where no token has that id. merges come in rank order. */
enum status bpe_new(const struct tokenizer_string *tokens, size_t count, struct bpe_options options,
                    size_t merge_count, bpe **out);
/* Call merge_count times, rank 0 first. STATUS_MODEL when a part or the whole is not in the
 * vocabulary. */
enum status bpe_add_merge(bpe *b, struct tokenizer_string left, struct tokenizer_string right);
/* Which token stands for a character that is none; before the first encode. */
void bpe_set_unk(bpe *b, int id);
void bpe_free(bpe *b);

/* The id of exactly this text, or -1. */
int bpe_find(const bpe *b, const char *text, size_t n);
/* Appends the ids of one piece (valid UTF-8). */
enum status bpe_encode(const bpe *b, struct bpe_scratch *s, const char *piece, size_t n,
                       struct id_list *out);

#endif
