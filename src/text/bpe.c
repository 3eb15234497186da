/* bpe.c: see bpe.h. */
#include "text/bpe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/utf8.h"

enum {
    CHARACTER_TABLE = 512, /* the byte-level alphabet ends at U+0143 */
    NONE = -1,
    /* Slots looked at for one key. Published vocabularies of up to 280,147 entries fill runs of up to 40;
     * random keys fill ln(4M) / 0.19 = 80 in a half-full table of the most entries. More is a file made
     * to collide, which would take hours to load. */
    PROBE_COUNT_MAX = 256,
    WORD_COUNT = 4096, /* power of two */
    WORD_BYTES = 32,
    WORD_IDS = 7,
};
static const uint32_t NO_RANK = UINT32_MAX;

struct merge {
    uint64_t pair; /* left << 32 | right */
    uint32_t rank, merged;
};

struct bpe {
    const struct tokenizer_string *tokens;
    size_t token_count;
    struct bpe_options options;
    uint32_t *slots; /* [slot_mask + 1] id + 1, 0 empty */
    size_t slot_mask;
    struct merge *merges; /* [merge_mask + 1] open addressing; empty when rank is NO_RANK */
    size_t merge_mask;
    size_t merge_count, merge_limit;
    int32_t character_ids[CHARACTER_TABLE];
};

struct bpe_symbol {
    uint32_t id;
    int32_t previous, next; /* positions; NONE at the ends */
    uint32_t rank; /* of the pair (this, next); NO_RANK: not a pair, or this symbol is gone */
};

struct bpe_word {
    uint8_t n, count;
    char text[WORD_BYTES];
    uint32_t ids[WORD_IDS];
};

static uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t h = 0x9E3779B97F4A7C15u ^ n;
    while (n >= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
        s += 8;
        n -= 8;
    }
    uint64_t w = 0;
    if (n > 0) memcpy(&w, s, n);
    h = (h ^ w) * 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

static uint64_t hash_pair(uint64_t pair) {
    pair *= 0x9E3779B97F4A7C15u;
    return pair ^ pair >> 29;
}

static size_t table_size(size_t count) {
    size_t size = 16;
    while (size < count * 2) size *= 2;
    return size;
}

enum status id_list_add(struct id_list *l, uint32_t id) {
    if (l->count == l->capacity) {
        const size_t capacity = l->capacity == 0 ? 64 : l->capacity * 2;
        uint32_t *ids = realloc(l->ids, capacity * sizeof *ids);
        if (ids == NULL) return fail(STATUS_MEMORY, "no memory for %zu token ids", capacity);
        l->ids = ids;
        l->capacity = capacity;
    }
    l->ids[l->count++] = id;
    return STATUS_OK;
}

/* --- vocabulary and merges ------------------------------------------------------------------- */

int bpe_find(const bpe *b, const char *text, size_t n) {
    size_t i = hash_bytes(text, n) & b->slot_mask;
    for (int k = 0; k < PROBE_COUNT_MAX && b->slots[i] != 0; k++, i = (i + 1) & b->slot_mask) {
        const struct tokenizer_string t = b->tokens[b->slots[i] - 1];
        if (t.n == n && memcmp(t.bytes, text, n) == 0) return (int)(b->slots[i] - 1);
    }
    return NONE;
}

static const struct merge *find_merge(const bpe *b, uint32_t left, uint32_t right) {
    const uint64_t pair = (uint64_t)left << 32 | right;
    size_t i = hash_pair(pair) & b->merge_mask;
    for (int k = 0; k < PROBE_COUNT_MAX && b->merges[i].rank != NO_RANK;
         k++, i = (i + 1) & b->merge_mask)
        if (b->merges[i].pair == pair) return &b->merges[i];
    return NULL;
}

static enum status refuse_collisions(const char *what) {
    return fail(STATUS_MODEL, "tokenizer: more than %d %s fall into one place of a table",
                PROBE_COUNT_MAX, what);
}

enum status bpe_new(const struct tokenizer_string *tokens, size_t count, struct bpe_options options,
                    size_t merge_count, bpe **out) {
    *out = NULL;
    bpe *b = calloc(1, sizeof *b);
    if (b == NULL) return fail(STATUS_MEMORY, "no memory for a vocabulary");
    b->tokens = tokens;
    b->token_count = count;
    b->options = options;
    b->merge_limit = merge_count;
    b->slot_mask = table_size(count) - 1;
    b->merge_mask = table_size(merge_count) - 1;
    b->slots = calloc(b->slot_mask + 1, sizeof *b->slots);
    b->merges = malloc((b->merge_mask + 1) * sizeof *b->merges);
    if (b->slots == NULL || b->merges == NULL) {
        bpe_free(b);
        return fail(STATUS_MEMORY, "no memory for a vocabulary of %zu tokens and %zu merges", count,
                    merge_count);
    }
    for (size_t i = 0; i <= b->merge_mask; i++) b->merges[i].rank = NO_RANK;
    for (size_t id = 0; id < count; id++) {
        if (tokens[id].bytes == NULL || bpe_find(b, tokens[id].bytes, tokens[id].n) != NONE)
            continue;
        size_t i = hash_bytes(tokens[id].bytes, tokens[id].n) & b->slot_mask;
        for (int k = 1; k < PROBE_COUNT_MAX && b->slots[i] != 0; k++) i = (i + 1) & b->slot_mask;
        if (b->slots[i] != 0) {
            bpe_free(b);
            return refuse_collisions("tokens");
        }
        b->slots[i] = (uint32_t)id + 1;
    }
    for (uint32_t code = 0; code < CHARACTER_TABLE; code++) {
        char text[4];
        b->character_ids[code] = bpe_find(b, text, (size_t)utf8_put(code, text));
    }
    *out = b;
    return STATUS_OK;
}

