/* h_kv_scales.c: the fp8 cache's scales: names they go by, one or one a head, ranks, refusals. */
#include <math.h>

#include "model/model_parts.h"
#include "suite.h"

/* A checkpoint of nothing but such tensors. */
struct fake_tensor {
    const char *name;
    int64_t rows, cols;
    float values[8];
};
static const struct fake_tensor *tensors;

static const struct fake_tensor *fake_get(const char *name) {
    for (const struct fake_tensor *t = tensors; t->name; t++)
        if (strcmp(t->name, name) == 0) return t;
    return NULL;
}
static bool fake_find(const source *s, const char *name, struct source_tensor *out) {
    const struct fake_tensor *t = fake_get(name);
    (void)s;
    if (t) *out = (struct source_tensor){.rows = t->rows, .cols = t->cols, .dtype_name = "F32"};
    return t != NULL;
}
static enum status fake_read(source *s, const char *name, int64_t row_begin, int64_t row_count,
                             int64_t col_begin, int64_t col_count, float *dst) {
    const struct fake_tensor *t = fake_get(name);
    (void)s;
    CU_ASSERT_FATAL(t != NULL && row_begin == 0 && row_count == 1 &&
                    col_begin + col_count <= t->cols);
    memcpy(dst, t->values + col_begin, sizeof *dst * (size_t)col_count);
    return STATUS_OK;
}
static const struct source_ops fake_ops = {.kind = "fake", .find = fake_find, .read = fake_read};

/* What rank `rank` of `ranks` reads for 3 layers of 8 query and 4 kv heads. */
static enum status load(const struct fake_tensor *file, int ranks, int rank, float **out) {
    struct model m = {.config = {.layers = 3, .kv_heads = 4, .heads = 8, .head_dim = 16}};
    source src = {.ops = &fake_ops, .path = "here"};
    const struct shard_dims dims = {
        .vocab_rows = 64, .ffn = 64, .heads = 8, .kv_heads = 4, .head_dim = 16};
    shard_map_init(&m.shard, &dims, 8, ranks, rank);
    tensors = file;
    *out = NULL;
    return kv_scales_load(&m, &src, out);
}

static const struct fake_tensor all[] = {
    {"model.layers.0.self_attn.k_scale", 1, 1, {0.5f}},
    {"model.layers.0.self_attn.v_scale", 1, 4, {1.0f, 2.0f, 3.0f, 4.0f}},
    {"model.layers.2.self_attn.k_proj.k_scale", 1, 1, {0.25f}},
    {"model.layers.2.self_attn.v_proj.v_scale", 1, 1, {8.0f}},
    {NULL, 0, 0, {0}},
};

static void test_scales(void) {
    /* [layer][head][key, value]; layer 1 has none */
    static const float want[3][4][2] = {{{0.5f, 1}, {0.5f, 2}, {0.5f, 3}, {0.5f, 4}},
                                        {{1, 1}, {1, 1}, {1, 1}, {1, 1}},
                                        {{0.25f, 8}, {0.25f, 8}, {0.25f, 8}, {0.25f, 8}}};
    static const int ranks_of[] = {1, 2, 4, 8};
    for (int i = 0; i < 4; i++) {
        const int ranks = ranks_of[i], held = ranks < 4 ? 4 / ranks : 1;
        for (int rank = 0; rank < ranks; rank++) {
            const int begin = rank * 4 / ranks;
            float *scales = NULL;
            CU_ASSERT_FATAL(load(all, ranks, rank, &scales) == STATUS_OK);
            for (int layer = 0; layer < 3; layer++)
                CU_ASSERT(suite_equal_bytes("scales", scales + layer * held * 2, want[layer][begin],
                                            sizeof(float) * 2 * (size_t)held));
            free(scales);
        }
    }
}

static void test_refusals(void) {
    struct fake_tensor one[] = {{"model.layers.1.self_attn.v_scale", 1, 3, {1, 1, 1}},
                                {NULL, 0, 0, {0}}};
    float *scales;
    CHECK_EQ(load(one, 1, 0, &scales), STATUS_MODEL); /* neither one nor four */
    CU_ASSERT(strstr(fail_text(), "here: tensor model.layers.1.self_attn.v_scale is [1, 3]") !=
              NULL);
    static const float bad[] = {0.0f, -1.0f, NAN, INFINITY};
    one[0].cols = 1;
    for (int i = 0; i < 4; i++) {
        one[0].values[0] = bad[i];
        CHECK_EQ(load(one, 1, 0, &scales), STATUS_MODEL);
        CU_ASSERT(strstr(fail_text(), "--kv-dtype bf16") != NULL);
    }
}

const struct suite_case suite_cases[] = {
    {"one number or one a kv head, by either name, every rank its own; 1 where there is none",
     test_scales},
    {"what cannot be scales is refused", test_refusals},
    {NULL, NULL},
};
