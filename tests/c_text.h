/* c_text.h: what the suites of text/ share: files, .xz files, JSON lines, the test tokenizers. */
#ifndef SFUMATO_TESTS_C_TEXT_H
#define SFUMATO_TESTS_C_TEXT_H

#include <jansson.h>

#include "base/check.h"
#include "suite.h"
#include "text/tokenizer.h"

/* A whole file, or a .xz file through `xz -dc`; NUL-terminated, NULL when it cannot be read. */
static inline char *text_read(const char *relative, size_t *n) {
    const char *path = suite_path(relative);
    const bool packed = strstr(relative, ".xz") != NULL;
    char command[2300];
    snprintf(command, sizeof command, "xz -dc '%s'", path);
    FILE *f = packed ? popen(command, "r") : fopen(path, "rb");
    if (f == NULL) return NULL;
    size_t capacity = 1 << 16;
    char *bytes = malloc(capacity + 1);
    *n = 0;
    for (size_t got; bytes != NULL && (got = fread(bytes + *n, 1, capacity - *n, f)) > 0;) {
        *n += got;
        if (*n == capacity) bytes = realloc(bytes, (capacity *= 2) + 1);
    }
    if (bytes != NULL) bytes[*n] = '\0';
    const int rc = packed ? pclose(f) : fclose(f);
    if (rc == 0 && *n > 0) return bytes;
    printf("\n    cannot read %s%s\n", path, packed ? " (is xz installed?)" : "");
    free(bytes);
    return NULL;
}

/* Calls `each` for every line of a .jsonl file; returns how many. */
static inline int text_lines(const char *relative, void (*each)(const json_t *line)) {
    size_t n;
    char *bytes = text_read(relative, &n);
    CU_ASSERT_PTR_NOT_NULL_FATAL(bytes);
    int count = 0;
    for (char *at = bytes, *end; at < bytes + n; at = end + 1) {
        end = memchr(at, '\n', (size_t)(bytes + n - at));
        if (end == NULL) end = bytes + n;
        json_error_t error;
        json_t *line = json_loadb(at, (size_t)(end - at), JSON_ALLOW_NUL, &error);
        CU_ASSERT_PTR_NOT_NULL_FATAL(line);
        each(line);
        json_decref(line);
        count++;
    }
    free(bytes);
    return count;
}

/* "tiny" is the shipped model's and changes with it; "small" is of the same kind and stays. */
enum { TEXT_TOKENIZER_COUNT = 4, TEXT_SMALL = 3 };
static const struct {
    const char *name, *json, *config;
} text_files[TEXT_TOKENIZER_COUNT] = {
    {"llama3_1", "tests/data/tokenizers/llama3_1.tokenizer.json.xz",
     "tests/data/tokenizers/llama3_1.tokenizer_config.json.xz"},
    {"qwen3", "tests/data/tokenizers/qwen3.tokenizer.json.xz",
     "tests/data/tokenizers/qwen3.tokenizer_config.json.xz"},
    {"tiny", "models/tiny/tokenizer.json", "models/tiny/tokenizer_config.json"},
    {"small", "tests/data/tokenizers/small.tokenizer.json.xz",
     "tests/data/tokenizers/small.tokenizer_config.json.xz"},
};

static inline int text_file_index(const char *name) {
    for (int i = 0; i < TEXT_TOKENIZER_COUNT; i++)
        if (strcmp(text_files[i].name, name) == 0) return i;
    return -1;
}

static inline tokenizer *text_open(int index) {
    size_t n, config_n;
    char *json = text_read(text_files[index].json, &n);
    char *config = text_read(text_files[index].config, &config_n);
    tokenizer *t = NULL;
    if (json != NULL && config != NULL &&
        tokenizer_open_json(json, n, config, config_n, &t) != STATUS_OK)
        printf("\n    %s: %s\n", text_files[index].name, fail_text());
    free(json);
    free(config);
    return t;
}

static inline bool text_same_ids(const json_t *want, const uint32_t *ids, size_t count) {
    if (json_array_size(want) != count) return false;
    for (size_t i = 0; i < count; i++)
        if (json_integer_value(json_array_get(want, i)) != (json_int_t)ids[i]) return false;
    return true;
}

#endif
