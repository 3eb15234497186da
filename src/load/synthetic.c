/* synthetic.c: a model of any shape without a file: weights are a hash of their place.
 *
 * Owns a config and a seed. Every element is a pure function of (seed, tensor name, row, column),
 * made of 32-bit integer operations and one exact conversion, so a rank makes its shard, a one-rank
 * run makes the whole, and both agree on every machine: a sharding bug cannot hide in a file. About
 * 0.5 G elements a second and core.
 *
 * Scales keep a forward pass as tame as a trained model's. Uniform in (-sqrt 3, sqrt 3) times:
 *
 *   embedding            1 (1/8 when it is also the output matrix: the norm makes up for it)
 *   projections          1 / sqrt(fan in): outputs are about as large as inputs
 *   q, k, v biases       0.3
 *   norms                1 + 0.1 times the value
 *   output matrix        1 / 8
 *
 * and the final norm makes LOUD_COLUMNS columns louder than all others together. The logits of a
 * position are then mostly a sum over these few, so their spread differs from one position to the
 * next (like chi with four degrees of freedom, root mean square LOGIT_SPREAD). For vocabularies of
 * 1,000 to 1,500 entropies then run from nearly 0 to 4.5 nats, half of them between 0.6 and 2, as
 * those of a trained model do: soft steps as well as cold stops occur.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load/source.h"

enum { LOUD_COLUMNS = 4, HASH_COLUMNS = 64 };
#define LOGIT_SPREAD 16.0 /* large: a sum of four bounded values has no tails of its own */
#define OUTPUT_SCALE 0.125

struct synthetic_source {
    source base;
    uint64_t seed;
};

/* What a tensor looks like: values are offset + scale * uniform. */
struct recipe {
    int64_t rows, cols;
    float offset, scale;
    bool final_norm;
};

static uint64_t mix64(uint64_t x) { /* SplitMix64's finaliser (Steele, Lea, Flood 2014) */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t name_key(const char *name, uint64_t seed) { /* FNV-1a */
    uint64_t h = 0xcbf29ce484222325u;
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 0x100000001b3u;
    return mix64(h ^ mix64(seed));
}

/* A fixed count, so that the compiler vectorises it at any optimisation level. */
static void hash_columns(uint32_t key0, uint32_t key1, uint32_t col, float offset, float scale,
                         float *out) {
    for (uint32_t i = 0; i < HASH_COLUMNS; i++) {
        uint32_t x = (col + i) * 0x9e3779b9u + key0;
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ key1 ^ x >> 15) * 0x846ca68bu;
        x ^= x >> 16;
        /* 24 bits convert exactly; centred, so that the mean is 0 */
        const float unit = (float)((int32_t)x >> 8) + 0.5f;
        out[i] = unit * scale + offset;
    }
}

static void make_row(uint64_t tensor_key, int64_t row, int64_t col_begin, int64_t col_count,
                     const struct recipe *r, float *dst) {
    const uint64_t key = mix64(tensor_key + (uint64_t)row * 0xd1342543de82ef95u);
    const uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
    const float scale = r->scale * (1.7320508f / 8388608.0f); /* sqrt 3 / 2^23 */
    float some[HASH_COLUMNS];
    int64_t done = 0;
    for (; done + HASH_COLUMNS <= col_count; done += HASH_COLUMNS) {
        hash_columns(key0, key1, (uint32_t)(col_begin + done), r->offset, scale, dst + done);
    }
    if (done < col_count) {
        hash_columns(key0, key1, (uint32_t)(col_begin + done), r->offset, scale, some);
        memcpy(dst + done, some, (size_t)(col_count - done) * sizeof *dst);
    }
}

/* All columns together give the logits a spread of 1, columns D/8, D/8 + D/4, ... one of
 * LOGIT_SPREAD. */
static void make_loud(int64_t hidden, int64_t col_begin, int64_t col_count, float *dst) {
    const float quiet = (float)(1 / OUTPUT_SCALE / sqrt((double)hidden));
    const float loud = (float)(LOGIT_SPREAD / OUTPUT_SCALE / sqrt(LOUD_COLUMNS));
    const int64_t step = hidden / LOUD_COLUMNS;
    for (int64_t i = 0; i < col_count; i++) {
        const bool is_loud = step > 0 && (col_begin + i) % step == step / 2;
        dst[i] *= is_loud ? loud : quiet;
    }
}

