/* dense.c: the forward pass of a dense decoder (Llama, Mistral, Qwen2, Qwen3), from top to bottom.
 *
 * Every rank runs this on its own heads, ffn columns and vocabulary rows. The comm_ calls are all
 * the places where ranks meet: one all-reduce for the concept embeddings, two per layer. What
 * differs between the families (QKV bias, QK norm, RoPE scaling) is data in attention_spec, not
 * code here.
 *
 *   concept tokens ─ embed_mix ─ all_reduce ─► x            x: residual [T,D], fp32
 *   per layer:  h = norm(x);  q,k,v = qkv(h);  x += all_reduce(o · attention(q))
 *               h = norm(x);                   x += all_reduce(down · silu(gate h) (up h))
 *   chosen rows: h = norm(x);  z = lm_head h;  records = statistics and candidates of this rank
 *
 * Thread: engine. Memory: none is taken.
 */
#include <time.h>

#include "model/model_parts.h"

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* x += the sum of what all ranks have put into their slots; h = norm(x), the next matrix's input. */
static void reduce_norm(model *m, int rows, bool first, const float *weight) {
    const struct comm_norm norm = {.rows = rows,
                                   .hidden = m->config.hidden,
                                   .first = first,
                                   .scale = first ? m->config.embed_scale : 1.0f,
                                   .x = m->x,
                                   .weight = weight,
                                   .eps = m->config.norm_eps,
                                   .dtype = backend_activation(m->options.weight_dtype),
                                   .h = m->h};
    comm_all_reduce_norm(m->c, m->be, &norm, m->sum);
}

void model_forward(model *m, const struct batch *batch) {
    backend *be = m->be;
    const struct backend_ops *ops = be->ops;
    const enum backend_dtype dtype = backend_activation(m->options.weight_dtype);
    const int T = batch->row_count, D = m->config.hidden, slabs = m->shard.slab_count;
    const int logit_rows = batch->logit_row_count;
    ASSERT_LE(T, m->options.rows_max);
    ASSERT_LE(logit_rows, m->options.logit_rows_max);

    ops->embed_mix(be, batch, m->embed, slabs, m->shard.vocab_begin, comm_slot(m->c));
    reduce_norm(m, T, true, m->layers[0].attention_norm);

    for (int l = 0; l < m->config.layers; l++) {
        const struct model_layer *layer = &m->layers[l];

        ops->qkv(be, batch, &layer->attention, m->h, m->q);
        ops->attention(be, batch, &layer->attention, m->q, dtype, m->o);
        ops->row_matmul(be, T, layer->o, m->o, comm_slot(m->c));
        reduce_norm(m, T, false, layer->ffn_norm);

        ops->gate_up(be, T, layer->gate_up, m->h, m->act);
        ops->row_matmul(be, T, layer->down, m->act, comm_slot(m->c));
        if (l + 1 < m->config.layers) {
            reduce_norm(m, T, false, m->layers[l + 1].attention_norm);
        } else { /* the last sum meets the final norm, of chosen rows only */
            comm_all_reduce(m->c, (size_t)T * (size_t)D, m->sum);
        }
    }

    if (logit_rows > 0) {
        ops->add_norm_rows(be, batch->logit_rows, logit_rows, D, m->sum, m->x, m->final_norm,
                           m->config.norm_eps, dtype, m->h_last);
        ops->logits(be, logit_rows, m->lm_head, m->h_last, m->logits);
    }
}

void model_step(model *m, const struct batch *batch, void *records) {
    const double start = seconds_now();
    const struct backend_ops *ops = m->be->ops;
    if (ops->begin) ops->begin(m->be, batch);
    model_forward(m, batch);
    if (batch->logit_row_count > 0)
        ops->candidates(m->be, batch, m->logits, m->shard.slab_count, m->shard.vocab_begin,
                        m->options.vocab_count, records);
    m->forward_seconds += seconds_now() - start;
}

void model_fetch(model *m, const struct batch *batch, int probe, float *out) {
    m->be->ops->probe_logits(m->be, batch, probe, m->logits, m->shard.slab_count,
                             m->shard.vocab_begin, m->options.vocab_count, out);
}
