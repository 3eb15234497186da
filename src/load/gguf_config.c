/* gguf_config.c: the metadata of a GGUF file -> struct model_config.
 *
 * Owns the names of the keys and what is not in them and must be worked out:
 *
 *   vocabulary rows   rows of token_embd (padding included), at least as many as tokens
 *   head size         hidden / heads unless attention.key_length says otherwise
 *   tied              there is no output.weight
 *   llama3 RoPE       llama.cpp's converter stores it as a tensor, rope_freqs.weight: one divisor
 *                     for each frequency. The parameters of all published Llama 3.x models are tried
 *                     on it; divisors that do not come from them are refused rather than guessed
 *   end ids           eos, eot and eom, and the well-known end texts among the control tokens, since
 *                     the second end id of a generation_config.json does not make it into the file
 *
 * Refuses to know: bytes of weights and names of layers (gguf.c). Memory: none. Thread: any.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "load/gguf.h"

enum { TOKEN_TYPE_CONTROL = 3 };

static bool string_is(struct gguf_string s, const char *text) {
    return s.n == strlen(text) && memcmp(s.bytes, text, s.n) == 0;
}

/* An unsigned, signed or boolean value; false for any other type. */
static bool integer_of(const struct gguf_value *v, int64_t *out) {
    union {
        uint8_t u8;
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        uint64_t u64;
        int64_t i64;
    } x = {0};
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 0, 1, 0, 0, 8, 8, 0};
    if (bytes[v->type] == 0) return false;
    memcpy(&x, v->data, bytes[v->type]);
    switch (v->type) {
        case GGUF_U8:
        case GGUF_BOOL:
            *out = x.u8;
            return true;
        case GGUF_I8:
            *out = x.i8;
            return true;
        case GGUF_U16:
            *out = x.u16;
            return true;
        case GGUF_I16:
            *out = x.i16;
            return true;
        case GGUF_U32:
            *out = x.u32;
            return true;
        case GGUF_I32:
            *out = x.i32;
            return true;
        case GGUF_U64:
            *out = (int64_t)x.u64;
            return x.u64 <= INT64_MAX;
        default:
            *out = x.i64;
            return true;
    }
}

static bool real_of(const struct gguf_value *v, double *out) {
    float single;
    int64_t integer;
    if (v->type == GGUF_F32) {
        memcpy(&single, v->data, sizeof single);
        *out = (double)single;
    } else if (v->type == GGUF_F64) {
        memcpy(out, v->data, sizeof *out);
    } else if (integer_of(v, &integer)) {
        *out = (double)integer;
    } else {
        return false;
    }
    return true;
}

/* A file and its architecture, for keys like "llama.block_count". */
struct reader {
    const struct gguf_file *file;
    char arch[16];
};

static const struct gguf_value *find(const struct reader *r, const char *name) {
    char key[96];
    snprintf(key, sizeof key, "%s.%s", r->arch, name);
    return gguf_find(r->file, key);
}

enum { REQUIRED = INT32_MIN };

static enum status read_int(const struct reader *r, const char *name, int64_t low, int64_t high,
                            int fallback, int *out) {
    const struct gguf_value *v = find(r, name);
    int64_t value;
    if (!v) {
        *out = fallback;
        return fallback == REQUIRED ? fail(STATUS_MODEL, "key %s.%s is missing", r->arch, name)
                                    : STATUS_OK;
    }
    if (v->type == GGUF_ARRAY) {
        return fail(STATUS_MODEL, "key %s.%s differs from layer to layer: not supported", r->arch,
                    name);
    }
    if (!integer_of(v, &value) || value < low || value > high) {
        return fail(STATUS_MODEL, "key %s.%s must be an integer from %lld to %lld", r->arch, name,
                    (long long)low, (long long)high);
    }
    *out = (int)value;
    return STATUS_OK;
}

static enum status read_real(const struct reader *r, const char *name, double low, double high,
                             double fallback, double *out) {
    const struct gguf_value *v = find(r, name);
    *out = fallback;
    if (!v) return STATUS_OK;
    if (!real_of(v, out) || !(*out >= low && *out <= high)) {
        return fail(STATUS_MODEL, "key %s.%s must be a number from %g to %g", r->arch, name, low,
                    high);
    }
    return STATUS_OK;
}

