/* config_dims.c: shapes of well-known models, so that any of them can be timed without a download.
 *
 * The numbers are those of the published config.json files. A name that is not in the table is taken as
 * the path of a config.json. Thread: any. Memory: none kept.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load/config.h"
#include "load/file.h"

/* clang-format off: a table, one model a line */
static const struct preset {
    const char *name;
    enum config_arch arch;
    int layers, hidden, ffn, heads, kv_heads, head_dim, vocab_rows;
    bool tied;
    double norm_eps, rope_theta;
    int max_positions, bos_id, eos_ids[3]; /* 0 ends the list */
} presets[] = {
    {"qwen2.5-0.5b",
     ARCH_QWEN2,
     24,
     896,
     4864,
     14,
     2,
     64,
     151936,
     true,
     1e-6,
     1e6,
     32768,
     151643,
     {151645, 151643}},
    {"qwen2.5-1.5b",
     ARCH_QWEN2,
     28,
     1536,
     8960,
     12,
     2,
     128,
     151936,
     true,
     1e-6,
     1e6,
     32768,
     151643,
     {151645, 151643}},
    {"smollm2-135m", ARCH_LLAMA, 30, 576, 1536, 9, 3, 64, 49152, true, 1e-5, 1e5, 8192, 1, {2}},
    {"qwq-32b",
     ARCH_QWEN2,
     64,
     5120,
     27648,
     40,
     8,
     128,
     152064,
     false,
     1e-5,
     1e6,
     40960,
     151643,
     {151645, 151643}},
    {"llama-3.1-8b",
     ARCH_LLAMA,
     32,
     4096,
     14336,
     32,
     8,
     128,
     128256,
     false,
     1e-5,
     5e5,
     131072,
     128000,
     {128001, 128008, 128009}},
    {"llama-3.1-70b",
     ARCH_LLAMA,
     80,
     8192,
     28672,
     64,
     8,
     128,
     128256,
     false,
     1e-5,
     5e5,
     131072,
     128000,
     {128001, 128008, 128009}},
};
/* clang-format on */

static void fill(struct model_config *c, const struct preset *p) {
    config_init(c);
    c->arch = p->arch;
    snprintf(c->arch_name, sizeof c->arch_name, "%s",
             p->arch == ARCH_QWEN2 ? "Qwen2ForCausalLM" : "LlamaForCausalLM");
    c->layers = p->layers;
    c->hidden = p->hidden;
    c->ffn = p->ffn;
    c->heads = p->heads;
    c->kv_heads = p->kv_heads;
    c->head_dim = p->head_dim;
    c->vocab_rows = p->vocab_rows;
    c->tied = p->tied;
    c->qkv_bias = p->arch == ARCH_QWEN2;
    c->norm_eps = (float)p->norm_eps;
    c->rope_theta = p->rope_theta;
    c->max_positions = c->rope_original_positions = p->max_positions;
    if (strncmp(p->name, "llama-3.1", 9) == 0) {
        c->rope = ROPE_LLAMA3;
        c->rope_factor = 8;
        c->rope_low_freq_factor = 1;
        c->rope_high_freq_factor = 4;
        c->rope_original_positions = 8192;
    }
    c->bos_id = p->bos_id;
    while (c->eos_count < 3 && p->eos_ids[c->eos_count]) {
        c->eos_ids[c->eos_count] = p->eos_ids[c->eos_count];
        c->eos_count++;
    }
}

enum status config_from_dims(struct model_config *out, const char *name_or_path) {
    char names[256] = "", *json = NULL;
    size_t n = 0, json_n = 0;
    for (size_t i = 0; i < sizeof presets / sizeof presets[0]; i++) {
        if (strcmp(name_or_path, presets[i].name) == 0) {
            fill(out, &presets[i]);
            return STATUS_OK;
        }
        n += (size_t)snprintf(names + n, sizeof names - n, "%s%s", n ? ", " : "", presets[i].name);
    }
    TRY(file_read_text(name_or_path, CONFIG_FILE_BYTES_MAX, &json, &json_n));
    if (!json) {
        return fail(STATUS_USAGE, "%s is neither a file nor one of the known shapes: %s",
                    name_or_path, names);
    }
    const enum status status = config_from_json(out, json, json_n, NULL, 0);
    free(json);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", name_or_path);
}
