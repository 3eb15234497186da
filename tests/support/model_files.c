/* model_files.c: see model_files.h. */
#include "support/model_files.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bf16.h"

static void must(bool ok, const char *what) {
    if (ok) return;
    perror(what);
    abort();
}

void blob_free(struct blob *b) {
    free(b->bytes);
    *b = (struct blob){0};
}

void blob_add(struct blob *b, const void *bytes, size_t n) {
    if (b->n + n > b->capacity) {
        b->capacity = 2 * (b->n + n) + 64;
        b->bytes = realloc(b->bytes, b->capacity);
        must(b->bytes != NULL, "realloc");
    }
    if (n) memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
}

void blob_add_text(struct blob *b, const char *text) { blob_add(b, text, strlen(text)); }
void blob_add_u32(struct blob *b, uint32_t x) { blob_add(b, &x, sizeof x); }
void blob_add_u64(struct blob *b, uint64_t x) { blob_add(b, &x, sizeof x); }

void blob_pad(struct blob *b, size_t alignment) {
    while (b->n % alignment != 0) blob_add(b, "", 1);
}

const char *folder_make(void) {
    static char folders[4][256];
    static int turn;
    char *folder = folders[turn++ % 4];
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folders[0], "%s/sfumato-test-XXXXXX", tmp ? tmp : "/tmp");
    must(mkdtemp(folder) != NULL, folder);
    return folder;
}

const char *folder_path(const char *folder, const char *name) {
    static char paths[8][512];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

void folder_remove(const char *folder) {
    DIR *dir = opendir(folder);
    if (!dir) return;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            unlink(folder_path(folder, e->d_name));
        }
    }
    closedir(dir);
    rmdir(folder);
}

void folder_write(const char *folder, const char *name, const void *bytes, size_t n) {
    const char *path = folder_path(folder, name);
    FILE *f = fopen(path, "wb");
    must(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0, path);
}

void folder_write_text(const char *folder, const char *name, const char *text) {
    folder_write(folder, name, text, strlen(text));
}

void safetensors_write(struct blob *out, const char *header, const void *data, size_t data_n) {
    blob_add_u64(out, strlen(header));
    blob_add_text(out, header);
    blob_add(out, data, data_n);
}

/* --- GGUF --- */

static void add_string(struct blob *b, const char *text) {
    blob_add_u64(b, strlen(text));
    blob_add_text(b, text);
}

static void begin_key(struct gguf_writer *w, const char *key, uint32_t type) {
    add_string(&w->keys, key);
    blob_add_u32(&w->keys, type);
    w->key_count++;
}

void gguf_key_text(struct gguf_writer *w, const char *key, const char *value) {
    begin_key(w, key, 8);
    add_string(&w->keys, value);
}

void gguf_key_u32(struct gguf_writer *w, const char *key, uint32_t value) {
    begin_key(w, key, 4);
    blob_add_u32(&w->keys, value);
}

void gguf_key_f32(struct gguf_writer *w, const char *key, float value) {
    begin_key(w, key, 6);
    blob_add(&w->keys, &value, sizeof value);
}

void gguf_key_bool(struct gguf_writer *w, const char *key, bool value) {
    begin_key(w, key, 7);
    blob_add(&w->keys, &value, 1);
}

void gguf_key_texts(struct gguf_writer *w, const char *key, const char *const *values,
                    size_t count) {
    begin_key(w, key, 9);
    blob_add_u32(&w->keys, 8);
    blob_add_u64(&w->keys, count);
    for (size_t i = 0; i < count; i++) add_string(&w->keys, values[i]);
}

void gguf_key_i32s(struct gguf_writer *w, const char *key, const int32_t *values, size_t count) {
    begin_key(w, key, 9);
    blob_add_u32(&w->keys, 5);
    blob_add_u64(&w->keys, count);
    blob_add(&w->keys, values, count * sizeof *values);
}

