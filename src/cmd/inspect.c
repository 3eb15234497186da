/* inspect.c: `sfumato inspect`, what a model is and what each of R ranks would hold, without loading it.
 *
 * Reads headers only. The estimate of a rank is model_need's, the same that start-up checks against the free
 * memory. Rank 0 alone works.
 */
#include <stdio.h>
#include <string.h>

#include "base/free_memory.h"
#include "base/json.h"
#include "cmd/commands.h"
#include "kv/pages.h"

/* "1, 2, 3, 4, 8": rank counts that can split the model with its default slab count. */
static void legal_ranks(const struct shard_dims *dims, int slabs, char *out, size_t capacity) {
    size_t n = 0;
    int first = 0;
    out[0] = '\0';
    for (int r = 1; r <= SHARD_RANKS_MAX + 1; r++) {
        const bool legal =
            r <= SHARD_RANKS_MAX &&
            shard_check(dims, slabs > 0 ? slabs : shard_default_slabs(r), r) == STATUS_OK;
        if (legal && !first) first = r;
        if (legal || !first) continue;
        char part[32];
        if (r - 1 == first) {
            snprintf(part, sizeof part, "%s%d", n ? ", " : "", first);
        } else {
            snprintf(part, sizeof part, "%s%d..%d", n ? ", " : "", first, r - 1);
        }
        snprintf(out + n, capacity - n, "%s", part);
        n = strlen(out);
        first = 0;
    }
}

static const char *file_dtype_name(enum config_dtype d) {
    static const char *const names[] = {[DTYPE_F32] = "f32",
                                        [DTYPE_F16] = "f16",
                                        [DTYPE_BF16] = "bf16",
                                        [DTYPE_FP8] = "fp8",
                                        [DTYPE_QUANTISED] = "quantised"};
    return names[d];
}

/* Tensors of the model's files by number format. */
struct tensor_tally {
    int count, kinds;
    struct {
        char name[16];
        int count;
        int64_t bytes;
    } kind[16];
};

static void tally_tensor(const source *s, const char *name, struct tensor_tally *t) {
    struct source_tensor tensor;
    if (!s->ops->find(s, name, &tensor)) return;
    int k = 0;
    while (k < t->kinds && strcmp(t->kind[k].name, tensor.dtype_name) != 0) k++;
    if (k == (int)(sizeof t->kind / sizeof *t->kind)) return;
    if (k == t->kinds)
        snprintf(t->kind[t->kinds++].name, sizeof t->kind[k].name, "%s", tensor.dtype_name);
    t->kind[k].count++;
    t->kind[k].bytes += tensor.file_bytes;
    t->count++;
}

static struct tensor_tally tally_tensors(const source *s) {
    static const char *const whole[] = {"model.embed_tokens.weight", "model.norm.weight",
                                        "lm_head.weight"};
    static const char *const layer[] = {
        "input_layernorm.weight",  "post_attention_layernorm.weight",
        "self_attn.q_proj.weight", "self_attn.k_proj.weight",
        "self_attn.v_proj.weight", "self_attn.o_proj.weight",
        "self_attn.q_proj.bias",   "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",   "self_attn.q_norm.weight",
        "self_attn.k_norm.weight", "mlp.gate_proj.weight",
        "mlp.up_proj.weight",      "mlp.down_proj.weight"};
    struct tensor_tally t = {0};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) tally_tensor(s, whole[i], &t);
    for (int l = 0; l < s->config.layers; l++) {
        for (size_t i = 0; i < sizeof layer / sizeof *layer; i++) {
            char name[128];
            snprintf(name, sizeof name, "model.layers.%d.%s", l, layer[i]);
            tally_tensor(s, name, &t);
        }
    }
    return t;
}

static void print_tensors(const source *s) {
    const struct tensor_tally t = tally_tensors(s);
    char bytes[32];
    printf("tensors           %d:", t.count);
    for (int k = 0; k < t.kinds; k++) {
        printf("%s %d %s (%s)", k ? "," : "", t.kind[k].count, t.kind[k].name,
               progress_bytes((double)t.kind[k].bytes, bytes));
    }
    printf("\n");
}

struct rank_needs {
    int ranks;
    struct model_need need[SHARD_RANKS_MAX];
    struct shard_map map[SHARD_RANKS_MAX];
    int64_t tokens_fit; /* KV tokens the fullest rank can hold in this host's free memory */
};

static enum status count_needs(struct host *h, int ranks, struct rank_needs *out) {
    const struct model_config *c = &h->source->config;
    struct shard_dims dims;
    config_shard_dims(c, &dims);
    out->ranks = ranks;
    out->tokens_fit = INT64_MAX;
    const int64_t free_each = free_memory(ranks);
    for (int r = 0; r < ranks; r++) {
        TRY(model_need(c, &h->model_options, ranks, r, &out->need[r]));
        shard_map_init(&out->map[r], &dims, h->model_options.slabs, ranks, r);
        const struct model_need *need = &out->need[r];
        const int64_t room = h->params.kv_memory > 0
                                 ? h->params.kv_memory
                                 : free_each - need->weight_bytes - need->scratch_bytes;
        const int64_t fit = room > 0 && need->kv_bytes_per_page > 0
                                ? room / need->kv_bytes_per_page * KV_PAGE_TOKENS
                                : 0;
        if (fit < out->tokens_fit) out->tokens_fit = fit;
    }
    return STATUS_OK;
}

