/* Text <-> ids. Expected values: Hugging Face tokenizers (tests/data/golden, made by
 * tests/reference), the Unicode standard's example of broken UTF-8, and the examples in the
 * documentation of `tokenizers`. */
#include <pthread.h>
#include <time.h>

#include "c_text.h"
#include "text/added.h"
#include "text/pretokenize.h"
#include "text/regex.h"
#include "text/tokenizer_build.h"
#include "text/utf8.h"

static tokenizer *tokenizers[TEXT_TOKENIZER_COUNT];

int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++) {
        tokenizers[i] = text_open(i);
        if (tokenizers[i] == NULL) return 1;
    }
    return 0;
}

void suite_teardown(void) {
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++) tokenizer_close(tokenizers[i]);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t); /* not the clock: other jobs may be running */
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* --- UTF-8 and the byte-level alphabet ------------------------------------------------------- */

static void check_lossy(const char *bytes, size_t n, const char *want) {
    struct text_buffer b = {0};
    char *text = NULL;
    size_t text_n = 0;
    CHECK_EQ(text_add_lossy(&b, bytes, n), STATUS_OK);
    CHECK_EQ(text_finish(&b, &text, &text_n), STATUS_OK);
    CHECK_STR(text, want);
    free(text);
}

#define FFFD "\xEF\xBF\xBD"
static void test_utf8(void) {
    /* Unicode 15, table 3-8: 61 F1 80 80 E1 80 C2 62 80 63 80 BF 64 */
    check_lossy("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64", 13,
                "a" FFFD FFFD FFFD "b" FFFD "c" FFFD FFFD "d");
    /* tables 3-9, 3-10, 3-11: overlong forms, surrogates, out of range: a replacement a byte */
    check_lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", 9,
                FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    check_lossy("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", 9,
                FFFD FFFD FFFD FFFD FFFD FFFD FFFD FFFD "A");
    check_lossy("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", 9,
                FFFD FFFD FFFD FFFD FFFD "A" FFFD FFFD "B");
    check_lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", 9, FFFD FFFD FFFD FFFD "A");
    CHECK_EQ(utf8_next("\xF0\x9F\x98", 3).kind, UTF8_PARTIAL);
    CHECK_EQ(utf8_next("\xF0\x9F\x98", 3).n, 3);
    CHECK_EQ(utf8_next("\xE0\x80", 2).kind, UTF8_BROKEN);
    CHECK_EQ(utf8_next("\xF0\x9F\x98\x80", 4).code, 0x1F600);
    CHECK_EQ(utf8_valid_bytes("ab\xC3\xA9\xC3", 5), 4);
    /* every character comes back */
    for (uint32_t code = 0; code <= 0x10FFFF; code++) {
        if (code >= 0xD800 && code <= 0xDFFF) continue;
        char text[4];
        const int n = utf8_put(code, text);
        const struct utf8_unit u = utf8_next(text, (size_t)n);
        if (u.kind != UTF8_CHARACTER || u.n != n || u.code != code) {
            CHECK_EQ(u.code, code);
            break;
        }
    }
}

static void test_alphabet(void) {
    /* GPT-2: a space is U+0120, a newline U+010A, a soft hyphen U+0143, DEL U+0121, NUL U+0100 */
    CHECK_EQ(utf8_byte_to_alphabet(' '), 0x120);
    CHECK_EQ(utf8_byte_to_alphabet('\n'), 0x10A);
    CHECK_EQ(utf8_byte_to_alphabet(0xAD), 0x143);
    CHECK_EQ(utf8_byte_to_alphabet(0x7F), 0x121);
    CHECK_EQ(utf8_byte_to_alphabet(0), 0x100);
    CHECK_EQ(utf8_byte_to_alphabet('a'), 'a');
    int count = 0;
    for (uint32_t code = 0; code < 0x400; code++) {
        const int byte = utf8_byte_of_alphabet(code);
        if (byte < 0) continue;
        CHECK_EQ(utf8_byte_to_alphabet((uint8_t)byte), code);
        count++;
    }
    CHECK_EQ(count, 256);
}

/* --- splitting and added tokens: the documentation's examples -------------------------------- */

struct pieces {
    char text[256];
};

static enum status join_piece(void *context, const char *piece, size_t n) {
    struct pieces *p = context;
    const size_t at = strlen(p->text);
    snprintf(p->text + at, sizeof p->text - at, "%.*s/", (int)n, piece);
    return STATUS_OK;
}

static void check_split(enum split_behavior behavior, const char *want) {
    pretokenizer *p = NULL;
    pretokenize_scratch *s = NULL;
    struct pieces pieces = {{0}};
    struct regex_budget budget;
    regex_budget_init(&budget, 20);
    CHECK_EQ(pretokenizer_new(&p), STATUS_OK);
    CHECK_EQ(pretokenizer_add_split(p, "-", 1, true, behavior, false), STATUS_OK);
    CHECK_EQ(pretokenize_scratch_new(p, &budget, &s), STATUS_OK);
    CHECK_EQ(pretokenize_run(p, s, "the-final--countdown", 20, join_piece, &pieces), STATUS_OK);
    CHECK_STR(pieces.text, want);
    pretokenize_scratch_free(s);
    pretokenizer_free(p);
}

