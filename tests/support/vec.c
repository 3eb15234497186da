/* vec.c: see vec.h. */
#include "support/vec.h"

#include <stdlib.h>
#include <string.h>

#include "suite.h"

void vec_open(struct vec_file *v, const char *relative) {
    char name[512];
    snprintf(name, sizeof name, "tests/data/golden/%s", relative);
    memset(v, 0, sizeof *v);
    v->file = fopen(suite_path(name), "r");
    if (!v->file) {
        printf("cannot open %s: set SFUMATO_SOURCE_DIR to the source tree\n", suite_path(name));
        exit(1);
    }
}

void vec_close(struct vec_file *v) {
    fclose(v->file);
    free(v->line);
    free(v->words);
}

bool vec_next(struct vec_file *v) {
    do {
        if (getline(&v->line, &v->capacity, v->file) < 0) return false;
    } while (v->line[0] == '#' || v->line[0] == '\n');
    v->word_count = 0;
    for (char *save, *w = strtok_r(v->line, " \n", &save); w; w = strtok_r(NULL, " \n", &save)) {
        if (v->word_count == v->word_capacity) {
            v->word_capacity = v->word_capacity ? 2 * v->word_capacity : 64;
            v->words = realloc(v->words, (size_t)v->word_capacity * sizeof *v->words);
            if (!v->words) exit(1);
        }
        v->words[v->word_count++] = w;
    }
    return v->word_count > 0;
}

bool vec_is(const struct vec_file *v, const char *name) { return strcmp(v->words[0], name) == 0; }

float vec_float(const char *hex) {
    const uint32_t bits = (uint32_t)strtoul(hex, NULL, 16);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void vec_pair(const char *word, uint32_t *id, float *value) {
    char *end;
    *id = (uint32_t)strtoul(word, &end, 10);
    *value = *end == ':' ? vec_float(end + 1) : 1.0f;
}

const char *vec_value(const struct vec_file *v, const char *key) {
    const size_t n = strlen(key);
    for (int i = 1; i < v->word_count; i++) {
        if (strncmp(v->words[i], key, n) == 0 && v->words[i][n] == '=') return v->words[i] + n + 1;
    }
    return NULL;
}

float vec_value_float(const struct vec_file *v, const char *key) {
    const char *text = vec_value(v, key);
    return text ? vec_float(text) : NAN;
}

long long vec_value_int(const struct vec_file *v, const char *key) {
    const char *text = vec_value(v, key);
    return text ? strtoll(text, NULL, 10) : 0;
}
