/* b_safetensors.c: folders of real bytes: what must open, and what must be refused and with which words. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "load/file.h"
#include "load/safetensors.h"
#include "load/source.h"
#include "suite.h"
#include "support/model_files.h"
#include "support/toy_model.h"

static const char *config_text =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,\"intermediate_size\":16,"
    "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"vocab_size\":16,\"torch_dtype\":"
    "\"float32\"}";

/* Hand-written: 1.5, -2, 65504 (largest fp16), 0.25 in three formats; the header has an odd length, so that
 * the data is unaligned. */
static void test_by_hand(void) {
    static const uint8_t data[] = {0x00, 0x00, 0xc0, 0x3f, 0x00, 0x00, 0x00, 0xc0,
                                   0x00, 0xe0, 0x7f, 0x47, 0x00, 0x00, 0x80, 0x3e,  /* F32 */
                                   0x00, 0x3e, 0x00, 0xc0, 0xff, 0x7b, 0x00, 0x34,  /* F16 */
                                   0xc0, 0x3f, 0x00, 0xc0, 0x80, 0x47, 0x80, 0x3e}; /* BF16 */
    const char *header =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[2,2],\"data_offsets\":[16,24]},"
        "\"c\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"
        "\"ids\":{\"dtype\":\"I64\",\"shape\":[0],\"data_offsets\":[32,32]}} ";
    static const float want[4] = {1.5f, -2.0f, 65504.0f, 0.25f};
    const char *folder = folder_make();
    struct blob file = {0};
    source *s = NULL;
    struct source_tensor t;
    float got[4];
    CU_ASSERT_FATAL(strlen(header) % 2 == 1);
    safetensors_write(&file, header, data, sizeof data);
    folder_write(folder, "model.safetensors", file.bytes, file.n);
    folder_write_text(folder, "config.json", config_text);
    CHECK_EQ(source_open(folder, &s), STATUS_OK);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_STR(s->ops->kind, "safetensors");
    CHECK_EQ(s->total_bytes, 32);
    CU_ASSERT(s->ops->find(s, "a", &t) && t.rows == 2 && t.cols == 2 && t.file_bytes == 16);
    CHECK_STR(t.dtype_name, "F32");
    CU_ASSERT(s->ops->find(s, "c", &t) && t.rows == 1 && t.cols == 4);
    CU_ASSERT(!s->ops->find(s, "d", &t) && !s->ops->find(s, "__metadata__", &t));
    CHECK_EQ(s->ops->read(s, "a", 0, 2, 0, 2, got), STATUS_OK);
    CU_ASSERT(memcmp(got, want, sizeof want) == 0);
    CHECK_EQ(s->ops->read(s, "b", 0, 2, 0, 2, got), STATUS_OK);
    CU_ASSERT(memcmp(got, want, sizeof want) == 0);
    CHECK_EQ(s->ops->read(s, "c", 0, 1, 0, 4, got), STATUS_OK);
    CHECK_NEAR(got[1], -2, 0);
    CHECK_NEAR(got[2], 65536, 0); /* 65504 is not a bf16 */
    CHECK_EQ(s->ops->read(s, "b", 1, 1, 1, 1, got), STATUS_OK);
    CHECK_NEAR(got[0], 0.25, 0);
    CHECK_EQ(s->ops->read(s, "ids", 0, 0, 0, 0, got), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "I64") != NULL);
    source_close(s);
    blob_free(&file);
    folder_remove(folder);
}

/* fp8 weights of 130 rows x 3 columns in blocks of 128 x 128, of 2 x 2 with a scale a row, and of
 * 1 x 2 with one scale in all. Codes: 0x38 = 1, 0x40 = 2, 0xc4 = -3, 0x7e = 448, 0x01 = 2^-9. */
