/* j_params.c: options and JSON text: parsing, precedence, ranges, messages, escaping. */
#include <unistd.h>

#include "base/json.h"
#include "base/params.h"
#include "base/progress.h"
#include "suite.h"

/* Options of whoever runs the tests must not count. */
int suite_setup(int *argc, char ***argv) {
    (void)argc, (void)argv;
    return clearenv();
}

/* Parses a command line of at most 8 words; the status, with p filled. */
static enum status parse(struct params *p, enum params_command command, const char *const *words) {
    char *argv[10] = {"sfumato"};
    static char copies[10][128];
    int argc = 1;
    for (; words && words[argc - 1]; argc++) {
        snprintf(copies[argc], sizeof copies[argc], "%s", words[argc - 1]);
        argv[argc] = copies[argc];
    }
    return params_parse(p, command, argc, argv);
}

static void refused(enum params_command command, const char *const *words, const char *message) {
    struct params p;
    CHECK_EQ(parse(&p, command, words), STATUS_USAGE);
    CHECK_STR(fail_text(), message);
    params_fini(&p);
}
#define REFUSED(message, ...) \
    refused(PARAMS_GENERATE, (const char *const[]){__VA_ARGS__, NULL}, message)

static void test_defaults(void) {
    struct params p;
    CHECK_EQ(parse(&p, PARAMS_GENERATE, NULL), STATUS_OK);
    CHECK_EQ(p.max_topk, 10);
    CHECK_NEAR(p.think_top_p, 0.95, 0);
    CHECK_NEAR(p.cold_stop_entropy, 0.01, 0);
    CHECK_EQ(p.cold_stop_length, 256);
    CHECK_EQ(p.return_trace, 0);
    CHECK_STR(p.think, "soft");
    CU_ASSERT(p.model == NULL && !p.quiet && !param_given(&p, PARAM_max_topk));
    CHECK_STR(param_word(&p, PARAM_on_eos), "close");
    params_fini(&p);
}

static void test_command_line(void) {
    struct params p;
    const char *const words[] = {
        "--max-topk=5", "--seed", "-9", "-q", "--return-trace", "-p", "hi", "--on-eos=mask", NULL};
    CHECK_EQ(parse(&p, PARAMS_GENERATE, words), STATUS_OK);
    CHECK_EQ(p.max_topk, 5);
    CHECK_EQ(p.seed, -9);
    CHECK_EQ(p.return_trace, 64);
    CHECK_STR(p.prompt, "hi");
    CHECK_STR(param_word(&p, PARAM_on_eos), "mask");
    CU_ASSERT(p.quiet && param_given(&p, PARAM_seed) && !param_given(&p, PARAM_top_p));
    params_fini(&p);
}

/* A list flag may be repeated; the command line as a whole still replaces the environment. */
static void test_lists(void) {
    struct params p;
    char *argv[] = {"x", "--served-model-name", "a,b", "--served-model-name", "c"};
    setenv("SFUMATO_SERVED_MODEL_NAME", "z", 1);
    CHECK_EQ(params_parse(&p, PARAMS_SERVE, 5, argv), STATUS_OK);
    CHECK_STR(p.served_model_name, "a,b,c");
    params_fini(&p);
    CHECK_EQ(params_parse(&p, PARAMS_SERVE, 1, argv), STATUS_OK);
    CHECK_STR(p.served_model_name, "z");
    params_fini(&p);
    unsetenv("SFUMATO_SERVED_MODEL_NAME");
}

static void test_messages(void) {
    REFUSED("--max-topk 65: it must be in 1..64", "--max-topk", "65");
    REFUSED("--max-topk ten: it must be a number in 1..64", "--max-topk", "ten");
    REFUSED("--top-p 0: it must be in (0,1]", "--top-p", "0");
    REFUSED("--top-p nan: it must be a number in (0,1]", "--top-p", "nan");
    REFUSED("--min-p 1: it must be in [0,1)", "--min-p", "1");
    REFUSED("--on-eos stop: it must be one of close, finish, mask", "--on-eos", "stop");
#ifndef SFUMATO_WITH_CUDA
    REFUSED("--kv-dtype fp8: not built into this binary, which has auto, f32, bf16", "--kv-dtype",
            "fp8");
#endif
    REFUSED("--gpu-memory-utilization: not built into this binary", "--gpu-memory-utilization",
            "0.9");
    REFUSED("--wibble: unknown or ambiguous option; --help lists them", "-q", "--wibble", "3");
    REFUSED("--max-topk: needs a value", "--max-topk");
    REFUSED("--quiet=1: takes no value", "--quiet=1");
    REFUSED("--ranks: not an option of this command; --help lists them", "--ranks", "3");
    REFUSED("two: unexpected argument; options start with --", "one", "two");
}

