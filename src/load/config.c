/* config.c: config.json (+ generation_config.json) -> struct model_config.
 *
 * Owns the meaning of the JSON fields of four families as transformers reads them: names, defaults
 * of a missing field, both spellings of RoPE (`rope_theta` + `rope_scaling`, and `rope_parameters`
 * of transformers 5) and of the number type (`torch_dtype`, `dtype`). Refuses to know: files (the
 * text comes in as bytes) and weights. Thread: any. Memory: one parsed JSON tree for the length of
 * the call.
 *
 * Rule: a field that changes what the model computes is either honoured or refused by name. Unknown
 * fields are ignored, as transformers does. Two cases are worth knowing:
 *   - a sliding window that is really active is honoured by shortening max_positions to it: up to
 *     that length windowed and full attention are the same thing. A warning says so;
 *   - end ids of generation_config.json are added to those of config.json, never instead of them.
 */
#include "load/config.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/fp8.h"
#include "base/log.h"

/* What transformers assumes where config.json is silent. kv_heads 0: as many as heads; head_dim 0:
 * hidden / heads. */
static const struct family {
    const char *class_name, *model_type;
    enum config_arch arch;
    int kv_heads, head_dim, max_positions;
    bool qkv_bias, qk_norm;
} families[] = {
    {"LlamaForCausalLM", "llama", ARCH_LLAMA, 0, 0, 2048, false, false},
    {"MistralForCausalLM", "mistral", ARCH_MISTRAL, 8, 0, 131072, false, false},
    {"Qwen2ForCausalLM", "qwen2", ARCH_QWEN2, 32, 0, 32768, true, false},
    {"Qwen3ForCausalLM", "qwen3", ARCH_QWEN3, 32, 128, 32768, false, true},
};

/* The field, or NULL when it is missing or null: transformers treats both alike. */
static const json_t *field(const json_t *object, const char *name) {
    const json_t *value = json_object_get(object, name);
    return json_is_null(value) ? NULL : value;
}

/* The value as JSON text, cut to fit into a message. */
static const char *shown(const json_t *value, char out[64]) {
    char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
    snprintf(out, 64, "%s", text ? text : "?");
    free(text);
    return out;
}

/* An integer in [low, high]; a missing field gives `fallback`, or an error when fallback < low - 1.
 */
static enum status read_int(const json_t *object, const char *name, int64_t low, int64_t high,
                            int64_t fallback, int *out) {
    const json_t *value = field(object, name);
    char text[64];
    if (!value) {
        if (fallback < low - 1) return fail(STATUS_MODEL, "%s is missing", name);
        *out = (int)fallback;
        return STATUS_OK;
    }
    /* 4096.0 is an integer to Python's JSON users */
    const double real = json_is_real(value) ? json_real_value(value) : 0.5;
    const bool whole = json_is_real(value) && fabs(real) < 0x1p53 && real == floor(real);
    const int64_t number = whole ? (int64_t)real : (int64_t)json_integer_value(value);
    if ((!json_is_integer(value) && !whole) || number < low || number > high) {
        return fail(STATUS_MODEL, "%s is %s: must be an integer from %lld to %lld", name,
                    shown(value, text), (long long)low, (long long)high);
    }
    *out = (int)number;
    return STATUS_OK;
}

enum { REQUIRED = INT32_MIN };

/* A number in [low, high]; missing gives the fallback, NAN as fallback means required. */
static enum status read_real(const json_t *object, const char *name, double low, double high,
                             double fallback, double *out) {
    const json_t *value = field(object, name);
    char text[64];
    if (!value) {
        if (isnan(fallback)) return fail(STATUS_MODEL, "%s is missing", name);
        *out = fallback;
        return STATUS_OK;
    }
    const double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= low && number <= high)) {
        return fail(STATUS_MODEL, "%s is %s: must be a number from %g to %g", name,
                    shown(value, text), low, high);
    }
    *out = number;
    return STATUS_OK;
}