static void test_fp8(void) {
    static const char *header =
        "{\"a.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[130,3],\"data_offsets\":[0,390]},"
        "\"b.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[2,2],\"data_offsets\":[390,394]},"
        "\"c.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[1,2],\"data_offsets\":[394,396]},"
        "\"a.weight_scale_inv\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[396,404]},"
        "\"b.weight_scale\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[404,408]},"
        "\"c.weight_scale\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[408,412]}}";
    static const char *quantised =
        "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,\"intermediate_size\":16,"
        "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"vocab_size\":16,"
        "\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\","
        "\"activation_scheme\":\"dynamic\",\"weight_block_size\":[128,128]}}";
    static const uint8_t codes[4] = {0x40, 0xc4, 0x7e, 0x01};
    uint8_t data[412];
    const float scales[2] = {0.5f, 3.0f}, one = 0.1f;
    float got[390], some[2];
    memset(data, 0x38, sizeof data);
    memcpy(data + 127 * 3, codes, 4); /* three of row 127, the first of row 128 */
    memcpy(data + 390, codes, 4);
    memcpy(data + 396, scales, 8);
    memcpy(data + 404, (const uint8_t[]){0x00, 0x3f, 0x80, 0x40}, 4); /* 0.5, 4 */
    memcpy(data + 408, &one, 4);
    const char *folder = folder_make();
    struct blob file = {0};
    source *s = NULL;
    safetensors_write(&file, header, data, sizeof data);
    folder_write(folder, "model.safetensors", file.bytes, file.n);
    folder_write_text(folder, "config.json", quantised);
    CHECK_EQ(source_open(folder, &s), STATUS_OK);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_EQ(s->config.file_dtype, DTYPE_FP8);
    CHECK_EQ(s->ops->read(s, "a.weight", 0, 130, 0, 3, got), STATUS_OK);
    CHECK_NEAR(got[0], 0.5, 0);
    CHECK_NEAR(got[381], 1, 0);
    CHECK_NEAR(got[382], -1.5, 0);
    CHECK_NEAR(got[383], 224, 0);
    CHECK_NEAR(got[384], 3 * 0x1p-9, 0); /* row 128: the other block */
    CHECK_NEAR(got[389], 3, 0);
    CHECK_EQ(s->ops->read(s, "a.weight", 127, 2, 1, 2, got), STATUS_OK);
    CHECK_NEAR(got[1], 224, 0);
    CHECK_NEAR(got[2], 3, 0);
    CHECK_EQ(s->ops->read(s, "b.weight", 0, 2, 0, 2, got), STATUS_OK);
    CHECK_NEAR(got[1], -1.5, 0);
    CHECK_NEAR(got[2], 4 * 448, 0);
    CHECK_EQ(s->ops->read(s, "c.weight", 0, 1, 1, 1, got), STATUS_OK);
    CHECK_NEAR(got[0], one, 0);
    /* blocks of 128 columns: only where all their rows have one scale */
    CU_ASSERT(s->ops->block_scales(s, "a.weight", 0, 128, 0, 3, some) && some[0] == 0.5f);
    CU_ASSERT(s->ops->block_scales(s, "a.weight", 128, 2, 1, 2, some) && some[0] == 3.0f);
    CU_ASSERT(!s->ops->block_scales(s, "a.weight", 127, 2, 0, 3, some));
    CU_ASSERT(!s->ops->block_scales(s, "b.weight", 0, 2, 0, 2, some));
    CU_ASSERT(s->ops->block_scales(s, "c.weight", 0, 1, 0, 2, some) && some[0] == one);
    CU_ASSERT(!s->ops->block_scales(s, "a.weight_scale_inv", 0, 1, 0, 1, some));
    source_close(s);
    s = NULL;
    /* a scale that cannot be one makes its block NaN: the loader refuses NaN */
    const float bad = -1.0f;
    memcpy(data + 396, &bad, 4);
    blob_free(&file);
    safetensors_write(&file, header, data, sizeof data);
    folder_write(folder, "model.safetensors", file.bytes, file.n);
    CHECK_EQ(source_open(folder, &s), STATUS_OK);
    CHECK_EQ(s->ops->read(s, "a.weight", 0, 130, 0, 3, got), STATUS_OK);
    CU_ASSERT(isnan(got[0]) && got[389] == 3.0f);
    source_close(s);
    static const struct {
        const char *header, *word;
    } refused[] = {
        {"{\"a.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[4,2],\"data_offsets\":[0,8]}}",
         "weight_scale_inv"},
        {"{\"a.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[4,2],\"data_offsets\":[0,8]},"
         "\"a.weight_scale\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[8,16]}}",
         "[2, 1]"},
        {"{\"a.weight\":{\"dtype\":\"F8_E4M3\",\"shape\":[4,2],\"data_offsets\":[0,8]},"
         "\"a.weight_scale\":{\"dtype\":\"I32\",\"shape\":[4],\"data_offsets\":[8,24]}}",
         "I32"},
    };
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        blob_free(&file);
        safetensors_write(&file, refused[i].header, data, 24);
        folder_write(folder, "model.safetensors", file.bytes, file.n);
        CHECK_EQ(source_open(folder, &s), STATUS_MODEL);
        CU_ASSERT(s == NULL && strstr(fail_text(), refused[i].word) != NULL);
    }
    blob_free(&file);
    folder_remove(folder);
}

