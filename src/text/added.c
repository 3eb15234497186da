/* added.c: see added.h. */
#include "text/added.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "text/utf8.h"

/* Children of a node are a list of siblings; the root has a table, since most bytes start no token.
 */
struct node {
    uint32_t child, sibling; /* indices, 0 none (0 is the root, nobody's child) */
    int32_t token;           /* index, -1 none */
    uint8_t byte;
};

struct added {
    struct node *nodes;
    size_t node_count, node_capacity;
    struct added_token *tokens;
    size_t token_count, token_capacity;
    uint32_t root[256];
};

enum status added_new(added **out) {
    *out = calloc(1, sizeof **out);
    if (*out == NULL) return fail(STATUS_MEMORY, "no memory for added tokens");
    (*out)->node_count = 1;
    return STATUS_OK;
}

void added_free(added *a) {
    if (a == NULL) return;
    free(a->nodes);
    free(a->tokens);
    free(a);
}

static uint32_t find_child(const added *a, uint32_t node, uint8_t byte) {
    if (node == 0) return a->root[byte];
    uint32_t child = a->nodes[node].child;
    while (child != 0 && a->nodes[child].byte != byte) child = a->nodes[child].sibling;
    return child;
}

enum status added_add(added *a, struct added_token token) {
    if (token.n == 0) return STATUS_OK;
    if (token.n > ADDED_BYTES_MAX)
        return fail(STATUS_MODEL,
                    "tokenizer: the added token of id %u has %zu bytes, at most %d are supported",
                    token.id, token.n, ADDED_BYTES_MAX);
    if (a->node_count + token.n > a->node_capacity) {
        const size_t capacity = (a->node_count + token.n) * 2;
        struct node *nodes = realloc(a->nodes, capacity * sizeof *nodes);
        if (nodes == NULL) return fail(STATUS_MEMORY, "no memory for added tokens");
        a->nodes = nodes;
        a->node_capacity = capacity;
    }
    if (a->token_count == a->token_capacity) {
        const size_t capacity = a->token_capacity == 0 ? 64 : a->token_capacity * 2;
        struct added_token *tokens = realloc(a->tokens, capacity * sizeof *tokens);
        if (tokens == NULL) return fail(STATUS_MEMORY, "no memory for added tokens");
        a->tokens = tokens;
        a->token_capacity = capacity;
    }
    uint32_t node = 0;
    for (size_t i = 0; i < token.n; i++) {
        const uint8_t byte = (uint8_t)token.text[i];
        uint32_t child = find_child(a, node, byte);
        if (child == 0) {
            child = (uint32_t)a->node_count++;
            a->nodes[child] = (struct node){.token = -1, .byte = byte};
            if (node == 0) {
                a->root[byte] = child;
            } else {
                a->nodes[child].sibling = a->nodes[node].child;
                a->nodes[node].child = child;
            }
        }
        node = child;
    }
    if (a->nodes[node].token < 0) {
        a->nodes[node].token = (int32_t)a->token_count;
        a->tokens[a->token_count++] = token;
    }
    return STATUS_OK;
}

int added_find(const added *a, const char *text, size_t n) {
    uint32_t node = 0;
    for (size_t i = 0; i < n; i++)
        if ((node = find_child(a, node, (uint8_t)text[i])) == 0) return -1;
    return n == 0 || a->nodes[node].token < 0 ? -1 : (int)a->tokens[a->nodes[node].token].id;
}

/* Leftmost-longest at or after `from`: the token's index or -1. */
static int32_t search(const added *a, const char *text, size_t n, size_t from, size_t *begin,
                      size_t *end) {
    for (size_t i = from; i < n; i++) {
        int32_t best = -1;
        uint32_t node = 0;
        for (size_t k = i; k < n && (node = find_child(a, node, (uint8_t)text[k])) != 0; k++) {
            if (a->nodes[node].token < 0) continue;
            best = a->nodes[node].token;
            *end = k + 1;
        }
        if (best >= 0) {
            *begin = i;
            return best;
        }
    }
    return -1;
}

/* Rust regex's \w: Alphabetic, Mark, Decimal_Number, Connector_Punctuation, Join_Control. */
static bool is_word(uint32_t code) {
    if (code == 0x200C || code == 0x200D) return true;
    /* symbols that are alphabetic: letters in circles and squares */
    if ((code >= 0x24B6 && code <= 0x24E9) || (code >= 0x1F130 && code <= 0x1F149) ||
        (code >= 0x1F150 && code <= 0x1F169) || (code >= 0x1F170 && code <= 0x1F189))
        return true;
    switch (utf8proc_category((utf8proc_int32_t)code)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_PC:
            return true;
        default:
            return false;
    }
}

static bool touches_word(const char *text, size_t n, size_t begin, size_t end) {
    if (begin > 0) {
        const size_t at = utf8_last_start(text, begin);
        if (is_word(utf8_next(text + at, begin - at).code)) return true;
    }
    return end < n && is_word(utf8_next(text + end, n - end).code);
}

/* Not further than to `floor`. */
static size_t skip_space_left(const char *text, size_t at, size_t floor) {
    while (at > floor) {
        const size_t start = utf8_last_start(text, at);
        if (!utf8_is_space(utf8_next(text + start, at - start).code)) break;
        at = start;
    }
    return at;
}

/* Tokens that are white space themselves may begin in the space behind the last one: that run is known. */
static size_t skip_space_right(const char *text, size_t n, size_t at, struct added_scan *scan) {
    if (at >= scan->space_begin && at < scan->space_end) return scan->space_end;
    scan->space_begin = at;
    while (at < n) {
        const struct utf8_unit u = utf8_next(text + at, n - at);
        if (!utf8_is_space(u.code)) break;
        at += (size_t)u.n;
    }
    return scan->space_end = at;
}

bool added_next(const added *a, const char *text, size_t n, struct added_scan *scan,
                struct added_span *span) {
    if (scan->has_pending) {
        *span = scan->pending;
        scan->has_pending = false;
        return true;
    }
    size_t begin, end;
    int32_t index;
    while ((index = search(a, text, n, scan->search, &begin, &end)) >= 0) {
        const struct added_token *t = &a->tokens[index];
        scan->search = end; /* also when refused: matches do not overlap */
        if (t->single_word && touches_word(text, n, begin, end)) continue;
        if (t->lstrip) {
            begin = skip_space_left(text, begin, scan->covered);
            if (begin < scan->covered) begin = scan->covered;
        }
        if (t->rstrip) end = skip_space_right(text, n, end, scan);
        const struct added_span token = {begin, end, (int)t->id};
        const size_t covered = scan->covered;
        scan->covered = end;
        if (covered < begin) {
            *span = (struct added_span){covered, begin, -1};
            scan->pending = token;
            scan->has_pending = true;
        } else {
            *span = token;
        }
        return true;
    }
    scan->search = n;
    if (scan->covered >= n) return false;
    *span = (struct added_span){scan->covered, n, -1};
    scan->covered = n;
    return true;
}
