/* weights.c: which rows and columns of which tensors a rank holds, and how they are packed.
 *
 *   embed, lm_head   [V local, D]   rows of this rank's vocabulary slabs (one matrix when tied)
 *   qkv              [(H + 2G) hd, D]  local query heads, then their kv heads' k, then v
 *   o                [D, H hd]      columns of the local query heads, cut at slab borders
 *   gate_up          2 x [F, D]     local ffn columns are rows here
 *   down             [D, F]         columns, cut at slab borders
 *   norms, biases    fp32 vectors   whole, or the local heads' part
 *
 * Rows are read as fp32 in blocks of at most LOAD_BLOCK_FLOATS through the source, checked for NaN
 * and infinity, and packed by the backend; so beside the packed weights only one block is in
 * memory. A wrong or missing tensor is reported with its name, what it should be and what the file
 * has. Thread: start-up, engine thread.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "model/model_parts.h"

enum { LOAD_BLOCK_FLOATS = 1 << 20, TENSOR_NAME_BYTES = 128 };

/* One loading run: the source, the block it reads into, and how far it is. */
struct loader {
    model *m;
    source *src;
    float *block;
    int64_t block_floats;
    int64_t done_floats, total_floats;
    void (*progress)(void *user, int64_t done, int64_t total);
    void *user;
};

void weights_layer_specs(const struct model_config *config, const shard_map *shard,
                         enum backend_dtype dtype, struct layer_specs *out) {
    const int64_t hidden = config->hidden, hd = config->head_dim;
    const int64_t heads = shard_head_count(shard), kv = shard_kv_count(shard);
    for (int s = 0; s <= shard->slab_count; s++) {
        out->head_borders[s] = (shard->head_begin[s] - shard->head_begin[0]) * hd;
        out->ffn_borders[s] = shard->ffn_begin[s] - shard->ffn_begin[0];
    }
    out->qkv = (struct matrix_spec){
        .kind = MATRIX_COLUMN, .dtype = dtype, .rows = (heads + 2 * kv) * hd, .cols = hidden};
    out->o = (struct matrix_spec){.kind = MATRIX_ROW,
                                  .dtype = dtype,
                                  .rows = hidden,
                                  .cols = heads * hd,
                                  .slab_count = shard->slab_count,
                                  .slab_begin = out->head_borders};
    out->gate_up = (struct matrix_spec){
        .kind = MATRIX_GATE_UP, .dtype = dtype, .rows = shard_ffn_count(shard), .cols = hidden};
    out->down = (struct matrix_spec){.kind = MATRIX_ROW,
                                     .dtype = dtype,
                                     .rows = hidden,
                                     .cols = shard_ffn_count(shard),
                                     .slab_count = shard->slab_count,
                                     .slab_begin = out->ffn_borders};
}

struct matrix_spec weights_vocab_spec(const struct model_config *config, const shard_map *shard,
                                      enum backend_dtype dtype) {
    return (struct matrix_spec){.kind = MATRIX_COLUMN,
                                .dtype = dtype,
                                .rows = shard_vocab_count(shard),
                                .cols = config->hidden};
}

/* The tensor must exist and be [rows, cols]. */
static enum status expect_shape(const struct loader *l, const char *name, int64_t rows,
                                int64_t cols) {
    struct source_tensor t;
    if (!l->src->ops->find(l->src, name, &t)) {
        return fail(STATUS_MODEL,
                    "%s: tensor %s is missing: the file is incomplete or of another architecture",
                    l->src->path, name);
    }
    if (t.rows != rows || t.cols != cols) {
        return fail(
            STATUS_MODEL,
            "%s: tensor %s is [%lld, %lld], the configuration says [%lld, %lld]: config and "
            "weights do not belong together",
            l->src->path, name, (long long)t.rows, (long long)t.cols, (long long)rows,
            (long long)cols);
    }
    return STATUS_OK;
}

static enum status expect_finite(const struct loader *l, const char *name, const float *values,
                                 int64_t count, int64_t row_begin, int64_t cols) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        bad |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
    }
    if (!bad) return STATUS_OK;
    int64_t i = 0;
    while (values[i] - values[i] == 0.0f)
        i++; /* NaN and infinity are the only values that are not */
    return fail(STATUS_MODEL,
                "%s: tensor %s holds %f at row %lld, column %lld: the file is damaged, download it "
                "again",
                l->src->path, name, (double)values[i], (long long)(row_begin + i / cols),
                (long long)(i % cols));
}

static void report(struct loader *l, int64_t floats) {
    l->done_floats += floats;
    if (l->progress) l->progress(l->user, l->done_floats, l->total_floats);
}

/* Packs rows [row_begin, +row_count) x columns [col_begin, +col_count) of a tensor into rows from
 * `to_row` of part `part` of a matrix. */
