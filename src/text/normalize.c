/* normalize.c: see normalize.h. */
#include "text/normalize.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "text/regex.h"

enum { STEP_COUNT_MAX = 64 };
enum step_kind { STEP_FORM, STEP_PREPEND, STEP_REPLACE };

struct step {
    enum step_kind kind;
    enum normal_form form;
    regex *pattern;
    struct text_buffer content;
};

struct normalizer {
    struct step steps[STEP_COUNT_MAX];
    int count;
};

enum status normalizer_new(normalizer **out) {
    *out = calloc(1, sizeof **out);
    return *out == NULL ? fail(STATUS_MEMORY, "no memory for a normalizer") : STATUS_OK;
}

void normalizer_free(normalizer *z) {
    if (z == NULL) return;
    for (int i = 0; i < z->count; i++) {
        regex_free(z->steps[i].pattern);
        free(z->steps[i].content.bytes);
    }
    free(z);
}

static enum status add_step(normalizer *z, enum step_kind kind, struct step **out) {
    if (z->count == STEP_COUNT_MAX)
        return fail(STATUS_MODEL, "tokenizer: more than %d normalizers", STEP_COUNT_MAX);
    *out = &z->steps[z->count++];
    (*out)->kind = kind;
    return STATUS_OK;
}

enum status normalizer_add_form(normalizer *z, enum normal_form form) {
    struct step *s = NULL;
    TRY(add_step(z, STEP_FORM, &s));
    s->form = form;
    return STATUS_OK;
}

enum status normalizer_add_prepend(normalizer *z, const char *text, size_t n) {
    struct step *s = NULL;
    TRY(add_step(z, STEP_PREPEND, &s));
    return text_add(&s->content, text, n);
}

enum status normalizer_add_replace(normalizer *z, const char *pattern, size_t n, bool literal,
                                   const char *content, size_t content_n) {
    struct step *s = NULL;
    TRY(add_step(z, STEP_REPLACE, &s));
    TRY(text_add(&s->content, content, content_n));
    return regex_new(pattern, n, literal, &s->pattern);
}

static enum status add_bounded(struct text_buffer *b, const char *bytes, size_t n) {
    if (n > NORMALIZED_BYTES_MAX - b->n)
        return fail(STATUS_REQUEST, "the normalized text has more than %d bytes",
                    NORMALIZED_BYTES_MAX);
    return text_add(b, bytes, n);
}

static bool is_ascii(const char *s, size_t n) {
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++) any |= (uint8_t)s[i];
    return any < 0x80;
}

/* ---- normal forms ----
 *
 * utf8proc_map would do, but it orders marks by exchanging neighbours: of a text that is a long run of
 * marks it makes seconds, squared. So its parts are called one by one, with an ordering in between. */

struct codes {
    utf8proc_int32_t *at; /* one more than capacity: utf8proc_reencode ends the text with a NUL */
    size_t n, capacity;
};

static int class_of(utf8proc_int32_t code) { return utf8proc_get_property(code)->combining_class; }

static enum status reserve(struct codes *c, size_t more) {
    if (c->capacity - c->n >= more) return STATUS_OK;
    const size_t capacity = 2 * c->capacity + more;
    void *grown = realloc(c->at, (capacity + 1) * sizeof *c->at);
    if (!grown) return fail(STATUS_MEMORY, "no memory to normalize a text");
    c->at = grown;
    c->capacity = capacity;
    return STATUS_OK;
}

static enum status decompose(const struct text_buffer *text, utf8proc_option_t options,
                             struct codes *out) {
    enum { ONE_MAX = 32 }; /* no character becomes more than 18 */
    int boundary = UTF8PROC_BOUNDCLASS_START;
    for (size_t i = 0; i < text->n;) {
        utf8proc_int32_t code;
        const utf8proc_ssize_t step = utf8proc_iterate((const utf8proc_uint8_t *)text->bytes + i,
                                                       (utf8proc_ssize_t)(text->n - i), &code);
        if (step <= 0) return fail(STATUS_REQUEST, "a text to normalize is not UTF-8");
        TRY(reserve(out, ONE_MAX));
        const utf8proc_ssize_t n =
            utf8proc_decompose_char(code, out->at + out->n, ONE_MAX, options, &boundary);
        ASSERT(n >= 0 && n <= ONE_MAX);
        out->n += (size_t)n;
        i += (size_t)step;
    }
    return STATUS_OK;
}

