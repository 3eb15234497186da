/* k_access.c: who may call: keys, names of this machine, the bind rule; and SHA-256 under the keys.
 *
 * SHA-256 vectors: FIPS 180-4 examples and the "million a" of NIST's test data.
 */
#include "base/sha256.h"
#include "serve/access.h"
#include "serve/refusal.h"
#include "suite.h"

static const char *hex_of(const void *bytes, size_t n) {
    static char text[2 * SHA256_BYTES + 1];
    unsigned char digest[SHA256_BYTES];
    sha256(bytes, n, digest);
    for (int i = 0; i < SHA256_BYTES; i++) sprintf(text + 2 * i, "%02x", digest[i]);
    return text;
}

static void test_sha256(void) {
    CHECK_STR(hex_of("", 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK_STR(hex_of("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    const char *two = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    CHECK_STR(hex_of(two, strlen(two)),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    char *million = malloc(1000000);
    memset(million, 'a', 1000000);
    CHECK_STR(hex_of(million, 1000000),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

static struct access *open_with(const char *host, const char *key, bool no_auth) {
    struct params p = {.host = host, .api_key = key, .no_auth = no_auth};
    struct access *a = NULL;
    return access_new(&p, &a) == STATUS_OK ? a : NULL;
}

static void test_bind_rule(void) {
    static const char *const loopback[] = {"127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"};
    static const char *const others[] = {"0.0.0.0", "::", "192.168.1.1", "example.org",
                                         "128.0.0.1"};
    for (int i = 0; i < 5; i++) {
        struct access *a = open_with(loopback[i], NULL, false);
        CU_ASSERT_PTR_NOT_NULL(a);
        access_free(a);
        CU_ASSERT_PTR_NULL(open_with(others[i], NULL, false));
        CHECK_EQ(fail_last()->status, STATUS_USAGE);
        a = open_with(others[i], "k", false);
        CU_ASSERT_PTR_NOT_NULL(a);
        access_free(a);
        a = open_with(others[i], NULL, true);
        CU_ASSERT_PTR_NOT_NULL(a);
        access_free(a);
    }
}

static void test_names(void) {
    static const char *const yes[] = {
        "localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:1",
        "::1",       "a.localhost",  "localhost.",     "[::ffff:127.0.0.1]"};
    static const char *const no[] = {"",
                                     "localhost.evil.example",
                                     "127.0.0.1.evil.example",
                                     "evil.example",
                                     "127.0.0.1@evil.example",
                                     "0.0.0.0",
                                     "[::1]evil",
                                     "notlocalhost"};
    for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) CU_ASSERT(access_is_loopback(yes[i]));
    for (size_t i = 0; i < sizeof no / sizeof *no; i++) CU_ASSERT(!access_is_loopback(no[i]));
}

static void test_keys(void) {
    struct access *a = open_with("127.0.0.1", "  the key ", false);
    CU_ASSERT(access_needs_key(a));
    CU_ASSERT(access_key_ok(a, "Bearer the key"));
    CU_ASSERT(access_key_ok(a, "bearer the key"));
    CU_ASSERT(!access_key_ok(a, "Bearer the kex"));
    CU_ASSERT(!access_key_ok(a, "Bearer "));
    CU_ASSERT(!access_key_ok(a, "the key"));
    CU_ASSERT(!access_key_ok(a, NULL));
    CU_ASSERT(access_host_ok(a, "evil.example")); /* the key protects */
    CU_ASSERT(!access_admin_ok(a, NULL, "127.0.0.1"));
    CU_ASSERT(access_admin_ok(a, "Bearer the key", "10.0.0.1"));
    access_free(a);
    a = open_with("127.0.0.1", NULL, false);
    CU_ASSERT(access_key_ok(a, NULL));
    CU_ASSERT(!access_host_ok(a, "evil.example"));
    CU_ASSERT(!access_host_ok(a, NULL));
    CU_ASSERT(access_admin_ok(a, NULL, "127.0.0.1"));
    CU_ASSERT(!access_admin_ok(a, NULL, "10.0.0.1"));
    access_free(a);
    a = open_with("0.0.0.0", NULL, true);
    CU_ASSERT(!access_admin_ok(a, NULL, "127.0.0.1")); /* a proxy's clients all look like this */
    access_free(a);
}

static void test_origins(void) {
    struct params p = {.host = "127.0.0.1", .allowed_origins = "https://a.example, http://b:1"};
    struct access *a = NULL;
    CHECK_EQ(access_new(&p, &a), STATUS_OK);
    CU_ASSERT(access_origin_ok(a, "https://a.example"));
    CU_ASSERT(access_origin_ok(a, "http://b:1"));
    CU_ASSERT(!access_origin_ok(a, "http://b"));
    CU_ASSERT(!access_origin_ok(a, "https://a.example.evil"));
    CU_ASSERT(!access_origin_ok(a, ""));
    access_free(a);
}

static void test_refusals(void) {
    fail_param(STATUS_REQUEST, "n", NULL, "n is 0");
    struct refused r = refused_last();
    CHECK_EQ(r.http_status, 400);
    CHECK_EQ(r.grpc_status, 3);
    fail_param(STATUS_REQUEST, "model", "model_not_found", "no");
    r = refused_last();
    CHECK_EQ(r.http_status, 404);
    fail(STATUS_BUSY, "full");
    r = refused_last();
    CHECK_EQ(r.http_status, 503);
    CU_ASSERT(r.retry_after_seconds >= 1);
    fail(STATUS_MEMORY, "secret path /x");
    r = refused_last();
    CHECK_EQ(r.http_status, 500);
    CU_ASSERT_PTR_NULL(strstr(r.fault.text, "secret"));
    struct json_writer w;
    json_writer_init(&w);
    r = refused_as(REFUSAL_DRAINING, NULL, "bye");
    refused_write(&r, &w);
    json_write_bytes(&w, "", 1);
    CHECK_STR(w.bytes,
              "{\"error\":{\"message\":\"bye\",\"type\":\"unavailable_error\",\"param\":null,"
              "\"code\":\"shutting_down\"}}");
    json_writer_fini(&w);
}

const struct suite_case suite_cases[] = {
    {"SHA-256: published vectors", test_sha256},
    {"an address others can reach needs a key or --no-auth", test_bind_rule},
    {"which names mean this machine", test_names},
    {"keys, Host and /admin with and without keys", test_keys},
    {"origins", test_origins},
    {"refusals: status, code, nothing inner shown", test_refusals},
    {NULL, NULL},
};
