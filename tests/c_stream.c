/* The text of a growing reply (serving.md §4.2, rules 3-6) against a slow and simple version of the
 * same rules that sees the whole reply at once. */
#include "c_text.h"
#include "text/stream.h"
#include "text/utf8.h"

static tokenizer *small, *qwen;

int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    small = text_open(TEXT_SMALL);
    qwen = text_open(1);
    return small == NULL || qwen == NULL;
}

void suite_teardown(void) {
    tokenizer_close(small);
    tokenizer_close(qwen);
}

struct step {
    uint32_t id;
    bool thinking, marker;
};

struct reply {
    struct text_buffer thinking, answer;
    int stop_index, steps_used;
};

static void free_reply(struct reply *r) {
    free(r->thinking.bytes);
    free(r->answer.bytes);
}

/* --- the simple version ---------------------------------------------------------------------- */

static bool is_newline(char c) { return c == '\n' || c == '\r'; }

static void trim(struct text_buffer *b, bool left, bool right) {
    while (right && b->n > 0 && is_newline(b->bytes[b->n - 1])) b->n--;
    size_t skip = 0;
    while (left && skip < b->n && is_newline(b->bytes[skip])) skip++;
    if (skip > 0) memmove(b->bytes, b->bytes + skip, b->n - skip);
    b->n -= skip;
}

/* The end of the stop that is complete first (the longest of those), looking only inside [from, n).
 */
static bool find_stop(const struct stream_options *o, const struct text_buffer *b, size_t from,
                      size_t *end, int *index) {
    for (size_t e = from + 1; e <= b->n; e++) {
        size_t best = 0;
        for (int k = 0; k < o->stop_count; k++) {
            const size_t n = strlen(o->stops[k]);
            if (n <= e - from && n > best && memcmp(b->bytes + e - n, o->stops[k], n) == 0) {
                best = n;
                *index = k;
            }
        }
        *end = e;
        if (best > 0) return true;
    }
    return false;
}

static struct reply simple_reply(const tokenizer *t, const struct stream_options *o,
                                 const struct step *steps, int count) {
    struct reply r = {.stop_index = -1, .steps_used = count};
    bool after_thinking = false;
    for (int i = 0; i < count && r.stop_index < 0;) {
        if (steps[i].marker) {
            const struct tokenizer_string piece = tokenizer_piece(t, steps[i].id);
            if (o->raw) text_add(&r.answer, piece.bytes, piece.n);
            if (steps[i].thinking) after_thinking = true;
            i++;
            continue;
        }
        /* one segment: steps of one phase up to a marker */
        const bool thinking = steps[i].thinking;
        struct text_buffer bytes = {0}, text = {0};
        for (; i < count && !steps[i].marker && steps[i].thinking == thinking; i++) {
            if (o->skip_special && tokenizer_is_special(t, steps[i].id)) continue;
            const struct tokenizer_string piece = tokenizer_piece(t, steps[i].id);
            text_add(&bytes, piece.bytes, piece.n);
        }
        text_add_lossy(&text, bytes.bytes, bytes.n);
        if (!o->raw) trim(&text, thinking || after_thinking, thinking);
        struct text_buffer *to = thinking && !o->raw ? &r.thinking : &r.answer;
        const size_t from = to->n;
        text_add(to, text.bytes, text.n);
        size_t end;
        if (!thinking && find_stop(o, &r.answer, from, &end, &r.stop_index))
            r.answer.n = o->include_stop ? end : end - strlen(o->stops[r.stop_index]);
        if (thinking) after_thinking = true;
        free(bytes.bytes);
        free(text.bytes);
    }
    return r;
}

/* --- the stream ------------------------------------------------------------------------------ */

/* Is every delta whole characters? Is nothing shown that a stop could still take back? */
static void take_delta(struct reply *r, const struct stream_delta *d) {
    CHECK_EQ(utf8_valid_bytes(d->thinking, d->thinking_n), d->thinking_n);
    CHECK_EQ(utf8_valid_bytes(d->answer, d->answer_n), d->answer_n);
    text_add(&r->thinking, d->thinking, d->thinking_n);
    text_add(&r->answer, d->answer, d->answer_n);
    if (d->stopped) r->stop_index = d->stop_index;
}