static enum status read_arch(struct reader *r, struct model_config *c) {
    static const struct {
        const char *name;
        enum config_arch arch;
    } known[] = {{"llama", ARCH_LLAMA}, {"qwen2", ARCH_QWEN2}, {"qwen3", ARCH_QWEN3}};
    const struct gguf_string arch = gguf_string_of(gguf_find(r->file, "general.architecture"));
    const struct gguf_value *split = gguf_find(r->file, "split.count");
    int64_t split_count;
    if (split && integer_of(split, &split_count) && split_count > 1) {
        return fail(STATUS_MODEL,
                    "one of %lld parts of a split model: join them with llama-gguf-split --merge",
                    (long long)split_count);
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (!string_is(arch, known[i].name)) continue;
        snprintf(r->arch, sizeof r->arch, "%s", known[i].name);
        snprintf(c->arch_name, sizeof c->arch_name, "%s", known[i].name);
        c->arch = known[i].arch;
        return STATUS_OK;
    }
    return fail(STATUS_MODEL,
                "architecture \"%.*s\" is not supported: use a llama, qwen2 or qwen3 model",
                arch.n < 60 ? (int)arch.n : 60, arch.bytes);
}

static enum status read_sizes(const struct reader *r, struct model_config *c) {
    int experts, value_length, rotated;
    TRY(read_int(r, "block_count", 1, CONFIG_LAYERS_MAX, REQUIRED, &c->layers));
    TRY(read_int(r, "embedding_length", 1, CONFIG_HIDDEN_MAX, REQUIRED, &c->hidden));
    TRY(read_int(r, "feed_forward_length", 1, CONFIG_FFN_MAX, REQUIRED, &c->ffn));
    TRY(read_int(r, "attention.head_count", 1, CONFIG_HEADS_MAX, REQUIRED, &c->heads));
    TRY(read_int(r, "attention.head_count_kv", 1, CONFIG_HEADS_MAX, c->heads, &c->kv_heads));
    TRY(read_int(r, "context_length", 1, CONFIG_POSITION_MAX, REQUIRED, &c->max_positions));
    TRY(read_int(r, "expert_count", 0, INT32_MAX, 0, &experts));
    if (experts > 0) return fail(STATUS_MODEL, "a mixture of %d experts: not supported", experts);
    if (!find(r, "attention.key_length") && c->hidden % c->heads != 0) {
        return fail(
            STATUS_MODEL,
            "attention.key_length is missing and the hidden size %d is not a multiple of %d "
            "heads",
            c->hidden, c->heads);
    }
    TRY(read_int(r, "attention.key_length", 1, CONFIG_HEAD_DIM_MAX, c->hidden / c->heads,
                 &c->head_dim));
    if (c->head_dim > CONFIG_HEAD_DIM_MAX) { /* worked out, not read: not checked yet */
        return fail(STATUS_MODEL, "%d columns for %d heads: a head has at most %d", c->hidden,
                    c->heads, CONFIG_HEAD_DIM_MAX);
    }
    TRY(read_int(r, "attention.value_length", 1, CONFIG_HEAD_DIM_MAX, c->head_dim, &value_length));
    TRY(read_int(r, "rope.dimension_count", 1, CONFIG_HEAD_DIM_MAX, c->head_dim, &rotated));
    if (value_length != c->head_dim || rotated != c->head_dim) {
        return fail(STATUS_MODEL,
                    "heads of %d with values of %d and %d rotated columns: must be equal here",
                    c->head_dim, value_length, rotated);
    }
    double norm_eps;
    TRY(read_real(r, "attention.layer_norm_rms_epsilon", 0, 1, 1e-6, &norm_eps));
    c->norm_eps = (float)norm_eps;
    return STATUS_OK;
}