static enum status read_bool(const json_t *object, const char *name, bool fallback, bool *out) {
    const json_t *value = field(object, name);
    char text[64];
    if (value && !json_is_boolean(value)) {
        return fail(STATUS_MODEL, "%s is %s: must be true or false", name, shown(value, text));
    }
    *out = value ? json_is_true(value) : fallback;
    return STATUS_OK;
}

/* A flag that would change the forward pass in a way this program has no code for. */
static enum status refuse_if_true(const json_t *object, const char *name, const char *why) {
    bool on;
    TRY(read_bool(object, name, false, &on));
    return on ? fail(STATUS_MODEL, "%s is true: %s", name, why) : STATUS_OK;
}

static enum status read_family(const json_t *root, struct model_config *c,
                               const struct family **out) {
    const json_t *list = field(root, "architectures");
    const char *class_name = json_string_value(json_array_get(list, 0));
    const char *model_type = json_string_value(field(root, "model_type"));
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++) {
        const bool match = class_name
                               ? strcmp(class_name, families[i].class_name) == 0
                               : model_type && strcmp(model_type, families[i].model_type) == 0;
        if (!match) continue;
        c->arch = families[i].arch;
        snprintf(c->arch_name, sizeof c->arch_name, "%s", families[i].class_name);
        *out = &families[i];
        return STATUS_OK;
    }
    const char *given = class_name ? class_name : model_type;
    if (!given) return fail(STATUS_MODEL, "neither architectures nor model_type is given");
    return fail(STATUS_MODEL,
                "architecture %.60s is not supported: use a LlamaForCausalLM, MistralForCausalLM, "
                "Qwen2ForCausalLM or Qwen3ForCausalLM model",
                given);
}

static enum status read_sizes(const json_t *root, const struct family *family,
                              struct model_config *c) {
    TRY(read_int(root, "num_hidden_layers", 1, CONFIG_LAYERS_MAX, REQUIRED, &c->layers));
    TRY(read_int(root, "hidden_size", 1, CONFIG_HIDDEN_MAX, REQUIRED, &c->hidden));
    TRY(read_int(root, "intermediate_size", 1, CONFIG_FFN_MAX, REQUIRED, &c->ffn));
    TRY(read_int(root, "num_attention_heads", 1, CONFIG_HEADS_MAX, REQUIRED, &c->heads));
    /* `null` means one kv head per head in every family; only a missing field takes the default */
    const bool kv_null = json_is_null(json_object_get(root, "num_key_value_heads"));
    const int kv_default = kv_null || family->kv_heads == 0 ? c->heads : family->kv_heads;
    TRY(read_int(root, "num_key_value_heads", 1, CONFIG_HEADS_MAX, kv_default, &c->kv_heads));
    int head_dim = family->head_dim;
    if (!head_dim && !field(root, "head_dim") && c->hidden % c->heads != 0) {
        return fail(STATUS_MODEL,
                    "head_dim is missing and hidden_size %d is not a multiple of "
                    "num_attention_heads %d",
                    c->hidden, c->heads);
    }
    if (!head_dim) head_dim = c->hidden / c->heads;
    TRY(read_int(root, "head_dim", 1, CONFIG_HEAD_DIM_MAX, head_dim, &c->head_dim));
    TRY(read_int(root, "vocab_size", 1, CONFIG_VOCAB_MAX, REQUIRED, &c->vocab_rows));
    return read_int(root, "max_position_embeddings", 1, CONFIG_POSITION_MAX, family->max_positions,
                    &c->max_positions);
}

