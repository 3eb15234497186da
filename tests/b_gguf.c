/* b_gguf.c: GGUF files made by this suite's writer, one made by the Python package gguf, and a real one when
 * it is there. Every number format is read through the source; b_dequant.c checks the numbers. */
#include <unistd.h>

#include "base/log.h"
#include "load/file.h"
#include "load/gguf.h"
#include "suite.h"
#include "support/model_files.h"
#include "support/toy_model.h"
#include "support/vec.h"

static source *open_blob(struct gguf_writer *w, const char *folder) {
    struct blob b = {0};
    source *s = NULL;
    gguf_finish(w, &b);
    folder_write(folder, "m.gguf", b.bytes, b.n);
    blob_free(&b);
    const enum status status = source_open(folder_path(folder, "m.gguf"), &s);
    CU_ASSERT((status == STATUS_OK) == (s != NULL));
    return s;
}

static const char *const four_tokens[] = {"<|endoftext|>", "a", "b", "<|im_end|>"};
static const int32_t four_types[] = {3, 1, 1, 3};

/* A llama of 1 layer: D 64, ffn 64, 4 heads of 16, 2 kv heads, 4 tokens; and its embedding. */
static void begin_llama(struct gguf_writer *w) {
    static float embedding[4 * 64];
    gguf_key_text(w, "general.architecture", "llama");
    gguf_key_u32(w, "llama.block_count", 1);
    gguf_key_u32(w, "llama.embedding_length", 64);
    gguf_key_u32(w, "llama.feed_forward_length", 64);
    gguf_key_u32(w, "llama.attention.head_count", 4);
    gguf_key_u32(w, "llama.attention.head_count_kv", 2);
    gguf_key_u32(w, "llama.context_length", 512);
    gguf_key_f32(w, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    gguf_key_texts(w, "tokenizer.ggml.tokens", four_tokens, 4);
    gguf_tensor(w, "token_embd.weight", 0, 4, 64, embedding, sizeof embedding);
}

static void test_config(void) {
    const char *folder = folder_make();
    struct gguf_writer w = {0};
    begin_llama(&w);
    gguf_key_f32(&w, "llama.rope.freq_base", 500000.0f);
    gguf_key_i32s(&w, "tokenizer.ggml.token_type", four_types, 4);
    gguf_key_u32(&w, "tokenizer.ggml.eos_token_id", 3);
    gguf_key_u32(&w, "tokenizer.ggml.bos_token_id", 0);
    source *s = open_blob(&w, folder);
    CU_ASSERT_FATAL(s != NULL);
    const struct model_config *c = &s->config;
    CU_ASSERT(c->arch == ARCH_LLAMA && c->tied && !c->qkv_bias && !c->qk_norm);
    CHECK_EQ(c->head_dim, 16);
    CHECK_EQ(c->kv_heads, 2);
    CHECK_EQ(c->vocab_rows, 4);
    CHECK_EQ(c->max_positions, 512);
    CU_ASSERT(c->rope == ROPE_PLAIN && c->rope_theta == 500000 && c->norm_eps == 1e-5f);
    CHECK_EQ(c->bos_id, 0);
    CHECK_EQ(c->eos_count, 2); /* 3, and <|endoftext|> by its text */
    CHECK_EQ(c->eos_ids[0], 3);
    CHECK_EQ(c->eos_ids[1], 0);
    CHECK_EQ(c->file_dtype, DTYPE_F32);
    CU_ASSERT(c->temperature < 0 && c->top_k < 0);
    source_close(s);
    folder_remove(folder);
}

/* rope_freqs.weight as llama.cpp's converter writes it for Llama 3.1 (factor 8, 1, 4, 8192), head size 16:
 * wavelength 2 pi theta^(2i/16), turns = 8192 / wavelength; the same formula, written a second time. */
static void test_llama3_rope(void) {
    float divisors[8];
    for (int i = 0; i < 8; i++) {
        const double turns = 8192 / (2 * 3.14159265358979323846 * pow(500000.0, i / 8.0));
        divisors[i] = turns > 4   ? 1.0f
                      : turns < 1 ? 8.0f
                                  : (float)(1 / ((1 - (turns - 1) / 3) / 8 + (turns - 1) / 3));
    }
    const char *folder = folder_make();
    for (int broken = 0; broken < 2; broken++) {
        struct gguf_writer w = {0};
        begin_llama(&w);
        gguf_key_f32(&w, "llama.rope.freq_base", 500000.0f);
        if (broken) divisors[7] = 8.2f, divisors[6] = 7.0f;
        gguf_tensor(&w, "rope_freqs.weight", 0, 0, 8, divisors, sizeof divisors);
        source *s = open_blob(&w, folder);
        if (broken) {
            CU_ASSERT(s == NULL && strstr(fail_text(), "rope_freqs.weight[") != NULL);
            continue;
        }
        CU_ASSERT_FATAL(s != NULL);
        CHECK_EQ(s->config.rope, ROPE_LLAMA3);
        CHECK_NEAR(s->config.rope_factor, 8, 0);
        CHECK_EQ(s->config.rope_original_positions, 8192);
        source_close(s);
    }
    struct gguf_writer w = {0};
    begin_llama(&w);
    gguf_key_text(&w, "llama.rope.scaling.type", "linear");
    gguf_key_f32(&w, "llama.rope.scaling.factor", 2.0f);
    source *s = open_blob(&w, folder);
    CU_ASSERT_FATAL(s != NULL);
    CU_ASSERT(s->config.rope == ROPE_LINEAR && s->config.rope_factor == 2);
    source_close(s);
    folder_remove(folder);
}

/* Golden blocks of every format, as the rows of one matrix each, come back through the source. */
static void test_every_format(void) {
    struct vec_file v;
    static uint8_t bytes[3 * 256];
    static float want[3 * 256];
    const char *folder = folder_make();
    int formats = 0;
    vec_open(&v, "gguf_blocks.vec");
    for (bool more = vec_next(&v); more; formats++) {
        const struct dequant_type *type = dequant_find_name(v.words[1]);
        CU_ASSERT_FATAL(type != NULL);
        for (int b = 0; b < 3; b++) {
            for (int i = 0; i < type->bytes; i++) {
                unsigned byte;
                CHECK_EQ(sscanf(v.words[2] + 2 * i, "%2x", &byte), 1);
                bytes[b * type->bytes + i] = (uint8_t)byte;
            }
            for (int i = 0; i < type->elements; i++)
                want[b * type->elements + i] = vec_float(v.words[3 + i]);
            more = vec_next(&v);
        }
        struct gguf_writer w = {0};
        begin_llama(&w);
        gguf_tensor(&w, "blk.0.ffn_up.weight", (uint32_t)type->ggml_id, 3, type->elements, bytes,
                    3 * (size_t)type->bytes);
        source *s = open_blob(&w, folder);
        CU_ASSERT_FATAL(s != NULL);
        struct source_tensor t;
        static float got[3 * 256];
        const char *name = "model.layers.0.mlp.up_proj.weight";
        CU_ASSERT(s->ops->find(s, name, &t) && t.rows == 3 && t.cols == type->elements);
        CHECK_STR(t.dtype_name, type->name);
        CHECK_EQ(s->ops->read(s, name, 0, 3, 0, t.cols, got), STATUS_OK);
        CU_ASSERT(suite_equal_bytes(type->name, got, want, 3 * (size_t)type->elements * 4));
        source_close(s);
    }
    vec_close(&v);
    CHECK_EQ(formats, 10);
    folder_remove(folder);
}

struct pair {
    source *made, *read;
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
    CU_ASSERT(suite_equal_bytes(name, x, y, count * sizeof *x));
    /* some rows and columns only */
    const int64_t r0 = a.rows / 3, c0 = a.cols / 5, rn = a.rows - r0, cn = a.cols / 2;
    p->made->ops->read(p->made, name, r0, rn, c0, cn, x);
    CHECK_EQ(p->read->ops->read(p->read, name, r0, rn, c0, cn, y), STATUS_OK);
    CU_ASSERT(suite_equal_bytes(name, x, y, (size_t)(rn * cn) * sizeof *x));
    free(x);
    free(y);
}

/* llama's q and k are interleaved by the writer and must come back in order; qwen's must not be touched. A
 * llama with QKV bias (there is none in Hugging Face's class, but converters write it) has its biases
 * interleaved, too. */
static void test_whole_models(void) {
    for (int i = 0; i <= 6; i++) {
        struct model_config c;
        struct pair p;
        const char *folder = folder_make();
        CU_ASSERT_FATAL(toy_config(i < 6 ? toy_names[i] : "toy_gqa3", &c));
        c.arch = c.arch == ARCH_MISTRAL ? ARCH_LLAMA : c.arch;
        if (i == 6) c.qkv_bias = true;
        CU_ASSERT_FATAL(synthetic_open(&c, 5, &p.made) == STATUS_OK);
        model_write_gguf(p.made, folder, "toy.gguf");
        CHECK_EQ(source_open(folder_path(folder, "toy.gguf"), &p.read), STATUS_OK);
        CU_ASSERT_FATAL(p.read != NULL);
        const struct model_config *got = &p.read->config;
        CHECK_EQ(got->arch, c.arch);
        CHECK_EQ(got->heads, c.heads);
        CHECK_EQ(got->kv_heads, c.kv_heads);
        CHECK_EQ(got->head_dim, c.head_dim);
        CHECK_EQ(got->vocab_rows, c.vocab_rows);
        CU_ASSERT(got->tied == c.tied && got->qkv_bias == c.qkv_bias && got->qk_norm == c.qk_norm);
        CHECK_EQ(p.read->total_bytes, 4 * config_parameter_count(&c));
        model_each_tensor(&c, check_equal, &p);
        source_close(p.read);
        source_close(p.made);
        folder_remove(folder);
    }
}

static bool text_is(struct gguf_string s, const char *text) {
    return s.n == strlen(text) && memcmp(s.bytes, text, s.n) == 0;
}

static void test_tokenizer(void) {
    static const char *const merges[] = {"a b", "ab c"};
    const char *folder = folder_make();
    struct gguf_writer w = {0};
    const struct gguf_tokenizer *t = NULL;
    begin_llama(&w);
    gguf_key_text(&w, "tokenizer.ggml.model", "gpt2");
    gguf_key_text(&w, "tokenizer.ggml.pre", "smollm");
    gguf_key_texts(&w, "tokenizer.ggml.merges", merges, 2);
    gguf_key_i32s(&w, "tokenizer.ggml.token_type", four_types, 4);
    gguf_key_u32(&w, "tokenizer.ggml.bos_token_id", 1);
    gguf_key_u32(&w, "tokenizer.ggml.eos_token_id", 3);
    gguf_key_bool(&w, "tokenizer.ggml.add_bos_token", true);
    gguf_key_text(&w, "tokenizer.chat_template", "{{ x }}");
    source *s = open_blob(&w, folder);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_OK);
    CU_ASSERT_FATAL(t != NULL);
    CHECK_EQ(t->token_count, 4);
    CHECK_EQ(t->merge_count, 2);
    CU_ASSERT(text_is(t->tokens[0], "<|endoftext|>") && text_is(t->tokens[2], "b"));
    CU_ASSERT(text_is(t->merges[1], "ab c") && text_is(t->chat_template, "{{ x }}"));
    CU_ASSERT(memcmp(t->token_types, four_types, sizeof four_types) == 0);
    CHECK_STR(t->model, "gpt2");
    CHECK_STR(t->pre, "smollm");
    CU_ASSERT(t->bos_id == 1 && t->eos_id == 3 && t->add_bos && !t->add_eos);
    source_close(s);

    w = (struct gguf_writer){0}; /* nothing but the tokens */
    begin_llama(&w);
    s = open_blob(&w, folder);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_OK);
    CU_ASSERT(t->token_types == NULL && t->merge_count == 0 && t->chat_template.n == 0 &&
              t->bos_id == -1 && !t->add_bos && t->pre[0] == '\0');
    source_close(s);

    for (int broken = 0; broken < 3; broken++) { /* arrays that are there and cannot be used */
        static const char *const named[] = {"merges must be an array of texts",
                                            "token_type must be an array of 32-bit",
                                            "token_type has 3 items for 4 tokens"};
        w = (struct gguf_writer){0};
        begin_llama(&w);
        if (broken == 0) gguf_key_i32s(&w, "tokenizer.ggml.merges", four_types, 4);
        if (broken == 1) gguf_key_texts(&w, "tokenizer.ggml.token_type", four_tokens, 4);
        if (broken == 2) gguf_key_i32s(&w, "tokenizer.ggml.token_type", four_types, 3);
        s = open_blob(&w, folder);
        CU_ASSERT_FATAL(s != NULL);
        CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_MODEL);
        CU_ASSERT(strstr(fail_text(), named[broken]) != NULL);
        source_close(s);
    }

    w = (struct gguf_writer){0}; /* a Llama 3 file of before the key add_bos_token */
    begin_llama(&w);
    gguf_key_text(&w, "tokenizer.ggml.pre", "llama-bpe");
    s = open_blob(&w, folder);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_OK);
    CU_ASSERT(t->add_bos);
    source_close(s);

    CHECK_EQ(source_open(suite_path("models/tiny"), &s), STATUS_OK);
    CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_OK);
    CU_ASSERT(t == NULL);
    source_close(s);
    folder_remove(folder);
}

