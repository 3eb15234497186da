/* vec.h: reads the line-based golden files of tests/data/golden (format: the head of each file).
 *
 * A file is lines of words; '#' lines are comments; the first word names the line. Owns one line
 * buffer and the words in it, valid until the next vec_next.
 */
#ifndef SFUMATO_TESTS_VEC_H
#define SFUMATO_TESTS_VEC_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct vec_file {
    FILE *file;
    char *line;
    size_t capacity;
    char **words;
    int word_count, word_capacity;
};

/* relative: to tests/data/golden. Ends the test program when the file is missing. */
void vec_open(struct vec_file *v, const char *relative);
void vec_close(struct vec_file *v);
/* Next line that is not a comment; false at the end. words[0] is the line's name. */
bool vec_next(struct vec_file *v);
bool vec_is(const struct vec_file *v, const char *name);

/* "3f800000" -> 1.0f */
float vec_float(const char *hex);
/* "12:3f800000" -> 12, 1.0f; "12" -> 12, 1.0f */
void vec_pair(const char *word, uint32_t *id, float *value);
/* The text after "key=" in the line's words, NULL when absent. */
const char *vec_value(const struct vec_file *v, const char *key);
float vec_value_float(const struct vec_file *v, const char *key);
long long vec_value_int(const struct vec_file *v, const char *key);

#endif