static enum status load_rows(struct loader *l, matrix *to, int part, int64_t to_row,
                             const char *name, int64_t row_begin, int64_t row_count,
                             int64_t col_begin, int64_t col_count) {
    if (col_count == 0) return STATUS_OK;
    int64_t step = l->block_floats / col_count / 32 * 32;
    if (step < 1) step = 1;
    for (int64_t done = 0; done < row_count; done += step) {
        const int64_t n = row_count - done < step ? row_count - done : step;
        TRY(l->src->ops->read(l->src, name, row_begin + done, n, col_begin, col_count, l->block));
        TRY(expect_finite(l, name, l->block, n * col_count, row_begin + done, col_count));
        l->m->be->ops->matrix_load(l->m->be, to, part, to_row + done, n, l->block);
        report(l, n * col_count);
    }
    return STATUS_OK;
}

/* Elements [begin, begin + count) of a vector of `length`, as fp32 in device memory at `to`. */
static enum status load_vector(struct loader *l, float *to, const char *name, int64_t length,
                               int64_t begin, int64_t count) {
    TRY(expect_shape(l, name, 1, length));
    TRY(l->src->ops->read(l->src, name, 0, 1, begin, count, l->block));
    TRY(expect_finite(l, name, l->block, count, 0, length));
    return l->m->be->ops->write(l->m->be, to, l->block, (size_t)count * sizeof(float));
}

static enum status new_vector(struct loader *l, float **out, const char *name, int64_t length) {
    *out = l->m->be->ops->alloc(l->m->be, (size_t)length * sizeof(float), name);
    return *out ? STATUS_OK : STATUS_MEMORY;
}

static enum status load_whole_vector(struct loader *l, float **out, const char *name,
                                     int64_t length) {
    TRY(new_vector(l, out, name, length));
    return load_vector(l, *out, name, length, 0, length);
}

static enum status load_vocab_matrix(struct loader *l, matrix **out, const char *name,
                                     bool lookup_only) {
    const model *m = l->m;
    struct matrix_spec spec = weights_vocab_spec(&m->config, &m->shard, m->options.weight_dtype);
    spec.lookup_only = lookup_only;
    TRY(expect_shape(l, name, m->config.vocab_rows, m->config.hidden));
    TRY(m->be->ops->matrix_new(m->be, &spec, out));
    return load_rows(l, *out, 0, 0, name, m->shard.vocab_begin[0], spec.rows, 0, m->config.hidden);
}

/* q, k, v of the local heads go into one matrix, their biases into one vector. */
static enum status load_qkv(struct loader *l, int layer, const struct matrix_spec *spec,
                            struct attention_spec *attention) {
    const model *m = l->m;
    const int64_t hd = m->config.head_dim;
    const struct {
        const char *letter;
        int64_t all_heads, begin, count;
    } parts[] = {
        {"q", m->config.heads, m->shard.head_begin[0], shard_head_count(&m->shard)},
        {"k", m->config.kv_heads, m->shard.kv_begin, shard_kv_count(&m->shard)},
        {"v", m->config.kv_heads, m->shard.kv_begin, shard_kv_count(&m->shard)},
    };
    char name[TENSOR_NAME_BYTES];
    matrix *qkv;
    float *bias = NULL;
    TRY(m->be->ops->matrix_new(m->be, spec, &qkv));
    if (m->config.qkv_bias) TRY(new_vector(l, &bias, "QKV bias", spec->rows));
    int64_t row = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        const int64_t begin = parts[i].begin * hd, count = parts[i].count * hd;
        snprintf(name, sizeof name, "model.layers.%d.self_attn.%s_proj.weight", layer,
                 parts[i].letter);
        TRY(expect_shape(l, name, parts[i].all_heads * hd, m->config.hidden));
        TRY(load_rows(l, qkv, 0, row, name, begin, count, 0, m->config.hidden));
        if (bias) {
            snprintf(name, sizeof name, "model.layers.%d.self_attn.%s_proj.bias", layer,
                     parts[i].letter);
            TRY(load_vector(l, bias + row, name, parts[i].all_heads * hd, begin, count));
        }
        row += count;
    }
    attention->qkv = qkv;
    attention->bias = bias;
    return STATUS_OK;
}

static enum status load_attention(struct loader *l, int layer, const struct layer_specs *specs,
                                  struct attention_spec *attention) {
    const model *m = l->m;
    char name[TENSOR_NAME_BYTES];
    float *norm = NULL;
    *attention = (struct attention_spec){.norm_eps = m->config.norm_eps,
                                         .heads = shard_head_count(&m->shard),
                                         .kv_heads = shard_kv_count(&m->shard),
                                         .head_dim = m->config.head_dim,
                                         .kv_of_head = m->kv_of_head,
                                         .layer = layer};
    TRY(load_qkv(l, layer, &specs->qkv, attention));
    if (m->config.qk_norm) {
        snprintf(name, sizeof name, "model.layers.%d.self_attn.q_norm.weight", layer);
        TRY(load_whole_vector(l, &norm, name, m->config.head_dim));
        attention->q_norm = norm;
        snprintf(name, sizeof name, "model.layers.%d.self_attn.k_norm.weight", layer);
        TRY(load_whole_vector(l, &norm, name, m->config.head_dim));
        attention->k_norm = norm;
    }
    return STATUS_OK;
}