/* Both spellings. In `rope_parameters` (transformers 5) theta sits beside the scaling fields. */
static enum status read_rope(const json_t *root, struct model_config *c) {
    const json_t *scaling = field(root, "rope_parameters");
    if (!scaling) scaling = field(root, "rope_scaling");
    if (scaling && !json_is_object(scaling)) {
        return fail(STATUS_MODEL, "rope_scaling (or rope_parameters) must be an object or null");
    }
    TRY(read_real(root, "rope_theta", 1.0, 1e12, 10000.0, &c->rope_theta));
    TRY(read_real(scaling, "rope_theta", 1.0, 1e12, c->rope_theta, &c->rope_theta));
    double rotary_share;
    TRY(read_real(root, "partial_rotary_factor", 0, 1, 1, &rotary_share));
    TRY(read_real(scaling, "partial_rotary_factor", 0, 1, rotary_share, &rotary_share));
    if (rotary_share != 1) {
        return fail(STATUS_MODEL, "partial_rotary_factor is %g: only whole heads are rotated here",
                    rotary_share);
    }
    c->rope = ROPE_PLAIN;
    c->rope_factor = c->rope_low_freq_factor = c->rope_high_freq_factor = 1;
    c->rope_original_positions = c->max_positions;
    if (!scaling) return STATUS_OK;
    const json_t *named = field(scaling, "rope_type");
    if (!named) named = field(scaling, "type");
    const char *type = named ? json_string_value(named) : "default";
    if (type && strcmp(type, "default") == 0) return STATUS_OK;
    if (type && strcmp(type, "linear") == 0) {
        c->rope = ROPE_LINEAR;
        return read_real(scaling, "factor", 1, 1e4, NAN, &c->rope_factor);
    }
    if (!type || strcmp(type, "llama3") != 0) {
        return fail(STATUS_MODEL,
                    "RoPE scaling type \"%.40s\" is not supported: only default, linear and llama3 "
                    "are (for yarn, remove rope_scaling: the model then works up to its original "
                    "context length)",
                    type ? type : "?");
    }
    c->rope = ROPE_LLAMA3;
    TRY(read_real(scaling, "factor", 1, 1e4, NAN, &c->rope_factor));
    TRY(read_real(scaling, "low_freq_factor", 1e-6, 1e6, NAN, &c->rope_low_freq_factor));
    TRY(read_real(scaling, "high_freq_factor", 1e-6, 1e6, NAN, &c->rope_high_freq_factor));
    TRY(read_int(root, "original_max_position_embeddings", 1, CONFIG_POSITION_MAX, c->max_positions,
                 &c->rope_original_positions));
    return read_int(scaling, "original_max_position_embeddings", 1, CONFIG_POSITION_MAX,
                    c->rope_original_positions, &c->rope_original_positions);
}

/* Mistral: sliding_window alone, 4096 when it is missing and none when it is null.
 * Qwen: only with use_sliding_window, and only in the layers from
 * max_window_layers on; newer files list layer_types. Llama has none. */
static enum status read_window(const json_t *root, struct model_config *c) {
    int window, first_layer;
    bool on;
    if (c->arch == ARCH_LLAMA) return STATUS_OK;
    const bool missing = !json_object_get(root, "sliding_window");
    TRY(read_int(root, "sliding_window", 0, INT32_MAX,
                 missing && c->arch == ARCH_MISTRAL ? 4096 : 0, &window));
    TRY(read_bool(root, "use_sliding_window", c->arch == ARCH_MISTRAL, &on));
    TRY(read_int(root, "max_window_layers", 0, INT32_MAX, 28, &first_layer));
    if (c->arch != ARCH_MISTRAL && first_layer >= c->layers) on = false;
    const json_t *types = field(root, "layer_types");
    if (types) {
        on = false;
        for (size_t i = 0; i < json_array_size(types); i++) {
            const char *type = json_string_value(json_array_get(types, i));
            if (type && strcmp(type, "sliding_attention") == 0) {
                on = true;
            } else if (!type || strcmp(type, "full_attention") != 0) {
                return fail(STATUS_MODEL, "layer_types has %.40s: only full_attention is supported",
                            type ? type : "a value that is no string");
            }
        }
    }
    if (on && window > 0 && window < c->max_positions) {
        log_warn("sliding_window %d is active: the context is limited to it (of %d)", window,
                 c->max_positions);
        c->max_positions = window;
    }
    return STATUS_OK;
}