static void test_split(void) {
    check_split(SPLIT_ISOLATED, "the/-/final/-/-/countdown/");
    check_split(SPLIT_REMOVED, "the/final/countdown/");
    check_split(SPLIT_MERGED_WITH_PREVIOUS, "the-/final-/-/countdown/");
    check_split(SPLIT_MERGED_WITH_NEXT, "the/-final/-/-countdown/");
    check_split(SPLIT_CONTIGUOUS, "the/-/final/--/countdown/");
}

static void check_added(struct added_token token, const char *text, const char *want) {
    added *a = NULL;
    struct added_scan scan = {0};
    struct added_span span;
    char got[256] = "";
    CHECK_EQ(added_new(&a), STATUS_OK);
    CHECK_EQ(added_add(a, token), STATUS_OK);
    while (added_next(a, text, strlen(text), &scan, &span)) {
        const size_t at = strlen(got);
        snprintf(got + at, sizeof got - at, span.token_id < 0 ? "%.*s|" : "{%.*s}|",
                 (int)(span.end - span.begin), text + span.begin);
    }
    CHECK_STR(got, want);
    added_free(a);
}

static void test_added(void) {
    struct added_token mask = {"<mask>", 6, 7, .single_word = true};
    check_added(mask, "<mask> My name <mask> A<mask> <mask>ony <mask>",
                "{<mask>}| My name |{<mask>}| A<mask> <mask>ony |{<mask>}|");
    check_added(mask, "<mask>, <mask>- \xE2\x97\x8C\xCC\xB0<mask>",
                "{<mask>}|, |{<mask>}|- \xE2\x97\x8C\xCC\xB0<mask>|");
    /* U+1F130, a letter in a square, is one; U+1F14A, two letters in a square, is none */
    check_added(mask, "\xF0\x9F\x84\xB0<mask> \xF0\x9F\x85\x8A<mask>",
                "\xF0\x9F\x84\xB0<mask> \xF0\x9F\x85\x8A|{<mask>}|");
    mask.lstrip = mask.rstrip = true;
    check_added(mask, "Hi <mask> there\t<mask>\t<mask>\xE2\x80\x80",
                "Hi|{ <mask> }|there|{\t<mask>\t}|{<mask>\xE2\x80\x80}|");
    check_added((struct added_token){.text = "ab", .n = 2, .id = 1}, "", "");
    check_added((struct added_token){.text = "ab", .n = 2, .id = 1}, "abaab", "{ab}|a|{ab}|");
}

/* Tokens that are white space and take white space in, on nothing else: n tokens, in linear time. Every
 * look around one would otherwise go over the whole text. */
static void test_added_space(void) {
    enum { N = 100000 };
    added *a = NULL;
    struct added_scan scan = {0};
    struct added_span span;
    char *text = malloc(N);
    size_t count = 0;
    CU_ASSERT_PTR_NOT_NULL_FATAL(text);
    for (size_t i = 0; i < N; i++) text[i] = i % 3 ? ' ' : '\n';
    CHECK_EQ(added_new(&a), STATUS_OK);
    CHECK_EQ(added_add(a, (struct added_token){" ", 1, 1, .lstrip = true}), STATUS_OK);
    CHECK_EQ(added_add(a, (struct added_token){"\n", 1, 2, .lstrip = true, .rstrip = true}),
             STATUS_OK);
    const double start = seconds();
    while (added_next(a, text, N, &scan, &span)) count += span.token_id > 0;
    CHECK_EQ(count, N);
    CU_ASSERT(seconds() - start < 2);
    added_free(a);
    free(text);
}

/* --- golden vectors -------------------------------------------------------------------------- */

static void check_encode(const tokenizer *t, const char *what, const json_t *text, bool special,
                         const json_t *want) {
    uint32_t *ids = NULL;
    size_t count = 0;
    CHECK_EQ(tokenizer_encode(t, json_string_value(text), json_string_length(text), special, &ids,
                              &count),
             STATUS_OK);
    const bool same = text_same_ids(want, ids, count);
    if (!same) printf("\n    %s: other ids for \"%s\"\n", what, json_string_value(text));
    CU_ASSERT(same);
    free(ids);
}