struct pair {
    source *made, *read;
    double tolerance; /* relative, of the number format */
};

static void check_equal(void *user, const char *name) {
    struct pair *p = user;
    struct source_tensor a, b;
    CU_ASSERT_FATAL(p->made->ops->find(p->made, name, &a) && p->read->ops->find(p->read, name, &b));
    CU_ASSERT_FATAL(a.rows == b.rows && a.cols == b.cols);
    const size_t count = (size_t)(a.rows * a.cols);
    float *x = malloc(count * sizeof *x), *y = malloc(count * sizeof *y);
    p->made->ops->read(p->made, name, 0, a.rows, 0, a.cols, x);
    CHECK_EQ(p->read->ops->read(p->read, name, 0, a.rows, 0, a.cols, y), STATUS_OK);
    size_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        bad += !(fabs((double)x[i] - (double)y[i]) <=
                 p->tolerance * fabs((double)x[i]) + 6e-8 * (p->tolerance > 0));
    }
    CHECK_EQ(bad, 0);
    free(x);
    free(y);
}

/* A whole model, in one file and in five shards, comes back as it was made. */
static void test_whole_models(void) {
    static const struct {
        const char *toy;
        enum config_dtype dtype;
        int shards;
        double tolerance;
    } cases[] = {{"toy_gqa2", DTYPE_F32, 1, 0},
                 {"toy_qk", DTYPE_BF16, 5, 0x1p-8},
                 {"toy_gqa3", DTYPE_F16, 3, 0x1p-11}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct model_config c;
        struct pair p = {.tolerance = cases[i].tolerance};
        const char *folder = folder_make();
        CU_ASSERT_FATAL(toy_config(cases[i].toy, &c) &&
                        synthetic_open(&c, 1, &p.made) == STATUS_OK);
        model_write_safetensors(p.made, folder, cases[i].dtype, cases[i].shards);
        CHECK_EQ(source_open(folder, &p.read), STATUS_OK);
        CU_ASSERT_FATAL(p.read != NULL);
        CHECK_EQ(p.read->config.file_dtype, cases[i].dtype);
        CHECK_EQ(p.read->config.qk_norm, c.qk_norm);
        CHECK_EQ(p.read->config.qkv_bias, c.qkv_bias);
        CHECK_EQ(p.read->total_bytes,
                 config_parameter_count(&c) * (cases[i].dtype == DTYPE_F32 ? 4 : 2));
        model_each_tensor(&c, check_equal, &p);
        source_close(p.read);
        source_close(p.made);
        folder_remove(folder);
    }
}

static enum status parse(const void *bytes, size_t n) {
    arena names;
    struct tensor_table table = {0};
    arena_init(&names, 0);
    enum status status = safetensors_parse(bytes, n, 0, &names, &table);
    if (status == STATUS_OK) status = tensor_table_seal(&table);
    tensor_table_fini(&table);
    arena_fini(&names);
    return status;
}

#define TENSOR(name, dtype, shape, begin, end)                                                   \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end \
    "]}"

