/* config.h: what a model is, read from config.json (+ generation_config.json) or GGUF metadata.
 *
 * Owns nothing: a plain struct. Every field is validated where it is read (positive, bounded, divisible
 * as the forward pass needs), so the rest of the program may trust it. Limits are named below.
 */
#ifndef SFUMATO_LOAD_CONFIG_H
#define SFUMATO_LOAD_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "load/shard.h"

enum {
    CONFIG_LAYERS_MAX = 512,
    CONFIG_HIDDEN_MAX = 65536,
    CONFIG_FFN_MAX = 1 << 20,
    CONFIG_HEADS_MAX = 1024,
    CONFIG_HEAD_DIM_MAX = 512,
    CONFIG_VOCAB_MAX = 1 << 22,
    CONFIG_POSITION_MAX = 1 << 24,
    CONFIG_EOS_MAX = 16,
    CONFIG_FILE_BYTES_MAX = 4 << 20, /* config.json, generation_config.json */
};

enum config_arch { ARCH_LLAMA, ARCH_MISTRAL, ARCH_QWEN2, ARCH_QWEN3 };
enum config_rope { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };
enum config_dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_FP8, DTYPE_QUANTISED };

struct model_config {
    enum config_arch arch;
    char arch_name[48]; /* as the file says it: "Qwen3ForCausalLM", "llama" */
    int layers;         /* L */
    int hidden;         /* D */
    int ffn;
    int heads, kv_heads, head_dim;
    int vocab_rows; /* rows of the matrices (padding included), V_rows */
    bool tied;      /* output matrix = embedding matrix */
    bool qkv_bias, qk_norm;
    float norm_eps;
    float embed_scale; /* 1 for all of these families */
    enum config_rope rope;
    double rope_theta, rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int rope_original_positions;
    int max_positions;            /* context length the model was made for */
    enum config_dtype file_dtype; /* of most weight bytes */
    int bos_id;                   /* -1: none */
    int eos_ids[CONFIG_EOS_MAX], eos_count;
    /* generation_config.json; negative: not given */
    float temperature, top_p, min_p;
    int top_k;
};

/* json: the text of config.json, n bytes; generation: generation_config.json or NULL. Errors:
 * STATUS_MODEL naming the field, its value and what is allowed. */
enum status config_from_json(struct model_config *out, const char *json, size_t n,
                             const char *generation, size_t generation_n);

/* Named shapes for `bench --dims`: qwen2.5-0.5b, qwen2.5-1.5b, smollm2-135m, qwq-32b, llama-3.1-8b,
 * llama-3.1-70b; or a path to a config.json. */
enum status config_from_dims(struct model_config *out, const char *name_or_path);

void config_shard_dims(const struct model_config *config, struct shard_dims *out);
/* Parameters in all, and those read in one decode step (the embedding lookup is not). */
int64_t config_parameter_count(const struct model_config *config);
int64_t config_step_parameter_count(const struct model_config *config);

/* For whoever fills a model_config by other means (GGUF, presets, tests): nothing given yet; an end id
 * more, once; and the checks across fields. STATUS_MODEL naming what is wrong. */
void config_init(struct model_config *out);
enum status config_add_eos(struct model_config *config, int64_t id);
enum status config_check(const struct model_config *config);

#endif
