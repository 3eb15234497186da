/* utf8.c: see utf8.h. */
#include "text/utf8.h"

#include <stdlib.h>
#include <string.h>

struct utf8_unit utf8_next(const char *s, size_t n) {
    const uint8_t *b = (const uint8_t *)s;
    const uint8_t first = b[0];
    if (first < 0x80) return (struct utf8_unit){UTF8_CHARACTER, 1, first};
    /* Lead byte -> length and the allowed range of the second byte (Unicode table 3-7): this is
     * what refuses overlong forms, surrogates and numbers above U+10FFFF at the earliest byte. */
    int need;
    uint8_t low = 0x80, high = 0xBF;
    if (first >= 0xC2 && first <= 0xDF) {
        need = 2;
    } else if (first >= 0xE0 && first <= 0xEF) {
        need = 3;
        if (first == 0xE0) low = 0xA0;
        if (first == 0xED) high = 0x9F;
    } else if (first >= 0xF0 && first <= 0xF4) {
        need = 4;
        if (first == 0xF0) low = 0x90;
        if (first == 0xF4) high = 0x8F;
    } else {
        return (struct utf8_unit){UTF8_BROKEN, 1, 0xFFFD};
    }
    uint32_t code = first & (0xFFu >> (need + 1));
    for (int i = 1; i < need; i++) {
        if ((size_t)i == n) return (struct utf8_unit){UTF8_PARTIAL, i, 0xFFFD};
        if (b[i] < low || b[i] > high) return (struct utf8_unit){UTF8_BROKEN, i, 0xFFFD};
        code = code << 6 | (b[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    return (struct utf8_unit){UTF8_CHARACTER, need, code};
}

size_t utf8_last_start(const char *s, size_t n) {
    size_t i = n - 1;
    while (i > 0 && ((uint8_t)s[i] & 0xC0) == 0x80) i--;
    return i;
}

size_t utf8_valid_bytes(const char *s, size_t n) {
    size_t i = 0;
    while (i < n) {
        if ((uint8_t)s[i] < 0x80) {
            i++;
            continue;
        }
        const struct utf8_unit u = utf8_next(s + i, n - i);
        if (u.kind != UTF8_CHARACTER) return i;
        i += (size_t)u.n;
    }
    return n;
}

int utf8_put(uint32_t code, char out[4]) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3F));
        out[2] = (char)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3F));
    out[2] = (char)(0x80 | (code >> 6 & 0x3F));
    out[3] = (char)(0x80 | (code & 0x3F));
    return 4;
}

bool utf8_is_space(uint32_t c) {
    return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

/* Bytes 00..20 (33 of them), then 7F..A0 (34), then AD: the 68 that are not printable. */
uint32_t utf8_byte_to_alphabet(uint8_t byte) {
    if (byte <= 0x20) return 0x100u + byte;
    if (byte < 0x7F) return byte;
    if (byte <= 0xA0) return 0x100u + 33u + (byte - 0x7Fu);
    if (byte == 0xAD) return 0x100u + 67u;
    return byte;
}

int utf8_byte_of_alphabet(uint32_t code) {
    if (code >= 0x100 && code < 0x100 + 33) return (int)(code - 0x100);
    if (code >= 0x100 + 33 && code < 0x100 + 67) return (int)(code - 0x100 - 33 + 0x7F);
    if (code == 0x100 + 67) return 0xAD;
    if ((code > 0x20 && code < 0x7F) || (code > 0xA0 && code <= 0xFF && code != 0xAD))
        return (int)code;
    return -1;
}

enum status text_reserve(struct text_buffer *b, size_t more) {
    if (more <= b->capacity - b->n) return STATUS_OK;
    size_t capacity = b->capacity < 64 ? 64 : b->capacity;
    while (capacity - b->n < more) {
        if (capacity > SIZE_MAX / 2)
            return fail(STATUS_MEMORY, "no memory for %zu bytes of text", more);
        capacity *= 2;
    }
    char *bytes = realloc(b->bytes, capacity);
    if (bytes == NULL) return fail(STATUS_MEMORY, "no memory for %zu bytes of text", capacity);
    b->bytes = bytes;
    b->capacity = capacity;
    return STATUS_OK;
}

enum status text_add(struct text_buffer *b, const char *bytes, size_t n) {
    TRY(text_reserve(b, n));
    if (n > 0) memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
    return STATUS_OK;
}

enum status text_add_lossy(struct text_buffer *b, const char *s, size_t n) {
    size_t i = 0;
    while (i < n) {
        const size_t valid = utf8_valid_bytes(s + i, n - i);
        TRY(text_add(b, s + i, valid));
        i += valid;
        if (i == n) break;
        TRY(text_add(b, "\xEF\xBF\xBD", 3));
        i += (size_t)utf8_next(s + i, n - i).n;
    }
    return STATUS_OK;
}

enum status text_finish(struct text_buffer *b, char **bytes, size_t *n) {
    TRY(text_add(b, "", 1));
    *bytes = b->bytes;
    *n = b->n - 1;
    *b = (struct text_buffer){0};
    return STATUS_OK;
}
