/* json.c: see json.h. */
#include "base/json.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- reading ---- */

enum status json_load_text(const char *text, size_t n, enum status on_error, json_t **out) {
    json_error_t error;
    *out = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    if (*out) return STATUS_OK;
    if (!memchr(text, '\n', n)) /* a line of JSON lines has a number of its own elsewhere */
        return fail(on_error, "not valid JSON at column %d: %s", error.column, error.text);
    return fail(on_error, "not valid JSON at line %d, column %d: %s", error.line, error.column,
                error.text);
}

enum status json_read_file(const char *path, size_t bytes_max, bool optional, enum status on_error,
                           char **bytes, size_t *n) {
    *bytes = NULL;
    *n = 0;
    FILE *file = fopen(path, "rbe");
    if (!file) {
        if (optional && errno == ENOENT) return STATUS_OK;
        return fail(on_error, "%s: %s", path, strerror(errno));
    }
    enum status status = STATUS_OK;
    struct stat facts;
    if (fstat(fileno(file), &facts) != 0 || !S_ISREG(facts.st_mode)) {
        status = fail(on_error, "%s: not a plain file", path);
        goto out;
    }
    const size_t size = (size_t)facts.st_size;
    if (size > bytes_max) {
        status = fail(on_error, "%s: %zu bytes, at most %zu are accepted", path, size, bytes_max);
        goto out;
    }
    *bytes = malloc(size + 1);
    if (!*bytes) {
        status = fail(STATUS_MEMORY, "%s: no memory for its %zu bytes", path, size);
        goto out;
    }
    *n = fread(*bytes, 1, size, file);
    (*bytes)[*n] = '\0';
    if (*n != size) {
        free(*bytes);
        *bytes = NULL;
        status = fail(on_error, "%s: %zu of %zu bytes could be read", path, *n, size);
    }
out:
    fclose(file);
    return status;
}

enum status json_load_path(const char *path, enum status on_error, json_t **out) {
    char *text;
    size_t n;
    *out = NULL;
    TRY(json_read_file(path, JSON_FILE_BYTES_MAX, false, on_error, &text, &n));
    const enum status status = json_load_text(text, n, on_error, out);
    free(text);
    return status == STATUS_OK ? status : fail_prefix(status, "%s", path);
}

/* ---- writing ---- */

void json_writer_init(struct json_writer *w) { *w = (struct json_writer){0}; }

void json_writer_fini(struct json_writer *w) {
    free(w->bytes);
    json_writer_init(w);
}

void json_writer_clear(struct json_writer *w) {
    w->n = 0;
    w->comma = false;
    w->failed = false;
}

void json_write_bytes(struct json_writer *w, const char *bytes, size_t n) {
    if (w->failed || n == 0) return;
    if (w->capacity - w->n < n) {
        size_t capacity = w->capacity ? w->capacity : 512;
        while (capacity - w->n < n) capacity *= 2;
        char *grown = realloc(w->bytes, capacity);
        if (!grown) {
            w->failed = true;
            return;
        }
        w->bytes = grown;
        w->capacity = capacity;
    }
    memcpy(w->bytes + w->n, bytes, n);
    w->n += n;
}

static void begin_value(struct json_writer *w) {
    if (w->comma) json_write_bytes(w, ",", 1);
    w->comma = true;
}

void json_begin(struct json_writer *w, char open) {
    begin_value(w);
    json_write_bytes(w, &open, 1);
    w->comma = false;
}

void json_end(struct json_writer *w, char close) {
    json_write_bytes(w, &close, 1);
    w->comma = true;
}

size_t json_utf8_length(const char *p, size_t n, size_t *skip) {
    const unsigned char *b = (const unsigned char *)p;
    *skip = 1;
    if (n == 0) return 0;
    if (b[0] < 0x80) return 1;
    const size_t want = b[0] >= 0xf0 ? 4 : b[0] >= 0xe0 ? 3 : 2;
    if (b[0] < 0xc2 || b[0] > 0xf4) return 0;
    for (size_t i = 1; i < want; i++) {
        /* The second byte also rules out overlong forms, surrogates and what is above U+10FFFF. */
        const unsigned char low = i > 1 ? 0x80 : b[0] == 0xe0 ? 0xa0 : b[0] == 0xf0 ? 0x90 : 0x80;
        const unsigned char high = i > 1 ? 0xbf : b[0] == 0xed ? 0x9f : b[0] == 0xf4 ? 0x8f : 0xbf;
        if (i >= n || b[i] < low || b[i] > high) {
            *skip = i;
            return 0;
        }
    }
    return want;
}

/* Bytes of an ASCII text that stand for themselves: nearly all there are, so they go in runs. */
static size_t plain_length(const char *text, size_t n) {
    size_t i = 0;
    while (i < n && text[i] >= 0x20 && text[i] < 0x7f && text[i] != '"' && text[i] != '\\') i++;
    return i;
}

void json_write_string(struct json_writer *w, const char *text, size_t n) {
    begin_value(w);
    json_write_bytes(w, "\"", 1);
    for (size_t i = 0; i < n;) {
        const size_t plain = plain_length(text + i, n - i);
        json_write_bytes(w, text + i, plain);
        i += plain;
        if (i == n) break;
        const unsigned char c = (unsigned char)text[i];
        char escape[8];
        if (c == '"' || c == '\\') {
            snprintf(escape, sizeof escape, "\\%c", c);
            json_write_bytes(w, escape, 2);
            i++;
        } else if (c < 0x20 || c == 0x7f) {
            const char *letter = c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" : NULL;
            snprintf(escape, sizeof escape, "\\u%04x", c);
            json_write_bytes(w, letter ? letter : escape, letter ? 2 : 6);
            i++;
        } else {
            size_t skip;
            const size_t length = json_utf8_length(text + i, n - i, &skip);
            json_write_bytes(w, length ? text + i : "\xef\xbf\xbd", length ? length : 3);
            i += length ? length : skip;
        }
    }
    json_write_bytes(w, "\"", 1);
}

void json_write_text(struct json_writer *w, const char *text) {
    if (text) {
        json_write_string(w, text, strlen(text));
    } else {
        json_write_null(w);
    }
}

void json_key(struct json_writer *w, const char *key) {
    json_write_text(w, key);
    json_write_bytes(w, ":", 1);
    w->comma = false;
}

void json_write_raw(struct json_writer *w, const char *json, size_t n) {
    begin_value(w);
    json_write_bytes(w, json, n);
}

void json_write_int(struct json_writer *w, int64_t value) {
    char text
        [24]; /* at most 20; snprintf takes ten times as long, and replies are full of numbers */
    char *p = text + sizeof text;
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do {
        *--p = (char)('0' + rest % 10);
        rest /= 10;
    } while (rest > 0);
    if (value < 0) *--p = '-';
    json_write_raw(w, p, (size_t)(text + sizeof text - p));
}

void json_write_real(struct json_writer *w, double value) {
    char text[40];
    if (!isfinite(value)) {
        json_write_null(w);
    } else {
        json_write_raw(w, text, (size_t)snprintf(text, sizeof text, "%.9g", value));
    }
}

void json_write_bool(struct json_writer *w, bool value) {
    json_write_raw(w, value ? "true" : "false", value ? 4 : 5);
}

void json_write_null(struct json_writer *w) { json_write_raw(w, "null", 4); }
