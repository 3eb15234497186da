/* grpc_tree.c: bytes as a protobuf message, and that as the JSON tree of the HTTP API (grpc_parts.h).
 *
 * Fields have the JSON names, so the descriptors that protobuf-c generates are all that is needed: a
 * new field of the API is one line in proto/sfumato.proto. What JSON says by the type of a value
 * and protobuf cannot is in the few rules of `exceptions` and in is_map. Recursion is bounded:
 * no message of proto/ contains itself.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "serve/grpc_parts.h"
#include "text/utf8.h"

/* ---- bytes to messages ---- */

/* protobuf-c asks for memory piece by piece; all of it goes at once, with the arena. */
struct bump {
    arena *memory;
    bool refused;
};

static void *bump_alloc(void *data, size_t n) {
    struct bump *bump = data;
    void *piece = arena_alloc(bump->memory, n ? n : 1);
    if (!piece) bump->refused = true;
    return piece;
}

static void bump_free(void *data, void *piece) {
    (void)data;
    (void)piece;
}

enum status grpc_parse(const ProtobufCMessageDescriptor *type, arena *memory, const uint8_t *bytes,
                       size_t n, void **out) {
    struct bump bump = {.memory = memory};
    ProtobufCAllocator allocator = {bump_alloc, bump_free, &bump};
    *out = protobuf_c_message_unpack(type, &allocator, n, n ? bytes : (const uint8_t *)"");
    if (*out) return STATUS_OK;
    if (bump.refused) return fail(STATUS_BUSY, "the message unfolds into too much memory");
    return fail(STATUS_REQUEST, "the message is not a valid protobuf of type %s", type->name);
}

/* ---- messages to JSON ---- */

struct walk {
    int64_t items_left;
};

static enum status object_of(struct walk *w, const ProtobufCMessage *m, json_t **out);

/* jansson gives nothing, or takes nothing, only when memory is short. */
static enum status no_memory(void) { return fail(STATUS_MEMORY, "no memory for a request"); }

/* value's reference is taken over. */
static enum status set(json_t *object, const char *key, json_t *value) {
    return json_object_set_new(object, key, value) == 0 ? STATUS_OK : no_memory();
}

/* ---- values ---- */

static enum status wrong(const ProtobufCFieldDescriptor *f, const char *what) {
    return fail_param(STATUS_REQUEST, f->name, NULL, "%s must be %s", f->name, what);
}

static enum status text_of(const ProtobufCFieldDescriptor *f, const void *bytes, size_t n,
                           json_t **out) {
    const char *text = n ? bytes : "";
    if (memchr(text, '\0', n)) return wrong(f, "text without NUL");
    *out = json_stringn(text, n); /* checks UTF-8 */
    if (*out) return STATUS_OK;
    return utf8_valid_bytes(text, n) < n ? wrong(f, "valid UTF-8") : no_memory();
}

static enum status real_of(const ProtobufCFieldDescriptor *f, double value, json_t **out) {
    if (!isfinite(value)) return wrong(f, "a finite number");
    *out = json_real(value);
    return STATUS_OK;
}

static enum status value_of(struct walk *w, const ProtobufCFieldDescriptor *f, const void *at,
                            json_t **out) {
    switch (f->type) {
        case PROTOBUF_C_TYPE_INT32:
        case PROTOBUF_C_TYPE_SINT32:
        case PROTOBUF_C_TYPE_SFIXED32:
        case PROTOBUF_C_TYPE_ENUM:
            *out = json_integer(*(const int32_t *)at);
            return STATUS_OK;
        case PROTOBUF_C_TYPE_UINT32:
        case PROTOBUF_C_TYPE_FIXED32:
            *out = json_integer(*(const uint32_t *)at);
            return STATUS_OK;
        case PROTOBUF_C_TYPE_INT64:
        case PROTOBUF_C_TYPE_SINT64:
        case PROTOBUF_C_TYPE_SFIXED64:
            *out = json_integer(*(const int64_t *)at);
            return STATUS_OK;
        case PROTOBUF_C_TYPE_UINT64:
        case PROTOBUF_C_TYPE_FIXED64:
            if (*(const uint64_t *)at > INT64_MAX) return wrong(f, "below 2^63");
            *out = json_integer((json_int_t) * (const uint64_t *)at);
            return STATUS_OK;
        case PROTOBUF_C_TYPE_FLOAT:
            return real_of(f, (double)*(const float *)at, out);
        case PROTOBUF_C_TYPE_DOUBLE:
            return real_of(f, *(const double *)at, out);
        case PROTOBUF_C_TYPE_BOOL:
            *out = json_boolean(*(const protobuf_c_boolean *)at);
            return STATUS_OK;
        case PROTOBUF_C_TYPE_STRING: {
            const char *text = *(const char *const *)at;
            return text_of(f, text, text ? strlen(text) : 0, out);
        }
        case PROTOBUF_C_TYPE_BYTES: {
            const ProtobufCBinaryData *data = at;
            return text_of(f, data->data, data->len, out);
        }
        case PROTOBUF_C_TYPE_MESSAGE:
            return object_of(w, *(const ProtobufCMessage *const *)at, out);
    }
    return fail(STATUS_BUG, "field %s has a type of its own", f->name);
}