static void check_refused(struct gguf_writer *w, const char *folder, const char *message) {
    source *s = open_blob(w, folder);
    CU_ASSERT(s == NULL);
    const bool found = s == NULL && strstr(fail_text(), message) != NULL;
    if (!found) printf("\n    \"%s\" lacks \"%s\"\n", fail_text(), message);
    CU_ASSERT(found);
    source_close(s);
    *w = (struct gguf_writer){0};
}

static void test_refusals(void) {
    const char *folder = folder_make();
    static const uint8_t data[4096];
    struct gguf_writer w = {0};
    gguf_key_text(&w, "general.architecture", "mamba");
    check_refused(&w, folder, "architecture \"mamba\" is not supported");
    check_refused(&w, folder, "architecture \"\" is not supported");
    gguf_key_text(&w, "general.architecture", "llama");
    check_refused(&w, folder, "llama.block_count is missing");
    begin_llama(&w);
    gguf_key_u32(&w, "split.count", 3);
    check_refused(&w, folder, "llama-gguf-split --merge");
    begin_llama(&w);
    gguf_key_u32(&w, "llama.expert_count", 8);
    check_refused(&w, folder, "mixture of 8 experts");
    begin_llama(&w);
    gguf_key_u32(&w, "llama.rope.dimension_count", 8);
    check_refused(&w, folder, "8 rotated columns");
    begin_llama(&w);
    gguf_key_text(&w, "llama.rope.scaling.type", "yarn");
    check_refused(&w, folder, "RoPE scaling \"yarn\"");
    begin_llama(&w);
    gguf_key_u32(&w, "llama.attention.key_length", 15);
    check_refused(&w, folder, "head size 15");
    /* no key_length: the head size is 4096 / 4, and rope_freqs.weight fits it */
    static const float divisors[512];
    gguf_key_text(&w, "general.architecture", "llama");
    gguf_key_u32(&w, "llama.block_count", 1);
    gguf_key_u32(&w, "llama.embedding_length", 4096);
    gguf_key_u32(&w, "llama.feed_forward_length", 64);
    gguf_key_u32(&w, "llama.attention.head_count", 4);
    gguf_key_u32(&w, "llama.context_length", 512);
    gguf_tensor(&w, "rope_freqs.weight", 0, 0, 512, divisors, sizeof divisors);
    check_refused(&w, folder, "a head has at most 512");
    begin_llama(&w);
    gguf_key_f32(&w, "llama.rope.freq_base", NAN);
    check_refused(&w, folder, "llama.rope.freq_base must be a number");
    begin_llama(&w);
    gguf_key_u32(&w, "tokenizer.ggml.eos_token_id", 4);
    check_refused(&w, folder, "eos_token_id must be an id below 4");
    begin_llama(&w);
    gguf_tensor(&w, "x", 10, 1, 256, data, 84);
    check_refused(&w, folder, "tensor x has type Q2_K, which is not supported");
    begin_llama(&w);
    gguf_tensor(&w, "x", 999, 1, 256, data, 84);
    check_refused(&w, folder, "tensor x has type unknown");
    begin_llama(&w);
    gguf_tensor(&w, "x", 12, 1, 255, data, 144);
    check_refused(&w, folder, "tensor x has 255 columns, Q4_K needs a multiple of 256");
    begin_llama(&w);
    gguf_tensor(&w, "x", 0, 2, 64, data, 256); /* half of its bytes */
    check_refused(&w, folder, "download it again");
    begin_llama(&w);
    gguf_tensor(&w, "token_embd.weight", 0, 1, 1, data, 4);
    check_refused(&w, folder, "token_embd.weight is there twice");
    begin_llama(&w);
    gguf_tensor(&w, "x", 0, INT32_MAX, INT32_MAX, data, 16); /* 2^64 bytes */
    check_refused(&w, folder, "unusable shape");
    for (int i = 0; i < 3; i++) { /* 2^62 bytes each */
        static const char *const names[] = {"x", "y", "z"};
        if (i == 0) begin_llama(&w);
        gguf_tensor(&w, names[i], 0, 1ll << 30, 1ll << 30, data, 16);
    }
    check_refused(&w, folder, "more bytes than there can be");
    begin_llama(&w);
    gguf_tensor(&w, "x", 0, 0, 0, data, 0);
    check_refused(&w, folder, "dimension of 0");
    begin_llama(&w);
    gguf_tensor(&w, "blk.0.attn_output.bias", 0, 0, 64, data, 256);
    check_refused(&w, folder, "biases outside");
    begin_llama(&w);
    gguf_key_u32(&w, "general.alignment", 48);
    check_refused(&w, folder, "general.alignment");
    begin_llama(&w);
    gguf_key_u32(&w, "general.alignment", 64); /* the tensors below are aligned to 32 only */
    gguf_tensor(&w, "x", 0, 0, 8, data, 32);
    gguf_tensor(&w, "y", 0, 0, 8, data, 32);
    check_refused(&w, folder, "not aligned to 64");
    gguf_key_text(&w, "general.architecture", "llama");
    gguf_key_u32(&w, "llama.embedding_length", 64);
    gguf_key_i32s(&w, "llama.block_count", four_types, 4);
    check_refused(&w, folder, "differs from layer to layer");
    folder_remove(folder);
}