static void test_hostile_headers(void) {
    static const struct {
        const char *header, *message;
    } cases[] = {
        {"{x", "header is broken"},
        {"{\"a\":1}", "unknown dtype"},
        {"{\"a\":{}}", "unknown dtype"},
        {"{" TENSOR("a", "F4", "[1]", "0", "4") "}", "unknown dtype F4"},
        {"{" TENSOR("a", "F32", "[-1]", "0", "4") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "[\"x\"]", "0", "4") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "7", "0", "4") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "[1099511627776,1099511627776]", "0", "4") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "[4294967296,4294967296]", "0", "0") "}", "unusable shape"},
        {"{" TENSOR("a", "F32", "[1]", "0", "5") "}",
         "has 5 bytes, its shape 1 x 1 of F32 needs 4"},
        {"{" TENSOR("a", "F32", "[2]", "0", "4") "}",
         "has 4 bytes, its shape 1 x 2 of F32 needs 8"},
        {"{" TENSOR("a", "F32", "[4]", "64", "80") "}",
         "ends at byte 80 of the data, the file has 64"},
        {"{" TENSOR("a", "F32", "[1]", "8", "4") "}", "unusable data_offsets"},
        {"{" TENSOR("a", "F32", "[1]", "-4", "0") "}", "unusable data_offsets"},
        {"{" TENSOR("a", "F32", "[1]", "0.0", "4") "}", "unusable data_offsets"},
        {"{" TENSOR("a", "F32", "[1]", "0", "4,8") "}", "unusable data_offsets"},
        {"{" TENSOR("a", "F32", "[1]", "9223372036854775800", "9223372036854775804") "}",
         "the file has 64"},
        {"{" TENSOR("a", "F32", "[4]", "0", "16") "," TENSOR("b", "F32", "[4]", "12", "28") "}",
         "overlap"},
        {"{" TENSOR("a", "F32", "[4]", "0", "16") "," TENSOR("b", "F32", "[4]", "0", "16") "}",
         "overlap"},
        {"{" TENSOR("a", "F32", "[4]", "0", "16") "," TENSOR("a", "F32", "[4]", "16", "32") "}",
         "header is broken"},
        {"{" TENSOR("", "F32", "[4]", "0", "16") "}", "name has 0 bytes"},
    };
    static const uint8_t data[64];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct blob b = {0};
        safetensors_write(&b, cases[i].header, data, sizeof data);
        CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
        const bool found = strstr(fail_text(), cases[i].message) != NULL;
        if (!found)
            printf("\n    %s: \"%s\" lacks \"%s\"\n", cases[i].header, fail_text(),
                   cases[i].message);
        CU_ASSERT(found);
        blob_free(&b);
    }
}

static void test_hostile_bytes(void) {
    struct blob b = {0};
    static const uint8_t data[16];
    safetensors_write(&b, "{" TENSOR("weight", "F32", "[2,2]", "0", "16") "}", data, sizeof data);
    CHECK_EQ(parse(b.bytes, b.n), STATUS_OK);
    for (size_t n = 0; n < b.n;
         n++) { /* every truncation; a copy, so that a sanitizer sees its end */
        uint8_t *copy = malloc(n + 1);
        memcpy(copy, b.bytes, n);
        CHECK_EQ(parse(copy, n), STATUS_MODEL);
        free(copy);
    }
    static const uint64_t lengths[] = {0,         1,          UINT64_MAX, UINT64_MAX - 7,
                                       INT64_MAX, 1ull << 32, 16 << 20,   (16 << 20) + 1};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        memcpy(b.bytes, &lengths[i], 8);
        CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
    }
    CHECK_EQ(parse("version https://git-lfs.github.com/spec/v1", 42), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "Git LFS pointer") != NULL);
    blob_free(&b);
    /* deeply nested JSON must not overflow the stack */
    enum { DEPTH = 200000 };
    char *nested = malloc(DEPTH + 6);
    memcpy(nested, "{\"a\":", 5);
    memset(nested + 5, '[', DEPTH);
    nested[DEPTH + 5] = '\0';
    safetensors_write(&b, nested, NULL, 0);
    CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
    blob_free(&b);
    free(nested);
}

static void check_refused(const char *path, const char *message) {
    source *s = (source *)&s;
    CHECK_EQ(source_open(path, &s), STATUS_MODEL);
    CU_ASSERT(s == NULL);
    const bool found = strstr(fail_text(), message) != NULL;
    if (!found) printf("\n    \"%s\" lacks \"%s\"\n", fail_text(), message);
    CU_ASSERT(found);
}

