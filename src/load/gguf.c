/* gguf.c: one GGUF file as a source.
 *
 * Owns the mapping, the parsed file and the memory of both. Translates names: callers ask for
 * "model.layers.3.self_attn.q_proj.weight" and get the rows of "blk.3.attn_q.weight" in Hugging
 * Face's order. That order differs for q and k of the llama architecture, where llama.cpp stores,
 * in every head of d rows, the halves interleaved:
 *
 *   Hugging Face   0 1 2 ... d/2-1 | d/2 d/2+1 ...        rotates row j with row j + d/2
 *   file           0 d/2 1 d/2+1 2 d/2+2 ...              rotates row 2j with row 2j + 1
 *
 * so row r of a head is row 2 (r mod d/2) + (r div d/2) of the file; biases likewise, by column.
 * Files are hostile: gguf_parse.c checks them. Threads: find and read from any; open, close and
 * gguf_get_tokenizer on one.
 */
#include "load/gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load/file.h"

struct gguf_source {
    source base;
    struct file_map map;
    arena memory;
    struct gguf_file file;
    struct gguf_tokenizer tokenizer;
    bool has_tokenizer;
};

/* Hugging Face's name after "model.layers.N." -> the file's after "blk.N." */
static const struct part {
    const char *hf, *gguf;
    bool is_q, is_k;
} parts[] = {
    {"input_layernorm.weight", "attn_norm.weight", false, false},
    {"post_attention_layernorm.weight", "ffn_norm.weight", false, false},
    {"self_attn.q_proj.weight", "attn_q.weight", true, false},
    {"self_attn.k_proj.weight", "attn_k.weight", false, true},
    {"self_attn.v_proj.weight", "attn_v.weight", false, false},
    {"self_attn.o_proj.weight", "attn_output.weight", false, false},
    {"self_attn.q_proj.bias", "attn_q.bias", true, false},
    {"self_attn.k_proj.bias", "attn_k.bias", false, true},
    {"self_attn.v_proj.bias", "attn_v.bias", false, false},
    {"self_attn.q_norm.weight", "attn_q_norm.weight", false, false},
    {"self_attn.k_norm.weight", "attn_k_norm.weight", false, false},
    {"mlp.gate_proj.weight", "ffn_gate.weight", false, false},
    {"mlp.up_proj.weight", "ffn_up.weight", false, false},
    {"mlp.down_proj.weight", "ffn_down.weight", false, false},
};

/* The entry behind a Hugging Face name. permuted_rows: rows (of a vector: columns) are interleaved
 * in heads. NULL when there is none. */
static const struct tensor_entry *lookup(const struct gguf_source *s, const char *name,
                                         bool *permuted) {
    char translated[128];
    int layer, used = 0;
    *permuted = false;
    if (strcmp(name, "model.embed_tokens.weight") == 0)
        name = "token_embd.weight";
    else if (strcmp(name, "lm_head.weight") == 0)
        name = "output.weight";
    else if (strcmp(name, "model.norm.weight") == 0)
        name = "output_norm.weight";
    else {
        if (sscanf(name, "model.layers.%9d.%n", &layer, &used) != 1 || used == 0) return NULL;
        const struct part *p = NULL;
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            if (strcmp(name + used, parts[i].hf) == 0) p = &parts[i];
        }
        if (!p) return NULL;
        snprintf(translated, sizeof translated, "blk.%d.%s", layer, p->gguf);
        *permuted = s->base.config.arch == ARCH_LLAMA && (p->is_q || p->is_k);
        name = translated;
    }
    return tensor_table_find(&s->file.table, name);
}

/* Where row r (over all heads) of Hugging Face's order is in the file. */
static int64_t file_row(int64_t r, int head_dim) {
    const int64_t in_head = r % head_dim, half = head_dim / 2;
    return r - in_head + 2 * (in_head % half) + in_head / half;
}

static bool gguf_source_find(const source *src, const char *name, struct source_tensor *out) {
    bool permuted;
    const struct tensor_entry *e = lookup((const struct gguf_source *)src, name, &permuted);
    if (!e) return false;
    *out = (struct source_tensor){e->rows, e->cols, e->type_name, e->bytes,
                                  .bf16 = tensor_is_bf16(e) && !permuted};
    return true;
}