static void check_decode(const tokenizer *t, const char *what, const json_t *ids, bool skip,
                         const json_t *want) {
    const size_t count = json_array_size(ids);
    uint32_t *list = calloc(count + 1, sizeof *list);
    for (size_t i = 0; i < count; i++)
        list[i] = (uint32_t)json_integer_value(json_array_get(ids, i));
    char *text = NULL;
    size_t n = 0;
    CHECK_EQ(tokenizer_decode(t, list, count, skip, &text, &n), STATUS_OK);
    const bool same =
        n == json_string_length(want) && memcmp(text, json_string_value(want), n) == 0;
    if (!same)
        printf("\n    %s: decoded \"%s\", want \"%s\"\n", what, text, json_string_value(want));
    CU_ASSERT(same);
    free(text);
    free(list);
}

static const char *get_text(const json_t *line, const char *name) {
    return json_string_value(json_object_get(line, name));
}

static void each_golden(const json_t *line) {
    const char *name = get_text(line, "tokenizer");
    const tokenizer *t = tokenizers[text_file_index(name)];
    check_encode(t, name, json_object_get(line, "text"),
                 json_is_true(json_object_get(line, "add_special")), json_object_get(line, "ids"));
    check_decode(t, name, json_object_get(line, "ids"), false, json_object_get(line, "decoded"));
}

static void each_decode(const json_t *line) {
    const char *name = get_text(line, "tokenizer");
    check_decode(tokenizers[text_file_index(name)], name, json_object_get(line, "ids"),
                 json_is_true(json_object_get(line, "skip_special")),
                 json_object_get(line, "decoded"));
}

static void test_golden(void) {
    const int lines = text_lines("tests/data/golden/tokenizer.jsonl", each_golden);
    CU_ASSERT(lines > 1000);
}

static void test_golden_decode(void) {
    const int lines = text_lines("tests/data/golden/decode.jsonl", each_decode);
    CU_ASSERT(lines > 100);
}

/* The small tokenizer.json with one variation applied, as tests/reference/make_tokenizer_options.py
 * does. */
static json_t *vary(const json_t *change) {
    size_t n;
    char *bytes = text_read(text_files[TEXT_SMALL].json, &n);
    json_error_t error;
    json_t *root = json_loadb(bytes, n, 0, &error), *model = json_object_get(root, "model");
    free(bytes);
    json_object_update(root, json_object_get(change, "set"));
    json_object_update(model, json_object_get(change, "model"));
    size_t i, k;
    json_t *drop, *merge, *entry;
    json_array_foreach(json_object_get(change, "drop"), i, drop) {
        const char *text = json_string_value(drop), *key;
        json_t *vocab = json_object_get(model, "vocab"), *merges = json_object_get(model, "merges"),
               *id;
        void *next;
        json_object_foreach_safe(vocab, next, key, id) {
            if (strstr(key, text) != NULL) json_object_del(vocab, key);
        }
        json_t *kept = json_array();
        json_array_foreach(merges, k, merge) {
            if (strstr(json_string_value(json_array_get(merge, 0)), text) == NULL &&
                strstr(json_string_value(json_array_get(merge, 1)), text) == NULL)
                json_array_append(kept, merge);
        }
        json_object_set_new(model, "merges", kept);
    }
    json_array_foreach(json_object_get(change, "add"), i, entry)
        json_array_append(json_object_get(root, "added_tokens"), entry);
    return root;
}

static enum status open_varied(const json_t *change, tokenizer **t) {
    json_t *root = vary(change);
    char *text = json_dumps(root, JSON_COMPACT);
    const enum status status = tokenizer_open_json(text, strlen(text), NULL, 0, t);
    free(text);
    json_decref(root);
    return status;
}

static void each_option(const json_t *line) {
    const char *name = get_text(line, "name");
    tokenizer *t = NULL;
    CHECK_EQ(open_varied(line, &t), STATUS_OK);
    if (t == NULL) {
        printf("\n    %s: %s\n", name, fail_text());
        return;
    }
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(line, "cases"), i, c) {
        check_encode(t, name, json_array_get(c, 0), false, json_array_get(c, 1));
        check_encode(t, name, json_array_get(c, 0), true, json_array_get(c, 2));
        check_decode(t, name, json_array_get(c, 1), false, json_array_get(c, 3));
    }
    tokenizer_close(t);
}

static void test_options(void) {
    const int lines = text_lines("tests/data/golden/tokenizer_options.jsonl", each_option);
    CU_ASSERT(lines > 50);
}

/* --- GGUF arrays: the same ids from vocabulary, merges and a pre-tokenizer's name ------------ */

static tokenizer *parts_tokenizer;

/* What a converter writes into a GGUF file for this tokenizer.json: also 100 padding tokens at the
 * end. */