static void test_folders(void) {
    const char *folder = folder_make();
    check_refused("/nowhere/at/all", "No such file");
    check_refused(folder, "has no config.json");
    folder_write_text(folder, "config.json", "{");
    check_refused(folder, "config.json line 1");
    folder_write_text(folder, "config.json", config_text);
    check_refused(folder, "neither model.safetensors nor");
    folder_write_text(folder, "pytorch_model.bin", "x");
    check_refused(folder, "only PyTorch .bin weights");
    folder_write_text(folder, "model.safetensors", "");
    check_refused(folder, "model.safetensors is empty");
    check_refused(folder_path(folder, "model.safetensors"), "give the folder");
    check_refused(folder_path(folder, "config.json"), "give the folder");
    CHECK_EQ(mkfifo(folder_path(folder, "weights.gguf"), 0600), 0); /* must not hang */
    check_refused(folder_path(folder, "weights.gguf"), "not a regular file");
    folder_write_text(folder, "generation_config.json", "{\"temperature\":\"hot\"}");
    check_refused(folder, "generation_config.json: temperature is \"hot\"");
    folder_remove(folder);
}

static void test_indices(void) {
    static const struct {
        const char *index, *message;
    } cases[] = {
        {"", "line 1"},
        {"{}", "weight_map is missing"},
        {"{\"weight_map\":{}}", "weight_map is missing or empty"},
        {"{\"weight_map\":{\"a\":7}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"../part.safetensors\"}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"/etc/part.safetensors\"}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"sub/part.safetensors\"}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"passwd\"}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"..safetensors\"}}", "must be the plain name"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "gone.safetensors: No such file"},
        {"{\"weight_map\":{\"b\":\"part.safetensors\"}}", "tensor b is not in part.safetensors"},
        {"{\"weight_map\":{\"a\":\"part.safetensors\",\"c\":\"twin.safetensors\"}}",
         "tensor a is there twice"},
    };
    const char *folder = folder_make();
    struct blob b = {0};
    source *s = NULL;
    static const uint8_t data[4];
    safetensors_write(&b, "{" TENSOR("a", "F32", "[1]", "0", "4") "}", data, sizeof data);
    folder_write_text(folder, "config.json", config_text);
    folder_write(folder, "part.safetensors", b.bytes, b.n);
    folder_write(folder, "twin.safetensors", b.bytes, b.n);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        folder_write_text(folder, "model.safetensors.index.json", cases[i].index);
        check_refused(folder, cases[i].message);
    }
    folder_write_text(folder, "model.safetensors.index.json",
                      "{\"weight_map\":{\"a\":\"part.safetensors\"}}");
    CHECK_EQ(source_open(folder, &s), STATUS_OK);
    source_close(s);
    CU_ASSERT(!safetensors_file_name_ok(".safetensors") &&
              safetensors_file_name_ok("x.safetensors"));
    blob_free(&b);
    folder_remove(folder);
}

static void test_texts(void) {
    source *s = NULL;
    char *text;
    size_t n;
    char path[512];
    snprintf(path, sizeof path, "%s/", suite_path("models/tiny"));
    CHECK_EQ(source_open(path, &s), STATUS_OK);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_STR(s->path, suite_path("models/tiny")); /* without the slash */
    CHECK_EQ(source_read_text(s, "tokenizer.json", 1 << 24, &text, &n), STATUS_OK);
    CU_ASSERT(text != NULL && n > 1000 && text[n] == '\0' && strlen(text) == n);
    free(text);
    CHECK_EQ(source_read_text(s, "no_such_file.json", 1 << 20, &text, &n), STATUS_OK);
    CU_ASSERT(text == NULL && n == 0);
    CHECK_EQ(source_read_text(s, "tokenizer.json", 100, &text, &n), STATUS_MODEL);
    CU_ASSERT(text == NULL && strstr(fail_text(), "the limit is 100") != NULL);
    CHECK_EQ(s->config.arch, ARCH_QWEN3);
    struct source_tensor t;
    CU_ASSERT(s->ops->find(s, "model.layers.3.self_attn.q_norm.weight", &t) && t.cols == 32);
    source_close(s);
}

const struct suite_case suite_cases[] = {
    {"three formats by hand, unaligned", test_by_hand},
    {"fp8 weights with scales a block, a row, a tensor; what cannot be scales is refused",
     test_fp8},
    {"whole models, one file and shards", test_whole_models},
    {"hostile headers", test_hostile_headers},
    {"hostile bytes", test_hostile_bytes},
    {"folders that are no model", test_folders},
    {"indices", test_indices},
    {"texts beside the weights", test_texts},
    {NULL, NULL}};