static struct reply streamed_reply(const tokenizer *t, const struct stream_options *o,
                                   const struct step *steps, int count) {
    struct reply r = {.stop_index = -1};
    stream *s = NULL;
    struct stream_delta d = {0};
    CHECK_EQ(stream_open(t, o, &s), STATUS_OK);
    for (int i = 0; i < count && !d.stopped; i++) {
        CHECK_EQ(stream_push(s, steps[i].id, steps[i].thinking, steps[i].marker, &d), STATUS_OK);
        take_delta(&r, &d);
        r.steps_used++;
    }
    CHECK_EQ(stream_finish(s, &d), STATUS_OK);
    take_delta(&r, &d);
    stream_close(s);
    return r;
}

static void check_text(const char *what, const struct text_buffer *got, const char *want,
                       size_t n) {
    const bool same = got->n == n && (n == 0 || memcmp(got->bytes, want, n) == 0);
    if (!same)
        printf("\n    %s: \"%.*s\", want \"%.*s\"\n", what, (int)got->n, got->bytes, (int)n, want);
    CU_ASSERT(same);
}

/* --- by hand --------------------------------------------------------------------------------- */

/* Text as ids of the small tokenizer; "<think>" and "</think>" become markers that change the
 * phase. */
static int make_steps(const char *text, bool thinking, struct step *steps) {
    uint32_t *ids = NULL;
    size_t count = 0;
    CHECK_EQ(tokenizer_encode(small, text, strlen(text), false, &ids, &count), STATUS_OK);
    const int open = tokenizer_find(small, "<think>"), close = tokenizer_find(small, "</think>");
    for (size_t i = 0; i < count; i++) {
        const bool marker = (int)ids[i] == open || (int)ids[i] == close;
        steps[i] = (struct step){ids[i], thinking, marker};
        if ((int)ids[i] == open) thinking = true;
        if ((int)ids[i] == close) thinking = false;
    }
    free(ids);
    return (int)count;
}

static void check_reply(const char *text, bool thinking, const struct stream_options *o,
                        const char *want_thinking, const char *want_answer, int want_stop) {
    struct step steps[256];
    const int count = make_steps(text, thinking, steps);
    struct reply r = streamed_reply(small, o, steps, count);
    check_text("thinking", &r.thinking, want_thinking, strlen(want_thinking));
    check_text("answer", &r.answer, want_answer, strlen(want_answer));
    CHECK_EQ(r.stop_index, want_stop);
    free_reply(&r);
}

static void test_phases(void) {
    const struct stream_options plain = {.skip_special = true},
                                raw = {.raw = true, .skip_special = true};
    check_reply("\n1+2=3\n\nso 3\r\n</think>\n\n It is 3.\n", true, &plain, "1+2=3\n\nso 3",
                " It is 3.\n", -1);
    check_reply("\nHm.<think>\n\na\n</think>b", false, &plain, "a", "\nHm.b", -1);
    check_reply("</think>\n\n\nb\n\n", true, &plain, "", "b\n\n", -1);
    check_reply("\n\n", true, &plain, "", "", -1);
    check_reply("\n\nb", false, &plain, "", "\n\nb", -1);
    check_reply("a<|end|>b", false, &plain, "", "ab", -1);
    check_reply("\na\n</think>\n\nb\n", true, &raw, "", "\na\n</think>\n\nb\n", -1);
    const struct stream_options special = {0};
    check_reply("a<|end|>b", false, &special, "", "a<|end|>b", -1);
    /* the close marker's text out of ordinary tokens is ordinary text */
    struct step steps[16];
    const int count = make_steps("< /think>", true, steps);
    struct reply r = streamed_reply(small, &plain, steps, count);
    check_text("thinking", &r.thinking, "< /think>", 9);
    free_reply(&r);
}