enum status bpe_add_merge(bpe *b, struct tokenizer_string left, struct tokenizer_string right) {
    ASSERT(b->merge_count < b->merge_limit);
    char joined[4096];
    int merged = NONE;
    const int l = bpe_find(b, left.bytes, left.n), r = bpe_find(b, right.bytes, right.n);
    if (l != NONE && r != NONE && left.n + right.n <= sizeof joined) {
        memcpy(joined, left.bytes, left.n);
        memcpy(joined + left.n, right.bytes, right.n);
        merged = bpe_find(b, joined, left.n + right.n);
    }
    if (merged == NONE)
        return fail(STATUS_MODEL,
                    "tokenizer: merge %zu (\"%.*s\" + \"%.*s\") names a token that is not in the "
                    "vocabulary",
                    b->merge_count, (int)(left.n < 64 ? left.n : 64), left.bytes,
                    (int)(right.n < 64 ? right.n : 64), right.bytes);
    const uint64_t pair = (uint64_t)(uint32_t)l << 32 | (uint32_t)r;
    size_t i = hash_pair(pair) & b->merge_mask;
    for (int k = 1;
         k < PROBE_COUNT_MAX && b->merges[i].rank != NO_RANK && b->merges[i].pair != pair; k++)
        i = (i + 1) & b->merge_mask;
    if (b->merges[i].rank != NO_RANK && b->merges[i].pair != pair)
        return refuse_collisions("merges");
    /* A pair that comes twice keeps the last rank, as a map built in order does. */
    b->merges[i] = (struct merge){pair, (uint32_t)b->merge_count++, (uint32_t)merged};
    return STATUS_OK;
}

void bpe_set_unk(bpe *b, int id) { b->options.unk_id = id; }

void bpe_free(bpe *b) {
    if (b == NULL) return;
    free(b->slots);
    free(b->merges);
    free(b);
}

/* --- scratch --------------------------------------------------------------------------------- */

void bpe_scratch_free(struct bpe_scratch *s) {
    free(s->symbols);
    free(s->heap);
    free(s->words);
    *s = (struct bpe_scratch){0};
}

void bpe_scratch_use_cache(struct bpe_scratch *s) {
    if (s->words == NULL) s->words = calloc(WORD_COUNT, sizeof *s->words);
}

/* Room for n symbols and their heap: each merge removes one pair and adds at most two, so no more
 * than n - 1 + 2 (n - 1) entries ever go in. */
static enum status scratch_reserve(struct bpe_scratch *s, size_t n) {
    if (n <= s->symbol_capacity) return STATUS_OK;
    if (n > INT32_MAX) return fail(STATUS_REQUEST, "a word of %zu characters is too long", n);
    const size_t capacity = n < 256 ? 256 : n + n / 4;
    struct bpe_symbol *symbols = realloc(s->symbols, capacity * sizeof *symbols);
    if (symbols != NULL) s->symbols = symbols;
    uint64_t *heap = symbols == NULL ? NULL : realloc(s->heap, 3 * capacity * sizeof *heap);
    if (heap != NULL) s->heap = heap;
    if (symbols == NULL || heap == NULL)
        return fail(STATUS_MEMORY, "no memory to tokenize a word of %zu characters", n);
    s->symbol_capacity = capacity;
    s->heap_capacity = 3 * capacity;
    return STATUS_OK;
}

/* --- a min-heap of rank << 32 | position
 * ---------------------------------------------------------- */

static void heap_down(uint64_t *heap, size_t count, size_t i) {
    const uint64_t moved = heap[i];
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= count) break;
        if (child + 1 < count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= moved) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = moved;
}

static void heap_push(uint64_t *heap, size_t *count, uint64_t entry) {
    size_t i = (*count)++;
    while (i > 0 && heap[(i - 1) / 2] > entry) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = entry;
}

static uint64_t heap_pop(uint64_t *heap, size_t *count) {
    const uint64_t top = heap[0];
    heap[0] = heap[--*count];
    if (*count > 0) heap_down(heap, *count, 0);
    return top;
}

