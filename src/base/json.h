/* json.h: reading JSON through jansson, writing it through an own escaper.
 *
 * Reading is strict: one value, no duplicate keys, no NUL in strings (jansson checks UTF-8 and
 * depth). Writing goes straight into a growing buffer: commas are placed by the writer, floats
 * print with 9 significant digits (equal text = equal fp32 bits), broken UTF-8 becomes U+FFFD.
 * jansson objects for replies would cost an allocation per number of a trace. Thread: any, one
 * writer per thread. Memory: the buffer is malloc'ed; when memory ends the writer becomes `failed`
 * and ignores the rest.
 */
#ifndef SFUMATO_BASE_JSON_H
#define SFUMATO_BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

enum { JSON_FILE_BYTES_MAX = 256 << 20 };

/* on_error: the status of a failure (STATUS_REQUEST for request bodies, STATUS_MODEL for model
 * files). */
enum status json_load_text(const char *text, size_t n, enum status on_error, json_t **out);
enum status json_load_path(const char *path, enum status on_error, json_t **out);
/* A whole file as malloc'ed bytes with a NUL after them. *bytes = NULL and STATUS_OK when
 * `optional` and there is no such file. */
enum status json_read_file(const char *path, size_t bytes_max, bool optional, enum status on_error,
                           char **bytes, size_t *n);

struct json_writer {
    char *bytes;
    size_t n, capacity;
    bool comma;  /* the next value needs one before it */
    bool failed; /* out of memory */
};
void json_writer_init(struct json_writer *w);
void json_writer_fini(struct json_writer *w);
void json_writer_clear(struct json_writer *w); /* keeps the memory */

void json_begin(struct json_writer *w, char open); /* '{' or '[' */
void json_end(struct json_writer *w, char close);  /* '}' or ']' */
void json_key(struct json_writer *w, const char *key);
void json_write_string(struct json_writer *w, const char *text, size_t n);
void json_write_text(struct json_writer *w, const char *text); /* NULL writes null */
void json_write_int(struct json_writer *w, int64_t value);
void json_write_real(struct json_writer *w, double value); /* %.9g; NaN and infinities write null */
void json_write_bool(struct json_writer *w, bool value);
void json_write_null(struct json_writer *w);
/* Already JSON: a value rendered before (custom_id). */
void json_write_raw(struct json_writer *w, const char *json, size_t n);
/* Bytes that are no value: the newline after a line. */
void json_write_bytes(struct json_writer *w, const char *bytes, size_t n);

/* Length of the valid UTF-8 sequence at p (1..4), or 0; *skip = bytes to replace by one U+FFFD (the
 * maximal subpart, as Unicode recommends and Python does). */
size_t json_utf8_length(const char *p, size_t n, size_t *skip);

#endif