static tokenizer *open_as_parts(int index, const char *pre, int bos, bool add_bos) {
    enum { PADDING = 100 };
    size_t n;
    char *bytes = text_read(text_files[index].json, &n);
    json_error_t error;
    json_t *root = json_loadb(bytes, n, 0, &error), *model = json_object_get(root, "model");
    json_t *merges = json_object_get(model, "merges"), *id, *item;
    free(bytes);
    const size_t used = (size_t)tokenizer_vocab_count(tokenizers[index]), count = used + PADDING;
    const size_t merge_count = json_array_size(merges);
    struct tokenizer_string *tokens = calloc(count, sizeof *tokens),
                            *pairs = calloc(merge_count, sizeof *pairs);
    int32_t *types = calloc(count, sizeof *types);
    char *joined = malloc(merge_count * 600);
    for (size_t i = used; i < count; i++) {
        tokens[i] = (struct tokenizer_string){"[PAD]", 5};
        types[i] = TOKEN_UNUSED;
    }
    const char *key;
    json_object_foreach(json_object_get(model, "vocab"), key, id) {
        tokens[json_integer_value(id)] = (struct tokenizer_string){key, strlen(key)};
        types[json_integer_value(id)] = TOKEN_NORMAL;
    }
    size_t i;
    json_array_foreach(json_object_get(root, "added_tokens"), i, item) {
        const json_t *content = json_object_get(item, "content");
        const size_t at = (size_t)json_integer_value(json_object_get(item, "id"));
        tokens[at] =
            (struct tokenizer_string){json_string_value(content), json_string_length(content)};
        types[at] = json_is_true(json_object_get(item, "special")) ? TOKEN_CONTROL : TOKEN_USER;
    }
    json_array_foreach(merges, i, item) {
        char *to = joined + i * 600;
        if (json_is_string(item))
            snprintf(to, 600, "%s", json_string_value(item));
        else
            snprintf(to, 600, "%s %s", json_string_value(json_array_get(item, 0)),
                     json_string_value(json_array_get(item, 1)));
        pairs[i] = (struct tokenizer_string){to, strlen(to)};
    }
    const struct tokenizer_parts parts = {
        .tokens = tokens,
        .token_types = types,
        .vocab_count = count,
        .merges = pairs,
        .merge_count = merge_count,
        .model = "gpt2",
        .pre = pre,
        .bos_id = bos,
        .eos_id = -1,
        .add_bos = add_bos,
    };
    tokenizer *t = NULL;
    CHECK_EQ(tokenizer_open_parts(&parts, &t), STATUS_OK);
    if (t != NULL) CHECK_EQ(tokenizer_vocab_count(t), used);
    free(tokens);
    free(pairs);
    free(types);
    free(joined);
    json_decref(root);
    return t;
}

/* 600 tokens of six digits, `count` of which start in slot 5 of a table of 2048 (bpe.c's hash, written
 * a second time). */
static enum status open_colliding(int count, tokenizer **t) {
    enum { VOCAB = 600 };
    static char texts[VOCAB][7];
    struct tokenizer_string tokens[VOCAB + 3] = {
        [VOCAB] = {"a", 1}, [VOCAB + 1] = {"b", 1}, [VOCAB + 2] = {"ab", 2}};
    const struct tokenizer_string merges[] = {{"a b", 3}};
    int alike = 0, others = 0;
    for (int number = 0; number < 1000000 && alike + others < VOCAB; number++) {
        char text[9] = "";
        uint64_t word;
        snprintf(text, sizeof text, "%06d", number);
        memcpy(&word, text, 8);
        word = (0x9E3779B97F4A7C15u ^ 6 ^ word) * 0xD6E8FEB86659FD93u;
        if (((word ^ word >> 32) & 2047) == 5) {
            if (alike == count) continue;
            alike++;
        } else if (others++ >= VOCAB - count) {
            others--;
            continue;
        }
        const int id = alike + others - 1;
        memcpy(texts[id], text, 7);
        tokens[id] = (struct tokenizer_string){texts[id], 6};
    }
    CHECK_EQ(alike + others, VOCAB);
    const struct tokenizer_parts p = {.tokens = tokens,
                                      .vocab_count = VOCAB + 3,
                                      .merges = merges,
                                      .merge_count = 1,
                                      .model = "gpt2",
                                      .pre = "gpt-2",
                                      .bos_id = -1,
                                      .eos_id = -1};
    const enum status status = tokenizer_open_parts(&p, t);
    for (int id = 0; status == STATUS_OK && id < VOCAB; id++)
        if (tokenizer_find(*t, texts[id]) != id) CHECK_EQ(tokenizer_find(*t, texts[id]), id);
    return status;
}

static void test_collisions(void) {
    tokenizer *t = NULL;
    CHECK_EQ(open_colliding(150, &t), STATUS_OK);
    tokenizer_close(t);
    CHECK_EQ(open_colliding(300, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "one place") != NULL);
}

