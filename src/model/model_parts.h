/* model_parts.h: the struct behind model.h, shared by the files of this folder only.
 *
 * weights.c and kv_scales.c fill it (what each rank reads and packs), dense.c runs it, model.c makes and ends it.
 * Buffers are device memory of the backend; [T] is options.rows_max, [n] options.logit_rows_max.
 */
#ifndef SFUMATO_MODEL_PARTS_H
#define SFUMATO_MODEL_PARTS_H

#include "model/model.h"

struct model_layer {
    float *attention_norm, *ffn_norm; /* [D] */
    struct attention_spec attention;
    matrix *o, *gate_up, *down;
};

struct model {
    struct model_config config;
    struct model_options options;
    shard_map shard;
    backend *be;
    comm *c;

    matrix *embed, *lm_head; /* the same matrix when tied */
    float *final_norm;       /* [D] */
    struct model_layer *layers;
    int *kv_of_head;  /* [H]: local kv head that local query head reads */
    float *kv_scales; /* fp8 KV cache: [layers][G][key, value], host; else NULL */

    float *x;      /* [T,D] residual stream, fp32 */
    float *sum;    /* [T,D] what the last all-reduce gave */
    void *h;       /* [T,D] normed rows, activation type */
    float *q;      /* [T,H,hd] */
    void *o;       /* [T,H,hd] attention output, activation type */
    void *act;     /* [T,F] gated activations, activation type */
    void *h_last;  /* [n,D] normed rows whose logits are wanted */
    float *logits; /* [n,V] of this rank's vocabulary rows */

    double forward_seconds;
};

/* From the batch's inputs to m->logits of its logit rows; the backend has the batch already. */
void model_forward(model *m, const struct batch *batch);

/* Local sizes. */
static inline int64_t model_vocab_local(const shard_map *s) { return shard_vocab_count(s); }
static inline int64_t model_ffn_local(const shard_map *s) { return shard_ffn_count(s); }

/* The packed matrices of one layer on one rank. Borders of row matrices are local columns;
 * `borders` must outlive the spec: two arrays of SHARD_SLABS_MAX + 1. */
struct layer_specs {
    struct matrix_spec qkv, o, gate_up, down;
    int64_t head_borders[SHARD_SLABS_MAX + 1], ffn_borders[SHARD_SLABS_MAX + 1];
};
void weights_layer_specs(const struct model_config *config, const shard_map *shard,
                         enum backend_dtype dtype, struct layer_specs *out);
struct matrix_spec weights_vocab_spec(const struct model_config *config, const shard_map *shard,
                                      enum backend_dtype dtype);

/* Bytes such a matrix takes. */
int64_t weights_matrix_bytes(const struct matrix_spec *spec);
/* STATUS_USAGE when this model cannot have such weights. */
enum status weights_check_dtype(const struct model_config *config, enum backend_dtype dtype);

enum status weights_load(model *m, source *src,
                         void (*progress)(void *user, int64_t done, int64_t total), void *user);

/* *out: malloc'ed, [layers][G][key, value]. */
enum status kv_scales_load(const model *m, source *src, float **out);

/* RoPE tables [max_positions, hd/2], made in double. */
enum status rope_tables(model *m, float **cos_table, float **sin_table);

#endif