enum status config_add_eos(struct model_config *c, int64_t id) {
    for (int i = 0; i < c->eos_count; i++) {
        if (c->eos_ids[i] == id) return STATUS_OK;
    }
    if (id < 0 || id >= c->vocab_rows) {
        return fail(STATUS_MODEL, "end id %lld is not in the vocabulary of %d", (long long)id,
                    c->vocab_rows);
    }
    if (c->eos_count == CONFIG_EOS_MAX) {
        return fail(STATUS_MODEL, "more than %d end ids", CONFIG_EOS_MAX);
    }
    c->eos_ids[c->eos_count++] = (int)id;
    return STATUS_OK;
}

/* An id or a list of ids. -1 in a file means none. */
static enum status read_eos(const json_t *object, struct model_config *c) {
    const json_t *value = field(object, "eos_token_id");
    const size_t count = json_is_array(value) ? json_array_size(value) : value ? 1 : 0;
    char text[64];
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_is_array(value) ? json_array_get(value, i) : value;
        if (!json_is_integer(id)) {
            return fail(STATUS_MODEL, "eos_token_id is %s: must be an id or a list of ids",
                        shown(value, text));
        }
        if (json_integer_value(id) == -1) continue;
        TRY(config_add_eos(c, (int64_t)json_integer_value(id)));
    }
    return STATUS_OK;
}

static enum status read_generation(const json_t *root, struct model_config *c) {
    double temperature, top_p, min_p;
    TRY(read_eos(root, c));
    if (c->bos_id < 0) TRY(read_int(root, "bos_token_id", -1, c->vocab_rows - 1, -1, &c->bos_id));
    TRY(read_real(root, "temperature", 0, 1000, -1, &temperature));
    TRY(read_real(root, "top_p", 0, 1, -1, &top_p));
    TRY(read_real(root, "min_p", 0, 1, -1, &min_p));
    TRY(read_int(root, "top_k", -1, INT32_MAX, -1, &c->top_k));
    c->temperature = (float)temperature;
    c->top_p = top_p == 0 ? -1.0f : (float)top_p; /* 0 keeps nothing: taken as not given */
    c->min_p = (float)min_p;
    return STATUS_OK;
}

static enum status read_dtype(const json_t *root, struct model_config *c) {
    const json_t *value = field(root, "dtype");
    if (!value) value = field(root, "torch_dtype");
    const char *name = value ? json_string_value(value) : "bfloat16";
    if (name && strncmp(name, "torch.", 6) == 0) name += 6;
    if (name && strcmp(name, "bfloat16") == 0) {
        c->file_dtype = DTYPE_BF16;
    } else if (name && strcmp(name, "float16") == 0) {
        c->file_dtype = DTYPE_F16;
    } else if (name && strcmp(name, "float32") == 0) {
        c->file_dtype = DTYPE_F32;
    } else {
        return fail(STATUS_MODEL, "dtype %.40s is not supported: use float32, float16 or bfloat16",
                    name ? name : "that is no string");
    }
    return STATUS_OK;
}

/* fp8 weights with scales beside them can be read (tensor_table.h says in which shapes); how the
 * activations were meant to be quantised does not matter here. Everything else is refused. */