/* Sorts n marks by class, equal ones in their order. space: room for n. */
static void order_run(utf8proc_int32_t *run, size_t n, utf8proc_int32_t *space) {
    enum { SHORT = 16, CLASSES = 256 };
    size_t begin[CLASSES + 1] = {0};
    if (n <= SHORT) {
        for (size_t i = 1; i < n; i++) {
            const utf8proc_int32_t code = run[i];
            size_t k = i;
            for (; k > 0 && class_of(run[k - 1]) > class_of(code); k--) run[k] = run[k - 1];
            run[k] = code;
        }
        return;
    }
    for (size_t i = 0; i < n; i++) begin[class_of(run[i]) + 1]++;
    for (int c = 0; c < CLASSES; c++) begin[c + 1] += begin[c];
    for (size_t i = 0; i < n; i++) space[begin[class_of(run[i])]++] = run[i];
    memcpy(run, space, n * sizeof *run);
}

static enum status order(struct codes *c) {
    utf8proc_int32_t *space = NULL;
    for (size_t i = 0, end; i < c->n; i = end + 1) {
        for (end = i; end < c->n && class_of(c->at[end]) > 0;) end++;
        if (end - i < 2) continue;
        if (!space && !(space = malloc(c->n * sizeof *space)))
            return fail(STATUS_MEMORY, "no memory to normalize a text");
        order_run(c->at + i, end - i, space);
    }
    free(space);
    return STATUS_OK;
}

static enum status run_form(enum normal_form form, struct text_buffer *text) {
    if (is_ascii(text->bytes, text->n)) return STATUS_OK; /* ASCII is all four forms of itself */
    int options = UTF8PROC_STABLE;
    options |= form == NORMAL_NFC || form == NORMAL_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (form == NORMAL_NFKC || form == NORMAL_NFKD) options |= UTF8PROC_COMPAT;
    struct codes codes = {0};
    enum status status;
    TRY_GOTO(decompose(text, (utf8proc_option_t)options, &codes), out);
    TRY_GOTO(order(&codes), out);
    const utf8proc_ssize_t n =
        utf8proc_reencode(codes.at, (utf8proc_ssize_t)codes.n, (utf8proc_option_t)options);
    if (n < 0)
        TRY_GOTO(fail(STATUS_MEMORY, "cannot normalize the text: %s", utf8proc_errmsg(n)), out);
    text->n = 0;
    status = add_bounded(text, (const char *)codes.at, (size_t)n);
out:
    free(codes.at);
    return status;
}

static enum status run_replace(const struct step *s, struct regex_budget *budget,
                               struct text_buffer *text) {
    enum status status = STATUS_OK;
    struct text_buffer out = {0};
    regex_match *match = NULL;
    TRY_GOTO(regex_match_new(s->pattern, budget, &match), out);
    size_t at = 0, last_end = SIZE_MAX;
    for (;;) {
        bool found;
        size_t begin, end;
        TRY_GOTO(
            regex_next(s->pattern, match, text->bytes, text->n, at, last_end, &found, &begin, &end),
            out);
        if (!found) break;
        TRY_GOTO(add_bounded(&out, text->bytes + at, begin - at), out);
        TRY_GOTO(add_bounded(&out, s->content.bytes, s->content.n), out);
        at = last_end = end;
    }
    TRY_GOTO(add_bounded(&out, text->bytes + at, text->n - at), out);
    const struct text_buffer old = *text;
    *text = out;
    out = old;
out:
    regex_match_free(match);
    free(out.bytes);
    return status;
}

static enum status run_prepend(const struct step *s, struct text_buffer *text) {
    TRY(add_bounded(text, s->content.bytes, s->content.n)); /* room for it */
    memmove(text->bytes + s->content.n, text->bytes, text->n - s->content.n);
    memcpy(text->bytes, s->content.bytes, s->content.n);
    return STATUS_OK;
}

enum status normalizer_run(const normalizer *z, const char *text, size_t n,
                           struct regex_budget *budget, struct text_buffer *out) {
    out->n = 0;
    TRY(text_add(out, text, n));
    for (int i = 0; i < z->count; i++) {
        const struct step *s = &z->steps[i];
        if (out->n == 0) continue;
        if (s->kind == STEP_FORM) TRY(run_form(s->form, out));
        if (s->kind == STEP_REPLACE) TRY(run_replace(s, budget, out));
        if (s->kind == STEP_PREPEND) TRY(run_prepend(s, out));
    }
    return STATUS_OK;
}