static enum status parse(const uint8_t *bytes, size_t n) {
    arena a;
    struct gguf_file file;
    struct model_config c;
    arena_init(&a, 0);
    enum status status = gguf_parse(bytes, n, &a, &file);
    if (status == STATUS_OK) status = gguf_read_config(&file, &c);
    gguf_file_fini(&file);
    arena_fini(&a);
    return status;
}

/* Patches 8 bytes at the first place where `text` stands, `skip` bytes further. */
static void patch(const struct blob *b, const char *text, size_t skip, uint64_t value) {
    uint8_t *at = memmem(b->bytes, b->n, text, strlen(text));
    CU_ASSERT_FATAL(at != NULL);
    memcpy(at + strlen(text) + skip, &value, 8);
}

static void test_hostile_bytes(void) {
    struct gguf_writer w = {0};
    struct blob b = {0};
    begin_llama(&w);
    gguf_finish(&w, &b);
    CHECK_EQ(parse(b.bytes, b.n), STATUS_OK);
    for (size_t n = 0; n < b.n; n++) { /* a copy, so that a sanitizer sees its end */
        uint8_t *copy = malloc(n + 1);
        memcpy(copy, b.bytes, n);
        CHECK_EQ(parse(copy, n), STATUS_MODEL);
        free(copy);
    }
    static const uint64_t huge[] = {UINT64_MAX, INT64_MAX, 1ull << 63, 1ull << 32, UINT64_MAX / 8};
    for (size_t i = 0; i < sizeof huge / sizeof huge[0]; i++) {
        const struct {
            size_t at;
        } counts[] = {{8}, {16}, {24}}; /* tensors, keys, length of the first key */
        for (size_t k = 0; k < 3; k++) {
            uint8_t saved[8];
            memcpy(saved, b.bytes + counts[k].at, 8);
            memcpy(b.bytes + counts[k].at, &huge[i], 8);
            CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
            memcpy(b.bytes + counts[k].at, saved, 8);
        }
        struct blob c = {0};
        blob_add(&c, b.bytes, b.n);
        patch(&c, "tokenizer.ggml.tokens", 8, huge[i]); /* after type and item type: the count */
        CHECK_EQ(parse(c.bytes, c.n), STATUS_MODEL);
        patch(&c, "tokenizer.ggml.tokens", 8, 4);
        CHECK_EQ(parse(c.bytes, c.n), STATUS_OK);
        patch(&c, "token_embd.weight", 4, huge[i]); /* columns */
        CHECK_EQ(parse(c.bytes, c.n), STATUS_MODEL);
        patch(&c, "token_embd.weight", 4, 64);
        patch(&c, "token_embd.weight", 24, huge[i]); /* offset */
        CHECK_EQ(parse(c.bytes, c.n), STATUS_MODEL);
        blob_free(&c);
    }
    b.bytes[4] = 1;
    CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "GGUF version 1") != NULL);
    memcpy(b.bytes + 4, "\0\0\0\3", 4);
    CHECK_EQ(parse(b.bytes, b.n), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "big-endian") != NULL);
    CHECK_EQ(parse((const uint8_t *)"version https://git-lfs", 23), STATUS_MODEL);
    CU_ASSERT(strstr(fail_text(), "not a GGUF file") != NULL);
    blob_free(&b);
}