/* The text of ids has a limit as the text of a request has one: a piece may be long. */
static void test_decode_limit(void) {
    enum { MIB = 1 << 20 };
    char *piece = malloc(MIB), *text = NULL;
    CU_ASSERT_PTR_NOT_NULL_FATAL(piece);
    memset(piece, 'x', MIB);
    const struct tokenizer_string tokens[] = {{"a", 1}, {"b", 1}, {"ab", 2}, {piece, MIB}};
    const struct tokenizer_string merges[] = {{"a b", 3}};
    const struct tokenizer_parts p = {.tokens = tokens,
                                      .vocab_count = 4,
                                      .merges = merges,
                                      .merge_count = 1,
                                      .model = "gpt2",
                                      .pre = "gpt-2",
                                      .bos_id = -1,
                                      .eos_id = -1};
    tokenizer *t = NULL;
    uint32_t ids[65];
    size_t n = 0;
    for (int i = 0; i < 65; i++) ids[i] = i == 64 ? 0 : 3;
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_OK);
    CHECK_EQ(tokenizer_decode(t, ids, 64, false, &text, &n), STATUS_OK);
    CHECK_EQ(n, TOKENIZER_TEXT_BYTES_MAX);
    free(text);
    CHECK_EQ(tokenizer_decode(t, ids, 65, false, &text, &n), STATUS_REQUEST);
    CU_ASSERT(text == NULL);
    tokenizer_close(t);
    free(piece);
}

static const char *parts_name;
static void each_parts(const json_t *line) {
    if (strcmp(get_text(line, "tokenizer"), parts_name) != 0) return;
    check_encode(parts_tokenizer, "parts", json_object_get(line, "text"),
                 json_is_true(json_object_get(line, "add_special")), json_object_get(line, "ids"));
    check_decode(parts_tokenizer, "parts", json_object_get(line, "ids"), false,
                 json_object_get(line, "decoded"));
}

static void test_parts(void) {
    static const struct {
        const char *name, *pre;
        int bos;
    } cases[] = {{"llama3_1", "llama-bpe", 128000}, {"qwen3", "qwen2", -1}};
    for (int i = 0; i < 2; i++) {
        parts_name = cases[i].name;
        parts_tokenizer = open_as_parts(text_file_index(parts_name), cases[i].pre, cases[i].bos,
                                        cases[i].bos >= 0);
        CU_ASSERT_PTR_NOT_NULL_FATAL(parts_tokenizer);
        CHECK_EQ(tokenizer_bos(parts_tokenizer), cases[i].bos);
        text_lines("tests/data/golden/tokenizer.jsonl", each_parts);
        tokenizer_close(parts_tokenizer);
    }
}

static void test_parts_refused(void) {
    const struct tokenizer_string tokens[] = {{"a", 1}, {"b", 1}, {"ab", 2}};
    const struct tokenizer_string merges[] = {{"a b", 3}}, strange[] = {{"a c", 3}},
                                  single[] = {{"ab", 2}};
    struct tokenizer_parts p = {.tokens = tokens,
                                .vocab_count = 3,
                                .merges = merges,
                                .merge_count = 1,
                                .model = "gpt2",
                                .pre = "gpt-2",
                                .bos_id = 9,
                                .eos_id = -1,
                                .add_bos = true};
    tokenizer *t = NULL;
    uint32_t *ids;
    size_t count;
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_OK);
    CHECK_EQ(tokenizer_encode(t, "abba", 4, true, &ids, &count), STATUS_OK);
    CHECK_EQ(count, 3); /* ab, b, a; the begin token that is out of range is left out */
    CHECK_EQ(ids[0], 2);
    free(ids);
    tokenizer_close(t);
    p.merges = NULL;
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "merges is missing") != NULL);
    p.merges = strange;
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "merge 0") != NULL);
    p.merges = single;
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_MODEL);
    p.merges = merges;
    p.pre = "mystery";
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "mystery") != NULL);
    p.model = "llama";
    CHECK_EQ(tokenizer_open_parts(&p, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "\"llama\"") != NULL);
}

/* --- accessors, long pieces, bad input ------------------------------------------------------- */

static void test_accessors(void) {
    const tokenizer *qwen = tokenizers[1], *small = tokenizers[TEXT_SMALL], *llama = tokenizers[0];
    CHECK_EQ(tokenizer_vocab_count(qwen), 151669); /* not the 151936 rows of the matrix */
    CHECK_EQ(tokenizer_vocab_count(llama), 128256);
    CHECK_EQ(tokenizer_find(qwen, "<think>"), 151667);
    CHECK_EQ(tokenizer_find(qwen, "</think>"), 151668);
    CHECK_EQ(tokenizer_find(qwen, "Hello"), 9707);
    CHECK_EQ(tokenizer_find(qwen, "no such token"), -1);
    CHECK_EQ(tokenizer_find(qwen, ""), -1);
    CHECK_EQ(tokenizer_bos(qwen), -1);
    CHECK_EQ(tokenizer_eos(qwen), 151645);
    CHECK_EQ(tokenizer_bos(llama), 128000);
    CHECK_EQ(tokenizer_bos(small), 0);
    CU_ASSERT(!tokenizer_is_special(qwen, 151667));
    CU_ASSERT(tokenizer_is_special(qwen, 151645));
    CU_ASSERT(!tokenizer_is_special(qwen, 4000000000u));
    CHECK_EQ(tokenizer_piece(qwen, 4000000000u).n, 0);
    CHECK_EQ(tokenizer_piece(qwen, 151668).n, 8);
    CHECK_EQ(tokenizer_piece(llama, 9906).n, 5);
    CHECK_EQ(tokenizer_piece(llama, 22691).bytes[0], ' ');
}

