/* toy_model.c: see toy_model.h. */
#include "support/toy_model.h"

#include <stdio.h>
#include <string.h>

static const struct toy {
    const char *name, *arch_name;
    enum config_arch arch;
    int layers, heads, kv_heads, hidden, ffn, vocab_rows;
    bool tied, qkv_bias, qk_norm;
} toys[] = {
    {"toy_mha8", "LlamaForCausalLM", ARCH_LLAMA, 3, 8, 8, 256, 512, 1000, false, false, false},
    {"toy_gqa3", "LlamaForCausalLM", ARCH_LLAMA, 3, 9, 3, 288, 384, 1003, false, false, false},
    {"toy_gqa2", "Qwen2ForCausalLM", ARCH_QWEN2, 2, 14, 2, 448, 608, 1511, true, true, false},
    {"toy_gqa5", "Qwen2ForCausalLM", ARCH_QWEN2, 2, 40, 8, 320, 864, 1024, false, true, false},
    {"toy_qk", "Qwen3ForCausalLM", ARCH_QWEN3, 3, 16, 8, 192, 320, 997, false, false, true},
    {"toy_kv10", "MistralForCausalLM", ARCH_MISTRAL, 2, 20, 10, 320, 640, 1009, false, false,
     false},
};

const char *const toy_names[] = {"toy_mha8", "toy_gqa3", "toy_gqa2", "toy_gqa5",
                                 "toy_qk",   "toy_kv10", NULL};

bool toy_config(const char *name, struct model_config *out) {
    for (size_t i = 0; i < sizeof toys / sizeof toys[0]; i++) {
        const struct toy *t = &toys[i];
        if (strcmp(t->name, name) != 0) continue;
        config_init(out);
        out->arch = t->arch;
        snprintf(out->arch_name, sizeof out->arch_name, "%s", t->arch_name);
        out->layers = t->layers;
        out->heads = t->heads;
        out->kv_heads = t->kv_heads;
        out->head_dim = 32;
        out->hidden = t->hidden;
        out->ffn = t->ffn;
        out->vocab_rows = t->vocab_rows;
        out->tied = t->tied;
        out->qkv_bias = t->qkv_bias;
        out->qk_norm = t->qk_norm;
        out->max_positions = out->rope_original_positions = 4096;
        out->eos_ids[out->eos_count++] = 3;
        return true;
    }
    return false;
}