static void test_stops(void) {
    const char *const stops[] = {"END", "b\nc", "\n\n"};
    struct stream_options o = {.stops = stops, .stop_count = 3, .skip_special = true};
    check_reply("one ENd two END three", false, &o, "", "one ENd two ", 0);
    check_reply("ab\n", false, &o, "", "ab\n", -1);
    check_reply("ab\ncd", false, &o, "", "a", 1);
    check_reply("END\n\n</think>\n\nx END", true, &o, "END", "x ",
                0); /* not in the thinking, not in dropped newlines */
    o.include_stop = true;
    check_reply("ab\ncd", false, &o, "", "ab\nc", 1);
    const char *const nested[] = {"b", "abc", "aaab"};
    o = (struct stream_options){.stops = nested, .stop_count = 3};
    check_reply("xabc", false, &o, "", "xa", 0);   /* complete first */
    check_reply("aaaaab", false, &o, "", "aa", 2); /* the longest of those that end together */
    const char *const bars[] = {"\xE2\x94\x82"};   /* part of another character must not match */
    o = (struct stream_options){.stops = bars, .stop_count = 1};
    check_reply("\xE2\x94\x80\xE2\x94\x82z", false, &o, "", "\xE2\x94\x80", 0);
    /* in raw text only the answer counts */
    const char *const q[] = {"q"};
    o = (struct stream_options){.stops = q, .stop_count = 1, .raw = true};
    check_reply("q1</think>2q3", true, &o, "", "q1</think>2", 0);
}

/* What is shown at once, and what waits. */
static void test_held_back(void) {
    const char *const stops[] = {"\nstop"};
    const struct stream_options o = {.stops = stops, .stop_count = 1};
    struct stream_delta d;
    stream *s = NULL;
    struct step steps[64];
    const int count = make_steps("a\xF0\x9F\x98\x80\n", false, steps); /* the face is four tokens */
    CHECK_EQ(stream_open(small, &o, &s), STATUS_OK);
    size_t shown = 0;
    for (int i = 0; i < count; i++) {
        CHECK_EQ(stream_push(s, steps[i].id, false, false, &d), STATUS_OK);
        shown += d.answer_n;
        CU_ASSERT(d.answer_n == 0 || d.answer_n == 1 || d.answer_n == 4);
    }
    CHECK_EQ(shown, 5); /* the newline may begin the stop */
    CHECK_EQ(stream_finish(s, &d), STATUS_OK);
    CHECK_EQ(d.answer_n, 1);
    stream_close(s);
}

static void test_options(void) {
    stream *s = NULL;
    char longer[STREAM_STOP_BYTES_MAX + 2];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    const char *empty[] = {""}, *too_long[] = {longer}, *broken[] = {"\xC3"};
    struct stream_options o = {.stops = empty, .stop_count = 1};
    CHECK_EQ(stream_open(small, &o, &s), STATUS_REQUEST);
    CHECK_STR(fail_last()->param, "stop");
    o.stops = too_long;
    CHECK_EQ(stream_open(small, &o, &s), STATUS_REQUEST);
    o.stops = broken;
    CHECK_EQ(stream_open(small, &o, &s), STATUS_REQUEST);
    o.stop_count = STREAM_STOP_COUNT_MAX + 1;
    CHECK_EQ(stream_open(small, &o, &s), STATUS_REQUEST);
    longer[STREAM_STOP_BYTES_MAX] = '\0';
    o = (struct stream_options){.stops = too_long, .stop_count = 1};
    CHECK_EQ(stream_open(small, &o, &s), STATUS_OK);
    stream_close(s);
}

/* --- fuzz: 1,000 random sequences of ids ----------------------------------------------------- */