/* tokenizer_config.json: begin and end as text or as objects; added tokens that tokenizer.json
 * lacks. */
static void test_config(void) {
    static const char config[] =
        "{\"model_max_length\":1000000000000000019884624838656,\"bos_token\":{\"content\":\"<|user|"
        ">\"},"
        "\"eos_token\":\"<new>\",\"added_tokens_decoder\":{\"4\":{\"content\":\"<think>\","
        "\"special\":true},\"3\":{\"content\":\"<|end|>\",\"lstrip\":true,\"special\":false},"
        "\"768\":{\"content\":\"<new>\",\"special\":true,\"normalized\":false}}}";
    size_t n;
    char *json = text_read(text_files[TEXT_SMALL].json, &n);
    tokenizer *t = NULL;
    uint32_t *ids;
    size_t count;
    CHECK_EQ(tokenizer_open_json(json, n, config, sizeof config - 1, &t), STATUS_OK);
    CHECK_EQ(tokenizer_bos(t), 1);
    CHECK_EQ(tokenizer_eos(t), 768);
    CHECK_EQ(tokenizer_vocab_count(t), 769);
    CU_ASSERT(tokenizer_is_special(t, 768));
    CHECK_EQ(tokenizer_encode(t, "a<new><think>", 13, false, &ids, &count), STATUS_OK);
    CHECK_EQ(count, 3);
    CHECK_EQ(ids[1], 768);
    CHECK_EQ(ids[2], 4);
    free(ids);
    CU_ASSERT(tokenizer_is_special(t, 3)); /* tokenizer.json said so first */
    CHECK_EQ(tokenizer_encode(t, "a <|end|>", 9, false, &ids, &count), STATUS_OK);
    CHECK_EQ(count, 2); /* the later lstrip counts */
    free(ids);
    tokenizer_close(t);
    CHECK_EQ(tokenizer_open_json(json, n, "{", 1, &t), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "tokenizer_config.json") != NULL);
    free(json);
}

/* Hugging Face's count and FNV-1a (over ids) of long texts that are one piece. */
static void test_long_pieces(void) {
    static const struct {
        int tokenizer;
        const char *unit;
        int repeat;
        const char *tail;
        size_t count;
        uint64_t hash;
    } cases[] = {
        {0, "a", 200000, "", 25000, 0x30f4a711697536a5},
        {0, " ", 200000, "x", 1564, 0x855d5b93778c9f36},
        {0, "ab", 100000, "", 100000, 0x9938cd5dd6ecd125},
        {0, "\n", 100001, "", 3126, 0xfe5ae3f31ee1e05c},
        {1, "a", 200000, "", 25000, 0x6ee619724d594045},
        {1, " ", 200000, "x", 1564, 0xd116063d44c50c13},
        {1, "\n", 100001, "", 3126, 0x8d1cc36491142380},
        {TEXT_SMALL, "a", 200000, "", 200000, 0x91fc8e17ec64825},
        {TEXT_SMALL, "\n", 100001, "", 50001, 0x2057a73316c5e9bb},
    };
    const double start = seconds();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct text_buffer text = {0};
        for (int k = 0; k < cases[i].repeat; k++)
            text_add(&text, cases[i].unit, strlen(cases[i].unit));
        text_add(&text, cases[i].tail, strlen(cases[i].tail));
        uint32_t *ids;
        size_t count;
        CHECK_EQ(tokenizer_encode(tokenizers[cases[i].tokenizer], text.bytes, text.n, false, &ids,
                                  &count),
                 STATUS_OK);
        uint64_t hash = 0xcbf29ce484222325;
        for (size_t k = 0; k < count; k++) hash = (hash ^ ids[k]) * 0x100000001b3;
        CHECK_EQ(count, cases[i].count);
        CU_ASSERT(hash == cases[i].hash);
        free(ids);
        free(text.bytes);
    }
    CU_ASSERT(seconds() - start < 15); /* about 1 s; a quadratic loop takes hours */
}

static void test_bad_text(void) {
    uint32_t *ids = NULL;
    size_t count = 0;
    CHECK_EQ(tokenizer_encode(tokenizers[1], "ok \xC3\x28", 5, false, &ids, &count),
             STATUS_REQUEST);
    CU_ASSERT(strstr(fail_text(), "byte 3") != NULL);
    CHECK_EQ(tokenizer_encode(tokenizers[1], "", (size_t)TOKENIZER_TEXT_BYTES_MAX + 1, false, &ids,
                              &count),
             STATUS_REQUEST);
    CHECK_EQ(tokenizer_encode(tokenizers[1], "a\0b", 3, false, &ids, &count), STATUS_OK);
    CHECK_EQ(count, 3);
    free(ids);
}

