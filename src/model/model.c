/* model.c: a model's life on one rank: what it needs, opening, the KV cache, closing.
 *
 * Owns the struct model and its buffers (backend memory, freed with the backend) and the small host
 * arrays freed in model_close. model_need must name every byte model_open and model_kv_new take, but for
 * what a GPU's kernels work in (model_workspace_bytes): it is what `inspect` prints, and both are what
 * start-up compares with the free memory.
 */
#include <stdlib.h>

#include "kv/pages.h"
#include "model/model_parts.h"

static int64_t dtype_bytes(enum backend_dtype d) { return (int64_t)backend_dtype_bytes(d); }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

enum status model_need(const struct model_config *config, const struct model_options *options,
                       int ranks, int rank, struct model_need *out) {
    struct shard_dims dims;
    shard_map shard;
    config_shard_dims(config, &dims);
    TRY(shard_check(&dims, options->slabs, ranks));
    TRY(weights_check_dtype(config, options->weight_dtype));
    shard_map_init(&shard, &dims, options->slabs, ranks, rank);

    struct layer_specs specs;
    weights_layer_specs(config, &shard, options->weight_dtype, &specs);
    const struct matrix_spec vocab = weights_vocab_spec(config, &shard, options->weight_dtype);
    const int64_t hidden = config->hidden, hd = config->head_dim;
    const int64_t heads = shard_head_count(&shard), kv = shard_kv_count(&shard);
    const int64_t vectors =
        2 * hidden + (config->qkv_bias ? specs.qkv.rows : 0) + (config->qk_norm ? 2 * hd : 0);
    out->weight_bytes =
        config->layers * (weights_matrix_bytes(&specs.qkv) + weights_matrix_bytes(&specs.o) +
                          weights_matrix_bytes(&specs.gate_up) + weights_matrix_bytes(&specs.down) +
                          4 * vectors) +
        weights_matrix_bytes(&vocab) * (config->tied ? 1 : 2) + 4 * hidden;
    out->kv_bytes_per_page =
        2 * config->layers * kv * hd * KV_PAGE_TOKENS * dtype_bytes(options->kv_dtype);

    const int64_t rows = options->rows_max,
                  act = dtype_bytes(backend_activation(options->weight_dtype));
    const int64_t slots = ranks > 1 ? 2 : 1, ffn = shard_ffn_count(&shard);
    const int64_t widest = larger(hidden, larger(ffn, heads * hd));
    out->scratch_bytes = rows * hidden * (4 * (2 + slots) + act) /* x, sum, slots, h */
                         + rows * heads * hd * (4 + act)         /* q, o */
                         + rows * ffn * act                      /* act */
                         /* the CPU's inputs of a product, and new keys and values */
                         + rows * (widest + 2 * kv * hd) * 4 +
                         options->logit_rows_max * (hidden * act + shard_vocab_count(&shard) * 4) +
                         options->max_positions * hd * 4; /* RoPE */
    return STATUS_OK;
}

int64_t model_workspace_bytes(const struct model_config *config,
                              const struct model_options *options, int ranks, int rank,
                              backend *be) {
    struct shard_dims dims;
    shard_map shard;
    struct layer_specs specs;
    if (!be->ops->workspace_bytes) return 0;
    config_shard_dims(config, &dims);
    shard_map_init(&shard, &dims, options->slabs, ranks, rank);
    weights_layer_specs(config, &shard, options->weight_dtype, &specs);
    const struct matrix_spec vocab = weights_vocab_spec(config, &shard, options->weight_dtype);
    const struct matrix_spec *const all[] = {&specs.qkv, &specs.o, &specs.gate_up, &specs.down,
                                             &vocab};
    const struct kv_spec kv = {.layers = config->layers,
                               .heads = shard_head_count(&shard),
                               .kv_heads = shard_kv_count(&shard),
                               .head_dim = config->head_dim,
                               .positions_max = options->max_positions,
                               .page_count = INT32_MAX,
                               .dtype = options->kv_dtype};
    return be->ops->workspace_bytes(be, all, sizeof all / sizeof all[0], &kv);
}

