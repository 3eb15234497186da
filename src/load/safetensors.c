/* safetensors.c: a Hugging Face folder as a source.
 *
 * Owns the mappings of its *.safetensors files (one, or the shards named by the index), the tensor
 * table and the names. The folder and its files are hostile: sizes are checked against the file
 * before use, products against overflow, shard names must be plain file names so that an index
 * cannot point outside the folder, and the index must agree with the shards. Refuses to know: what
 * a model needs (the loader checks names and shapes) and whether values are sane (the loader looks
 * for NaN while it packs). Threads: find and read from any number of threads; open and close on
 * one.
 */
#include "load/safetensors.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load/file.h"
#include "load/source.h"

enum { FILES_MAX = 1024, INDEX_BYTES_MAX = 16 << 20 };

struct safetensors_source {
    source base;
    arena names;
    struct tensor_table table;
    struct file_map maps[FILES_MAX];
    const char *file_names[FILES_MAX]; /* without the folder */
    int file_count;
};

static bool dtype_bytes(const char *dtype, int64_t *out) {
    static const struct {
        const char *name;
        int bytes;
    } sizes[] = {{"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2},    {"I64", 8},
                 {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},     {"U32", 4},
                 {"U16", 2}, {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (strcmp(dtype, sizes[i].name) != 0) continue;
        *out = sizes[i].bytes;
        return true;
    }
    return false;
}

/* [rows, cols] of any shape: a vector is one row, more dimensions are folded into the columns.
 * False when a size is negative or the product does not fit. */
static bool read_shape(const json_t *shape, int64_t *rows, int64_t *cols) {
    int64_t total = 1, first = 1;
    const size_t rank = json_array_size(shape);
    if (!json_is_array(shape) || rank > 8) return false;
    for (size_t i = 0; i < rank; i++) {
        const json_t *size = json_array_get(shape, i);
        const int64_t value = (int64_t)json_integer_value(size);
        if (!json_is_integer(size) || value < 0 || value > INT64_C(1) << 40) return false;
        if (__builtin_mul_overflow(total, value, &total)) return false;
        if (i == 0) first = value;
    }
    *rows = rank >= 2 ? first : 1;
    *cols = *rows ? total / *rows : 0;
    return *cols <= TENSOR_COLUMNS_MAX;
}

static enum status read_tensor(const char *name, const json_t *value, const uint8_t *data,
                               int64_t data_bytes, struct tensor_entry *e) {
    const char *dtype = json_string_value(json_object_get(value, "dtype"));
    const json_t *offsets = json_object_get(value, "data_offsets");
    const json_t *begin_json = json_array_get(offsets, 0), *end_json = json_array_get(offsets, 1);
    const int64_t begin = (int64_t)json_integer_value(begin_json);
    const int64_t end = (int64_t)json_integer_value(end_json);
    int64_t element_bytes, need;
    if (!dtype || !dtype_bytes(dtype, &element_bytes)) {
        return fail(STATUS_MODEL, "tensor %s has the unknown dtype %.32s", name,
                    dtype ? dtype : "?");
    }
    if (!read_shape(json_object_get(value, "shape"), &e->rows, &e->cols) ||
        __builtin_mul_overflow(e->rows * e->cols, element_bytes, &need)) {
        return fail(STATUS_MODEL, "tensor %s has an unusable shape", name);
    }
    if (!json_is_integer(begin_json) || !json_is_integer(end_json) ||
        json_array_size(offsets) != 2 || begin < 0 || end < begin) {
        return fail(STATUS_MODEL, "tensor %s has unusable data_offsets", name);
    }
    if (end > data_bytes) {
        return fail(STATUS_MODEL,
                    "tensor %s ends at byte %lld of the data, the file has %lld: download it again",
                    name, (long long)end, (long long)data_bytes);
    }
    if (end - begin != need) {
        return fail(STATUS_MODEL,
                    "tensor %s has %lld bytes, its shape %lld x %lld of %s needs %lld", name,
                    (long long)(end - begin), (long long)e->rows, (long long)e->cols, dtype,
                    (long long)need);
    }
    e->type = dequant_find_name(dtype);
    e->data = data + begin;
    e->bytes = need;
    return STATUS_OK;
}

static enum status parse_header(const json_t *root, const uint8_t *data, int64_t data_bytes,
                                int file, arena *names, struct tensor_table *table) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value) {
        struct tensor_entry e = {.file = file};
        const size_t length = strlen(key);
        if (strcmp(key, "__metadata__") == 0) continue;
        if (length == 0 || length > TENSOR_NAME_BYTES_MAX) {
            return fail(STATUS_MODEL, "a tensor name has %zu bytes, allowed are 1 to %d", length,
                        TENSOR_NAME_BYTES_MAX);
        }
        TRY(read_tensor(key, value, data, data_bytes, &e));
        e.name = arena_strndup(names, key, length);
        const char *dtype = json_string_value(json_object_get(value, "dtype"));
        e.type_name = e.type ? e.type->name : arena_strndup(names, dtype, strlen(dtype));
        if (!e.name || !e.type_name) return STATUS_MEMORY;
        TRY(tensor_table_add(table, &e));
    }
    return STATUS_OK;
}