static enum status check_quantisation(const json_t *root) {
    const json_t *quant = field(root, "quantization_config");
    if (!quant) return STATUS_OK;
    const char *method = json_string_value(json_object_get(quant, "quant_method"));
    const char *format = json_string_value(json_object_get(quant, "fmt"));
    const json_t *block = field(quant, "weight_block_size");
    bool ok = false;
    if (method && strcmp(method, "fp8") == 0) {
        ok = !format || strcmp(format, "e4m3") == 0;
    } else if (method && strcmp(method, "compressed-tensors") == 0) {
        format = json_string_value(json_object_get(quant, "format"));
        ok = format && strcmp(format, "float-quantized") == 0;
    }
    if (!ok) {
        return fail(STATUS_MODEL,
                    "quantization_config says %.40s %.40s: only fp8 weights in e4m3 (fp8, or "
                    "compressed-tensors float-quantized) are supported, use the original weights "
                    "or a GGUF file",
                    method ? method : "no method", format ? format : "");
    }
    if (block &&
        (json_array_size(block) != 2 || json_integer_value(json_array_get(block, 0)) != FP8_BLOCK ||
         json_integer_value(json_array_get(block, 1)) != FP8_BLOCK)) {
        return fail(STATUS_MODEL, "weight_block_size must be [%d, %d] to be read here",
                    (int)FP8_BLOCK, (int)FP8_BLOCK);
    }
    return STATUS_OK;
}

static enum status read_root(const json_t *root, struct model_config *c) {
    const struct family *family = NULL;
    TRY(read_family(root, c, &family));
    TRY(check_quantisation(root));
    TRY(read_sizes(root, family, c));
    const json_t *act = field(root, "hidden_act");
    const char *act_name = act ? json_string_value(act) : "silu";
    if (!act_name || (strcmp(act_name, "silu") != 0 && strcmp(act_name, "swish") != 0)) {
        return fail(STATUS_MODEL, "hidden_act %.40s is not supported: only silu is",
                    act_name ? act_name : "that is no string");
    }
    c->qkv_bias = family->qkv_bias;
    c->qk_norm = family->qk_norm;
    if (c->arch != ARCH_QWEN2) { /* Qwen2 always has q, k, v biases and ignores the flag */
        TRY(refuse_if_true(root, "attention_bias", "biases in attention are not supported here"));
    }
    TRY(refuse_if_true(root, "mlp_bias", "biases in the feed-forward part are not supported"));
    TRY(read_bool(root, "tie_word_embeddings", false, &c->tied));
    double norm_eps;
    TRY(read_real(root, "rms_norm_eps", 0, 1, 1e-6, &norm_eps));
    c->norm_eps = (float)norm_eps;
    TRY(read_rope(root, c));
    TRY(read_window(root, c));
    TRY(read_dtype(root, c));
    TRY(read_int(root, "bos_token_id", -1, c->vocab_rows - 1, -1, &c->bos_id));
    TRY(read_eos(root, c));
    return config_check(c);
}

void config_init(struct model_config *c) {
    *c = (struct model_config){.embed_scale = 1,
                               .norm_eps = 1e-6f,
                               .rope_theta = 10000,
                               .rope_factor = 1,
                               .rope_low_freq_factor = 1,
                               .rope_high_freq_factor = 1,
                               .file_dtype = DTYPE_BF16,
                               .bos_id = -1,
                               .temperature = -1,
                               .top_p = -1,
                               .min_p = -1,
                               .top_k = -1};
}

static bool within(int64_t value, int64_t low, int64_t high) {
    return value >= low && value <= high;
}