static enum status gguf_source_read(source *src, const char *name, int64_t row_begin,
                                    int64_t row_count, int64_t col_begin, int64_t col_count,
                                    float *dst) {
    bool permuted;
    const struct tensor_entry *e = lookup((const struct gguf_source *)src, name, &permuted);
    const int head_dim = src->config.head_dim;
    if (!e) return fail(STATUS_MODEL, "%s has no tensor %s", src->path, name);
    ASSERT(row_begin >= 0 && row_count >= 0 && row_begin + row_count <= e->rows);
    ASSERT(col_begin >= 0 && col_count >= 0 && col_begin + col_count <= e->cols);
    if (permuted && (e->rows == 1 ? e->cols : e->rows) % head_dim != 0) {
        return fail(STATUS_MODEL, "%s: tensor %s has %lld rows, not a multiple of the head size %d",
                    src->path, name, (long long)e->rows, head_dim);
    }
    if (permuted && e->rows == 1) {
        for (int64_t i = 0; i < col_count; i++) {
            tensor_read_row(e, 0, file_row(col_begin + i, head_dim), 1, dst + i);
        }
        return STATUS_OK;
    }
    const struct file_map *map = &((const struct gguf_source *)src)->map;
    size_t n;
    const uint8_t *rows = tensor_rows(e, row_begin, row_count, &n);
    /* of a slab of columns only a part of these bytes is wanted */
    if (col_count == e->cols) file_map_want(map, rows, n);
    for (int64_t i = 0; i < row_count; i++) {
        const int64_t row = permuted ? file_row(row_begin + i, head_dim) : row_begin + i;
        tensor_read_row(e, row, col_begin, col_count, dst + i * col_count);
    }
    file_map_forget(map, rows, n);
    return STATUS_OK;
}

static enum status gguf_source_read_bf16(source *src, const char *name, int64_t row_begin,
                                         int64_t row_count, int64_t col_begin, int64_t col_count,
                                         bf16 *dst) {
    const struct gguf_source *s = (const struct gguf_source *)src;
    bool permuted;
    const struct tensor_entry *e = lookup(s, name, &permuted);
    ASSERT(e && tensor_is_bf16(e) && !permuted);
    ASSERT(row_begin >= 0 && row_count >= 0 && row_begin + row_count <= e->rows);
    ASSERT(col_begin >= 0 && col_count >= 0 && col_begin + col_count <= e->cols);
    const enum status status =
        tensor_read_bf16(e, &s->map, row_begin, row_count, col_begin, col_count, dst);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", src->path);
}

static void gguf_source_ahead(const source *src, const char *name, int64_t row_begin,
                              int64_t row_count) {
    const struct gguf_source *s = (const struct gguf_source *)src;
    bool permuted;
    const struct tensor_entry *e = lookup(s, name, &permuted);
    if (!e || !e->type) return; /* whoever reads it will be told */
    size_t n;
    const uint8_t *rows = tensor_rows(e, row_begin, row_count, &n);
    file_map_ahead(&s->map, rows, n);
}

static void gguf_source_forget(source *src) {
    const struct file_map *map = &((const struct gguf_source *)src)->map;
    file_map_forget(map, map->bytes, map->n);
}

static void gguf_source_close(source *src) {
    struct gguf_source *s = (struct gguf_source *)src;
    gguf_file_fini(&s->file);
    arena_fini(&s->memory);
    file_map_close(&s->map);
    free(s);
}

static const struct source_ops gguf_ops = {.kind = "gguf",
                                           .find = gguf_source_find,
                                           .read = gguf_source_read,
                                           .read_bf16 = gguf_source_read_bf16,
                                           .ahead = gguf_source_ahead,
                                           .forget = gguf_source_forget,
                                           .close = gguf_source_close};

enum status gguf_open(const char *path, source **out) {
    enum status status;
    *out = NULL;
    struct gguf_source *s = calloc(1, sizeof *s);
    if (!s) return fail(STATUS_MEMORY, "no memory to open %s", path);
    s->base.ops = &gguf_ops;
    arena_init(&s->memory, 0);
    TRY_GOTO(source_set_path(&s->base, path), out);
    TRY_GOTO(file_map_open(path, &s->map), out);
    status = gguf_parse(s->map.bytes, s->map.n, &s->memory, &s->file);
    if (status == STATUS_OK) status = gguf_read_config(&s->file, &s->base.config);
    if (status != STATUS_OK) status = fail_prefix(status, "%s", path);
    s->base.total_bytes = s->file.table.total_bytes;
out:
    if (status == STATUS_OK) {
        *out = &s->base;
    } else {
        gguf_source_close(&s->base);
    }
    return status;
}

enum status gguf_get_tokenizer(source *src, const struct gguf_tokenizer **out) {
    struct gguf_source *s = (struct gguf_source *)src;
    *out = NULL;
    if (src->ops != &gguf_ops) return STATUS_OK;
    if (!s->has_tokenizer) {
        const enum status status = gguf_read_tokenizer(&s->file, &s->memory, &s->tokenizer);
        if (status != STATUS_OK) return fail_prefix(status, "%s", src->path);
        s->has_tokenizer = true;
    }
    *out = &s->tokenizer;
    return STATUS_OK;
}