enum status safetensors_parse(const uint8_t *bytes, size_t n, int file, arena *names,
                              struct tensor_table *table) {
    uint64_t header_bytes;
    json_error_t error;
    if (n < 8) return fail(STATUS_MODEL, "not a safetensors file: only %zu bytes", n);
    memcpy(&header_bytes, bytes, 8);
    if (header_bytes < 2 || header_bytes > SAFETENSORS_HEADER_BYTES_MAX ||
        (n > 8 && bytes[8] != '{')) {
        return fail(
            STATUS_MODEL,
            "not a safetensors file (a Git LFS pointer or an error page? download it again)");
    }
    if (header_bytes > n - 8) {
        return fail(STATUS_MODEL, "the header has %llu bytes, the file %zu: download it again",
                    (unsigned long long)header_bytes, n);
    }
    json_t *root =
        json_loadb((const char *)bytes + 8, header_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) return fail(STATUS_MODEL, "the header is broken: %s: download it again", error.text);
    const enum status status = parse_header(root, bytes + 8 + header_bytes,
                                            (int64_t)(n - 8 - header_bytes), file, names, table);
    json_decref(root);
    return status;
}

bool safetensors_file_name_ok(const char *name) {
    const size_t n = strlen(name);
    return n > 12 && n < 200 && name[0] != '.' && !strchr(name, '/') &&
           strcmp(name + n - 12, ".safetensors") == 0;
}

static enum status map_file(struct safetensors_source *s, const char *name, int *out) {
    char path[sizeof s->base.path + 256];
    for (int i = 0; i < s->file_count; i++) {
        if (strcmp(s->file_names[i], name) != 0) continue;
        *out = i;
        return STATUS_OK;
    }
    if (s->file_count == FILES_MAX) return fail(STATUS_MODEL, "more than %d shards", FILES_MAX);
    const char *copy = arena_strndup(&s->names, name, strlen(name));
    if (!copy) return STATUS_MEMORY;
    const int i = *out = s->file_count;
    snprintf(path, sizeof path, "%s/%s", s->base.path, name);
    TRY(file_map_open(path, &s->maps[i]));
    s->file_names[i] = copy;
    s->file_count++;
    const enum status status =
        safetensors_parse(s->maps[i].bytes, s->maps[i].n, i, &s->names, &s->table);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", path);
}

/* {"metadata": {...}, "weight_map": {"tensor": "model-00001-of-00005.safetensors", ...}} */
static enum status map_index(struct safetensors_source *s, const json_t *root) {
    json_t *map = json_object_get(root, "weight_map"), *value;
    const char *tensor;
    int file;
    if (!json_is_object(map) || json_object_size(map) == 0) {
        return fail(STATUS_MODEL, "weight_map is missing or empty");
    }
    json_object_foreach(map, tensor, value) {
        const char *name = json_string_value(value);
        if (!name || !safetensors_file_name_ok(name)) {
            return fail(STATUS_MODEL,
                        "tensor %.100s is said to be in %.100s: must be the plain name of a "
                        ".safetensors file in the same folder",
                        tensor, name ? name : "something that is no text");
        }
        TRY(map_file(s, name, &file));
    }
    TRY(tensor_table_seal(&s->table));
    json_object_foreach(map, tensor, value) {
        const struct tensor_entry *e = tensor_table_find(&s->table, tensor);
        if (!e || strcmp(s->file_names[e->file], json_string_value(value)) != 0) {
            return fail(STATUS_MODEL, "tensor %.100s is not in %.100s: download it again", tensor,
                        json_string_value(value));
        }
    }
    return STATUS_OK;
}

