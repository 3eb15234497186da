/* gguf_parse.c: the bytes of a GGUF file (version 2 or 3) -> keys and a tensor table. See gguf.h.
 *
 * Owns the walk over the file and every check of it: a count or length is compared with the bytes
 * that are left before it is used, so memory and time are bounded by the file's size, and every
 * value, array item and tensor byte that is handed out lies inside the file. Refuses to know: what
 * the keys mean (gguf_config.c). Memory: the caller's arena. Thread: any, one at a time.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "load/gguf.h"

/* A position in the file. take() is the only way forward. */
struct cursor {
    const uint8_t *bytes;
    size_t n, at;
};

/* NULL after fail() when fewer bytes are left. */
static const uint8_t *take(struct cursor *c, size_t count) {
    if (count > c->n - c->at) {
        fail(STATUS_MODEL, "the header ends at byte %zu in the middle: download it again", c->n);
        return NULL;
    }
    const uint8_t *p = c->bytes + c->at;
    c->at += count;
    return p;
}

static enum status take_u32(struct cursor *c, uint32_t *out) {
    const uint8_t *p = take(c, 4);
    if (!p) return STATUS_MODEL;
    memcpy(out, p, 4);
    return STATUS_OK;
}

static enum status take_u64(struct cursor *c, uint64_t *out) {
    const uint8_t *p = take(c, 8);
    if (!p) return STATUS_MODEL;
    memcpy(out, p, 8);
    return STATUS_OK;
}

static enum status take_string(struct cursor *c, struct gguf_string *out) {
    uint64_t n = 0;
    TRY(take_u64(c, &n));
    const uint8_t *p = take(c, n); /* size_t is 64 bits wide on all targets */
    if (!p) return STATUS_MODEL;
    *out = (struct gguf_string){(const char *)p, n};
    return STATUS_OK;
}

/* Bytes of a value of fixed size; 0 for strings, arrays and unknown types. */
static size_t type_bytes(uint32_t type) {
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof bytes ? bytes[type] : 0;
}

static enum status take_items(struct cursor *c, uint32_t type, uint64_t count) {
    struct gguf_string skipped;
    if (type == GGUF_STRING) {
        for (uint64_t i = 0; i < count; i++) TRY(take_string(c, &skipped));
        return STATUS_OK;
    }
    if (count > (c->n - c->at) / type_bytes(type)) {
        return fail(STATUS_MODEL, "an array of %llu items ends beyond the file: download it again",
                    (unsigned long long)count);
    }
    return take(c, count * type_bytes(type)) ? STATUS_OK : STATUS_MODEL;
}

static enum status take_value(struct cursor *c, struct gguf_value *v) {
    uint32_t type = 0, item_type = 0;
    TRY(take_string(c, &v->key));
    if (v->key.n == 0 || v->key.n > UINT16_MAX) {
        return fail(STATUS_MODEL, "a key has %zu bytes, allowed are 1 to 65535", v->key.n);
    }
    TRY(take_u32(c, &type));
    item_type = type;
    v->count = 1;
    if (type == GGUF_ARRAY) {
        TRY(take_u32(c, &item_type));
        TRY(take_u64(c, &v->count));
    }
    if (item_type != GGUF_STRING && type_bytes(item_type) == 0) { /* nested arrays too */
        return fail(STATUS_MODEL, "key %.*s has the unknown value type %u", (int)v->key.n,
                    v->key.bytes, item_type);
    }
    v->type = (enum gguf_value_type)type;
    v->item_type = (enum gguf_value_type)item_type;
    v->data = c->bytes + c->at;
    return take_items(c, item_type, v->count);
}

const struct gguf_value *gguf_find(const struct gguf_file *file, const char *key) {
    const size_t n = strlen(key);
    for (size_t i = 0; i < file->value_count; i++) { /* a few dozen keys */
        const struct gguf_value *v = &file->values[i];
        if (v->key.n == n && memcmp(v->key.bytes, key, n) == 0) return v;
    }
    return NULL;
}

struct gguf_string gguf_string_of(const struct gguf_value *v) {
    uint64_t n;
    if (!v || v->type != GGUF_STRING) return (struct gguf_string){"", 0};
    memcpy(&n, v->data, sizeof n);
    return (struct gguf_string){(const char *)v->data + sizeof n, n};
}

/* A block format's rows must be whole blocks; the byte count must not overflow. */
static enum status tensor_size(struct tensor_entry *e, uint32_t ggml_id) {
    if (!e->type) {
        e->type_name = dequant_ggml_name(ggml_id);
        return fail(STATUS_MODEL,
                    "tensor %s has type %s, which is not supported: use a file of F32, F16, BF16, "
                    "Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
                    e->name, e->type_name ? e->type_name : "unknown");
    }
    if (e->cols % e->type->elements != 0) {
        return fail(STATUS_MODEL, "tensor %s has %lld columns, %s needs a multiple of %d", e->name,
                    (long long)e->cols, e->type->name, e->type->elements);
    }
    const int64_t row_bytes = e->cols / e->type->elements * e->type->bytes;
    if (__builtin_mul_overflow(row_bytes, e->rows, &e->bytes)) {
        return fail(STATUS_MODEL, "tensor %s has an unusable shape", e->name);
    }
    e->type_name = e->type->name;
    return STATUS_OK;
}

/* Reads one entry; the offset, relative to the data, is left in *offset until the data's start is
 * known. */