static void test_precedence(void) {
    struct params p;
    char path[] = "./j_params-XXXXXX", flag[64];
    const int file = mkstemp(path);
    const char text[] =
        "{\"max_topk\":3,\"seed\":4,\"think\":\"gumbel\",\"quiet\":true,\"budget\":null,\"top_p\":"
        "0.5}";
    CU_ASSERT(file >= 0 && write(file, text, sizeof text - 1) == (ssize_t)sizeof text - 1);
    close(file);
    snprintf(flag, sizeof flag, "--config=%s", path);
    setenv("SFUMATO_SEED", "5", 1);
    setenv("SFUMATO_TOP_P", "0.7", 1);
    const char *const words[] = {flag, "--top-p", "0.9", NULL};
    CHECK_EQ(parse(&p, PARAMS_GENERATE, words), STATUS_OK);
    CHECK_EQ(p.max_topk, 3);     /* file over default */
    CHECK_EQ(p.seed, 5);         /* environment over file */
    CHECK_NEAR(p.top_p, 0.9, 0); /* command line over all */
    CHECK_STR(p.think, "gumbel");
    CU_ASSERT(p.quiet && !param_given(&p, PARAM_budget));
    params_fini(&p);
    unsetenv("SFUMATO_TOP_P");
    setenv("SFUMATO_SEED", "x", 1);
    CHECK_EQ(parse(&p, PARAMS_GENERATE, NULL), STATUS_USAGE);
    CHECK_STR(fail_text(), "SFUMATO_SEED x: it must be a number");
    params_fini(&p);
    CHECK_EQ(parse(&p, PARAMS_TOKENIZE, NULL),
             STATUS_OK); /* a command that has no seed does not look */
    params_fini(&p);
    unsetenv("SFUMATO_SEED");
    unlink(path);
}

static void test_counts(void) {
    static const struct {
        const char *text;
        long long value; /* -1: refused */
    } rows[] = {{"0", 0},
                {"1k", 1000},
                {"1K", 1024},
                {"2M", 2 << 20},
                {"3m", 3000000},
                {"1GiB", 1 << 30},
                {"1g", 1000000000},
                {"", -1},
                {"k", -1},
                {"1kk", -1},
                {"1.5k", -1},
                {" 1", -1},
                {"1 ", -1},
                {"9223372036854775807", INT64_MAX},
                {"9223372036854775808", -1},
                {"9999999999G", -1},
                {"1kiB", -1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int64_t value = -1;
        if (!param_parse_count(rows[i].text, &value)) value = -1;
        CHECK_EQ(value, rows[i].value);
    }
}

static void test_fields(void) {
    CHECK_EQ(param_find_field("max_topk"), PARAM_max_topk);
    CHECK_EQ(param_find_field(".temperature"), PARAM_temperature);
    CHECK_EQ(param_find_field("temperature"), PARAM_think_temperature);
    CHECK_EQ(param_find_field("quiet"), PARAM_NONE);
    CHECK_EQ(param_check_number(PARAM_think_top_p, 1.0, "soft_thinking.top_p"), STATUS_OK);
    CHECK_EQ(param_check_number(PARAM_think_top_p, 1.01, "soft_thinking.top_p"), STATUS_REQUEST);
    CHECK_STR(fail_text(), "soft_thinking.top_p is 1.01: it must be in (0,1]");
    CHECK_STR(fail_last()->param, "soft_thinking.top_p");
}

static void test_digest(void) {
    struct params a, b;
    const char *const same[] = {"--quiet", "--threads=3", NULL}, *const other[] = {"--slabs=16",
                                                                                   NULL};
    parse(&a, PARAMS_GENERATE, NULL);
    parse(&b, PARAMS_GENERATE, same); /* may differ between ranks */
    CU_ASSERT(params_digest(&a) == params_digest(&b));
    params_fini(&b);
    parse(&b, PARAMS_GENERATE, other);
    CU_ASSERT(params_digest(&a) != params_digest(&b));
    params_fini(&a);
    params_fini(&b);
}

static void written(struct json_writer *w, const char *expected) {
    json_write_bytes(w, "", 1);
    CHECK_STR(w->bytes, expected);
    json_writer_clear(w);
}

static void test_writer(void) {
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "a");
    json_begin(&w, '[');
    json_write_int(&w, -1);
    json_write_real(&w, 0.1);
    json_write_real(&w, (double)0.1f);
    json_write_real(&w, (double)NAN);
    json_write_bool(&w, true);
    json_begin(&w, '{');
    json_end(&w, '}');
    json_end(&w, ']');
    json_key(&w, "b");
    json_write_text(&w, NULL);
    json_end(&w, '}');
    written(&w, "{\"a\":[-1,0.1,0.100000001,null,true,{}],\"b\":null}");
    json_write_string(&w, "\"\\\n\t\x01\x7f\xc3\xa9", 8);
    written(&w, "\"\\\"\\\\\\n\\t\\u0001\\u007f\xc3\xa9\"");
    json_write_string(&w, "plain, then \"", 13);
    written(&w, "\"plain, then \\\"\"");
    json_begin(&w, '[');
    json_write_int(&w, INT64_MIN);
    json_write_int(&w, INT64_MAX);
    json_write_int(&w, 0);
    json_write_int(&w, 10);
    json_end(&w, ']');
    written(&w, "[-9223372036854775808,9223372036854775807,0,10]");
    json_writer_fini(&w);
}

