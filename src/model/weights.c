/* weights.c: which rows and columns of which tensors a rank holds, and how they are packed.
 *
 *   embed, lm_head   [V local, D]   rows of this rank's vocabulary slabs (one matrix when tied)
 *   qkv              [(H + 2G) hd, D]  local query heads, then their kv heads' k, then v
 *   o                [D, H hd]      columns of the local query heads, cut at slab borders
 *   gate_up          2 x [F, D]     local ffn columns are rows here
 *   down             [D, F]         columns, cut at slab borders
 *   norms, biases    fp32 vectors   whole, or the local heads' part
 *
 * Vectors are loaded at once; the rows of matrices become a list of runs, which weights_read.c works
 * off on all threads. A run never crosses a slab, a kv head or a tensor, so that fp8 blocks, which
 * count from its first row, do not depend on the number of ranks. A wrong or missing tensor is
 * reported with its name, what it should be and what the file has. Thread: start-up, engine thread.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fp8.h"
#include "model/weights_read.h"

/* One loading: the source, room for a vector, and the runs so far. */
struct loader {
    model *m;
    source *src;
    float *vector;
    struct weights_runs list;
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
                                .dtype = backend_activation(dtype), /* fp8 is for the layers */
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

int64_t weights_not_finite(const float *values, int64_t count) {
    enum { BLOCK = 256 }; /* a fixed count, so that the compiler vectorises it */
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        uint32_t bad = 0;
        for (int k = 0; k < BLOCK; k++) {
            uint32_t bits;
            memcpy(&bits, values + i + k, sizeof bits);
            bad |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
        }
        if (bad) break;
    }
    while (i < count && values[i] - values[i] == 0.0f)
        i++; /* NaN and infinity are the only values that are not */
    return i < count ? i : -1;
}

enum status weights_fail_not_finite(const source *src, const char *name, double value, int64_t row,
                                    int64_t col) {
    return fail(STATUS_MODEL,
                "%s: tensor %s holds %f at row %lld, column %lld: the file is damaged, download it "
                "again",
                src->path, name, value, (long long)row, (long long)col);
}

/* Rows [row_begin, +row_count) x columns [col_begin, +spec->cols) of a tensor go to rows from
 * `to_row` of part `part` of a matrix. Only fp8 cares where a run ends: others grow. */
static enum status add_run(struct loader *l, matrix *to, const struct matrix_spec *spec, int part,
                           int64_t to_row, const char *name, int64_t row_begin, int64_t row_count,
                           int64_t col_begin) {
    struct weights_runs *list = &l->list;
    if (spec->cols == 0 || row_count == 0) return STATUS_OK;
    struct weights_run *last = list->count > 0 ? &list->runs[list->count - 1] : NULL;
    if (last && last->to == to && last->part == part && strcmp(last->name, name) == 0 &&
        last->row_begin + last->row_count == row_begin && spec->dtype != BACKEND_FP8) {
        last->row_count += row_count;
        return STATUS_OK;
    }
    if (list->count == list->capacity) {
        const size_t capacity = list->capacity ? 2 * list->capacity : 256;
        void *grown = realloc(list->runs, capacity * sizeof *list->runs);
        if (!grown) return fail(STATUS_MEMORY, "no memory for a list of %zu tensors", capacity);
        list->runs = grown;
        list->capacity = capacity;
    }
    struct weights_run *run = &list->runs[list->count++];
    *run = (struct weights_run){.to = to,
                                .spec = spec,
                                .part = part,
                                .to_row = to_row,
                                .row_begin = row_begin,
                                .row_count = row_count,
                                .col_begin = col_begin};
    snprintf(run->name, sizeof run->name, "%s", name);
    return STATUS_OK;
}

