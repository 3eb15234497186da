/* tokenizer_parts.c: the arrays of a GGUF file -> tokenizer.
 *
 * A GGUF file holds vocabulary and merges, but of the pre-tokenizer only a name
 * ("tokenizer.ggml.pre"), and nothing of the normalizer. The table below says, for each name we
 * know, what Hugging Face's tokenizer.json of those models has; the reference is Hugging Face, not
 * llama.cpp (which, for one, skips NFC for qwen2). A name that is not in the table is refused:
 * guessing would give slightly wrong ids without a sign.
 */
#include <string.h>

#include "text/tokenizer.h"
#include "text/tokenizer_build.h"

/* The words of Llama 3, Qwen2 (one digit at a time) and Mistral's Tekken. */
static const char LLAMA3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char QWEN2[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char TEKKEN[] =
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char DIGIT[] = "\\p{N}";

static const struct pre {
    const char *name;
    const char *split; /* first step, NULL: none */
    bool gpt2_regex;   /* ByteLevel's own words */
    bool nfc;
    bool ignore_merges;
} PRES[] = {
    {"llama-bpe", LLAMA3, false, false, true},
    {"llama3", LLAMA3, false, false, true},
    {"llama-v3", LLAMA3, false, false, true},
    {"qwen2", QWEN2, false, true, false},
    {"deepseek-r1-qwen", QWEN2, false, true, false},
    {"tekken", TEKKEN, false, false, true},
    {"smollm", DIGIT, true, false, false},
    {"starcoder", DIGIT, true, false, false},
    {"gpt-2", NULL, true, false, false},
    {"gpt2", NULL, true, false, false},
    {"phi-2", NULL, true, false, false},
};

static enum status find_pre(const char *name, const struct pre **out) {
    for (size_t i = 0; i < sizeof PRES / sizeof *PRES; i++) {
        if (strcmp(name, PRES[i].name) != 0) continue;
        *out = &PRES[i];
        return STATUS_OK;
    }
    return fail(
        STATUS_MODEL,
        "GGUF: the pre-tokenizer \"%.40s\" (tokenizer.ggml.pre) is not supported; known are "
        "llama-bpe, qwen2, deepseek-r1-qwen, tekken, smollm, starcoder, gpt-2, phi-2. Use the "
        "model's "
        "Hugging Face folder instead",
        name);
}

/* Padding at the end ("[PAD151665]", type UNUSED) is no token: it must never be drawn. */
static size_t count_used(const struct tokenizer_parts *p) {
    size_t count = p->vocab_count;
    while (p->token_types != NULL && count > 0 && p->token_types[count - 1] == TOKEN_UNUSED)
        count--;
    return count;
}

static enum status add_merges(tokenizer *t, const struct tokenizer_parts *p) {
    for (size_t i = 0; i < p->merge_count; i++) {
        const struct tokenizer_string m = p->merges[i];
        const char *space = m.n < 3 ? NULL : memchr(m.bytes + 1, ' ', m.n - 1);
        if (space == NULL) return fail(STATUS_MODEL, "GGUF: merge %zu is not two tokens", i);
        const size_t left_n = (size_t)(space - m.bytes);
        TRY(bpe_add_merge(t->bpe, (struct tokenizer_string){m.bytes, left_n},
                          (struct tokenizer_string){space + 1, m.n - left_n - 1}));
    }
    return STATUS_OK;
}

static enum status add_entries(tokenizer *t, const struct tokenizer_parts *p, size_t count) {
    for (size_t id = 0; p->token_types != NULL && id < count; id++) {
        const int32_t type = p->token_types[id];
        if (type != TOKEN_CONTROL && type != TOKEN_USER && type != TOKEN_UNKNOWN) continue;
        TRY(tokenizer_add_entry(t, (struct added_entry){
                                       .text = p->tokens[id].bytes,
                                       .n = p->tokens[id].n,
                                       .id = (uint32_t)id,
                                       .special = type != TOKEN_USER,
                                   }));
    }
    return STATUS_OK;
}

enum status tokenizer_open_parts(const struct tokenizer_parts *p, tokenizer **out) {
    *out = NULL;
    if (strcmp(p->model, "gpt2") != 0)
        return fail(STATUS_MODEL,
                    "GGUF: the tokenizer model \"%.40s\" is not supported (only \"gpt2\", "
                    "byte-level BPE, is)",
                    p->model);
    const struct pre *pre = NULL;
    TRY(find_pre(p->pre, &pre));
    if (p->merges == NULL) return fail(STATUS_MODEL, "GGUF: tokenizer.ggml.merges is missing");
    if (p->merge_count > TOKENIZER_VOCAB_MAX)
        return fail(STATUS_MODEL, "GGUF: %zu merges, at most %d are supported", p->merge_count,
                    TOKENIZER_VOCAB_MAX);
    const size_t count = count_used(p);
    enum status status = STATUS_OK;
    tokenizer *t = NULL;
    TRY_GOTO(tokenizer_begin(count, &t), out);
    for (size_t id = 0; id < count; id++)
        TRY_GOTO(tokenizer_add_model_token(t, id, p->tokens[id].bytes, p->tokens[id].n), out);
    const struct bpe_options options = {.ignore_merges = pre->ignore_merges, .unk_id = -1};
    TRY_GOTO(bpe_new(t->model, t->model_count, options, p->merge_count, &t->bpe), out);
    TRY_GOTO(add_merges(t, p), out);
    if (pre->nfc) TRY_GOTO(normalizer_add_form(t->normalizer, NORMAL_NFC), out);
    if (pre->split != NULL)
        TRY_GOTO(pretokenizer_add_split(t->pretokenizer, pre->split, strlen(pre->split), false,
                                        SPLIT_ISOLATED, false),
                 out);
    TRY_GOTO(pretokenizer_add_byte_level(t->pretokenizer, false, pre->gpt2_regex), out);
    TRY_GOTO(add_entries(t, p, count), out);
    t->bos = p->bos_id >= 0 && (size_t)p->bos_id < count ? p->bos_id : -1;
    t->eos = p->eos_id >= 0 && (size_t)p->eos_id < count ? p->eos_id : -1;
    if (p->add_bos && t->bos >= 0) TRY_GOTO(tokenizer_add_frame(t, true, (uint32_t)t->bos), out);
    if (p->add_eos && t->eos >= 0) TRY_GOTO(tokenizer_add_frame(t, false, (uint32_t)t->eos), out);
    TRY_GOTO(tokenizer_end(t), out);
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    return status;
}