enum status config_check(const struct model_config *c) {
    if (!within(c->layers, 1, CONFIG_LAYERS_MAX) || !within(c->hidden, 1, CONFIG_HIDDEN_MAX) ||
        !within(c->ffn, 1, CONFIG_FFN_MAX) || !within(c->vocab_rows, 1, CONFIG_VOCAB_MAX) ||
        !within(c->max_positions, 1, CONFIG_POSITION_MAX)) {
        return fail(
            STATUS_MODEL,
            "%d layers, hidden size %d, feed-forward size %d, vocabulary %d, context %d: each "
            "must be positive and at most %d, %d, %d, %d, %d",
            c->layers, c->hidden, c->ffn, c->vocab_rows, c->max_positions, CONFIG_LAYERS_MAX,
            CONFIG_HIDDEN_MAX, CONFIG_FFN_MAX, CONFIG_VOCAB_MAX, CONFIG_POSITION_MAX);
    }
    if (!within(c->heads, 1, CONFIG_HEADS_MAX) || !within(c->kv_heads, 1, c->heads) ||
        c->heads % c->kv_heads != 0) {
        return fail(STATUS_MODEL,
                    "%d attention heads and %d kv heads: must be from 1 to %d, and the first a "
                    "multiple of the second",
                    c->heads, c->kv_heads, CONFIG_HEADS_MAX);
    }
    if (!within(c->head_dim, 2, CONFIG_HEAD_DIM_MAX) || c->head_dim % 2 != 0) {
        return fail(STATUS_MODEL, "head size %d: must be even, from 2 to %d", c->head_dim,
                    CONFIG_HEAD_DIM_MAX);
    }
    if (!(c->norm_eps > 0 && c->norm_eps < 1)) {
        return fail(STATUS_MODEL, "rms_norm_eps %g: must be above 0 and below 1",
                    (double)c->norm_eps);
    }
    if (!(c->rope_theta >= 1 && c->rope_theta <= 1e12) ||
        !(c->rope_factor >= 1 && c->rope_factor <= 1e4)) {
        return fail(STATUS_MODEL, "RoPE base %g or factor %g is out of range", c->rope_theta,
                    c->rope_factor);
    }
    if (c->rope == ROPE_LLAMA3 && !(c->rope_high_freq_factor > c->rope_low_freq_factor)) {
        return fail(STATUS_MODEL, "high_freq_factor %g must be above low_freq_factor %g",
                    c->rope_high_freq_factor, c->rope_low_freq_factor);
    }
    return STATUS_OK;
}

static enum status parse(const char *file, const char *text, size_t n, json_t **out) {
    json_error_t error;
    if (n > CONFIG_FILE_BYTES_MAX) {
        return fail(STATUS_MODEL, "%s has %zu bytes, the limit is %d", file, n,
                    CONFIG_FILE_BYTES_MAX);
    }
    *out = json_loadb(text, n, 0, &error);
    if (!*out) {
        return fail(STATUS_MODEL, "%s line %d: %s: download it again", file, error.line,
                    error.text);
    }
    if (!json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return fail(STATUS_MODEL, "%s is not a JSON object: download it again", file);
    }
    return STATUS_OK;
}

enum status config_from_json(struct model_config *out, const char *json, size_t n,
                             const char *generation, size_t generation_n) {
    enum status status;
    json_t *root = NULL;
    config_init(out);
    TRY(parse("config.json", json, n, &root));
    status = read_root(root, out);
    json_decref(root);
    if (status != STATUS_OK) return fail_prefix(status, "config.json");
    if (!generation) return STATUS_OK;
    TRY(parse("generation_config.json", generation, generation_n, &root));
    status = read_generation(root, out);
    json_decref(root);
    if (status != STATUS_OK) return fail_prefix(status, "generation_config.json");
    return STATUS_OK;
}

void config_shard_dims(const struct model_config *c, struct shard_dims *out) {
    *out = (struct shard_dims){.vocab_rows = c->vocab_rows,
                               .ffn = c->ffn,
                               .heads = c->heads,
                               .kv_heads = c->kv_heads,
                               .head_dim = c->head_dim};
}

static int64_t layer_parameters(const struct model_config *c) {
    const int64_t q = (int64_t)c->heads * c->head_dim, kv = (int64_t)c->kv_heads * c->head_dim;
    int64_t count = 2 * q * c->hidden + 2 * kv * c->hidden + 3 * (int64_t)c->ffn * c->hidden;
    count += 2 * c->hidden;
    if (c->qkv_bias) count += q + 2 * kv;
    if (c->qk_norm) count += 2 * c->head_dim;
    return count;
}

int64_t config_step_parameter_count(const struct model_config *c) {
    return c->layers * layer_parameters(c) + c->hidden + (int64_t)c->vocab_rows * c->hidden;
}

int64_t config_parameter_count(const struct model_config *c) {
    const int64_t embedding = c->tied ? 0 : (int64_t)c->vocab_rows * c->hidden;
    return config_step_parameter_count(c) + embedding;
}