static enum status take_tensor(struct cursor *c, arena *a, struct tensor_entry *e,
                               uint64_t *offset) {
    struct gguf_string name = {0};
    uint32_t rank = 0, ggml_id = 0;
    TRY(take_string(c, &name));
    if (name.n == 0 || name.n > TENSOR_NAME_BYTES_MAX || memchr(name.bytes, 0, name.n)) {
        return fail(STATUS_MODEL, "a tensor name has %zu bytes, allowed are 1 to %d without NUL",
                    name.n, TENSOR_NAME_BYTES_MAX);
    }
    *e = (struct tensor_entry){.name = arena_strndup(a, name.bytes, name.n), .rows = 1, .cols = 1};
    if (!e->name) return STATUS_MEMORY;
    TRY(take_u32(c, &rank));
    if (rank < 1 || rank > 4) {
        return fail(STATUS_MODEL, "tensor %s has %u dimensions, allowed are 1 to 4", e->name, rank);
    }
    for (uint32_t i = 0; i < rank; i++) { /* the fastest dimension comes first: columns, rows */
        uint64_t size = 0;
        TRY(take_u64(c, &size));
        if (size < 1 || size > TENSOR_COLUMNS_MAX) {
            return fail(STATUS_MODEL, "tensor %s has a dimension of %llu", e->name,
                        (unsigned long long)size);
        }
        if (i == 0) {
            e->cols = (int64_t)size;
        } else if (__builtin_mul_overflow(e->rows, (int64_t)size, &e->rows)) {
            return fail(STATUS_MODEL, "tensor %s has an unusable shape", e->name);
        }
    }
    TRY(take_u32(c, &ggml_id));
    TRY(take_u64(c, offset));
    e->type = dequant_find_ggml(ggml_id);
    return tensor_size(e, ggml_id);
}

static enum status read_alignment(const struct gguf_file *file, uint32_t *out) {
    const struct gguf_value *v = gguf_find(file, "general.alignment");
    *out = 32;
    if (!v) return STATUS_OK;
    if (v->type == GGUF_U32) memcpy(out, v->data, 4);
    if (v->type != GGUF_U32 || *out == 0 || *out > GGUF_ALIGNMENT_MAX || (*out & (*out - 1)) != 0) {
        return fail(STATUS_MODEL, "general.alignment must be a power of two up to %d",
                    GGUF_ALIGNMENT_MAX);
    }
    return STATUS_OK;
}

static enum status take_values(struct cursor *c, uint64_t count, arena *a, struct gguf_file *out) {
    if (count > GGUF_KEYS_MAX || count > c->n / 13) { /* the smallest key takes 13 bytes */
        return fail(STATUS_MODEL, "%llu keys in %zu bytes: download it again",
                    (unsigned long long)count, c->n);
    }
    out->values = arena_alloc_array(a, count ? count : 1, sizeof *out->values);
    if (!out->values) return STATUS_MEMORY;
    for (uint64_t i = 0; i < count; i++) {
        TRY(take_value(c, &out->values[i]));
        out->value_count++;
    }
    return STATUS_OK;
}

static enum status take_tensors(struct cursor *c, uint64_t count, arena *a, struct gguf_file *out) {
    uint64_t *offsets;
    uint32_t alignment = 32;
    if (count > TENSOR_COUNT_MAX || count > c->n / 33) { /* the smallest entry takes 33 bytes */
        return fail(STATUS_MODEL, "%llu tensors in %zu bytes: download it again",
                    (unsigned long long)count, c->n);
    }
    TRY(read_alignment(out, &alignment));
    offsets = arena_alloc_array(a, count ? count : 1, sizeof *offsets);
    if (!offsets) return STATUS_MEMORY;
    for (uint64_t i = 0; i < count; i++) {
        struct tensor_entry e;
        TRY(take_tensor(c, a, &e, &offsets[i]));
        TRY(tensor_table_add(&out->table, &e));
    }
    const uint64_t data = ((uint64_t)c->at + alignment - 1) / alignment * alignment;
    for (uint64_t i = 0; i < count; i++) {
        struct tensor_entry *e = &out->table.entries[i];
        const uint64_t room = data <= c->n ? c->n - data : 0;
        if (offsets[i] % alignment != 0) {
            return fail(STATUS_MODEL, "tensor %s is not aligned to %u bytes", e->name, alignment);
        }
        if (offsets[i] > room || (uint64_t)e->bytes > room - offsets[i]) {
            return fail(
                STATUS_MODEL,
                "tensor %s of %lld bytes at byte %llu of the data, the file has %llu: download "
                "it again",
                e->name, (long long)e->bytes, (unsigned long long)offsets[i],
                (unsigned long long)room);
        }
        e->data = c->bytes + data + offsets[i];
    }
    return tensor_table_seal(&out->table);
}

enum status gguf_parse(const uint8_t *bytes, size_t n, arena *a, struct gguf_file *out) {
    struct cursor c = {bytes, n, 4};
    uint32_t version = 0;
    uint64_t tensor_count = 0, value_count = 0;
    *out = (struct gguf_file){0};
    if (n < 4 || memcmp(bytes, "GGUF", 4) != 0) {
        return fail(STATUS_MODEL,
                    "not a GGUF file (a Git LFS pointer or an error page? download it again)");
    }
    TRY(take_u32(&c, &version));
    if (version != 2 && version != 3) {
        return fail(STATUS_MODEL, "GGUF version %u%s: only 2 and 3, little-endian, can be read",
                    version, version > 0xffff ? " (a big-endian file?)" : "");
    }
    TRY(take_u64(&c, &tensor_count));
    TRY(take_u64(&c, &value_count));
    TRY(take_values(&c, value_count, a, out));
    return take_tensors(&c, tensor_count, a, out);
}

void gguf_file_fini(struct gguf_file *file) { tensor_table_fini(&file->table); }
