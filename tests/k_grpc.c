/* k_grpc.c: the pure parts of gRPC: message framing, headers, messages to JSON and their memory.
 * Expected bytes and values are written by hand from the gRPC protocol description and the
 * protobuf encoding.
 */
#include "serve/grpc_parts.h"
#include "sfumato.pb-c.h"
#include "suite.h"

/* ---- framing ---- */

static void test_every_cut(void) {
    /* | flag 0 | length 7 | "message" | cut into two pieces at every place, and into single bytes */
    const uint8_t wire[] = {0, 0, 0, 0, 7, 'm', 'e', 's', 's', 'a', 'g', 'e'};
    for (size_t cut = 0; cut <= sizeof wire; cut++) {
        struct wire_in in = {0};
        CHECK_EQ(wire_in_push(&in, wire, cut, 100), WIRE_OK);
        CHECK_EQ(wire_in_complete(&in), cut == sizeof wire);
        CHECK_EQ(wire_in_push(&in, wire + cut, sizeof wire - cut, 100), WIRE_OK);
        CU_ASSERT(wire_in_complete(&in));
        CHECK_EQ(in.n, 7);
        CU_ASSERT(suite_equal_bytes("message", in.bytes, "message", 7));
        wire_in_fini(&in);
    }
    struct wire_in in = {0};
    for (size_t i = 0; i < sizeof wire; i++) {
        CU_ASSERT(!wire_in_complete(&in));
        CHECK_EQ(wire_in_push(&in, wire + i, 1, 100), WIRE_OK);
    }
    CU_ASSERT(wire_in_complete(&in));
    wire_in_fini(&in);
}

static void test_empty_message(void) {
    const uint8_t wire[] = {0, 0, 0, 0, 0};
    struct wire_in in = {0};
    CU_ASSERT(!wire_in_complete(&in)); /* nothing is not an empty message */
    CHECK_EQ(wire_in_push(&in, wire, 5, 100), WIRE_OK);
    CU_ASSERT(wire_in_complete(&in));
    CHECK_EQ(in.n, 0);
    wire_in_fini(&in);
}

