/* b_synthetic.c: weights without a file: any slice is the same, scales are as promised. */
#include "load/source.h"
#include "suite.h"
#include "support/model_files.h"
#include "support/toy_model.h"

static source *open_toy(const char *name, uint64_t seed) {
    struct model_config c;
    source *s = NULL;
    CU_ASSERT_FATAL(toy_config(name, &c));
    CU_ASSERT_FATAL(synthetic_open(&c, seed, &s) == STATUS_OK);
    return s;
}

/* Made by tests/reference/synthetic.py, for seed 7 and toy_mha8. */
static void test_reference_values(void) {
    static const struct {
        const char *name;
        int row, col;
        uint32_t bits;
    } cases[] = {{"model.embed_tokens.weight", 0, 0, 0x3f80979c},
                 {"model.embed_tokens.weight", 999, 255, 0x3f8e0076},
                 {"lm_head.weight", 17, 63, 0x3e2bb397},
                 {"model.layers.0.input_layernorm.weight", 0, 5, 0x3f866596},
                 {"model.layers.2.mlp.down_proj.weight", 200, 511, 0xbd7e8d19},
                 {"model.layers.1.self_attn.q_proj.weight", 100, 64, 0xbceea3bf}};
    source *s = open_toy("toy_mha8", 7);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        float value;
        uint32_t bits;
        CHECK_EQ(s->ops->read(s, cases[i].name, cases[i].row, 1, cases[i].col, 1, &value),
                 STATUS_OK);
        memcpy(&bits, &value, 4);
        CHECK_EQ(bits, cases[i].bits);
    }
    source_close(s);
}

static void check_slices(void *user, const char *name) {
    source *s = user;
    struct source_tensor t;
    CU_ASSERT_FATAL(s->ops->find(s, name, &t));
    float *whole = malloc((size_t)(t.rows * t.cols) * sizeof *whole);
    float *part = malloc((size_t)(t.rows * t.cols) * sizeof *part);
    s->ops->read(s, name, 0, t.rows, 0, t.cols, whole);
    for (uint32_t i = 0; i < 6; i++) {
        const int64_t r0 = suite_random(1, 4 * i) % t.rows,
                      c0 = suite_random(1, 4 * i + 1) % t.cols;
        const int64_t rn = 1 + suite_random(1, 4 * i + 2) % (t.rows - r0);
        const int64_t cn = 1 + suite_random(1, 4 * i + 3) % (t.cols - c0);
        s->ops->read(s, name, r0, rn, c0, cn, part);
        bool equal = true;
        for (int64_t r = 0; r < rn; r++) {
            equal =
                equal && memcmp(part + r * cn, whole + (r0 + r) * t.cols + c0, (size_t)cn * 4) == 0;
        }
        CU_ASSERT(equal);
    }
    free(part);
    free(whole);
}

static void test_slices(void) {
    for (int i = 0; toy_names[i]; i++) {
        source *s = open_toy(toy_names[i], 3);
        model_each_tensor(&s->config, check_slices, s);
        source_close(s);
    }
}

static void check_moments(source *s, const char *name, double mean, double deviation) {
    struct source_tensor t;
    CU_ASSERT_FATAL(s->ops->find(s, name, &t));
    const int64_t count = t.rows * t.cols;
    float *w = malloc((size_t)count * sizeof *w);
    s->ops->read(s, name, 0, t.rows, 0, t.cols, w);
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)w[i];
    for (int64_t i = 0; i < count; i++)
        squares += ((double)w[i] - sum / (double)count) * ((double)w[i] - sum / (double)count);
    /* five standard errors; of a uniform variable's deviation about 0.45 / sqrt n */
    CHECK_NEAR(sum / (double)count, mean, 5 * deviation / sqrt((double)count));
    CHECK_NEAR(sqrt(squares / (double)count), deviation,
               5 * 0.45 * deviation / sqrt((double)count));
    free(w);
}