static enum status open_index(struct safetensors_source *s, const char *path, const char *text,
                              size_t n) {
    json_error_t error;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    if (!root) return fail(STATUS_MODEL, "%s line %d: %s", path, error.line, error.text);
    const enum status status = map_index(s, root);
    json_decref(root);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", path);
}

/* model.safetensors first, then the index: transformers' order. */
static enum status open_weights(struct safetensors_source *s) {
    char path[sizeof s->base.path + 64];
    char *text = NULL;
    size_t n = 0;
    int file;
    snprintf(path, sizeof path, "%s/model.safetensors", s->base.path);
    if (file_exists(path)) {
        TRY(map_file(s, "model.safetensors", &file));
        const enum status status = tensor_table_seal(&s->table);
        return status == STATUS_OK ? status : fail_prefix(status, "%s", path);
    }
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", s->base.path);
    TRY(file_read_text(path, INDEX_BYTES_MAX, &text, &n));
    if (text) {
        const enum status status = open_index(s, path, text, n);
        free(text);
        return status;
    }
    snprintf(path, sizeof path, "%s/pytorch_model.bin", s->base.path);
    const bool has_bin = file_exists(path);
    snprintf(path, sizeof path, "%s/pytorch_model.bin.index.json", s->base.path);
    if (has_bin || file_exists(path)) {
        return fail(STATUS_MODEL,
                    "%s has only PyTorch .bin weights, which can run code when read: get the "
                    ".safetensors files, or save the model again with safe_serialization=True",
                    s->base.path);
    }
    return fail(STATUS_MODEL,
                "%s has neither model.safetensors nor model.safetensors.index.json: download the "
                "weights into it",
                s->base.path);
}

static enum status read_config(struct safetensors_source *s) {
    char path[sizeof s->base.path + 64];
    char *json = NULL, *generation = NULL;
    size_t json_n = 0, generation_n = 0;
    enum status status;
    snprintf(path, sizeof path, "%s/config.json", s->base.path);
    TRY(file_read_text(path, CONFIG_FILE_BYTES_MAX, &json, &json_n));
    if (!json) {
        return fail(
            STATUS_MODEL,
            "%s has no config.json: give the folder of a Hugging Face model or a .gguf file",
            s->base.path);
    }
    snprintf(path, sizeof path, "%s/generation_config.json", s->base.path);
    TRY_GOTO(file_read_text(path, CONFIG_FILE_BYTES_MAX, &generation, &generation_n), out);
    status = config_from_json(&s->base.config, json, json_n, generation, generation_n);
    if (status != STATUS_OK) status = fail_prefix(status, "%s", s->base.path);
out:
    free(json);
    free(generation);
    return status;
}

static bool safetensors_find(const source *src, const char *name, struct source_tensor *out) {
    const struct safetensors_source *s = (const struct safetensors_source *)src;
    const struct tensor_entry *e = tensor_table_find(&s->table, name);
    if (!e) return false;
    *out =
        (struct source_tensor){e->rows, e->cols, e->type_name, e->bytes, .bf16 = tensor_is_bf16(e)};
    return true;
}

static enum status safetensors_read(source *src, const char *name, int64_t row_begin,
                                    int64_t row_count, int64_t col_begin, int64_t col_count,
                                    float *dst) {
    const struct safetensors_source *s = (const struct safetensors_source *)src;
    const struct tensor_entry *e = tensor_table_find(&s->table, name);
    if (!e) return fail(STATUS_MODEL, "%s has no tensor %s", src->path, name);
    if (!e->type) {
        return fail(STATUS_MODEL,
                    "%s/%s: tensor %s has dtype %s: only F32, F16, BF16 and F8_E4M3 can be read",
                    src->path, s->file_names[e->file], name, e->type_name);
    }
    ASSERT(row_begin >= 0 && row_count >= 0 && row_begin + row_count <= e->rows);
    ASSERT(col_begin >= 0 && col_count >= 0 && col_begin + col_count <= e->cols);
    size_t n;
    const uint8_t *rows = tensor_rows(e, row_begin, row_count, &n);
    /* of a slab of columns only a part of these bytes is wanted */
    if (col_count == e->cols) file_map_want(&s->maps[e->file], rows, n);
    for (int64_t r = 0; r < row_count; r++) {
        tensor_read_row(e, row_begin + r, col_begin, col_count, dst + r * col_count);
    }
    file_map_forget(&s->maps[e->file], rows, n);
    return STATUS_OK;
}