static size_t value_bytes(const ProtobufCFieldDescriptor *f) {
    switch (f->type) {
        case PROTOBUF_C_TYPE_INT64:
        case PROTOBUF_C_TYPE_SINT64:
        case PROTOBUF_C_TYPE_SFIXED64:
        case PROTOBUF_C_TYPE_UINT64:
        case PROTOBUF_C_TYPE_FIXED64:
        case PROTOBUF_C_TYPE_DOUBLE:
            return 8;
        case PROTOBUF_C_TYPE_BOOL:
            return sizeof(protobuf_c_boolean);
        case PROTOBUF_C_TYPE_STRING:
        case PROTOBUF_C_TYPE_MESSAGE:
            return sizeof(void *);
        case PROTOBUF_C_TYPE_BYTES:
            return sizeof(ProtobufCBinaryData);
        default:
            return 4;
    }
}

/* Proto3 without presence: zero and empty are absent. */
static bool is_zero(const ProtobufCFieldDescriptor *f, const void *at) {
    static const char zeros[sizeof(ProtobufCBinaryData)];
    if (f->type == PROTOBUF_C_TYPE_STRING) {
        const char *text = *(const char *const *)at;
        return !text || !*text;
    }
    if (f->type == PROTOBUF_C_TYPE_BYTES) return ((const ProtobufCBinaryData *)at)->len == 0;
    return memcmp(at, zeros, value_bytes(f)) == 0;
}

static bool is_set(const ProtobufCMessage *m, const ProtobufCFieldDescriptor *f) {
    const char *base = (const char *)m;
    if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF) {
        return *(const uint32_t *)(base + f->quantifier_offset) == f->id;
    }
    if (f->label == PROTOBUF_C_LABEL_REPEATED) {
        return *(const size_t *)(base + f->quantifier_offset) > 0;
    }
    return !is_zero(f, base + f->offset);
}

/* ---- repeated fields ---- */

/* A map is a repeated message of the two fields key and value. */
static bool is_map(const ProtobufCFieldDescriptor *f) {
    const ProtobufCMessageDescriptor *entry = f->descriptor;
    return f->type == PROTOBUF_C_TYPE_MESSAGE && entry->n_fields == 2 &&
           strcmp(entry->fields[0].name, "key") == 0 && strcmp(entry->fields[1].name, "value") == 0;
}

static enum status map_entry(struct walk *w, const ProtobufCMessage *entry, json_t *object) {
    const ProtobufCFieldDescriptor *key = &entry->descriptor->fields[0], *value = key + 1;
    json_t *name = NULL, *content = NULL;
    char text[24];
    TRY(value_of(w, key, (const char *)entry + key->offset, &name));
    if (!name) return no_memory();
    snprintf(text, sizeof text, "%lld", (long long)json_integer_value(name));
    json_decref(name);
    TRY(value_of(w, value, (const char *)entry + value->offset, &content));
    return set(object, text, content); /* twice the same key: the last counts */
}

