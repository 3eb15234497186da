/* Normal forms against utf8proc's own function on short random texts, and long runs of marks, which that
 * function orders in quadratic time, against what the standard says of them. */
#include <utf8proc.h>

#include "base/check.h"
#include "suite.h"
#include "text/normalize.h"
#include "text/regex.h"

static const struct {
    enum normal_form form;
    int options;
} forms[] = {
    {NORMAL_NFC, UTF8PROC_COMPOSE},
    {NORMAL_NFD, UTF8PROC_DECOMPOSE},
    {NORMAL_NFKC, UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
    {NORMAL_NFKD, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT},
};
enum { FORM_COUNT = 4 };

static normalizer *open_form(enum normal_form form) {
    normalizer *z = NULL;
    CU_ASSERT_EQUAL_FATAL(normalizer_new(&z), STATUS_OK);
    CU_ASSERT_EQUAL_FATAL(normalizer_add_form(z, form), STATUS_OK);
    return z;
}

/* Letters, marks of many classes, marks that are two, vowel signs of class 0 that are marks, jamo,
 * composed letters, a ligature of eighteen. */
static const utf8proc_int32_t alphabet[] = {
    'a',    'e',    'u',    0x2126, 0x301,  0x300,  0x316,   0x323,  0x327,  0x328,  0x302,
    0x345,  0x344,  0xF71,  0xF72,  0xF74,  0xF73,  0xF75,   0xF81,  0x1100, 0x1161, 0x11A8,
    0xAC00, 0xAC01, 0x1EBF, 0x1E69, 0xFDFA, 0xFB01, 0x1D15E, 0x5B0,  0x5B9,  0x3099, 0x304B,
    0x94D,  0x93C,  0x929,  0x340,  0x341,  0x2ADC, 0xFF21,  0x200D, 0x1F600};
enum { ALPHABET_COUNT = sizeof alphabet / sizeof *alphabet };

static void test_random(void) {
    uint64_t state = 7;
    struct text_buffer out = {0};
    normalizer *z[FORM_COUNT];
    for (int f = 0; f < FORM_COUNT; f++) z[f] = open_form(forms[f].form);
    for (int i = 0; i < 20000; i++) {
        utf8proc_uint8_t text[4 * 60];
        utf8proc_ssize_t n = 0;
        const int length = 1 + i % 59;
        for (int k = 0; k < length; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            n += utf8proc_encode_char(alphabet[(state >> 33) % ALPHABET_COUNT], text + n);
        }
        const int f = i % FORM_COUNT;
        utf8proc_uint8_t *want = NULL;
        const utf8proc_ssize_t want_n =
            utf8proc_map(text, n, &want, (utf8proc_option_t)(forms[f].options | UTF8PROC_STABLE));
        CU_ASSERT_FATAL(want_n > 0);
        CU_ASSERT_EQUAL(normalizer_run(z[f], (const char *)text, (size_t)n, NULL, &out), STATUS_OK);
        CU_ASSERT(out.n == (size_t)want_n && memcmp(out.bytes, want, out.n) == 0);
        free(want);
    }
    for (int f = 0; f < FORM_COUNT; f++) normalizer_free(z[f]);
    free(out.bytes);
}

/* a and N times (acute, below grave): the grave of class 220 comes first, then the acute of class 230,
 * the first of which joins the a. Exchanging neighbours would take N * N / 2 = 8e10 steps here. */
static void test_long_runs(void) {
    enum { N = 400000 };
    static const char acute[] = "\xCC\x81", grave[] = "\xCC\x96";
    char *text = malloc(1 + 4 * N), *want = malloc(2 + 4 * N);
    struct text_buffer out = {0};
    normalizer *z = open_form(NORMAL_NFC);
    CU_ASSERT_FATAL(text && want);
    text[0] = 'a';
    memcpy(want, "\xC3\xA1", 2);
    for (size_t i = 0; i < N; i++) {
        memcpy(text + 1 + 4 * i, acute, 2);
        memcpy(text + 3 + 4 * i, grave, 2);
        memcpy(want + 2 + 2 * i, grave, 2);
        if (i > 0) memcpy(want + 2 * (N + i), acute, 2);
    }
    CU_ASSERT_EQUAL(normalizer_run(z, text, 1 + 4 * N, NULL, &out), STATUS_OK);
    CHECK_EQ(out.n, 4 * N);
    CU_ASSERT(memcmp(out.bytes, want, 4 * N) == 0);
    CU_ASSERT_EQUAL(normalizer_run(z, "\xCC\x81\xFF", 3, NULL, &out), STATUS_REQUEST);
    normalizer_free(z);
    free(out.bytes);
    free(text);
    free(want);
}

/* One letter becomes a mebibyte: 64 of them are as much as a text may have. */
static void test_growth(void) {
    enum { MIB = 1 << 20 };
    char letters[65], *content = malloc(MIB);
    struct text_buffer out = {0};
    struct regex_budget budget;
    normalizer *z = NULL;
    CU_ASSERT_FATAL(content != NULL);
    memset(letters, 'a', sizeof letters);
    memset(content, 'b', MIB);
    CU_ASSERT_EQUAL_FATAL(normalizer_new(&z), STATUS_OK);
    CU_ASSERT_EQUAL(normalizer_add_replace(z, "a", 1, true, content, MIB), STATUS_OK);
    regex_budget_init(&budget, sizeof letters);
    CU_ASSERT_EQUAL(normalizer_run(z, letters, 64, &budget, &out), STATUS_OK);
    CHECK_EQ(out.n, 64 * MIB);
    CU_ASSERT_EQUAL(normalizer_run(z, letters, 65, &budget, &out), STATUS_REQUEST);
    CU_ASSERT_EQUAL(normalizer_add_prepend(z, content, MIB), STATUS_OK);
    CU_ASSERT_EQUAL(normalizer_run(z, letters, 63, &budget, &out), STATUS_OK);
    CU_ASSERT_EQUAL(normalizer_run(z, letters, 64, &budget, &out), STATUS_REQUEST);
    normalizer_free(z);
    free(out.bytes);
    free(content);
}

const struct suite_case suite_cases[] = {
    {"the four forms as utf8proc has them", test_random},
    {"long runs of marks in linear time", test_long_runs},
    {"text that grows has a limit", test_growth},
    {NULL, NULL},
};
