/* pretokenize.c: see pretokenize.h. */
#include "text/pretokenize.h"

#include <stdlib.h>
#include <string.h>

#include "text/regex.h"
#include "text/utf8.h"

enum { STEP_COUNT_MAX = 64 };
enum step_kind { STEP_SPLIT, STEP_SPACE, STEP_BYTES };

const char PRETOKENIZE_GPT2[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct step {
    enum step_kind kind;
    regex *pattern;
    enum split_behavior behavior;
    bool invert;
};

struct pretokenizer {
    struct step steps[STEP_COUNT_MAX];
    int count;
    char alphabet[256][2]; /* each byte as 1 or 2 bytes of UTF-8 */
    uint8_t alphabet_n[256];
};

struct pretokenize_scratch {
    regex_match *matches[STEP_COUNT_MAX];       /* of the SPLIT steps */
    struct text_buffer buffers[STEP_COUNT_MAX]; /* of the SPACE and BYTES steps */
};

/* One run: what every level of the recursion needs. */
struct run {
    const pretokenizer *p;
    pretokenize_scratch *s;
    pretokenize_sink *sink;
    void *context;
};

enum status pretokenizer_new(pretokenizer **out) {
    pretokenizer *p = *out = calloc(1, sizeof *p);
    if (p == NULL) return fail(STATUS_MEMORY, "no memory for a pre-tokenizer");
    for (int byte = 0; byte < 256; byte++) {
        char text[4];
        p->alphabet_n[byte] = (uint8_t)utf8_put(utf8_byte_to_alphabet((uint8_t)byte), text);
        memcpy(p->alphabet[byte], text, 2);
    }
    return STATUS_OK;
}

void pretokenizer_free(pretokenizer *p) {
    if (p == NULL) return;
    for (int i = 0; i < p->count; i++) regex_free(p->steps[i].pattern);
    free(p);
}

static enum status add_step(pretokenizer *p, enum step_kind kind, struct step **out) {
    if (p->count == STEP_COUNT_MAX)
        return fail(STATUS_MODEL, "tokenizer: more than %d pre-tokenizers", STEP_COUNT_MAX);
    *out = &p->steps[p->count++];
    (*out)->kind = kind;
    return STATUS_OK;
}

enum status pretokenizer_add_split(pretokenizer *p, const char *pattern, size_t n, bool literal,
                                   enum split_behavior behavior, bool invert) {
    struct step *s = NULL;
    TRY(add_step(p, STEP_SPLIT, &s));
    s->behavior = behavior;
    s->invert = invert;
    return regex_new(pattern, n, literal, &s->pattern);
}

enum status pretokenizer_add_byte_level(pretokenizer *p, bool add_prefix_space, bool use_regex) {
    struct step *s = NULL;
    for (int i = 0; i < p->count; i++) /* each doubles what is not ASCII */
        if (p->steps[i].kind == STEP_BYTES)
            return fail(STATUS_MODEL, "tokenizer: two ByteLevel pre-tokenizers");
    if (add_prefix_space) TRY(add_step(p, STEP_SPACE, &s));
    if (use_regex)
        TRY(pretokenizer_add_split(p, PRETOKENIZE_GPT2, strlen(PRETOKENIZE_GPT2), false,
                                   SPLIT_ISOLATED, false));
    return add_step(p, STEP_BYTES, &s);
}

enum status pretokenize_scratch_new(const pretokenizer *p, struct regex_budget *budget,
                                    pretokenize_scratch **out) {
    pretokenize_scratch *s = *out = calloc(1, sizeof *s);
    if (s == NULL) return fail(STATUS_MEMORY, "no memory to tokenize");
    for (int i = 0; i < p->count; i++) {
        if (p->steps[i].kind != STEP_SPLIT) continue;
        const enum status status = regex_match_new(p->steps[i].pattern, budget, &s->matches[i]);
        if (status == STATUS_OK) continue;
        pretokenize_scratch_free(s);
        *out = NULL;
        return status;
    }
    return STATUS_OK;
}

void pretokenize_scratch_free(pretokenize_scratch *s) {
    if (s == NULL) return;
    for (int i = 0; i < STEP_COUNT_MAX; i++) {
        regex_match_free(s->matches[i]);
        free(s->buffers[i].bytes);
    }
    free(s);
}

static enum status run_step(const struct run *r, int step, const char *text, size_t n);

/* Spans come in order and alternate freely between match and gap; `held` is the piece that may
 * still grow. */
struct splitter {
    const struct run *r;
    int step;
    const char *text;
    size_t held_begin, held_end;
    bool holding, held_is_match;
};

static enum status flush_held(struct splitter *p) {
    if (!p->holding) return STATUS_OK;
    p->holding = false;
    return run_step(p->r, p->step + 1, p->text + p->held_begin, p->held_end - p->held_begin);
}

static enum status take_span(struct splitter *p, size_t begin, size_t end, bool is_match) {
    bool joins = false;
    switch (p->r->p->steps[p->step].behavior) {
        case SPLIT_ISOLATED:
            break;
        case SPLIT_REMOVED:
            if (is_match) return STATUS_OK;
            break;
        case SPLIT_MERGED_WITH_PREVIOUS:
            joins = is_match && !p->held_is_match;
            break;
        case SPLIT_MERGED_WITH_NEXT:
            joins = !is_match && p->held_is_match;
            break;
        case SPLIT_CONTIGUOUS:
            joins = is_match == p->held_is_match;
            break;
    }
    if (joins && p->holding) {
        p->held_end = end;
    } else {
        TRY(flush_held(p));
        p->held_begin = begin;
        p->held_end = end;
        p->holding = true;
    }
    p->held_is_match = is_match;
    return STATUS_OK;
}

static enum status run_split(const struct run *r, int step, const char *text, size_t n) {
    const struct step *s = &r->p->steps[step];
    struct splitter p = {.r = r, .step = step, .text = text};
    size_t at = 0, last_end = SIZE_MAX;
    for (;;) {
        bool found;
        size_t begin, end;
        TRY(regex_next(s->pattern, r->s->matches[step], text, n, at, last_end, &found, &begin,
                       &end));
        if (!found) break;
        if (begin != at) TRY(take_span(&p, at, begin, s->invert));
        TRY(take_span(&p, begin, end, !s->invert));
        at = last_end = end;
    }
    if (at != n) TRY(take_span(&p, at, n, s->invert));
    return flush_held(&p);
}

static enum status run_step(const struct run *r, int step, const char *text, size_t n) {
    if (n == 0) return STATUS_OK;
    if (step == r->p->count) return r->sink(r->context, text, n);
    struct text_buffer *buffer = &r->s->buffers[step];
    switch (r->p->steps[step].kind) {
        case STEP_SPLIT:
            return run_split(r, step, text, n);
        case STEP_SPACE:
            if (text[0] == ' ') return run_step(r, step + 1, text, n);
            buffer->n = 0;
            TRY(text_add(buffer, " ", 1));
            TRY(text_add(buffer, text, n));
            return run_step(r, step + 1, buffer->bytes, buffer->n);
        case STEP_BYTES:
            break;
    }
    buffer->n = 0;
    TRY(text_reserve(buffer, 2 * n));
    char *out = buffer->bytes;
    for (size_t i = 0; i < n; i++) {
        const uint8_t byte = (uint8_t)text[i];
        memcpy(out, r->p->alphabet[byte], 2);
        out += r->p->alphabet_n[byte];
    }
    return run_step(r, step + 1, buffer->bytes, (size_t)(out - buffer->bytes));
}

enum status pretokenize_run(const pretokenizer *p, pretokenize_scratch *s, const char *text,
                            size_t n, pretokenize_sink *sink, void *context) {
    const struct run r = {p, s, sink, context};
    return run_step(&r, 0, text, n);
}