/* The divisor of frequency i under llama3 scaling (transformers, modeling_rope_utils.py). */
static double llama3_divisor(const struct model_config *c, int i) {
    const double wavelength = 2 * M_PI * pow(c->rope_theta, 2.0 * i / c->head_dim);
    const double turns = c->rope_original_positions / wavelength;
    const double low = c->rope_low_freq_factor, high = c->rope_high_freq_factor;
    if (turns > high) return 1;
    if (turns < low) return c->rope_factor;
    const double smooth = (turns - low) / (high - low);
    return 1 / ((1 - smooth) / c->rope_factor + smooth);
}

static enum status read_rope_freqs(const struct reader *r, struct model_config *c) {
    const struct tensor_entry *e = tensor_table_find(&r->file->table, "rope_freqs.weight");
    float divisors[CONFIG_HEAD_DIM_MAX / 2];
    bool plain = true;
    if (!e) return STATUS_OK;
    ASSERT_LE(c->head_dim, CONFIG_HEAD_DIM_MAX); /* read_sizes saw to it: divisors has room */
    if (e->rows != 1 || e->cols != c->head_dim / 2 || e->type != dequant_find_name("F32")) {
        return fail(STATUS_MODEL, "rope_freqs.weight must be %d F32 numbers", c->head_dim / 2);
    }
    tensor_read_row(e, 0, 0, e->cols, divisors);
    for (int64_t i = 0; i < e->cols; i++) plain = plain && divisors[i] == 1.0f;
    if (plain) return STATUS_OK;
    c->rope = ROPE_LLAMA3; /* Llama 3.1 has factor 8, 3.2 has 32; the rest is common to all */
    c->rope_factor = (double)divisors[e->cols - 1];
    c->rope_low_freq_factor = 1;
    c->rope_high_freq_factor = 4;
    c->rope_original_positions = 8192;
    for (int i = 0; i < e->cols; i++) {
        const double want = llama3_divisor(c, i);
        if (!(fabs((double)divisors[i] - want) <= 1e-3 * want)) {
            return fail(
                STATUS_MODEL,
                "rope_freqs.weight[%d] is %g, Llama 3 scaling has %g: this RoPE scaling is not "
                "supported",
                i, (double)divisors[i], want);
        }
    }
    return STATUS_OK;
}

static enum status read_rope(const struct reader *r, struct model_config *c) {
    const struct gguf_value *named = find(r, "rope.scaling.type");
    const struct gguf_string type = gguf_string_of(named);
    double factor;
    TRY(read_real(r, "rope.freq_base", 1, 1e12, 10000, &c->rope_theta));
    c->rope_original_positions = c->max_positions;
    if (named && !string_is(type, "none") && !string_is(type, "linear")) {
        return fail(STATUS_MODEL, "RoPE scaling \"%.*s\" is not supported: only linear is",
                    type.n < 40 ? (int)type.n : 40, type.bytes);
    }
    /* the old key scales without a type */
    TRY(read_real(r, "rope.scale_linear", 0, 1e4, 1, &factor));
    if (!named || string_is(type, "linear")) {
        TRY(read_real(r, "rope.scaling.factor", 0, 1e4, factor, &factor));
    }
    if (factor > 0 && factor != 1) { /* 0: none */
        c->rope = ROPE_LINEAR;
        c->rope_factor = factor;
    }
    if (c->rope == ROPE_LINEAR && tensor_table_find(&r->file->table, "rope_freqs.weight")) {
        return fail(STATUS_MODEL,
                    "both rope_freqs.weight and a linear RoPE scaling: not supported");
    }
    return read_rope_freqs(r, c);
}

