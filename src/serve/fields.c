/* fields.c: see fields.h. */
#include "serve/fields.h"

#include <stdio.h>
#include <string.h>

enum status field_wrong(const char *prefix, const char *key, const char *what) {
    char path[FAULT_NAME_BYTES];
    snprintf(path, sizeof path, "%s%s", prefix, key);
    return fail_param(STATUS_REQUEST, path, NULL, "%s must be %s", path, what);
}

json_t *field_get(const json_t *object, const char *key) {
    json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

enum status field_bool(const json_t *object, const char *prefix, const char *key, bool *out) {
    const json_t *value = field_get(object, key);
    if (!value) return STATUS_OK;
    if (!json_is_boolean(value)) return field_wrong(prefix, key, "true or false");
    *out = json_is_true(value);
    return STATUS_OK;
}

enum status field_int(const json_t *object, const char *prefix, const char *key, int64_t low,
                      int64_t high, int64_t *out) {
    const json_t *value = field_get(object, key);
    if (!value) return STATUS_OK;
    if (!json_is_integer(value)) return field_wrong(prefix, key, "an integer");
    const int64_t number = json_integer_value(value);
    if (number < low || number > high) {
        char path[FAULT_NAME_BYTES];
        snprintf(path, sizeof path, "%s%s", prefix, key);
        return fail_param(STATUS_REQUEST, path, NULL, "%s is %lld: it must be in %lld..%lld", path,
                          (long long)number, (long long)low, (long long)high);
    }
    *out = number;
    return STATUS_OK;
}

enum status field_real(const json_t *object, const char *prefix, const char *key, double low,
                       double high, double *out) {
    const json_t *value = field_get(object, key);
    if (!value) return STATUS_OK;
    if (!json_is_number(value)) return field_wrong(prefix, key, "a number");
    const double number = json_number_value(value);
    if (!(number >= low && number <= high)) {
        char path[FAULT_NAME_BYTES];
        snprintf(path, sizeof path, "%s%s", prefix, key);
        return fail_param(STATUS_REQUEST, path, NULL, "%s is %.9g: it must be in [%.9g,%.9g]", path,
                          number, low, high);
    }
    *out = number;
    return STATUS_OK;
}

enum status field_text(const json_t *object, const char *prefix, const char *key,
                       const char **out) {
    const json_t *value = field_get(object, key);
    if (!value) return STATUS_OK;
    if (!json_is_string(value)) return field_wrong(prefix, key, "a string");
    *out = json_string_value(value);
    return STATUS_OK;
}

enum status field_row(const json_t *object, const char *prefix, const char *key, const char *row,
                      double *out, bool *given) {
    const json_t *value = field_get(object, key);
    if (!value) return STATUS_OK;
    const enum param_id id = param_find_field(row);
    ASSERT(id != PARAM_NONE);
    if (param_is_count(id) ? !json_is_integer(value) : !json_is_number(value)) {
        return field_wrong(prefix, key, param_is_count(id) ? "an integer" : "a number");
    }
    char path[FAULT_NAME_BYTES];
    snprintf(path, sizeof path, "%s%s", prefix, key);
    TRY(json_is_integer(value) ? param_check_count(id, json_integer_value(value), path)
                               : param_check_number(id, json_real_value(value), path));
    *out = json_number_value(value);
    if (given) *given = true;
    return STATUS_OK;
}

enum status field_top_k(const json_t *object, const char *prefix, int vocab_count, int *out) {
    int64_t top_k = *out;
    TRY(field_int(object, prefix, "top_k", -1, vocab_count, &top_k));
    *out = top_k > 0 ? (int)top_k : 0;
    return STATUS_OK;
}

enum status field_only(const json_t *object, const char *const *known, size_t count,
                       const char *why) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)object, key, value) {
        char what[160];
        size_t i = 0;
        while (i < count && strcmp(known[i], key) != 0) i++;
        if (i < count) continue;
        snprintf(what, sizeof what, "left out: %s", why);
        return field_wrong("", key, what);
    }
    return STATUS_OK;
}