void gguf_tensor(struct gguf_writer *w, const char *name, uint32_t type, int64_t rows, int64_t cols,
                 const void *bytes, size_t n) {
    if (!w->alignment) w->alignment = 32;
    blob_pad(&w->data, w->alignment);
    add_string(&w->tensors, name);
    blob_add_u32(&w->tensors, rows ? 2 : 1);
    blob_add_u64(&w->tensors, (uint64_t)cols);
    if (rows) blob_add_u64(&w->tensors, (uint64_t)rows);
    blob_add_u32(&w->tensors, type);
    blob_add_u64(&w->tensors, w->data.n);
    blob_add(&w->data, bytes, n);
    w->tensor_count++;
}

void gguf_finish(struct gguf_writer *w, struct blob *out) {
    blob_add_text(out, "GGUF");
    blob_add_u32(out, 3);
    blob_add_u64(out, w->tensor_count);
    blob_add_u64(out, w->key_count);
    blob_add(out, w->keys.bytes, w->keys.n);
    blob_add(out, w->tensors.bytes, w->tensors.n);
    blob_pad(out, w->alignment ? w->alignment : 32);
    blob_add(out, w->data.bytes, w->data.n);
    blob_free(&w->keys);
    blob_free(&w->tensors);
    blob_free(&w->data);
}

/* --- whole models --- */

void model_each_tensor(const struct model_config *c, void (*visit)(void *user, const char *name),
                       void *user) {
    static const struct {
        const char *name;
        char when; /* 'a' always, 'b' with QKV bias, 'n' with QK norm */
    } parts[] = {
        {"input_layernorm.weight", 'a'},  {"self_attn.q_proj.weight", 'a'},
        {"self_attn.k_proj.weight", 'a'}, {"self_attn.v_proj.weight", 'a'},
        {"self_attn.o_proj.weight", 'a'}, {"post_attention_layernorm.weight", 'a'},
        {"mlp.gate_proj.weight", 'a'},    {"mlp.up_proj.weight", 'a'},
        {"mlp.down_proj.weight", 'a'},    {"self_attn.q_proj.bias", 'b'},
        {"self_attn.k_proj.bias", 'b'},   {"self_attn.v_proj.bias", 'b'},
        {"self_attn.q_norm.weight", 'n'}, {"self_attn.k_norm.weight", 'n'},
    };
    char name[128];
    visit(user, "model.embed_tokens.weight");
    for (int l = 0; l < c->layers; l++) {
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            if ((parts[i].when == 'b' && !c->qkv_bias) || (parts[i].when == 'n' && !c->qk_norm))
                continue;
            snprintf(name, sizeof name, "model.layers.%d.%s", l, parts[i].name);
            visit(user, name);
        }
    }
    visit(user, "model.norm.weight");
    if (!c->tied) visit(user, "lm_head.weight");
}

static float *read_whole(source *s, const char *name, struct source_tensor *t) {
    must(s->ops->find(s, name, t), name);
    float *values = malloc((size_t)(t->rows * t->cols) * sizeof *values);
    must(values != NULL, "malloc");
    must(s->ops->read(s, name, 0, t->rows, 0, t->cols, values) == STATUS_OK, name);
    return values;
}

static bool is_vector(const char *name) { return strstr(name, "norm") || strstr(name, ".bias"); }

static void add_numbers(struct blob *b, const float *values, int64_t count,
                        enum config_dtype dtype) {
    for (int64_t i = 0; i < count; i++) {
        const _Float16 half = (_Float16)values[i];
        const bf16 brain = bf16_from_float(values[i]);
        if (dtype == DTYPE_F32) blob_add(b, &values[i], 4);
        if (dtype == DTYPE_F16) blob_add(b, &half, 2);
        if (dtype == DTYPE_BF16) blob_add(b, &brain, 2);
    }
}

struct folder_writer {
    source *s;
    enum config_dtype dtype;
    int shards, next;
    struct blob headers[16], data[16], map;
};