static enum status take_buffers(model *m) {
    const struct backend_ops *ops = m->be->ops;
    const size_t rows = (size_t)m->options.rows_max, logit_rows = (size_t)m->options.logit_rows_max;
    const size_t hidden = (size_t)m->config.hidden;
    const size_t width = (size_t)shard_head_count(&m->shard) * (size_t)m->config.head_dim;
    const size_t act = (size_t)dtype_bytes(backend_activation(m->options.weight_dtype));
    const struct {
        void **to;
        size_t bytes;
        const char *what;
    } buffers[] = {
        {(void **)&m->x, rows * hidden * 4, "residual stream"},
        {(void **)&m->sum, rows * hidden * 4, "all-reduce result"},
        {&m->h, rows * hidden * act, "normed rows"},
        {(void **)&m->q, rows * width * 4, "queries"},
        {&m->o, rows * width * act, "attention output"},
        {&m->act, rows * (size_t)shard_ffn_count(&m->shard) * act, "gated activations"},
        {&m->h_last, logit_rows * hidden * act, "normed logit rows"},
        {(void **)&m->logits, logit_rows * (size_t)shard_vocab_count(&m->shard) * 4, "logits"},
    };
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++) {
        *buffers[i].to = ops->alloc(m->be, buffers[i].bytes, buffers[i].what);
        if (!*buffers[i].to) return STATUS_MEMORY;
    }
    return STATUS_OK;
}

enum status model_open(source *src, const struct model_options *options, backend *be, comm *c,
                       void (*progress)(void *user, int64_t done, int64_t total), void *user,
                       model **out) {
    enum status status = STATUS_OK;
    struct shard_dims dims;
    *out = NULL;
    model *m = calloc(1, sizeof *m);
    if (!m) return fail(STATUS_MEMORY, "cannot allocate the model");
    m->config = src->config;
    m->options = *options;
    m->be = be;
    m->c = c;
    config_shard_dims(&m->config, &dims);
    const int ranks = options->slice_ranks > 0 ? options->slice_ranks : comm_size(c);
    const int rank = options->slice_ranks > 0 ? options->slice_rank : comm_rank(c);
    TRY_GOTO(shard_check(&dims, options->slabs, ranks), out);
    shard_map_init(&m->shard, &dims, options->slabs, ranks, rank);

    const int heads = shard_head_count(&m->shard);
    m->layers = calloc((size_t)m->config.layers, sizeof *m->layers);
    m->kv_of_head = calloc((size_t)heads, sizeof *m->kv_of_head);
    if (!m->layers || !m->kv_of_head) {
        TRY_GOTO(fail(STATUS_MEMORY, "cannot allocate the layer table"), out);
    }
    const int group_heads = m->config.heads / m->config.kv_heads;
    for (int h = 0; h < heads; h++) {
        m->kv_of_head[h] = (m->shard.head_begin[0] + h) / group_heads - m->shard.kv_begin;
    }

    TRY_GOTO(weights_load(m, src, progress, user), out);
    if (options->kv_dtype == BACKEND_FP8) TRY_GOTO(kv_scales_load(m, src, &m->kv_scales), out);
    float *cos_table, *sin_table;
    TRY_GOTO(rope_tables(m, &cos_table, &sin_table), out);
    for (int l = 0; l < m->config.layers; l++) {
        m->layers[l].attention.rope_cos = cos_table;
        m->layers[l].attention.rope_sin = sin_table;
    }
    TRY_GOTO(take_buffers(m), out);
    *out = m;
    return STATUS_OK;
out:
    model_close(m);
    return status;
}

enum status model_kv_new(model *m, int32_t page_count) {
    return m->be->ops->kv_new(m->be, &(struct kv_spec){.layers = m->config.layers,
                                                       .heads = shard_head_count(&m->shard),
                                                       .kv_heads = shard_kv_count(&m->shard),
                                                       .head_dim = m->config.head_dim,
                                                       .positions_max = m->options.max_positions,
                                                       .page_count = page_count,
                                                       .dtype = m->options.kv_dtype,
                                                       .scales = m->kv_scales});
}

void model_close(model *m) {
    if (!m) return;
    if (m->be->ops->run) m->be->ops->run->forget(m->be); /* before anybody closes m->c */
    free(m->layers);
    free(m->kv_of_head);
    free(m->kv_scales);
    free(m);
}

const struct model_config *model_get_config(const model *m) { return &m->config; }
const shard_map *model_get_shard(const model *m) { return &m->shard; }
double model_forward_seconds(const model *m) { return m->forward_seconds; }

int64_t model_vocab_local_max(const model *m) {
    int64_t most = 0;
    for (int r = 0; r < m->shard.ranks; r++) {
        struct shard_dims dims;
        shard_map other;
        config_shard_dims(&m->config, &dims);
        shard_map_init(&other, &dims, m->shard.slabs, m->shard.ranks, r);
        if (shard_vocab_count(&other) > most) most = shard_vocab_count(&other);
    }
    return most;
}
