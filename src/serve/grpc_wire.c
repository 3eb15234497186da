/* grpc_wire.c: see grpc_wire.h. */
#include "serve/grpc_wire.h"

#include <stdlib.h>
#include <string.h>

enum { FIRST_BYTES = 4096 };

static size_t length_of(const uint8_t prefix[WIRE_PREFIX_BYTES]) {
    return (size_t)prefix[1] << 24 | (size_t)prefix[2] << 16 | (size_t)prefix[3] << 8 | prefix[4];
}

/* ---- in ---- */

static enum wire_fault read_prefix(struct wire_in *in, size_t length_max) {
    if (in->prefix[0] == 1) return WIRE_COMPRESSED;
    if (in->prefix[0] != 0) return WIRE_BAD_FLAG;
    in->length = length_of(in->prefix);
    return in->length > length_max ? WIRE_TOO_LARGE : WIRE_OK;
}

static bool reserve(struct wire_in *in, size_t bytes) {
    if (bytes <= in->capacity) return true;
    size_t capacity = in->capacity ? in->capacity : FIRST_BYTES;
    while (capacity < bytes) capacity *= 2;
    if (capacity > in->length) capacity = in->length;
    uint8_t *grown = realloc(in->bytes, capacity);
    if (!grown) return false;
    in->bytes = grown;
    in->capacity = capacity;
    return true;
}

bool wire_in_complete(const struct wire_in *in) {
    return in->prefix_n == WIRE_PREFIX_BYTES && in->n == in->length;
}

enum wire_fault wire_in_push(struct wire_in *in, const uint8_t *bytes, size_t n,
                             size_t length_max) {
    while (n > 0) {
        if (wire_in_complete(in)) return WIRE_SECOND_MESSAGE;
        if (in->prefix_n < WIRE_PREFIX_BYTES) {
            in->prefix[in->prefix_n++] = *bytes++;
            n--;
            if (in->prefix_n < WIRE_PREFIX_BYTES) continue;
            const enum wire_fault fault = read_prefix(in, length_max);
            if (fault != WIRE_OK) return fault;
            continue;
        }
        const size_t left = in->length - in->n, take = n < left ? n : left;
        if (!reserve(in, in->n + take)) return WIRE_NO_MEMORY;
        memcpy(in->bytes + in->n, bytes, take);
        in->n += take;
        bytes += take;
        n -= take;
    }
    return WIRE_OK;
}

void wire_in_fini(struct wire_in *in) {
    free(in->bytes);
    *in = (struct wire_in){0};
}

/* ---- out ---- */

void wire_prefix(uint8_t out[WIRE_PREFIX_BYTES], size_t length) {
    out[0] = 0;
    for (int i = 0; i < 4; i++) out[1 + i] = (uint8_t)(length >> (24 - 8 * i));
}

/* ---- headers ---- */

void wire_percent_encode(const char *text, char *out, size_t out_bytes) {
    static const char digits[] = "0123456789ABCDEF";
    size_t n = 0;
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        const bool plain = *c >= 0x20 && *c <= 0x7e && *c != '%';
        if (n + (plain ? 1 : 3) >= out_bytes) break;
        if (plain) {
            out[n++] = (char)*c;
        } else {
            out[n++] = '%';
            out[n++] = digits[*c >> 4];
            out[n++] = digits[*c & 15];
        }
    }
    out[n] = '\0';
}

bool wire_timeout_parse(const char *value, double *seconds) {
    static const struct {
        char unit;
        double seconds;
    } units[] = {{'H', 3600}, {'M', 60}, {'S', 1}, {'m', 1e-3}, {'u', 1e-6}, {'n', 1e-9}};
    double amount = 0;
    size_t n = 0;
    while (value[n] >= '0' && value[n] <= '9' && n < 8) amount = amount * 10 + (value[n++] - '0');
    if (n == 0 || value[n] == '\0' || value[n + 1] != '\0') return false;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (units[i].unit != value[n]) continue;
        *seconds = amount * units[i].seconds;
        if (*seconds < 1e-6) *seconds = 1e-6; /* 0 elsewhere means none */
        return true;
    }
    return false;
}

/* ---- protobuf ---- */

static void write_varint(struct json_writer *w, uint64_t value) {
    char bytes[10];
    size_t n = 0;
    do {
        bytes[n] = (char)(value & 0x7f);
        value >>= 7;
        if (value) bytes[n] = (char)(bytes[n] | 0x80);
        n++;
    } while (value);
    json_write_bytes(w, bytes, n);
}

void wire_write_field(struct json_writer *w, uint32_t number, const void *bytes, size_t n) {
    enum { LENGTH_DELIMITED = 2 };
    write_varint(w, (uint64_t)number << 3 | LENGTH_DELIMITED);
    write_varint(w, n);
    if (n) json_write_bytes(w, bytes, n);
}
