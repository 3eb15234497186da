/* stream.c: see stream.h.
 *
 *   id ─► piece ─► [partial UTF-8] ─┬─ thinking ─► [newlines] ─────────────────────► delta.thinking
 *                                   └─ answer ──► drop newlines once ─► [stop] ──► delta.answer
 *
 * In brackets: what is held back until more is known. Stop strings are found by one
 * Knuth-Morris-Pratt automaton each, a byte at a time, so what matches does not depend on where
 * tokens end: the stop that is complete first wins, of several at the same byte the longest. What
 * is held back is the largest state.
 */
#include "text/stream.h"

#include <stdlib.h>
#include <string.h>

#include "text/utf8.h"

struct stop {
    const char *text;
    int n, state; /* state: bytes of the stop that the text so far ends with */
    uint16_t border[STREAM_STOP_BYTES_MAX + 1]; /* longest proper border of each prefix */
};

struct stream {
    const tokenizer *t;
    struct stream_options options;
    struct stop *stops; /* [options.stop_count]; half a KiB each, and most requests have none */
    bool thinking;      /* phase of the last step */
    bool text_started;  /* of this phase: a byte other than a leading newline came */
    bool drop_newlines; /* this answer follows thinking */
    int stopped_by;     /* -1: not stopped */
    char partial[4];    /* an unfinished character of this phase */
    int partial_n;
    struct text_buffer newlines; /* end of the thinking text so far */
    struct text_buffer decoded;  /* whole characters of one step */
    struct text_buffer thinking_text;
    struct text_buffer answer_text; /* [visible | held back as a possible stop] */
    size_t answer_visible;
};

static bool is_newline(char c) { return c == '\n' || c == '\r'; }

/* --- stop strings ---------------------------------------------------------------------------- */

static int stop_advance(const struct stop *p, int state, char c) {
    while (state > 0 && (state == p->n || p->text[state] != c)) state = p->border[state];
    return p->text[state] == c ? state + 1 : 0;
}

static enum status stop_init(struct stop *p, const char *text, int index) {
    const size_t n = text == NULL ? 0 : strlen(text);
    if (n == 0 || n > STREAM_STOP_BYTES_MAX)
        return fail_param(STATUS_REQUEST, "stop", "invalid_value",
                          "stop[%d] has %zu bytes, allowed are 1..%d", index, n,
                          STREAM_STOP_BYTES_MAX);
    if (utf8_valid_bytes(text, n) != n)
        return fail_param(STATUS_REQUEST, "stop", "invalid_value", "stop[%d] is not UTF-8", index);
    p->text = text;
    p->n = (int)n;
    for (int i = 1, border = 0; i < p->n; i++) {
        border = stop_advance(p, border, text[i]);
        p->border[i + 1] = (uint16_t)border;
    }
    return STATUS_OK;
}

/* Appends answer bytes until a stop string is complete. */
static enum status add_answer(stream *s, const char *bytes, size_t n) {
    TRY(text_reserve(&s->answer_text, n));
    for (size_t i = 0; i < n; i++) {
        s->answer_text.bytes[s->answer_text.n++] = bytes[i];
        int held = 0, matched = -1;
        for (int k = 0; k < s->options.stop_count; k++) {
            struct stop *p = &s->stops[k];
            p->state = stop_advance(p, p->state, bytes[i]);
            if (p->state > held) held = p->state;
            if (p->state == p->n && (matched < 0 || p->n > s->stops[matched].n)) matched = k;
        }
        if (matched >= 0) {
            if (!s->options.include_stop) s->answer_text.n -= (size_t)s->stops[matched].n;
            s->answer_visible = s->answer_text.n;
            s->stopped_by = matched;
            return STATUS_OK;
        }
        s->answer_visible = s->answer_text.n - (size_t)held;
    }
    return STATUS_OK;
}

static enum status add_answer_unmatched(stream *s, const char *bytes, size_t n) {
    TRY(text_add(&s->answer_text, bytes, n));
    s->answer_visible = s->answer_text.n;
    return STATUS_OK;
}

/* --- phases ---------------------------------------------------------------------------------- */

/* Whole characters of the current phase. */
static enum status add_text(stream *s, const char *text, size_t n) {
    if (s->options.raw)
        return s->thinking ? add_answer_unmatched(s, text, n) : add_answer(s, text, n);
    if (!s->text_started && (s->thinking || s->drop_newlines)) {
        while (n > 0 && is_newline(*text)) {
            text++;
            n--;
        }
    }
    if (n == 0) return STATUS_OK;
    s->text_started = true;
    if (!s->thinking) return add_answer(s, text, n);
    size_t end = n;
    while (end > 0 && is_newline(text[end - 1])) end--;
    if (end > 0) {
        TRY(text_add(&s->thinking_text, s->newlines.bytes, s->newlines.n));
        TRY(text_add(&s->thinking_text, text, end));
        s->newlines.n = 0;
    }
    return text_add(&s->newlines, text + end, n - end);
}