static enum status load_row_matrix(struct loader *l, matrix **out, const char *name,
                                   const struct matrix_spec *spec, int64_t all_cols,
                                   int64_t col_begin) {
    TRY(expect_shape(l, name, spec->rows, all_cols));
    TRY(l->m->be->ops->matrix_new(l->m->be, spec, out));
    return load_rows(l, *out, 0, 0, name, 0, spec->rows, col_begin, spec->cols);
}

static enum status load_layer(struct loader *l, int layer, const struct layer_specs *specs) {
    model *m = l->m;
    struct model_layer *to = &m->layers[layer];
    const int64_t hidden = m->config.hidden, ffn = m->config.ffn;
    const int64_t width = (int64_t)m->config.heads * m->config.head_dim;
    char name[TENSOR_NAME_BYTES];

    snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", layer);
    TRY(load_whole_vector(l, &to->attention_norm, name, hidden));
    TRY(load_attention(l, layer, specs, &to->attention));
    snprintf(name, sizeof name, "model.layers.%d.self_attn.o_proj.weight", layer);
    TRY(load_row_matrix(l, &to->o, name, &specs->o, width,
                        (int64_t)m->shard.head_begin[0] * m->config.head_dim));

    snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", layer);
    TRY(load_whole_vector(l, &to->ffn_norm, name, hidden));
    TRY(m->be->ops->matrix_new(m->be, &specs->gate_up, &to->gate_up));
    static const char *const parts[] = {"gate", "up"};
    for (int part = 0; part < 2; part++) {
        snprintf(name, sizeof name, "model.layers.%d.mlp.%s_proj.weight", layer, parts[part]);
        TRY(expect_shape(l, name, ffn, hidden));
        TRY(load_rows(l, to->gate_up, part, 0, name, m->shard.ffn_begin[0], specs->gate_up.rows, 0,
                      hidden));
    }
    snprintf(name, sizeof name, "model.layers.%d.mlp.down_proj.weight", layer);
    return load_row_matrix(l, &to->down, name, &specs->down, ffn, m->shard.ffn_begin[0]);
}

static int64_t spec_floats(const struct matrix_spec *spec) {
    return spec->rows * spec->cols * (spec->kind == MATRIX_GATE_UP ? 2 : 1);
}

enum status weights_load(model *m, source *src,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    struct layer_specs specs;
    weights_layer_specs(&m->config, &m->shard, m->options.weight_dtype, &specs);
    const struct matrix_spec vocab =
        weights_vocab_spec(&m->config, &m->shard, m->options.weight_dtype);
    struct loader l = {.m = m, .src = src, .progress = progress, .user = user};
    l.total_floats = m->config.layers * (spec_floats(&specs.qkv) + spec_floats(&specs.o) +
                                         spec_floats(&specs.gate_up) + spec_floats(&specs.down)) +
                     spec_floats(&vocab) * (m->config.tied ? 1 : 2);
    /* a block holds any one row: the widest is a row of an ffn, attention or hidden width, or a
     * vector */
    l.block_floats = LOAD_BLOCK_FLOATS;
    const int64_t widths[] = {m->config.hidden, m->config.ffn,
                              (int64_t)m->config.heads * m->config.head_dim};
    for (int i = 0; i < 3; i++) {
        if (widths[i] > l.block_floats) l.block_floats = widths[i];
    }
    enum status status = STATUS_OK;
    l.block = malloc((size_t)l.block_floats * sizeof *l.block);
    if (!l.block) {
        return fail(STATUS_MEMORY, "cannot allocate %lld bytes to read the weights through",
                    (long long)l.block_floats * (long long)sizeof *l.block);
    }
    TRY_GOTO(load_vocab_matrix(&l, &m->embed, "model.embed_tokens.weight", !m->config.tied), out);
    m->lm_head = m->embed;
    for (int layer = 0; layer < m->config.layers; layer++) {
        TRY_GOTO(load_layer(&l, layer, &specs), out);
    }
    TRY_GOTO(load_whole_vector(&l, &m->final_norm, "model.norm.weight", m->config.hidden), out);
    if (!m->config.tied) TRY_GOTO(load_vocab_matrix(&l, &m->lm_head, "lm_head.weight", false), out);
out:
    free(l.block);
    return status;
}
