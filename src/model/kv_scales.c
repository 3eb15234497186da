/* kv_scales.c: what a cached fp8 key or value is multiplied by, as the checkpoint says.
 *
 * Checkpoints calibrated for an fp8 KV cache hold one number a layer for keys and one for values
 * (or one a kv head): model.layers.N.self_attn.k_scale and v_scale, or k_proj.k_scale and
 * v_proj.v_scale. They are fixed when the model is loaded, so a row's bits do not depend on what
 * else was computed. A layer without them has scale 1: e4m3 spans +-448 and keeps three bits of the
 * fraction down to 2^-6, which suits most models; what is larger is cut off.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "model/model_parts.h"

enum { KINDS = 2, NAMES = 2, TENSOR_NAME_BYTES = 128 };

/* The scales of one layer and kind for the rank's kv heads: out[2 g + kind]. *found: there are. */
static enum status read_scales(const model *m, source *src, int layer, int kind, float *out,
                               bool *found) {
    static const char *const names[KINDS][NAMES] = {
        {"model.layers.%d.self_attn.k_scale", "model.layers.%d.self_attn.k_proj.k_scale"},
        {"model.layers.%d.self_attn.v_scale", "model.layers.%d.self_attn.v_proj.v_scale"}};
    char name[TENSOR_NAME_BYTES];
    struct source_tensor t;
    const int64_t heads = shard_kv_count(&m->shard);
    *found = false;
    for (int i = 0; i < NAMES && !*found; i++) {
        snprintf(name, sizeof name, names[kind][i], layer);
        *found = src->ops->find(src, name, &t);
    }
    if (!*found) return STATUS_OK;
    const bool single = t.rows * t.cols == 1;
    if (!single && (t.rows != 1 || t.cols != m->config.kv_heads)) {
        return fail(STATUS_MODEL,
                    "%s: tensor %s is [%lld, %lld]: scales of the KV cache are one number, or one "
                    "for each of the %d key/value heads: use --kv-dtype bf16",
                    src->path, name, (long long)t.rows, (long long)t.cols, m->config.kv_heads);
    }
    for (int64_t g = 0; g < heads; g++) {
        float scale;
        TRY(src->ops->read(src, name, 0, 1, single ? 0 : m->shard.kv_begin + g, 1, &scale));
        if (!(scale > 0.0f) || !isfinite(scale)) {
            return fail(STATUS_MODEL,
                        "%s: tensor %s holds %g: a scale must be above 0: use --kv-dtype bf16",
                        src->path, name, (double)scale);
        }
        out[KINDS * g + kind] = scale;
    }
    return STATUS_OK;
}

enum status kv_scales_load(const model *m, source *src, float **out) {
    enum status status = STATUS_OK;
    const size_t heads = (size_t)shard_kv_count(&m->shard), layers = (size_t)m->config.layers;
    int layers_with = 0;
    float *scales = malloc(sizeof *scales * KINDS * heads * layers);
    if (!scales) return fail(STATUS_MEMORY, "cannot allocate the scales of the KV cache");
    for (size_t i = 0; i < KINDS * heads * layers; i++) scales[i] = 1.0f;
    for (size_t layer = 0; layer < layers; layer++) {
        bool found[KINDS];
        for (int kind = 0; kind < KINDS; kind++)
            TRY_GOTO(
                read_scales(m, src, (int)layer, kind, scales + KINDS * heads * layer, &found[kind]),
                out);
        layers_with += found[0] && found[1];
    }
    log_info("fp8 KV cache: scales of the checkpoint in %d of %d layers, 1 in the others",
             layers_with, m->config.layers);
    *out = scales;
    return STATUS_OK;
out:
    free(scales);
    return status;
}