static void visit_safetensors(void *user, const char *name) {
    struct folder_writer *w = user;
    struct source_tensor t;
    char text[512], shape[64], file[64];
    const int shard = w->next++ % w->shards;
    struct blob *header = &w->headers[shard], *data = &w->data[shard];
    float *values = read_whole(w->s, name, &t);
    const size_t begin = data->n;
    add_numbers(data, values, t.rows * t.cols, w->dtype);
    free(values);
    if (is_vector(name))
        snprintf(shape, sizeof shape, "%lld", (long long)t.cols);
    else
        snprintf(shape, sizeof shape, "%lld, %lld", (long long)t.rows, (long long)t.cols);
    snprintf(text, sizeof text,
             "%s\"%s\": {\"dtype\": \"%s\", \"shape\": [%s], \"data_offsets\": [%zu, %zu]}",
             header->n ? ", " : "{", name,
             w->dtype == DTYPE_F32   ? "F32"
             : w->dtype == DTYPE_F16 ? "F16"
                                     : "BF16",
             shape, begin, data->n);
    blob_add_text(header, text);
    snprintf(file, sizeof file, "model-%05d-of-%05d.safetensors", shard + 1, w->shards);
    snprintf(text, sizeof text, "%s\"%s\": \"%s\"", w->map.n ? ", " : "", name, file);
    blob_add_text(&w->map, text);
}

static void write_config(const struct model_config *c, const char *folder) {
    char text[1024];
    snprintf(text, sizeof text,
             "{\"architectures\": [\"%s\"], \"num_hidden_layers\": %d, \"hidden_size\": %d, "
             "\"intermediate_size\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
             "\"head_dim\": %d, \"vocab_size\": %d, \"tie_word_embeddings\": %s, \"rms_norm_eps\": "
             "%.9g, "
             "\"rope_theta\": %.17g, \"max_position_embeddings\": %d, \"eos_token_id\": %d}",
             c->arch_name, c->layers, c->hidden, c->ffn, c->heads, c->kv_heads, c->head_dim,
             c->vocab_rows, c->tied ? "true" : "false", (double)c->norm_eps, c->rope_theta,
             c->max_positions, c->eos_count ? c->eos_ids[0] : -1);
    folder_write_text(folder, "config.json", text);
}

void model_write_safetensors(source *s, const char *folder, enum config_dtype dtype, int shards) {
    struct folder_writer w = {.s = s, .dtype = dtype, .shards = shards};
    must(shards >= 1 && shards <= 16, "shards");
    write_config(&s->config, folder);
    model_each_tensor(&s->config, visit_safetensors, &w);
    for (int i = 0; i < shards; i++) {
        struct blob file = {0};
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, shards);
        blob_add(&w.headers[i], "}", 2); /* with NUL */
        safetensors_write(&file, (const char *)w.headers[i].bytes, w.data[i].bytes, w.data[i].n);
        folder_write(folder, shards == 1 ? "model.safetensors" : name, file.bytes, file.n);
        blob_free(&file);
        blob_free(&w.headers[i]);
        blob_free(&w.data[i]);
    }
    if (shards > 1) {
        struct blob index = {0};
        blob_add_text(&index, "{\"metadata\": {}, \"weight_map\": {");
        blob_add(&index, w.map.bytes, w.map.n);
        blob_add_text(&index, "}}");
        folder_write(folder, "model.safetensors.index.json", index.bytes, index.n);
        blob_free(&index);
    }
    blob_free(&w.map);
}

struct gguf_model_writer {
    source *s;
    struct gguf_writer w;
};

/* reshape(heads, 2, head_dim / 2, cols).swapaxes(1, 2), as convert_hf_to_gguf.py does */
static void interleave(float *values, int64_t rows, int64_t cols, int head_dim) {
    const int64_t half = head_dim / 2;
    float *out = malloc((size_t)(rows * cols) * sizeof *out);
    must(out != NULL, "malloc");
    for (int64_t h = 0; h < rows / head_dim; h++) {
        for (int64_t i = 0; i < 2; i++) {
            for (int64_t j = 0; j < half; j++) {
                const int64_t from = (h * 2 + i) * half + j, to = (h * half + j) * 2 + i;
                memcpy(out + to * cols, values + from * cols, (size_t)cols * sizeof *out);
            }
        }
    }
    memcpy(values, out, (size_t)(rows * cols) * sizeof *out);
    free(out);
}