static enum status add_piece(stream *s, const char *bytes, size_t n) {
    s->decoded.n = 0;
    TRY(text_add(&s->decoded, s->partial, (size_t)s->partial_n));
    TRY(text_add(&s->decoded, bytes, n));
    s->partial_n = 0;
    /* A character that may still be finished is always the last unit: look back at most 3 bytes. */
    size_t begin = s->decoded.n;
    for (size_t back = 1; back <= 3 && back <= s->decoded.n; back++) {
        const struct utf8_unit u = utf8_next(s->decoded.bytes + s->decoded.n - back, back);
        if (u.kind == UTF8_PARTIAL) begin = s->decoded.n - back;
        if (u.kind != UTF8_BROKEN) break;
    }
    s->partial_n = (int)(s->decoded.n - begin);
    if (s->partial_n > 0) memcpy(s->partial, s->decoded.bytes + begin, (size_t)s->partial_n);
    if (utf8_valid_bytes(s->decoded.bytes, begin) == begin)
        return add_text(s, s->decoded.bytes, begin);
    struct text_buffer lossy = {0};
    enum status status = text_add_lossy(&lossy, s->decoded.bytes, begin);
    if (status == STATUS_OK) status = add_text(s, lossy.bytes, lossy.n);
    free(lossy.bytes);
    return status;
}

/* Everything that waited for more of this phase is decided now. */
static enum status end_phase(stream *s) {
    if (s->partial_n > 0) TRY(add_text(s, "\xEF\xBF\xBD", 3));
    s->partial_n = 0;
    if (s->stopped_by >= 0) return STATUS_OK;
    s->newlines.n = 0;
    s->answer_visible = s->answer_text.n;
    for (int k = 0; k < s->options.stop_count; k++) s->stops[k].state = 0;
    s->text_started = false;
    return STATUS_OK;
}

/* --- the interface --------------------------------------------------------------------------- */

enum status stream_open(const tokenizer *t, const struct stream_options *options, stream **out) {
    *out = NULL;
    if (options->stop_count < 0 || options->stop_count > STREAM_STOP_COUNT_MAX)
        return fail_param(STATUS_REQUEST, "stop", "invalid_value",
                          "%d stop strings, at most %d are allowed", options->stop_count,
                          STREAM_STOP_COUNT_MAX);
    stream *s = calloc(1, sizeof *s);
    if (s == NULL) return fail(STATUS_MEMORY, "no memory for a reply's text");
    s->t = t;
    s->options = *options;
    s->stopped_by = -1;
    if (options->stop_count > 0) s->stops = calloc((size_t)options->stop_count, sizeof *s->stops);
    if (options->stop_count > 0 && s->stops == NULL) {
        stream_close(s);
        return fail(STATUS_MEMORY, "no memory for stop strings");
    }
    for (int k = 0; k < options->stop_count; k++) {
        const enum status status = stop_init(&s->stops[k], options->stops[k], k);
        if (status == STATUS_OK) continue;
        stream_close(s);
        return status;
    }
    *out = s;
    return STATUS_OK;
}

void stream_close(stream *s) {
    if (s == NULL) return;
    free(s->stops);
    free(s->newlines.bytes);
    free(s->decoded.bytes);
    free(s->thinking_text.bytes);
    free(s->answer_text.bytes);
    free(s);
}

/* Forgets what the last delta showed. */
static void begin_delta(stream *s) {
    s->thinking_text.n = 0;
    s->answer_text.n -= s->answer_visible;
    if (s->answer_visible > 0)
        memmove(s->answer_text.bytes, s->answer_text.bytes + s->answer_visible, s->answer_text.n);
    s->answer_visible = 0;
}

static void show_delta(const stream *s, struct stream_delta *out) {
    *out = (struct stream_delta){
        .thinking = s->thinking_text.n > 0 ? s->thinking_text.bytes : "",
        .thinking_n = s->thinking_text.n,
        .answer = s->answer_visible > 0 ? s->answer_text.bytes : "",
        .answer_n = s->answer_visible,
        .stopped = s->stopped_by >= 0,
        .stop_index = s->stopped_by,
    };
}

static enum status push(stream *s, uint32_t id, bool thinking, bool marker) {
    if (marker || thinking != s->thinking) {
        TRY(end_phase(s));
        if (s->thinking && !thinking) s->drop_newlines = true;
        s->thinking = thinking;
        if (s->stopped_by >= 0) return STATUS_OK;
    }
    const struct tokenizer_string piece = tokenizer_piece(s->t, id);
    if (marker) {
        /* The closing step counts as thinking, the opening one does not (soft-thinking.md §4.10).
         */
        if (thinking) s->drop_newlines = true;
        return s->options.raw ? add_answer_unmatched(s, piece.bytes, piece.n) : STATUS_OK;
    }
    if (s->options.skip_special && tokenizer_is_special(s->t, id)) return STATUS_OK;
    return add_piece(s, piece.bytes, piece.n);
}

enum status stream_push(stream *s, uint32_t id, bool thinking, bool marker,
                        struct stream_delta *out) {
    ASSERT(s->stopped_by < 0);
    begin_delta(s);
    TRY(push(s, id, thinking, marker));
    show_delta(s, out);
    return STATUS_OK;
}

enum status stream_finish(stream *s, struct stream_delta *out) {
    begin_delta(s);
    if (s->stopped_by < 0) TRY(end_phase(s));
    show_delta(s, out);
    return STATUS_OK;
}
