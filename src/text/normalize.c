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

static bool is_ascii(const char *s, size_t n) {
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++) any |= (uint8_t)s[i];
    return any < 0x80;
}

static enum status run_form(enum normal_form form, struct text_buffer *text) {
    if (is_ascii(text->bytes, text->n)) return STATUS_OK; /* ASCII is all four forms of itself */
    int options = UTF8PROC_STABLE;
    options |= form == NORMAL_NFC || form == NORMAL_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (form == NORMAL_NFKC || form == NORMAL_NFKD) options |= UTF8PROC_COMPAT;
    utf8proc_uint8_t *result = NULL;
    const utf8proc_ssize_t n =
        utf8proc_map((const utf8proc_uint8_t *)text->bytes, (utf8proc_ssize_t)text->n, &result,
                     (utf8proc_option_t)options);
    if (n < 0) return fail(STATUS_MEMORY, "cannot normalize the text: %s", utf8proc_errmsg(n));
    text->n = 0;
    const enum status status = text_add(text, (const char *)result, (size_t)n);
    free(result);
    return status;
}

static enum status run_replace(const struct step *s, struct text_buffer *text) {
    enum status status = STATUS_OK;
    struct text_buffer out = {0};
    regex_match *match = NULL;
    TRY_GOTO(regex_match_new(s->pattern, &match), out);
    size_t at = 0, last_end = SIZE_MAX;
    for (;;) {
        bool found;
        size_t begin, end;
        TRY_GOTO(
            regex_next(s->pattern, match, text->bytes, text->n, at, last_end, &found, &begin, &end),
            out);
        if (!found) break;
        TRY_GOTO(text_add(&out, text->bytes + at, begin - at), out);
        TRY_GOTO(text_add(&out, s->content.bytes, s->content.n), out);
        at = last_end = end;
    }
    TRY_GOTO(text_add(&out, text->bytes + at, text->n - at), out);
    const struct text_buffer old = *text;
    *text = out;
    out = old;
out:
    regex_match_free(match);
    free(out.bytes);
    return status;
}

enum status normalizer_run(const normalizer *z, const char *text, size_t n,
                           struct text_buffer *out) {
    out->n = 0;
    TRY(text_add(out, text, n));
    for (int i = 0; i < z->count; i++) {
        const struct step *s = &z->steps[i];
        if (out->n == 0) continue;
        if (s->kind == STEP_FORM) TRY(run_form(s->form, out));
        if (s->kind == STEP_REPLACE) TRY(run_replace(s, out));
        if (s->kind == STEP_PREPEND) {
            TRY(text_reserve(out, s->content.n));
            memmove(out->bytes + s->content.n, out->bytes, out->n);
            memcpy(out->bytes, s->content.bytes, s->content.n);
            out->n += s->content.n;
        }
    }
    return STATUS_OK;
}