/* The recipe of "model.layers.N.PART.weight" without its prefix. */
static bool layer_recipe(const struct model_config *c, const char *part, struct recipe *r) {
    const int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    const struct {
        const char *name;
        int64_t rows, cols;
        char kind; /* m matrix, b bias, n norm */
        bool present;
    } parts[] = {
        {"input_layernorm.weight", 1, c->hidden, 'n', true},
        {"post_attention_layernorm.weight", 1, c->hidden, 'n', true},
        {"self_attn.q_proj.weight", q, c->hidden, 'm', true},
        {"self_attn.k_proj.weight", kv, c->hidden, 'm', true},
        {"self_attn.v_proj.weight", kv, c->hidden, 'm', true},
        {"self_attn.o_proj.weight", c->hidden, q, 'm', true},
        {"self_attn.q_proj.bias", 1, q, 'b', c->qkv_bias},
        {"self_attn.k_proj.bias", 1, kv, 'b', c->qkv_bias},
        {"self_attn.v_proj.bias", 1, kv, 'b', c->qkv_bias},
        {"self_attn.q_norm.weight", 1, c->head_dim, 'n', c->qk_norm},
        {"self_attn.k_norm.weight", 1, c->head_dim, 'n', c->qk_norm},
        {"mlp.gate_proj.weight", c->ffn, c->hidden, 'm', true},
        {"mlp.up_proj.weight", c->ffn, c->hidden, 'm', true},
        {"mlp.down_proj.weight", c->hidden, c->ffn, 'm', true},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (!parts[i].present || strcmp(part, parts[i].name) != 0) continue;
        *r = (struct recipe){.rows = parts[i].rows, .cols = parts[i].cols};
        r->offset = parts[i].kind == 'n' ? 1.0f : 0.0f;
        r->scale = parts[i].kind == 'n'   ? 0.1f
                   : parts[i].kind == 'b' ? 0.3f
                                          : (float)(1 / sqrt((double)parts[i].cols));
        return true;
    }
    return false;
}

static bool find_recipe(const struct model_config *c, const char *name, struct recipe *r) {
    int layer, used = 0;
    char canonical[32];
    *r = (struct recipe){.rows = c->vocab_rows, .cols = c->hidden};
    if (strcmp(name, "model.embed_tokens.weight") == 0) {
        r->scale = c->tied ? (float)OUTPUT_SCALE : 1.0f;
        return true;
    }
    if (strcmp(name, "lm_head.weight") == 0) {
        r->scale = (float)OUTPUT_SCALE;
        return !c->tied;
    }
    if (strcmp(name, "model.norm.weight") == 0) {
        *r = (struct recipe){1, c->hidden, 1.0f, 0.1f, true};
        return true;
    }
    if (sscanf(name, "model.layers.%9d.%n", &layer, &used) != 1 || used == 0) return false;
    snprintf(canonical, sizeof canonical, "model.layers.%d.",
             layer); /* "+3" and "03" are no layers */
    if (layer < 0 || layer >= c->layers || strncmp(name, canonical, strlen(canonical)) != 0) {
        return false;
    }
    return layer_recipe(c, name + used, r);
}

static bool synthetic_find(const source *src, const char *name, struct source_tensor *out) {
    struct recipe r;
    if (!find_recipe(&src->config, name, &r)) return false;
    *out = (struct source_tensor){.rows = r.rows,
                                  .cols = r.cols,
                                  .dtype_name = "synthetic",
                                  .file_bytes = 2 * r.rows * r.cols};
    return true;
}

static enum status synthetic_read(source *src, const char *name, int64_t row_begin,
                                  int64_t row_count, int64_t col_begin, int64_t col_count,
                                  float *dst) {
    const struct synthetic_source *s = (const struct synthetic_source *)src;
    struct recipe r;
    if (!find_recipe(&src->config, name, &r)) {
        return fail(STATUS_MODEL, "%s has no tensor %s", src->path, name);
    }
    ASSERT(row_begin >= 0 && row_count >= 0 && row_begin + row_count <= r.rows);
    ASSERT(col_begin >= 0 && col_count >= 0 && col_begin + col_count <= r.cols);
    const uint64_t key = name_key(name, s->seed);
    for (int64_t i = 0; i < row_count; i++) {
        make_row(key, row_begin + i, col_begin, col_count, &r, dst + i * col_count);
    }
    if (r.final_norm && row_count > 0) make_loud(r.cols, col_begin, col_count, dst);
    return STATUS_OK;
}

static void synthetic_close(source *src) { free(src); }

static const struct source_ops synthetic_ops = {
    .kind = "synthetic", .find = synthetic_find, .read = synthetic_read, .close = synthetic_close};

enum status synthetic_open(const struct model_config *config, uint64_t seed, source **out) {
    *out = NULL;
    TRY(config_check(config));
    struct synthetic_source *s = calloc(1, sizeof *s);
    if (!s) return fail(STATUS_MEMORY, "no memory for a synthetic model");
    s->base.ops = &synthetic_ops;
    s->base.config = *config;
    s->base.total_bytes = 2 * config_parameter_count(config); /* as if it were a bf16 file */
    s->seed = seed;
    snprintf(s->base.path, sizeof s->base.path, "synthetic %.40s of seed %llu", config->arch_name,
             (unsigned long long)seed);
    *out = &s->base;
    return STATUS_OK;
}