/* Maximal subparts as in the Unicode standard, table 3-8 (and Python's errors="replace"). */
static void test_broken_utf8(void) {
#define R "\xef\xbf\xbd"
    static const struct {
        const char *in, *out;
    } rows[] = {{"a\xff"
                 "b",
                 "\"a" R "b\""},
                {"\xe2\x82", "\"" R "\""},
                {"\xe2\x82\x28", "\"" R "(\""},
                {"\xc0\xaf", "\"" R R "\""},
                {"\xe0\x9f\x80", "\"" R R R "\""},
                {"\xed\xa0\x80", "\"" R R R "\""},
                {"\xf4\x90\x80\x80", "\"" R R R R "\""},
                {"\xf0\x9f\x99", "\"" R "\""},
                {"\xf1\x80\x80\xe1\x80\xc2", "\"" R R R "\""},
                {"\xf0\x9f\x99\x82", "\"\xf0\x9f\x99\x82\""}};
#undef R
    struct json_writer w;
    json_writer_init(&w);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        json_write_string(&w, rows[i].in, strlen(rows[i].in));
        written(&w, rows[i].out);
    }
    json_writer_fini(&w);
}

/* Nine digits name one fp32 value. */
static void test_reals_come_back(void) {
    struct json_writer w;
    json_writer_init(&w);
    for (uint32_t i = 0; i < 20000; i++) {
        union {
            uint32_t bits;
            float value;
        } x = {.bits = suite_random(5, i)};
        if (!isfinite(x.value)) continue;
        json_writer_clear(&w);
        json_write_real(&w, (double)x.value);
        json_write_bytes(&w, "", 1);
        const float back = (float)strtod(w.bytes, NULL);
        if (memcmp(&back, &x.value, sizeof back) != 0) CHECK_STR(w.bytes, "the same float");
    }
    json_writer_fini(&w);
}

static void test_reading_is_strict(void) {
    static const char *const bad[] = {"",
                                      "{",
                                      "{\"a\":1,\"a\":2}",
                                      "[1] 2",
                                      "\"\xff\"",
                                      "{\"a\":\"\\u0000\"}",
                                      "{\"a\":\"\\ud800\"}",
                                      "[1e999]",
                                      "[9223372036854775808]",
                                      "nul"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        json_t *root = NULL;
        const enum status status = json_load_text(bad[i], strlen(bad[i]), STATUS_REQUEST, &root);
        if (status != STATUS_REQUEST) CHECK_STR(bad[i], "refused");
        json_decref(root);
    }
}

static void test_units(void) {
    char out[32];
    CHECK_STR(progress_bytes(999, out), "999 B");
    CHECK_STR(progress_bytes(1.5e9, out), "1.50 GB");
    CHECK_STR(progress_seconds(59.4, out), "59s");
    CHECK_STR(progress_seconds(200, out), "3m20s");
    CHECK_STR(progress_seconds(7260, out), "2h01m");
}

const struct suite_case suite_cases[] = {
    {"the defaults are the table's", test_defaults},
    {"every form of a command line option", test_command_line},
    {"lists, given at once or one by one", test_lists},
    {"one message names flag, value and range", test_messages},
    {"command line > environment > file > default", test_precedence},
    {"counts and sizes with suffixes", test_counts},
    {"ranges shared with request fields", test_fields},
    {"ranks compare what must be equal, and only that", test_digest},
    {"JSON writing", test_writer},
    {"broken UTF-8 becomes U+FFFD by maximal subparts", test_broken_utf8},
    {"a float printed is the float read", test_reals_come_back},
    {"JSON reading is strict", test_reading_is_strict},
    {"bytes and seconds for people", test_units},
    {NULL, NULL},
};