static void test_scales(void) {
    source *s = open_toy("toy_qk", 11); /* D 192, ffn 320, q width 512 */
    check_moments(s, "model.embed_tokens.weight", 0, 1);
    check_moments(s, "lm_head.weight", 0, 0.125);
    check_moments(s, "model.layers.0.self_attn.q_proj.weight", 0, 1 / sqrt(192));
    check_moments(s, "model.layers.1.self_attn.o_proj.weight", 0, 1 / sqrt(512));
    check_moments(s, "model.layers.2.mlp.down_proj.weight", 0, 1 / sqrt(320));
    check_moments(s, "model.layers.2.post_attention_layernorm.weight", 1, 0.1);
    check_moments(s, "model.layers.2.self_attn.k_norm.weight", 1, 0.1);
    source_close(s);
    s = open_toy("toy_gqa2", 11);
    check_moments(s, "model.embed_tokens.weight", 0, 0.125); /* tied */
    check_moments(s, "model.layers.1.self_attn.v_proj.bias", 0, 0.3);
    source_close(s);
}

static void test_differences(void) {
    enum { N = 64 };
    source *a = open_toy("toy_gqa3", 1), *b = open_toy("toy_gqa3", 2);
    float x[N], y[N];
    const char *up = "model.layers.0.mlp.up_proj.weight",
               *gate = "model.layers.0.mlp.gate_proj.weight";
    a->ops->read(a, up, 5, 1, 0, N, x);
    b->ops->read(b, up, 5, 1, 0, N, y);
    CU_ASSERT(memcmp(x, y, sizeof x) != 0); /* seed */
    a->ops->read(a, up, 6, 1, 0, N, y);
    CU_ASSERT(memcmp(x, y, sizeof x) != 0); /* row */
    a->ops->read(a, gate, 5, 1, 0, N, y);
    CU_ASSERT(memcmp(x, y, sizeof x) != 0); /* name */
    a->ops->read(a, "model.layers.1.mlp.up_proj.weight", 5, 1, 0, N, y);
    CU_ASSERT(memcmp(x, y, sizeof x) != 0); /* layer */
    int equal = 0;
    for (int i = 1; i < N; i++) equal += x[i] == x[i - 1];
    CHECK_EQ(equal, 0);
    source_close(a);
    source_close(b);
}

static void test_names(void) {
    source *s = open_toy("toy_gqa2", 1); /* tied, biases, 2 layers */
    struct source_tensor t;
    static const char *const absent[] = {"lm_head.weight",
                                         "model.layers.2.mlp.up_proj.weight",
                                         "model.layers.-1.mlp.up_proj.weight",
                                         "model.layers.01.mlp.up_proj.weight",
                                         "model.layers.0.self_attn.q_norm.weight",
                                         "model.layers.0.",
                                         ""};
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        CU_ASSERT(!s->ops->find(s, absent[i], &t));
    float value;
    CHECK_EQ(s->ops->read(s, "nothing", 0, 1, 0, 1, &value), STATUS_MODEL);
    CU_ASSERT(s->ops->find(s, "model.layers.1.self_attn.k_proj.weight", &t));
    CHECK_EQ(t.rows, 64);
    CHECK_EQ(t.cols, 448);
    char *text;
    size_t n;
    CHECK_EQ(source_read_text(s, "tokenizer.json", 100, &text, &n), STATUS_OK);
    CU_ASSERT(text == NULL && n == 0);
    struct model_config broken = s->config;
    source *none;
    broken.kv_heads = 3;
    CHECK_EQ(synthetic_open(&broken, 1, &none), STATUS_MODEL);
    CU_ASSERT(none == NULL);
    source_close(s);
    source_close(NULL);
}

const struct suite_case suite_cases[] = {
    {"values computed in Python", test_reference_values},
    {"any slice of a tensor is the same", test_slices},
    {"means and deviations", test_scales},
    {"seed, name, layer, row and column matter", test_differences},
    {"which tensors there are", test_names},
    {NULL, NULL}};