static enum status safetensors_read_bf16(source *src, const char *name, int64_t row_begin,
                                         int64_t row_count, int64_t col_begin, int64_t col_count,
                                         bf16 *dst) {
    const struct safetensors_source *s = (const struct safetensors_source *)src;
    const struct tensor_entry *e = tensor_table_find(&s->table, name);
    ASSERT(e && tensor_is_bf16(e));
    ASSERT(row_begin >= 0 && row_count >= 0 && row_begin + row_count <= e->rows);
    ASSERT(col_begin >= 0 && col_count >= 0 && col_begin + col_count <= e->cols);
    const enum status status =
        tensor_read_bf16(e, &s->maps[e->file], row_begin, row_count, col_begin, col_count, dst);
    if (status == STATUS_OK) return STATUS_OK;
    return fail_prefix(status, "%s/%s", src->path, s->file_names[e->file]);
}

static void safetensors_ahead(const source *src, const char *name, int64_t row_begin,
                              int64_t row_count) {
    const struct safetensors_source *s = (const struct safetensors_source *)src;
    const struct tensor_entry *e = tensor_table_find(&s->table, name);
    if (!e || !e->type) return; /* whoever reads it will be told */
    size_t n;
    const uint8_t *rows = tensor_rows(e, row_begin, row_count, &n);
    file_map_ahead(&s->maps[e->file], rows, n);
}

static bool safetensors_block_scales(const source *src, const char *name, int64_t row_begin,
                                     int64_t row_count, int64_t col_begin, int64_t col_count,
                                     float *scales) {
    const struct safetensors_source *s = (const struct safetensors_source *)src;
    const struct tensor_entry *e = tensor_table_find(&s->table, name);
    return e && tensor_block_scales(e, row_begin, row_count, col_begin, col_count, scales);
}

static void safetensors_forget(source *src) {
    struct safetensors_source *s = (struct safetensors_source *)src;
    for (int i = 0; i < s->file_count; i++)
        file_map_forget(&s->maps[i], s->maps[i].bytes, s->maps[i].n);
}

static enum status safetensors_read_text(const source *s, const char *file, size_t limit,
                                         char **text, size_t *n) {
    char path[sizeof s->path + 64];
    snprintf(path, sizeof path, "%s/%s", s->path, file);
    return file_read_text(path, limit, text, n);
}

static void safetensors_close(source *src) {
    struct safetensors_source *s = (struct safetensors_source *)src;
    for (int i = 0; i < FILES_MAX; i++) file_map_close(&s->maps[i]);
    tensor_table_fini(&s->table);
    arena_fini(&s->names);
    free(s);
}

static const struct source_ops safetensors_ops = {.kind = "safetensors",
                                                  .find = safetensors_find,
                                                  .read = safetensors_read,
                                                  .read_bf16 = safetensors_read_bf16,
                                                  .ahead = safetensors_ahead,
                                                  .block_scales = safetensors_block_scales,
                                                  .forget = safetensors_forget,
                                                  .read_text = safetensors_read_text,
                                                  .close = safetensors_close};

enum status safetensors_open(const char *folder, source **out) {
    enum status status;
    *out = NULL;
    struct safetensors_source *s = calloc(1, sizeof *s);
    if (!s) return fail(STATUS_MEMORY, "no memory to open %s", folder);
    s->base.ops = &safetensors_ops;
    arena_init(&s->names, 0);
    TRY_GOTO(source_set_path(&s->base, folder), out);
    TRY_GOTO(read_config(s), out);
    TRY_GOTO(open_weights(s), out);
    status = tensor_table_bind_scales(&s->table);
    if (status != STATUS_OK) TRY_GOTO(fail_prefix(status, "%s", s->base.path), out);
    s->base.total_bytes = s->table.total_bytes;
    s->base.config.file_dtype = tensor_table_dtype(&s->table);
out:
    if (status == STATUS_OK) {
        *out = &s->base;
    } else {
        safetensors_close(&s->base);
    }
    return status;
}