/* The rows that the Python package gguf reads from the file of launch/get-model, in Hugging Face's order. */
static void test_real_file(void) {
    source *s = NULL;
    struct vec_file v;
    float got[8], want[8];
    const char *path = suite_path("models/cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    if (!file_exists(path)) {
        printf("skipped: no %s (launch/get-model smollm2) ", path);
        return;
    }
    CHECK_EQ(source_open(path, &s), STATUS_OK);
    CU_ASSERT_FATAL(s != NULL);
    CHECK_EQ(config_parameter_count(&s->config), 134515008);
    CHECK_EQ(s->config.file_dtype, DTYPE_QUANTISED);
    CU_ASSERT(s->config.tied && s->config.heads == 9 && s->config.kv_heads == 3 &&
              s->config.head_dim == 64);
    vec_open(&v, "gguf_smollm2.vec");
    while (vec_next(&v)) {
        for (int i = 0; i < 8; i++) want[i] = vec_float(v.words[4 + i]);
        CHECK_EQ(s->ops->read(s, v.words[1], atoll(v.words[2]), 1, atoll(v.words[3]), 8, got),
                 STATUS_OK);
        CU_ASSERT(suite_equal_bytes(v.words[1], got, want, sizeof want));
    }
    vec_close(&v);
    const struct gguf_tokenizer *t;
    CHECK_EQ(gguf_get_tokenizer(s, &t), STATUS_OK);
    CHECK_EQ(t->token_count, 49152);
    CHECK_STR(t->pre, "smollm");
    CU_ASSERT(t->chat_template.n > 0);
    source_close(s);
}

int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    log_init(LOG_ERROR, false); /* the warnings are meant */
    return 0;
}

const struct suite_case suite_cases[] = {{"metadata", test_config},
                                         {"RoPE of Llama 3 from its divisors", test_llama3_rope},
                                         {"every number format", test_every_format},
                                         {"whole models, q and k in order", test_whole_models},
                                         {"the tokenizer's arrays", test_tokenizer},
                                         {"refusals", test_refusals},
                                         {"hostile bytes", test_hostile_bytes},
                                         {"a real file", test_real_file},
                                         {NULL, NULL}};