static void print_text(const struct host *h, const struct rank_needs *n, const char *ranks) {
    const struct model_config *c = &h->source->config;
    char a[32], b[32], d[32], e[32];
    printf("model             %s (%s, %s)\n", h->source->path, c->arch_name, h->source->ops->kind);
    printf("parameters        %.1f M\n", (double)config_parameter_count(c) / 1e6);
    printf("layers            %d\n", c->layers);
    printf("hidden, ffn       %d, %d\n", c->hidden, c->ffn);
    printf("heads             %d query, %d key/value, of %d\n", c->heads, c->kv_heads, c->head_dim);
    printf("vocabulary        %d ids, %d rows, output matrix %s\n", h->facts.vocab_count,
           c->vocab_rows, c->tied ? "tied to the embedding" : "of its own");
    printf("positions         %d\n", c->max_positions);
    printf("thinking          %s\n", h->facts.close_id < 0
                                         ? "no </think> marker: soft modes need --budget"
                                     : h->facts.open_id < 0 ? "close marker only"
                                                            : "open and close markers");
    printf("chat template     %s\n", h->chat ? "yes" : "none usable");
    printf("in the file       %s, %s\n", progress_bytes((double)h->source->total_bytes, a),
           file_dtype_name(c->file_dtype));
    print_tensors(h->source);
    printf("in memory         %s weights, %s KV cache\n",
           backend_dtype_name(h->model_options.weight_dtype),
           backend_dtype_name(h->model_options.kv_dtype));
    printf("rank counts       %s (1, 2, 4, 8 give the same bits)\n", ranks);
    printf("slabs             %d\n\n", h->model_options.slabs);
    printf("rank  slabs   heads  kv  ffn     vocabulary  weights      KV a token   scratch\n");
    for (int r = 0; r < n->ranks; r++) {
        const struct shard_map *m = &n->map[r];
        printf("%-4d  %2d..%-2d  %-5d  %-2d  %-6lld  %-10lld  %-11s  %-11s  %s\n", r, m->slab_begin,
               m->slab_begin + m->slab_count - 1, shard_head_count(m), shard_kv_count(m),
               (long long)shard_ffn_count(m), (long long)shard_vocab_count(m),
               progress_bytes((double)n->need[r].weight_bytes, a),
               progress_bytes((double)n->need[r].kv_bytes_per_page / KV_PAGE_TOKENS, b),
               progress_bytes((double)n->need[r].scratch_bytes, d));
    }
    printf("\ntokens that fit   %lld (%s free on this host, all %d rank%s on it)\n",
           (long long)n->tokens_fit, progress_bytes((double)free_memory(1), e), n->ranks,
           n->ranks == 1 ? "" : "s");
}

static void write_json(const struct host *h, const struct rank_needs *n, const char *ranks,
                       struct json_writer *w) {
    const struct model_config *c = &h->source->config;
    json_begin(w, '{');
    json_key(w, "model");
    json_write_text(w, h->source->path);
    json_key(w, "architecture");
    json_write_text(w, c->arch_name);
    json_key(w, "parameters");
    json_write_int(w, config_parameter_count(c));
    json_key(w, "file_bytes");
    json_write_int(w, h->source->total_bytes);
    json_key(w, "file_dtype");
    json_write_text(w, file_dtype_name(c->file_dtype));
    json_key(w, "dtype");
    json_write_text(w, backend_dtype_name(h->model_options.weight_dtype));
    json_key(w, "kv_dtype");
    json_write_text(w, backend_dtype_name(h->model_options.kv_dtype));
    json_key(w, "slabs");
    json_write_int(w, h->model_options.slabs);
    json_key(w, "legal_ranks");
    json_write_text(w, ranks);
    json_key(w, "tokens_fit");
    json_write_int(w, n->tokens_fit);
    json_key(w, "ranks");
    json_begin(w, '[');
    for (int r = 0; r < n->ranks; r++) {
        json_begin(w, '{');
        json_key(w, "weight_bytes");
        json_write_int(w, n->need[r].weight_bytes);
        json_key(w, "kv_bytes_per_token");
        json_write_int(w, n->need[r].kv_bytes_per_page / KV_PAGE_TOKENS);
        json_key(w, "scratch_bytes");
        json_write_int(w, n->need[r].scratch_bytes);
        json_end(w, '}');
    }
    json_end(w, ']');
    json_end(w, '}');
    json_write_bytes(w, "\n", 1);
}

static enum status inspect(struct host *h) {
    struct rank_needs needs;
    struct shard_dims dims;
    char ranks[256];
    const int count = h->params.ranks > 0 ? (int)h->params.ranks : h->ranks;
    if (h->params.positional) {
        return fail(STATUS_USAGE, "%s: unexpected argument; the model is given by --model",
                    h->params.positional);
    }
    host_plan_model(h);
    if (h->params.slabs == 0) h->model_options.slabs = shard_default_slabs(count);
    config_shard_dims(&h->source->config, &dims);
    TRY(shard_check(&dims, h->model_options.slabs, count));
    TRY(count_needs(h, count, &needs));
    legal_ranks(&dims, (int)h->params.slabs, ranks, sizeof ranks);
    if (!h->params.json) {
        print_text(h, &needs, ranks);
        return STATUS_OK;
    }
    struct json_writer w;
    json_writer_init(&w);
    write_json(h, &needs, ranks, &w);
    fwrite(w.bytes, 1, w.n, stdout);
    json_writer_fini(&w);
    return STATUS_OK;
}

enum status cmd_inspect(struct host *h) {
    TRY(host_open_text(h));
    return h->rank == 0 ? inspect(h) : STATUS_OK;
}
