/* utf8.h: UTF-8 one unit at a time, the byte-level alphabet, and a growable byte buffer.
 *
 * Owns what every other file of text/ needs of characters: decoding with the "maximal subpart" rule
 * of the Unicode standard (3.9, table 3-8), which is also how Rust's from_utf8_lossy replaces
 * broken bytes; GPT-2's table that writes each byte as one printable character; White_Space. Pure
 * functions.
 *
 *   bytes   61 | C3 A9 | E2 82 | FF | F0 9F          (end of input)
 *   unit    a  |  é    | broken| br.| partial
 *
 * The byte-level alphabet: bytes 21..7E, A1..AC, AE..FF are the characters of the same number; the
 * other 68 bytes are, in order, U+0100, U+0101, ... (so a space is U+0120, written as two bytes).
 */
#ifndef SFUMATO_TEXT_UTF8_H
#define SFUMATO_TEXT_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"

enum utf8_kind {
    UTF8_CHARACTER, /* a whole valid character */
    UTF8_BROKEN,    /* n bytes that no continuation can save: one U+FFFD */
    UTF8_PARTIAL,   /* the input ends inside a character that is valid so far */
};

struct utf8_unit {
    enum utf8_kind kind;
    int n; /* bytes it takes, 1..4 */
    uint32_t code;
};

/* The unit at s; n >= 1. */
struct utf8_unit utf8_next(const char *s, size_t n);
/* The start of the character that ends at s[n-1]; the text must be valid and n >= 1. */
size_t utf8_last_start(const char *s, size_t n);
/* Bytes of the longest valid beginning: n when all of it is UTF-8. */
size_t utf8_valid_bytes(const char *s, size_t n);
/* Writes a character, returns its bytes. */
int utf8_put(uint32_t code, char out[4]);
/* Unicode White_Space: what Rust's char::is_whitespace and Oniguruma's \s say. */
bool utf8_is_space(uint32_t code);

/* The character of a byte in the byte-level alphabet, and back (-1: not in the alphabet). */
uint32_t utf8_byte_to_alphabet(uint8_t byte);
int utf8_byte_of_alphabet(uint32_t code);

/* Bytes that grow; zero it before use, free .bytes after. Not terminated unless text_finish is
 * called. */
struct text_buffer {
    char *bytes;
    size_t n, capacity;
};
enum status text_add(struct text_buffer *b, const char *bytes, size_t n);
enum status text_reserve(struct text_buffer *b, size_t more);
/* Appends s with every broken or partial unit replaced by U+FFFD. */
enum status text_add_lossy(struct text_buffer *b, const char *s, size_t n);
/* Hands the bytes over, NUL-terminated; the buffer is empty after. */
enum status text_finish(struct text_buffer *b, char **bytes, size_t *n);

#endif