/* Walks the token texts once for the end texts that llama.cpp takes as ends, too. */
static enum status add_end_texts(const struct gguf_file *file, struct model_config *c) {
    static const char *const ends[] = {"<|im_end|>", "<|endoftext|>",   "<|eot_id|>",
                                       "<|eom_id|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"};
    const struct gguf_value *tokens = gguf_find(file, "tokenizer.ggml.tokens");
    const struct gguf_value *types = gguf_find(file, "tokenizer.ggml.token_type");
    const uint8_t *at = tokens->data;
    if (!types || types->type != GGUF_ARRAY || types->item_type != GGUF_I32 ||
        types->count != tokens->count) {
        return STATUS_OK;
    }
    for (uint64_t i = 0; i < tokens->count; i++) {
        uint64_t n;
        int32_t type;
        memcpy(&n, at, sizeof n);
        memcpy(&type, types->data + 4 * i, sizeof type);
        const struct gguf_string text = {(const char *)at + sizeof n, n};
        for (size_t e = 0; type == TOKEN_TYPE_CONTROL && e < sizeof ends / sizeof ends[0]; e++) {
            if (string_is(text, ends[e])) TRY(config_add_eos(c, (int64_t)i));
        }
        at += sizeof n + n;
    }
    return STATUS_OK;
}

static enum status read_id(const struct gguf_file *file, const char *key, int limit, int64_t *out) {
    const struct gguf_value *v = gguf_find(file, key);
    *out = -1;
    if (!v) return STATUS_OK;
    if (!integer_of(v, out) || *out < 0 || *out >= limit) {
        return fail(STATUS_MODEL, "key %s must be an id below %d", key, limit);
    }
    return STATUS_OK;
}

static enum status read_vocabulary(const struct gguf_file *file, struct model_config *c) {
    const struct gguf_value *tokens = gguf_find(file, "tokenizer.ggml.tokens");
    const struct tensor_entry *embedding = tensor_table_find(&file->table, "token_embd.weight");
    int64_t id;
    if (!tokens || tokens->type != GGUF_ARRAY || tokens->item_type != GGUF_STRING ||
        tokens->count < 1 || tokens->count > CONFIG_VOCAB_MAX) {
        return fail(STATUS_MODEL, "tokenizer.ggml.tokens must be a list of 1 to %d texts",
                    CONFIG_VOCAB_MAX);
    }
    if (!embedding) return fail(STATUS_MODEL, "tensor token_embd.weight is missing");
    if (embedding->rows < (int64_t)tokens->count || embedding->rows > CONFIG_VOCAB_MAX) {
        return fail(STATUS_MODEL, "token_embd.weight has %lld rows for %llu tokens",
                    (long long)embedding->rows, (unsigned long long)tokens->count);
    }
    c->vocab_rows = (int)embedding->rows;
    TRY(read_id(file, "tokenizer.ggml.bos_token_id", c->vocab_rows, &id));
    c->bos_id = (int)id;
    static const char *const end_keys[] = {"tokenizer.ggml.eos_token_id",
                                           "tokenizer.ggml.eot_token_id",
                                           "tokenizer.ggml.eom_token_id"};
    for (size_t i = 0; i < sizeof end_keys / sizeof end_keys[0]; i++) {
        TRY(read_id(file, end_keys[i], c->vocab_rows, &id));
        if (id >= 0) TRY(config_add_eos(c, id));
    }
    return add_end_texts(file, c);
}

static bool has(const struct gguf_file *file, const char *tensor) {
    return tensor_table_find(&file->table, tensor) != NULL;
}

enum status gguf_read_config(const struct gguf_file *file, struct model_config *c) {
    struct reader r = {.file = file};
    int window;
    config_init(c);
    TRY(read_arch(&r, c));
    TRY(read_sizes(&r, c));
    TRY(read_rope(&r, c));
    TRY(read_vocabulary(file, c));
    TRY(read_int(&r, "attention.sliding_window", 0, INT32_MAX, 0, &window));
    if (window > 0 && window < c->max_positions) {
        log_warn("sliding_window %d is active: the context is limited to it (of %d)", window,
                 c->max_positions);
        c->max_positions = window;
    }
    c->tied = !has(file, "output.weight");
    c->qkv_bias = c->arch == ARCH_QWEN2 || has(file, "blk.0.attn_q.bias");
    c->qk_norm = c->arch == ARCH_QWEN3;
    if (has(file, "blk.0.attn_output.bias") || has(file, "blk.0.ffn_down.bias")) {
        return fail(STATUS_MODEL, "biases outside q, k and v are not supported");
    }
    c->file_dtype = tensor_table_dtype(&file->table);
    return config_check(c);
}