static enum status open_text(const char *json) {
    tokenizer *t = NULL;
    const enum status status = tokenizer_open_json(json, strlen(json), NULL, 0, &t);
    tokenizer_close(t);
    return status;
}

static void check_refused(const char *change, const char *named) {
    json_error_t error;
    json_t *c = json_loads(change, 0, &error);
    CU_ASSERT_PTR_NOT_NULL_FATAL(c);
    tokenizer *t = NULL;
    CHECK_EQ(open_varied(c, &t), STATUS_MODEL);
    if (strstr(fail_text(), named) == NULL)
        printf("\n    \"%s\" does not name %s\n", fail_text(), named);
    CU_ASSERT(t == NULL && strstr(fail_text(), named) != NULL);
    tokenizer_close(t);
    json_decref(c);
}

#define PRE(x) "{\"set\":{\"pre_tokenizer\":" x "}}"
#define SPLIT(x) \
    PRE("{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":\"" x "\"}}")
static void test_refused(void) {
    check_refused("{\"model\":{\"type\":\"Unigram\"}}", "Unigram");
    check_refused("{\"model\":{\"type\":\"WordPiece\"}}", "WordPiece");
    check_refused("{\"model\":{\"dropout\":0.1}}", "dropout");
    check_refused("{\"model\":{\"end_of_word_suffix\":\"</w>\"}}", "end_of_word_suffix");
    check_refused("{\"model\":{\"continuing_subword_prefix\":\"##\"}}",
                  "continuing_subword_prefix");
    check_refused("{\"model\":{\"merges\":[[\"a\",\"\xC3\xA9\"]]}}", "merge 0");
    check_refused("{\"model\":{\"merges\":[\"a b c\"]}}", "merge");
    check_refused("{\"model\":{\"merges\":3}}", "merges");
    check_refused("{\"model\":{\"vocab\":{\"a\":-1}}}", "id");
    check_refused("{\"model\":{\"vocab\":{\"a\":4294967295}}}", "id");
    check_refused("{\"model\":{\"vocab\":{\"a\":1,\"b\":1}}}", "two tokens");
    check_refused("{\"set\":{\"normalizer\":{\"type\":\"BertNormalizer\"}}}", "BertNormalizer");
    check_refused("{\"set\":{\"normalizer\":{\"type\":\"Precompiled\"}}}", "Precompiled");
    check_refused(PRE("{\"type\":\"Metaspace\"}"), "Metaspace");
    check_refused(PRE("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Whitespace\"}]}"),
                  "Whitespace");
    check_refused(PRE("{\"type\":\"Split\",\"behavior\":\"Odd\",\"pattern\":{\"String\":\"a\"}}"),
                  "Odd");
    check_refused(PRE("{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},"
                      "{\"type\":\"ByteLevel\"}]}"),
                  "two ByteLevel");
    check_refused(SPLIT("(a"), "compile");
    check_refused(SPLIT("[a&&b]"), "intersection");
    check_refused(SPLIT("[a[b]]"), "class inside");
    check_refused(SPLIT("a{1,2}+"), "{n,m}");
    check_refused(SPLIT("a{2}?"), "a ? behind {n}");
    check_refused(SPLIT("a{,}"), "no repeat count");
    check_refused(SPLIT("a(?i)b|c"), "(?i)");
    check_refused(SPLIT("(?:b|(?:)(?i)c)"), "(?i)");
    check_refused(SPLIT("(?m:a)"), "group");
    check_refused(SPLIT("\\\\bword"), "\\b");
    check_refused(SPLIT("\\\\p{Emoji}"), "Emoji");
    check_refused(SPLIT("(*UTF8)a"), "(*");
    check_refused("{\"set\":{\"post_processor\":{\"type\":\"BertProcessing\"}}}", "BertProcessing");
    check_refused("{\"set\":{\"decoder\":null}}", "decoder");
    check_refused("{\"set\":{\"decoder\":{\"type\":\"WordPiece\"}}}", "WordPiece");
    check_refused("{\"set\":{\"decoder\":{\"type\":\"Fuse\"}}}", "Fuse");
    check_refused(SPLIT("\\\\xe9"), "bytes");
    check_refused("{\"set\":{\"added_tokens\":[{\"id\":9}]}}", "content");
    CHECK_EQ(open_text("{"), STATUS_MODEL);
    CHECK_EQ(open_text("[]"), STATUS_MODEL);
    CHECK_EQ(open_text("{\"model\":{}}"), STATUS_MODEL);
    CHECK_EQ(open_text("{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}"), STATUS_MODEL);
}