static void test_bad_frames(void) {
    const uint8_t compressed[] = {1, 0, 0, 0, 1, 'x'}, flag[] = {2, 0, 0, 0, 1, 'x'};
    const uint8_t huge[] = {0, 0xff, 0xff, 0xff, 0xff}, two[] = {0, 0, 0, 0, 1, 'a', 0};
    const uint8_t hundred[] = {0, 0, 0, 0, 100}, more[] = {0, 0, 0, 0, 101};
    const struct {
        const uint8_t *bytes;
        size_t n;
        enum wire_fault fault;
    } cases[] = {
        {compressed, sizeof compressed, WIRE_COMPRESSED},
        {flag, sizeof flag, WIRE_BAD_FLAG},
        {huge, sizeof huge, WIRE_TOO_LARGE},
        {two, sizeof two, WIRE_SECOND_MESSAGE},
        {hundred, sizeof hundred, WIRE_OK},
        {more, sizeof more, WIRE_TOO_LARGE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct wire_in in = {0};
        CHECK_EQ(wire_in_push(&in, cases[i].bytes, cases[i].n, 100), cases[i].fault);
        wire_in_fini(&in);
    }
}

/* A claimed length costs nothing until the bytes come. */
static void test_memory_follows_bytes(void) {
    const uint8_t wire[] = {0, 0x40, 0, 0, 0, 'x'}; /* 1 GiB claimed */
    struct wire_in in = {0};
    CHECK_EQ(wire_in_push(&in, wire, sizeof wire, SIZE_MAX), WIRE_OK);
    CU_ASSERT(in.capacity <= 64 * 1024);
    wire_in_fini(&in);
}

static void test_prefix(void) {
    uint8_t prefix[WIRE_PREFIX_BYTES];
    const uint8_t want[] = {0, 0x01, 0x02, 0x03, 0x04};
    wire_prefix(prefix, 0x01020304);
    CU_ASSERT(suite_equal_bytes("prefix", prefix, want, 5));
}

/* ---- headers ---- */

static void test_percent(void) {
    char out[64];
    wire_percent_encode("50% of \xc3\xa9\n~", out, sizeof out);
    CHECK_STR(out, "50%25 of %C3%A9%0A~");
    char small[6]; /* never half an escape */
    wire_percent_encode("abc\n", small, sizeof small);
    CHECK_STR(small, "abc");
    wire_percent_encode("ab\n", small, sizeof small);
    CHECK_STR(small, "ab%0A");
}

static void test_timeout(void) {
    static const struct {
        const char *text;
        double seconds; /* negative: malformed */
    } cases[] = {{"1S", 1},
                 {"2H", 7200},
                 {"3M", 180},
                 {"250m", 0.25},
                 {"99999999u", 99.999999},
                 {"5000000n", 0.005},
                 {"0S", 1e-6},
                 {"", -1},
                 {"S", -1},
                 {"1", -1},
                 {"1s", -1},
                 {"1SS", -1},
                 {"-1S", -1},
                 {"123456789S", -1},
                 {"1.5S", -1},
                 {" 1S", -1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double seconds = -1;
        const bool ok = wire_timeout_parse(cases[i].text, &seconds);
        CHECK_EQ(ok, cases[i].seconds >= 0);
        if (ok) CHECK_NEAR(seconds, cases[i].seconds, 1e-12);
    }
}

static void test_field(void) {
    /* field 3, wire type 2: tag 0x1a; field 16: tag 0x82 0x01; length 200: 0xc8 0x01 */
    struct json_writer w;
    char text[200];
    memset(text, 'x', sizeof text);
    json_writer_init(&w);
    wire_write_field(&w, 3, "a\0b", 3);
    CHECK_EQ(w.n, 5);
    CU_ASSERT(suite_equal_bytes("short", w.bytes,
                                "\x1a\x03"
                                "a\0b",
                                5));
    json_writer_clear(&w);
    wire_write_field(&w, 16, text, sizeof text);
    CHECK_EQ(w.n, 204);
    CU_ASSERT(suite_equal_bytes("long", w.bytes, "\x82\x01\xc8\x01x", 5));
    json_writer_fini(&w);
}

/* ---- messages to JSON ---- */

/* The JSON of a serialised Request, or the text of the failure. malloc'ed. */
static char *json_of(const char *bytes, size_t n, int64_t item_max) {
    arena memory;
    void *m;
    json_t *tree = NULL;
    char *text;
    arena_init(&memory, 1 << 20);
    if (grpc_parse(&sfumato__v1__request__descriptor, &memory, (const uint8_t *)bytes, n, &m) ==
            STATUS_OK &&
        grpc_tree(m, item_max, &tree) == STATUS_OK) {
        text = json_dumps(tree, JSON_COMPACT | JSON_SORT_KEYS | JSON_REAL_PRECISION(9));
    } else {
        text = strdup(fail_text());
    }
    json_decref(tree);
    arena_fini(&memory);
    return text;
}
#define CHECK_JSON(bytes, want)                                 \
    do {                                                        \
        char *json_ = json_of((bytes), sizeof(bytes) - 1, 100); \
        CHECK_STR(json_, (want));                               \
        free(json_);                                            \
    } while (0)

static void test_absent_is_not_zero(void) {
    CHECK_JSON("", "{}");
    /* temperature (9, fixed32) = 0, stream (4) = true, n (5) = 2 */
    CHECK_JSON("\x4d\0\0\0\0\x20\x01\x28\x02", "{\"n\":2,\"stream\":true,\"temperature\":0.0}");
    /* max_tokens (7) = 0; skip_special_tokens (22) = false; stream = false is absent */
    CHECK_JSON("\x38\0\xb0\x01\0\x20\0", "{\"max_tokens\":0,\"skip_special_tokens\":false}");
    /* seed (17) = -1: ten bytes */
    CHECK_JSON("\x88\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "{\"seed\":-1}");
}

static void test_shapes(void) {
    /* messages (1): {role (1) "user", content (2) "" } */
    CHECK_JSON("\x0a\x08\x0a\x04user\x12\0",
               "{\"messages\":[{\"content\":\"\",\"role\":\"user\"}]}");
    /* prompt (2): text (1) "hi"; ids (2) {1, 300} */
    CHECK_JSON("\x12\x04\x0a\x02hi\x12\x07\x12\x05\x0a\x03\x01\xac\x02",
               "{\"prompt\":[\"hi\",[1,300]]}");
    /* logit_bias (16): {5: 1.5}, {5: -1}: the last counts */
    CHECK_JSON("\x82\x01\x07\x08\x05\x15\0\0\xc0\x3f\x82\x01\x07\x08\x05\x15\0\0\x80\xbf",
               "{\"logit_bias\":{\"5\":-1.0}}");
    /* soft_thinking (36) {cold_stop (7) {off (3)}, return_trace (11) 0} */
    CHECK_JSON("\xa2\x02\x06\x3a\x02\x18\x01\x58\0",
               "{\"soft_thinking\":{\"cold_stop\":false,\"return_trace\":false}}");
    /* chat_template_kwargs (28): {"a":[1]} */
    CHECK_JSON("\xe2\x01\x09{\"a\":[1]}", "{\"chat_template_kwargs\":{\"a\":[1]}}");
}

static void test_bad_values(void) {
    CHECK_JSON("\x1a\x01\xff", "model must be valid UTF-8");
    CHECK_JSON("\x1a\x03\xed\xa0\x80", "model must be valid UTF-8"); /* a surrogate */
    CHECK_JSON(
        "\x1a\x03"
        "a\0b",
        "model must be text without NUL");
    CHECK_JSON("\x4d\0\0\xc0\x7f", "temperature must be a finite number"); /* NaN */
    char *text = json_of("\xe2\x01\x01{", 4, 100);
    CU_ASSERT(strstr(text, "chat_template_kwargs: not valid JSON") == text);
    free(text);
    text = json_of(
        "\x1a\x05"
        "ab",
        4, 100); /* cut short */
    CU_ASSERT(strstr(text, "not a valid protobuf") != NULL);
    free(text);
}

static int allocations_left;
static void *limited_malloc(size_t n) { return allocations_left-- > 0 ? malloc(n) : NULL; }

/* Whichever allocation fails, the tree is whole or there is none. */
static void test_no_memory(void) {
    /* messages {role "user", content ""}, prompt "hi" and {1, 300}, temperature 0, stream, n 2,
     * logit_bias {5: 1.5}, soft_thinking {cold_stop {off}} */
    static const char bytes[] =
        "\x0a\x08\x0a\x04user\x12\0\x12\x04\x0a\x02hi\x12\x07\x12\x05\x0a\x03\x01\xac\x02"
        "\x4d\0\0\0\0\x20\x01\x28\x02\x82\x01\x07\x08\x05\x15\0\0\xc0\x3f"
        "\xa2\x02\x04\x3a\x02\x18\x01";
    static const char want[] =
        "{\"logit_bias\":{\"5\":1.5},\"messages\":[{\"content\":\"\",\"role\":\"user\"}],\"n\":2,"
        "\"prompt\":[\"hi\",[1,300]],\"soft_thinking\":{\"cold_stop\":false},\"stream\":true,"
        "\"temperature\":0.0}";
    arena memory;
    void *m;
    json_t *tree = NULL;
    int failures = 0;
    arena_init(&memory, 1 << 20);
    CU_ASSERT_FATAL(grpc_parse(&sfumato__v1__request__descriptor, &memory, (const uint8_t *)bytes,
                               sizeof bytes - 1, &m) == STATUS_OK);
    json_set_alloc_funcs(limited_malloc, free);
    for (bool done = false; !done; failures += !done) {
        allocations_left = failures;
        const enum status status = grpc_tree(m, 100, &tree);
        done = status == STATUS_OK;
        if (!done) CHECK_EQ(status, STATUS_MEMORY);
    }
    json_set_alloc_funcs(malloc, free);
    CU_ASSERT(failures > 20); /* a value each, at least */
    char *text = json_dumps(tree, JSON_COMPACT | JSON_SORT_KEYS);
    CHECK_STR(text, want);
    free(text);
    json_decref(tree);
    arena_fini(&memory);
}

static void test_item_limit(void) {
    char wire[3 + 101] = "\x9a\x01\x65"; /* stop_token_ids (19), packed, 101 ids */
    memset(wire + 3, 1, 101);
    char *text = json_of(wire, sizeof wire, 100);
    CHECK_STR(text, "stop_token_ids must be shorter: the request is too large");
    free(text);
}

/* 2 bytes on the wire unfold to a hundred in memory: the cap holds, and is told apart. */
static void test_memory_cap(void) {
    enum { COUNT = 100000, CAP = 1 << 20 };
    static char wire[2 * COUNT];
    arena memory;
    void *m;
    for (int i = 0; i < COUNT; i++) memcpy(wire + 2 * i, "\x0a\0", 2); /* empty messages */
    arena_init(&memory, CAP);
    CHECK_EQ(grpc_parse(&sfumato__v1__request__descriptor, &memory, (const uint8_t *)wire,
                        sizeof wire, &m),
             STATUS_BUSY);
    CU_ASSERT(memory.used_bytes <= CAP);
    CU_ASSERT(m == NULL);
    arena_fini(&memory);
}

const struct suite_case suite_cases[] = {
    {"a message is the same however it is cut", test_every_cut},
    {"an empty message", test_empty_message},
    {"compressed, too large, second message, bad flag", test_bad_frames},
    {"memory follows the bytes that came", test_memory_follows_bytes},
    {"the prefix is big-endian", test_prefix},
    {"grpc-message is percent-encoded", test_percent},
    {"grpc-timeout", test_timeout},
    {"protobuf fields by hand", test_field},
    {"absent is not zero", test_absent_is_not_zero},
    {"arrays, maps, and types that JSON tells by value", test_shapes},
    {"bad values name their field", test_bad_values},
    {"no memory is no shorter request", test_no_memory},
    {"array elements are limited", test_item_limit},
    {"unpacking is limited in memory", test_memory_cap},
    {NULL, NULL},
};