/* --- one piece ------------------------------------------------------------------------------- */

/* Symbols of a piece: one a character, or what byte_fallback and unk make of a character without
 * token. */
static enum status split_characters(const bpe *b, struct bpe_scratch *s, const char *piece,
                                    size_t n, size_t *count_out) {
    TRY(scratch_reserve(s, n)); /* a byte gives at most one symbol */
    size_t count = 0;
    bool unk_open = false; /* an unk that the next one may join (fuse_unk) */
    for (size_t i = 0; i < n;) {
        const struct utf8_unit u = utf8_next(piece + i, n - i);
        const int id = u.code < CHARACTER_TABLE ? b->character_ids[u.code]
                                                : bpe_find(b, piece + i, (size_t)u.n);
        if (id != NONE) {
            s->symbols[count++].id = (uint32_t)id;
            unk_open = false;
        } else {
            int bytes[4] = {NONE, NONE, NONE, NONE};
            bool fallback = b->options.byte_fallback;
            for (int k = 0; fallback && k < u.n; k++) {
                char name[8];
                snprintf(name, sizeof name, "<0x%02X>", (unsigned)(uint8_t)piece[i + (size_t)k]);
                bytes[k] = bpe_find(b, name, 6);
                fallback = bytes[k] != NONE;
            }
            for (int k = 0; fallback && k < u.n; k++) s->symbols[count++].id = (uint32_t)bytes[k];
            if (!fallback && b->options.unk_id != NONE && !(unk_open && b->options.fuse_unk)) {
                s->symbols[count++].id = (uint32_t)b->options.unk_id;
                unk_open = true;
            }
        }
        i += (size_t)u.n;
    }
    *count_out = count;
    return STATUS_OK;
}

/* The rank of the pair that starts at this symbol; pushes it when it is one. */
static void rank_pair(const bpe *b, struct bpe_scratch *s, int32_t at, size_t *heap_count) {
    struct bpe_symbol *left = &s->symbols[at];
    left->rank = NO_RANK;
    if (left->next == NONE) return;
    const struct merge *m = find_merge(b, left->id, s->symbols[left->next].id);
    if (m == NULL) return;
    left->rank = m->rank;
    heap_push(s->heap, heap_count, (uint64_t)m->rank << 32 | (uint32_t)at);
}

static void merge_all(const bpe *b, struct bpe_scratch *s, size_t count) {
    size_t heap_count = 0;
    for (size_t i = 0; i < count; i++) {
        s->symbols[i].previous = (int32_t)i - 1;
        s->symbols[i].next = i + 1 < count ? (int32_t)i + 1 : NONE;
    }
    for (size_t i = 0; i < count; i++) rank_pair(b, s, (int32_t)i, &heap_count);
    while (heap_count > 0) {
        const uint64_t top = heap_pop(s->heap, &heap_count);
        const int32_t at = (int32_t)(uint32_t)top;
        struct bpe_symbol *left = &s->symbols[at];
        if (left->rank != top >> 32) continue; /* this pair changed since it was pushed */
        struct bpe_symbol *right = &s->symbols[left->next];
        left->id = find_merge(b, left->id, right->id)->merged;
        left->next = right->next;
        right->rank = NO_RANK;
        if (left->next != NONE) s->symbols[left->next].previous = at;
        if (left->previous != NONE) rank_pair(b, s, left->previous, &heap_count);
        rank_pair(b, s, at, &heap_count);
    }
}

enum status bpe_encode(const bpe *b, struct bpe_scratch *s, const char *piece, size_t n,
                       struct id_list *out) {
    if (n == 0) return STATUS_OK;
    struct bpe_word *word = NULL;
    if (s->words != NULL && n <= WORD_BYTES) {
        word = &s->words[hash_bytes(piece, n) & (WORD_COUNT - 1)];
        if (word->n == n && memcmp(word->text, piece, n) == 0) {
            for (int i = 0; i < word->count; i++) TRY(id_list_add(out, word->ids[i]));
            return STATUS_OK;
        }
    }
    const size_t first = out->count;
    const int whole = b->options.ignore_merges ? bpe_find(b, piece, n) : NONE;
    if (whole != NONE) {
        TRY(id_list_add(out, (uint32_t)whole));
    } else {
        size_t count;
        TRY(split_characters(b, s, piece, n, &count));
        if (count == 0) return STATUS_OK;
        merge_all(b, s, count);
        for (int32_t i = 0; i != NONE; i = s->symbols[i].next)
            TRY(id_list_add(out, s->symbols[i].id));
    }
    if (word != NULL && out->count - first <= WORD_IDS) {
        word->n = (uint8_t)n;
        word->count = (uint8_t)(out->count - first);
        memcpy(word->text, piece, n);
        memcpy(word->ids, out->ids + first, (out->count - first) * sizeof *word->ids);
    }
    return STATUS_OK;
}