/* x behind every `run` letters a. */
static void check_gives_up(const char *change, size_t n, size_t run, const char *named) {
    json_error_t error;
    json_t *c = json_loads(change, 0, &error);
    CU_ASSERT_PTR_NOT_NULL_FATAL(c);
    tokenizer *t = NULL;
    CHECK_EQ(open_varied(c, &t), STATUS_OK);
    char *text = malloc(n);
    for (size_t i = 0; i < n; i++) text[i] = i % (run + 1) == run ? 'x' : 'a';
    uint32_t *ids = NULL;
    size_t count = 0;
    const double start = seconds();
    CHECK_EQ(tokenizer_encode(t, text, n, false, &ids, &count), STATUS_REQUEST);
    CU_ASSERT(seconds() - start < 20);
    if (strstr(fail_text(), named) == NULL) printf("\n    \"%s\", not %s\n", fail_text(), named);
    CU_ASSERT(strstr(fail_text(), named) != NULL);
    free(text);
    tokenizer_close(t);
    json_decref(c);
}

/* Patterns that go on for ever give up, in time, as this request's failure: one that backtracks at its
 * first start, one that does so at every start but never too much, and one that only looks far ahead. */
static void test_hostile_pattern(void) {
    check_gives_up(SPLIT("(a+)+(?:b|c)"), 3000, 3000, "match limit");
    check_gives_up(SPLIT("a{0,1000}a{0,1000}a{0,1000}[bc]"), 100000, 150, "too long");
    check_gives_up(SPLIT("\\\\p{L}+\\\\p{N}"), 1000000, 1000000, "too long");
    check_gives_up(
        "{\"set\":{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":"
        "\"\\\\p{L}(?=\\\\p{L}*)\"},\"content\":\"b\"}}}",
        100000, 100000, "too long");
}

/* Characters with a mark at every distance, so that searches go on in the middle of one. */
static void test_far_matches(void) {
    regex *r = NULL;
    regex_match *m = NULL;
    struct regex_budget budget;
    char text[400];
    CHECK_EQ(regex_new("(?<=\xE2\x82\xAC)x|^y", 12, false, &r), STATUS_OK);
    regex_budget_init(&budget, sizeof text);
    CHECK_EQ(regex_match_new(r, &budget, &m), STATUS_OK);
    for (size_t k = 1; k < 130; k++) {
        size_t begin = 0, end = 0;
        bool found = false;
        for (size_t i = 0; i < k; i++) memcpy(text + 3 * i, "\xE2\x82\xAC", 3);
        memcpy(text + 3 * k, "xy", 2);
        CHECK_EQ(regex_next(r, m, text, 3 * k + 2, 0, SIZE_MAX, &found, &begin, &end), STATUS_OK);
        CU_ASSERT(found && begin == 3 * k && end == 3 * k + 1);
        CHECK_EQ(regex_next(r, m, text, 3 * k + 2, end, end, &found, &begin, &end), STATUS_OK);
        CU_ASSERT(!found);
    }
    regex_match_free(m);
    regex_free(r);
}

static void *encode_in_thread(void *sum) {
    static const char text[] = "Eight threads, one tokenizer: caf\xC3\xA9 <think> 12345";
    for (int i = 0; i < 200; i++) {
        uint32_t *ids;
        size_t count;
        if (tokenizer_encode(tokenizers[1], text, sizeof text - 1, true, &ids, &count) != STATUS_OK)
            break;
        for (size_t k = 0; k < count; k++) *(uint64_t *)sum = *(uint64_t *)sum * 31 + ids[k];
        free(ids);
    }
    return NULL;
}

static void test_threads(void) {
    pthread_t threads[8];
    uint64_t sums[8] = {0};
    for (int i = 0; i < 8; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, encode_in_thread, &sums[i]), 0);
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    for (int i = 1; i < 8; i++) CU_ASSERT(sums[i] == sums[0] && sums[0] != 0);
}

const struct suite_case suite_cases[] = {
    {"broken UTF-8 is replaced as the Unicode standard says", test_utf8},
    {"the byte-level alphabet is GPT-2's", test_alphabet},
    {"split behaviors: the documentation's examples", test_split},
    {"added tokens: single words, stripping", test_added},
    {"added tokens of white space in linear time", test_added_space},
    {"ids and text as Hugging Face tokenizers gives", test_golden},
    {"decoding of cut and invalid characters", test_golden_decode},
    {"decoding has a limit", test_decode_limit},
    {"tokens made to collide are refused", test_collisions},
    {"every option of tokenizer.json", test_options},
    {"the same ids from a GGUF file's arrays", test_parts},
    {"GGUF arrays that are refused", test_parts_refused},
    {"accessors", test_accessors},
    {"tokenizer_config.json", test_config},
    {"long pieces in n log n", test_long_pieces},
    {"bad text", test_bad_text},
    {"what is not supported is refused by name", test_refused},
    {"a hostile pattern gives up", test_hostile_pattern},
    {"a match behind many characters", test_far_matches},
    {"one tokenizer, eight threads", test_threads},
    {NULL, NULL},
};
