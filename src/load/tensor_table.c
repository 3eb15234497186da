/* tensor_table.c: see tensor_table.h. */
#include "load/tensor_table.h"

#include <stdlib.h>
#include <string.h>

enum status tensor_table_add(struct tensor_table *table, const struct tensor_entry *entry) {
    if (table->count == TENSOR_COUNT_MAX) {
        return fail(STATUS_MODEL, "more than %d tensors", TENSOR_COUNT_MAX);
    }
    if (table->count == table->capacity) {
        const size_t capacity = table->capacity ? 2 * table->capacity : 64;
        void *grown = realloc(table->entries, capacity * sizeof *table->entries);
        if (!grown) return fail(STATUS_MEMORY, "no memory for a table of %zu tensors", capacity);
        table->entries = grown;
        table->capacity = capacity;
    }
    table->entries[table->count++] = *entry;
    table->total_bytes += entry->bytes; /* at most TENSOR_COUNT_MAX mappings: cannot overflow */
    return STATUS_OK;
}

static int by_name(const void *a, const void *b) {
    const struct tensor_entry *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static int by_data(const void *a, const void *b) {
    const struct tensor_entry *x = a, *y = b;
    const uintptr_t i = (uintptr_t)x->data, j = (uintptr_t)y->data;
    return i < j ? -1 : i > j;
}

enum status tensor_table_seal(struct tensor_table *table) {
    struct tensor_entry *e = table->entries;
    if (table->count == 0) return STATUS_OK;
    qsort(e, table->count, sizeof *e, by_data);
    const struct tensor_entry *last = NULL; /* the last one that has bytes at all */
    for (size_t i = 0; i < table->count; i++) {
        if (e[i].bytes == 0) continue;
        if (last && e[i].data < last->data + last->bytes) {
            return fail(STATUS_MODEL, "tensors %s and %s overlap: download the file again",
                        last->name, e[i].name);
        }
        last = &e[i];
    }
    qsort(e, table->count, sizeof *e, by_name);
    for (size_t i = 1; i < table->count; i++) {
        if (strcmp(e[i - 1].name, e[i].name) == 0) {
            return fail(STATUS_MODEL, "tensor %s is there twice", e[i].name);
        }
    }
    return STATUS_OK;
}

void tensor_table_fini(struct tensor_table *table) {
    free(table->entries);
    *table = (struct tensor_table){0};
}

const struct tensor_entry *tensor_table_find(const struct tensor_table *table, const char *name) {
    const struct tensor_entry key = {.name = name};
    if (table->count == 0) return NULL;
    return bsearch(&key, table->entries, table->count, sizeof key, by_name);
}

enum config_dtype tensor_table_dtype(const struct tensor_table *table) {
    int64_t bytes[DTYPE_QUANTISED + 1] = {0};
    for (size_t i = 0; i < table->count; i++) {
        const struct tensor_entry *e = &table->entries[i];
        if (!e->type) continue;
        const char *name = e->type->name;
        const enum config_dtype dtype = e->type->elements > 1      ? DTYPE_QUANTISED
                                        : strcmp(name, "F32") == 0 ? DTYPE_F32
                                        : strcmp(name, "F16") == 0 ? DTYPE_F16
                                                                   : DTYPE_BF16;
        bytes[dtype] += e->bytes;
    }
    enum config_dtype best = DTYPE_F32;
    for (int d = DTYPE_F32; d <= DTYPE_QUANTISED; d++) {
        if (bytes[d] > bytes[best]) best = (enum config_dtype)d;
    }
    return best;
}

const uint8_t *tensor_rows(const struct tensor_entry *entry, int64_t row_begin, int64_t row_count,
                           size_t *n) {
    const int64_t row_bytes = entry->cols / entry->type->elements * entry->type->bytes;
    *n = (size_t)(row_count * row_bytes);
    return entry->data + row_begin * row_bytes;
}

void tensor_read_row(const struct tensor_entry *entry, int64_t row, int64_t col_begin,
                     int64_t col_count, float *dst) {
    const struct dequant_type *type = entry->type;
    const int64_t elements = type->elements, row_blocks = entry->cols / elements;
    const uint8_t *blocks = entry->data + row * row_blocks * type->bytes;
    const int64_t col_end = col_begin + col_count;
    int64_t col = col_begin;
    float whole[DEQUANT_BLOCK_ELEMENTS_MAX];
    while (col < col_end) {
        const int64_t block = col / elements, skip = col % elements;
        if (skip == 0 &&
            col_end - col >= elements) { /* the common case: whole blocks, straight out */
            const int64_t count = (col_end - col) / elements;
            type->decode(blocks + block * type->bytes, (size_t)count, dst);
            col += count * elements;
            dst += count * elements;
        } else {
            const int64_t left = elements - skip < col_end - col ? elements - skip : col_end - col;
            type->decode(blocks + block * type->bytes, 1, whole);
            memcpy(dst, whole + skip, (size_t)left * sizeof *dst);
            col += left;
            dst += left;
        }
    }
}
