/* layer: load */
/* fuzz_gguf.c: the bytes of one file; what passes the checks is read: sizes, tokenizer, every row. */
#include <stdlib.h>

#include "base/log.h"
#include "load/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);

static void read_rows(const struct tensor_entry *e) {
    float *row = malloc((size_t)e->cols * sizeof *row);
    for (int64_t r = 0; row && r < e->rows; r++) tensor_read_row(e, r, 0, e->cols, row);
    free(row);
}

static size_t touch(struct gguf_string s) {
    size_t sum = 0;
    for (size_t i = 0; i < s.n; i++) sum += (uint8_t)s.bytes[i];
    return sum;
}

static void read_texts(const struct gguf_tokenizer *t) {
    volatile size_t sum = touch(t->chat_template);
    for (size_t i = 0; i < t->token_count; i++) sum += touch(t->tokens[i]);
    for (size_t i = 0; i < t->merge_count; i++) sum += touch(t->merges[i]);
    for (size_t i = 0; t->token_types && i < t->token_count; i++) sum += (size_t)t->token_types[i];
    (void)sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    arena a;
    struct gguf_file file;
    struct model_config config;
    struct gguf_tokenizer tokenizer;
    log_init(LOG_OFF, false);
    arena_init(&a, 0);
    if (gguf_parse(bytes, n, &a, &file) == STATUS_OK) {
        if (gguf_read_config(&file, &config) == STATUS_OK)
            ASSERT(config_check(&config) == STATUS_OK);
        if (gguf_read_tokenizer(&file, &a, &tokenizer) == STATUS_OK) read_texts(&tokenizer);
        for (size_t i = 0; i < file.table.count; i++) read_rows(&file.table.entries[i]);
    }
    gguf_file_fini(&file);
    arena_fini(&a);
    return 0;
}