/* Elements [begin, begin + count) of a vector of `length`, as fp32 in device memory at `to`. */
static enum status load_vector(struct loader *l, float *to, const char *name, int64_t length,
                               int64_t begin, int64_t count) {
    TRY(expect_shape(l, name, 1, length));
    TRY(l->src->ops->read(l->src, name, 0, 1, begin, count, l->vector));
    const int64_t bad = weights_not_finite(l->vector, count);
    if (bad >= 0)
        return weights_fail_not_finite(l->src, name, (double)l->vector[bad], 0, begin + bad);
    return l->m->be->ops->write(l->m->be, to, l->vector, (size_t)count * sizeof(float));
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
                                     const struct matrix_spec *spec) {
    const model *m = l->m;
    TRY(expect_shape(l, name, m->config.vocab_rows, m->config.hidden));
    TRY(m->be->ops->matrix_new(m->be, spec, out));
    return add_run(l, *out, spec, 0, 0, name, m->shard.vocab_begin[0], spec->rows, 0);
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
        /* head by head: a slab is whole query heads, and kv heads are on several ranks */
        for (int64_t h = 0; h < count; h += hd)
            TRY(add_run(l, qkv, spec, 0, row + h, name, begin + h, hd, 0));
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
    return add_run(l, *out, spec, 0, 0, name, 0, spec->rows, col_begin);
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
        const int64_t *border = m->shard.ffn_begin;
        for (int s = 0; s < m->shard.slab_count; s++)
            TRY(add_run(l, to->gate_up, &specs->gate_up, part, border[s] - border[0], name,
                        border[s], border[s + 1] - border[s], 0));
    }
    snprintf(name, sizeof name, "model.layers.%d.mlp.down_proj.weight", layer);
    return load_row_matrix(l, &to->down, name, &specs->down, ffn, m->shard.ffn_begin[0]);
}

int64_t weights_matrix_bytes(const struct matrix_spec *spec) {
    if (spec->dtype != BACKEND_FP8) return cpu_matrix_bytes(spec);
    /* tiles of 16 rows (of 8 gate and 8 up rows); 128 codes a row and block, and two scales a tile */
    const int64_t rows = spec->kind == MATRIX_GATE_UP ? 8 : 16;
    const int64_t tiles = (spec->rows + rows - 1) / rows * weights_column_blocks(spec);
    return (tiles * (16 * FP8_BLOCK + 2 * (int64_t)sizeof(float)) + 15) / 16 * 16;
}

enum status weights_check_dtype(const struct model_config *config, enum backend_dtype dtype) {
    if (dtype != BACKEND_FP8 || config->head_dim % 8 == 0) return STATUS_OK;
    return fail(STATUS_USAGE,
                "--dtype fp8 needs heads of a multiple of 8, this model has %d: use --dtype bf16",
                config->head_dim);
}

enum status weights_load(model *m, source *src,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user) {
    const enum backend_dtype dtype = m->options.weight_dtype;
    enum status status = STATUS_OK;
    struct layer_specs specs;
    TRY(weights_check_dtype(&m->config, dtype));
    weights_layer_specs(&m->config, &m->shard, dtype, &specs);
    const struct matrix_spec lm_head = weights_vocab_spec(&m->config, &m->shard, dtype);
    struct matrix_spec embed = lm_head;
    embed.lookup_only = !m->config.tied;
    struct loader l = {.m = m, .src = src};
    /* the longest vector: norms, the biases of a rank's heads */
    const int64_t width = (int64_t)m->config.heads * m->config.head_dim;
    const int64_t longest = m->config.hidden > width ? m->config.hidden : width;
    l.vector = malloc((size_t)longest * sizeof *l.vector);
    if (!l.vector) return fail(STATUS_MEMORY, "no memory for a vector of %lld", (long long)longest);
    TRY_GOTO(load_vocab_matrix(&l, &m->embed, "model.embed_tokens.weight", &embed), out);
    m->lm_head = m->embed;
    for (int layer = 0; layer < m->config.layers; layer++) {
        TRY_GOTO(load_layer(&l, layer, &specs), out);
    }
    TRY_GOTO(load_whole_vector(&l, &m->final_norm, "model.norm.weight", m->config.hidden), out);
    if (!m->config.tied)
        TRY_GOTO(load_vocab_matrix(&l, &m->lm_head, "lm_head.weight", &lm_head), out);
    TRY_GOTO(weights_read(src, m->be, &l.list, progress, user), out);
    if (src->ops->forget) src->ops->forget(src);
out:
    free(l.vector);
    free(l.list.runs);
    return status;
}