static enum status repeated_of(struct walk *w, const ProtobufCMessage *m,
                               const ProtobufCFieldDescriptor *f, json_t **out) {
    const char *base = (const char *)m;
    const size_t count = *(const size_t *)(base + f->quantifier_offset), step = value_bytes(f);
    const char *items = *(const char *const *)(base + f->offset);
    const bool map = is_map(f);
    if ((w->items_left -= (int64_t)count) < 0) return wrong(f, "shorter: the request is too large");
    json_t *list = map ? json_object() : json_array();
    enum status status = list ? STATUS_OK : no_memory();
    for (size_t i = 0; i < count && status == STATUS_OK; i++) {
        json_t *item = NULL;
        if (map) {
            status = map_entry(w, ((const ProtobufCMessage *const *)items)[i], list);
        } else {
            status = value_of(w, f, items + i * step, &item);
            if (status == STATUS_OK && json_array_append_new(list, item) != 0) status = no_memory();
        }
    }
    if (status != STATUS_OK) {
        json_decref(list);
        return status;
    }
    *out = list;
    return STATUS_OK;
}

/* ---- what JSON says by the type of a value ---- */

/* chat_template_kwargs: the text of a JSON value. */
static enum status parse_text(json_t **value) {
    json_t *parsed = NULL;
    TRY(json_load_text(json_string_value(*value), json_string_length(*value), STATUS_REQUEST,
                       &parsed));
    json_decref(*value);
    *value = parsed;
    return STATUS_OK;
}

/* A message that only says which JSON type follows: its one member stands for it. */
static enum status unwrap(json_t **value) {
    json_t *inner = json_object_iter_value(json_object_iter(*value));
    inner = inner ? json_incref(inner) : json_array();
    json_decref(*value);
    *value = inner;
    return STATUS_OK;
}

/* "cold_stop": false, and "return_trace": false. */
static enum status off_is_false(json_t **value) {
    const json_t *off = json_object_get(*value, "off");
    if (json_is_true(off) || (json_is_integer(*value) && json_integer_value(*value) == 0)) {
        json_decref(*value);
        *value = json_false();
    }
    return STATUS_OK;
}

static const struct {
    const char *field;
    enum status (*apply)(json_t **value);
} exceptions[] = {
    {"chat_template_kwargs", parse_text},
    {"cold_stop", off_is_false},
    {"return_trace", off_is_false},
};
static const char *const wrappers[] = {"sfumato.v1.Prompt", "sfumato.v1.Ids"};

static enum status adjust_field(const ProtobufCFieldDescriptor *f, json_t **value) {
    for (size_t i = 0; i < sizeof exceptions / sizeof *exceptions; i++) {
        if (strcmp(f->name, exceptions[i].field) == 0) return exceptions[i].apply(value);
    }
    return STATUS_OK;
}

/* ---- messages ---- */

static enum status add_field(struct walk *w, const ProtobufCMessage *m,
                             const ProtobufCFieldDescriptor *f, json_t *object) {
    json_t *value = NULL;
    if (f->label == PROTOBUF_C_LABEL_REPEATED) {
        TRY(repeated_of(w, m, f, &value));
    } else {
        TRY(value_of(w, f, (const char *)m + f->offset, &value));
    }
    const enum status status = adjust_field(f, &value);
    if (status != STATUS_OK) {
        json_decref(value);
        const struct fault fault = *fail_last();
        return fail_param(status, f->name, NULL, "%s: %s", f->name, fault.text);
    }
    return set(object, f->name, value);
}

static enum status object_of(struct walk *w, const ProtobufCMessage *m, json_t **out) {
    json_t *object = json_object();
    enum status status = object ? STATUS_OK : no_memory();
    for (unsigned i = 0; i < m->descriptor->n_fields && status == STATUS_OK; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        if (is_set(m, f)) status = add_field(w, m, f, object);
    }
    for (size_t i = 0; i < sizeof wrappers / sizeof *wrappers && status == STATUS_OK; i++) {
        if (strcmp(m->descriptor->name, wrappers[i]) == 0) status = unwrap(&object);
    }
    if (status != STATUS_OK) {
        json_decref(object);
        return status;
    }
    *out = object;
    return STATUS_OK;
}

enum status grpc_tree(const ProtobufCMessage *message, int64_t item_max, json_t **out) {
    struct walk w = {.items_left = item_max};
    *out = NULL;
    return object_of(&w, message, out);
}