static void fuzz_one(uint64_t seed) {
    enum { STEPS_MAX = 80 };
    static const char *const pool[] = {"\n", "a",        "the",          "<think>", " an", "\n\n",
                                       "0",  "\xC3\xA9", "\xEF\xBF\xBD", "e",       "  ",  "aa",
                                       "\r", "12",       "x\n",          "So",      "\xEF"};
    struct step steps[STEPS_MAX];
    uint32_t draw = 0;
    const tokenizer *t = seed % 2 == 0 ? small : qwen;
    const uint32_t vocab = (uint32_t)tokenizer_vocab_count(t);
    const int count = (int)(suite_random(seed, draw++) % STEPS_MAX);
    bool thinking = suite_random(seed, draw++) % 2 == 0;
    uint32_t newline[2] = {(uint32_t)tokenizer_find(t, "\xC4\x8A"),
                           (uint32_t)tokenizer_find(t, "\xC4\x8D")};
    for (int i = 0; i < count; i++) {
        const uint32_t kind = suite_random(seed, draw++) % 16;
        uint32_t id = suite_random(seed, draw++) % (vocab + 5); /* some are unknown */
        if (kind < 4) id = newline[kind % 2];
        if (kind >= 4 && kind < 10)
            id = 7 + suite_random(seed, draw++) % 256; /* single bytes, mostly */
        const bool marker = kind == 10;
        if (marker) id = (uint32_t)tokenizer_find(t, thinking ? "</think>" : "<think>");
        steps[i] = (struct step){id, thinking, marker};
        if (marker || kind == 11) thinking = !thinking; /* 11: a budget without a marker */
    }
    const char *stops[3];
    struct stream_options o = {.stops = stops, .stop_count = (int)(suite_random(seed, draw++) % 4)};
    for (int k = 0; k < o.stop_count;) {
        const char *stop = pool[suite_random(seed, draw++) % (sizeof pool / sizeof *pool)];
        if (utf8_valid_bytes(stop, strlen(stop)) == strlen(stop)) stops[k++] = stop;
    }
    o.include_stop = suite_random(seed, draw++) % 2;
    o.skip_special = suite_random(seed, draw++) % 2;
    o.raw = suite_random(seed, draw++) % 4 == 0;
    struct reply got = streamed_reply(t, &o, steps, count),
                 want = simple_reply(t, &o, steps, count);
    check_text("thinking", &got.thinking, want.thinking.bytes, want.thinking.n);
    check_text("answer", &got.answer, want.answer.bytes, want.answer.n);
    if (got.stop_index >= 0 && want.stop_index >= 0) /* equal stops may be listed twice */
        CHECK_STR(o.stops[got.stop_index], o.stops[want.stop_index]);
    else
        CHECK_EQ(got.stop_index, want.stop_index);
    free_reply(&got);
    free_reply(&want);
}

static void test_fuzz(void) {
    for (uint64_t seed = 0; seed < 1000; seed++) fuzz_one(seed);
}

/* Without stops and phases a streamed reply is exactly what decode gives (tested against Hugging
 * Face). */
static void test_same_as_decode(void) {
    for (uint64_t seed = 5000; seed < 5200; seed++) {
        struct step steps[60];
        uint32_t ids[60];
        for (uint32_t i = 0; i < 60; i++) {
            ids[i] = suite_random(seed, i) % (uint32_t)tokenizer_vocab_count(qwen);
            steps[i] = (struct step){ids[i], false, false};
        }
        const struct stream_options o = {.skip_special = seed % 2};
        char *text;
        size_t n;
        CHECK_EQ(tokenizer_decode(qwen, ids, 60, seed % 2, &text, &n), STATUS_OK);
        struct reply r = streamed_reply(qwen, &o, steps, 60);
        check_text("answer", &r.answer, text, n);
        free_reply(&r);
        free(text);
    }
}

const struct suite_case suite_cases[] = {
    {"phases, newlines, special ids, raw text", test_phases},
    {"stop strings", test_stops},
    {"what is held back and what is not", test_held_back},
    {"stop strings that are refused", test_options},
    {"streamed = decoded at once", test_same_as_decode},
    {"1,000 random replies = the simple version of the rules", test_fuzz},
    {NULL, NULL},
};