static void visit_gguf(void *user, const char *name) {
    static const char *const names[][2] = {
        {"input_layernorm.", "attn_norm."},     {"post_attention_layernorm.", "ffn_norm."},
        {"self_attn.q_proj.", "attn_q."},       {"self_attn.k_proj.", "attn_k."},
        {"self_attn.v_proj.", "attn_v."},       {"self_attn.o_proj.", "attn_output."},
        {"self_attn.q_norm.", "attn_q_norm."},  {"self_attn.k_norm.", "attn_k_norm."},
        {"mlp.gate_proj.", "ffn_gate."},        {"mlp.up_proj.", "ffn_up."},
        {"mlp.down_proj.", "ffn_down."},        {"model.norm.", "output_norm."},
        {"model.embed_tokens.", "token_embd."}, {"lm_head.", "output."}};
    struct gguf_model_writer *g = user;
    const struct model_config *c = &g->s->config;
    struct source_tensor t;
    char to[128] = "";
    int layer;
    float *values = read_whole(g->s, name, &t);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *part = strstr(name, names[i][0]);
        if (!part) continue;
        const char *kind = part + strlen(names[i][0]); /* weight or bias */
        if (sscanf(name, "model.layers.%d.", &layer) == 1) {
            snprintf(to, sizeof to, "blk.%d.%s%s", layer, names[i][1], kind);
        } else {
            snprintf(to, sizeof to, "%s%s", names[i][1], kind);
        }
    }
    must(to[0] != '\0', name);
    const bool is_llama = c->arch == ARCH_LLAMA || c->arch == ARCH_MISTRAL;
    if (is_llama && (strstr(name, "q_proj") || strstr(name, "k_proj"))) {
        if (t.rows == 1)
            interleave(values, t.cols, 1, c->head_dim);
        else
            interleave(values, t.rows, t.cols, c->head_dim);
    }
    gguf_tensor(&g->w, to, 0, is_vector(name) ? 0 : t.rows, t.cols, values,
                (size_t)(t.rows * t.cols) * sizeof *values);
    free(values);
}

void model_write_gguf(source *s, const char *folder, const char *name) {
    const struct model_config *c = &s->config;
    struct gguf_model_writer g = {.s = s};
    struct blob out = {0};
    const char *arch = c->arch == ARCH_QWEN2 ? "qwen2" : c->arch == ARCH_QWEN3 ? "qwen3" : "llama";
    const struct {
        const char *key;
        int value;
    } keys[] = {{"block_count", c->layers},
                {"embedding_length", c->hidden},
                {"feed_forward_length", c->ffn},
                {"attention.head_count", c->heads},
                {"attention.head_count_kv", c->kv_heads},
                {"attention.key_length", c->head_dim},
                {"attention.value_length", c->head_dim},
                {"context_length", c->max_positions}};
    char key[96];
    char(*texts)[16] = malloc((size_t)c->vocab_rows * sizeof *texts);
    const char **tokens = malloc((size_t)c->vocab_rows * sizeof *tokens);
    must(texts && tokens, "malloc");
    for (int i = 0; i < c->vocab_rows; i++) {
        snprintf(texts[i], sizeof texts[i], "t%d", i);
        tokens[i] = texts[i];
    }
    gguf_key_text(&g.w, "general.architecture", arch);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        snprintf(key, sizeof key, "%s.%s", arch, keys[i].key);
        gguf_key_u32(&g.w, key, (uint32_t)keys[i].value);
    }
    snprintf(key, sizeof key, "%s.rope.freq_base", arch);
    gguf_key_f32(&g.w, key, (float)c->rope_theta);
    snprintf(key, sizeof key, "%s.attention.layer_norm_rms_epsilon", arch);
    gguf_key_f32(&g.w, key, c->norm_eps);
    gguf_key_text(&g.w, "tokenizer.ggml.model", "gpt2");
    gguf_key_texts(&g.w, "tokenizer.ggml.tokens", tokens, (size_t)c->vocab_rows);
    if (c->eos_count) gguf_key_u32(&g.w, "tokenizer.ggml.eos_token_id", (uint32_t)c->eos_ids[0]);
    model_each_tensor(c, visit_gguf, &g);
    gguf_finish(&g.w, &out);
    folder_write(folder, name, out.bytes, out.n);
    blob_free(&out);
    free(tokens);
    free(texts);
}
