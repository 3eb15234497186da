/* tensor_table.c: see tensor_table.h. */
#include "load/tensor_table.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/fp8.h"

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
    /* of a GGUF header that is not yet compared with the file, so anything */
    if (__builtin_add_overflow(table->total_bytes, entry->bytes, &table->total_bytes)) {
        return fail(STATUS_MODEL, "the tensors have more bytes than there can be");
    }
    table->entries[table->count++] = *entry;
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

static bool is_fp8(const struct tensor_entry *e) {
    return e->type && strcmp(e->type->name, "F8_E4M3") == 0;
}

static int64_t blocks_of(int64_t n) { return (n + FP8_BLOCK - 1) / FP8_BLOCK; }

static enum status bind_scale(struct tensor_table *table, struct tensor_entry *e) {
    static const char *const endings[] = {"_scale_inv", "_scale"};
    char name[TENSOR_NAME_BYTES_MAX + 16];
    const struct tensor_entry *scale = NULL;
    for (int i = 0; i < 2 && !scale; i++) {
        snprintf(name, sizeof name, "%s%s", e->name, endings[i]);
        scale = tensor_table_find(table, name);
    }
    if (!scale) {
        return fail(STATUS_MODEL, "tensor %s is F8_E4M3 and has no %s%s: the file is incomplete",
                    e->name, e->name, endings[0]);
    }
    if (!scale->type || scale->type->elements != 1 || is_fp8(scale)) {
        return fail(STATUS_MODEL,
                    "tensor %s has dtype %s: scales must be F32, F16 or BF16 to be read here",
                    scale->name, scale->type_name);
    }
    e->scale = scale;
    e->scale_rows = e->rows > 0 ? e->rows : 1;
    e->scale_cols = e->cols > 0 ? e->cols : 1;
    e->scale_pitch = 1;
    if (scale->rows == blocks_of(e->rows) && scale->cols == blocks_of(e->cols)) {
        e->scale_rows = e->scale_cols = FP8_BLOCK;
        e->scale_pitch = scale->cols;
    } else if (scale->rows * scale->cols == e->rows && (scale->rows == 1 || scale->cols == 1)) {
        e->scale_rows = 1;
    } else if (scale->rows * scale->cols != 1) {
        return fail(STATUS_MODEL,
                    "tensor %s is [%lld, %lld] for weights [%lld, %lld]: must be one scale a block "
                    "of 128 x 128, one a row, or one in all",
                    scale->name, (long long)scale->rows, (long long)scale->cols, (long long)e->rows,
                    (long long)e->cols);
    }
    return STATUS_OK;
}

enum status tensor_table_bind_scales(struct tensor_table *table) {
    for (size_t i = 0; i < table->count; i++)
        if (is_fp8(&table->entries[i])) TRY(bind_scale(table, &table->entries[i]));
    return STATUS_OK;
}

/* A scale that cannot be one makes its block NaN, which the loader reports. */
static float scale_at(const struct tensor_entry *e, int64_t row, int64_t col) {
    const struct tensor_entry *scale = e->scale;
    const int64_t at = row / e->scale_rows * e->scale_pitch + col / e->scale_cols;
    float out;
    scale->type->decode(scale->data + at * scale->type->bytes, 1, &out);
    return out >= 0.0f && out < INFINITY ? out : NAN;
}

bool tensor_block_scales(const struct tensor_entry *entry, int64_t row_begin, int64_t row_count,
                         int64_t col_begin, int64_t col_count, float *scales) {
    if (!entry->scale ||
        row_begin / entry->scale_rows != (row_begin + row_count - 1) / entry->scale_rows)
        return false;
    for (int64_t col = col_begin, end = col_begin + col_count; col < end; col += FP8_BLOCK) {
        const int64_t last = (end - col < FP8_BLOCK ? end : col + FP8_BLOCK) - 1;
        if (col / entry->scale_cols != last / entry->scale_cols) return false;
        *scales++ = scale_at(entry, row_begin, col);
    }
    return true;
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
                                        : is_fp8(e)                ? DTYPE_FP8
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

bool tensor_is_bf16(const struct tensor_entry *entry) {
    return entry->type && strcmp(entry->type->name, "BF16") == 0;
}

enum status tensor_read_bf16(const struct tensor_entry *entry, const struct file_map *map,
                             int64_t row_begin, int64_t row_count, int64_t col_begin,
                             int64_t col_count, bf16 *dst) {
    size_t n;
    const uint8_t *rows = tensor_rows(entry, row_begin, row_count, &n);
    if (col_count == entry->cols) return file_map_read(map, rows, n, dst);
    for (int64_t r = 0; r < row_count; r++) {
        const uint8_t *from = rows + (r * entry->cols + col_begin) * (int64_t)sizeof(bf16);
        TRY(file_map_read(map, from, (size_t)col_count * sizeof(bf16), dst + r * col_count));
    }
    return STATUS_OK;
}

static void decode_row(const struct tensor_entry *entry, int64_t row, int64_t col_begin,
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

void tensor_read_row(const struct tensor_entry *entry, int64_t row, int64_t col_begin,
                     int64_t col_count, float *dst) {
    decode_row(entry, row, col_begin, col_count, dst);
    if (!entry->scale) return;
    const int64_t end = col_begin + col_count;
    for (int64_t col = col_begin, next; col < end; col = next) {
        const float scale = scale_at(entry, row, col);
        next = (col / entry->scale_cols + 1) * entry->scale_cols;
        if (next > end) next = end;
        for (int64_t k = col - col_begin; k < next - col_begin; k++) dst[k] *= scale;
    }
}
