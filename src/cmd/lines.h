/* lines.h: JSON lines in and out, the same for generate, score and tokenize.
 *
 * Input is read a line at a time ("-" = standard input, from where it stands); output lines are written in
 * the order they are given, each at once, so that a consumer in a pipe sees them. lines_next waits
 * for a line that is still to come, lines_waits tells beforehand: what runs already must not wait for a
 * producer that itself waits for the replies. A line longer than LINES_BYTES_MAX is reported and skipped.
 * Rank 0 only. Memory: the longest line, and what was read ahead of it.
 */
#ifndef SFUMATO_CMD_LINES_H
#define SFUMATO_CMD_LINES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"
#include "base/json.h"

enum { LINES_BYTES_MAX = 64 << 20, LINES_CHUNK_BYTES = 1 << 16 };

struct lines {
    int out, in; /* descriptors; out is 0 when there is none */
    bool ended;  /* nothing is left to read, or it could not be read: read_error */
    int read_error;
    char *chunk; /* [LINES_CHUNK_BYTES], read ahead: [chunk_begin, chunk_end) is to be taken */
    size_t chunk_begin, chunk_end;
    char *line; /* the current one, without its newline */
    size_t n, capacity;
    int64_t number;     /* of the current line, from 1 */
    int64_t line_total; /* lines of the input when it is a plain file, else 0 */
    int64_t failed;     /* lines answered by an error */
};

/* STATUS_USAGE naming the file. An output file is made anew; it must not be the input file. */
enum status lines_open(struct lines *l, const char *input, const char *output);
enum status lines_open_output(struct lines *l, const char *output);
/* The status of the work, or that the output could not be written after all. */
enum status lines_close(struct lines *l, enum status status);
/* True when lines_next would wait for a line that has not begun to arrive. */
bool lines_waits(const struct lines *l);
/* The next line that is not blank: STATUS_OK, STATUS_END, STATUS_REQUEST for a line that is too long (or
 * there is no memory for it), or STATUS_USAGE when the input cannot be read. */
enum status lines_next(struct lines *l);
/* Writes what is in w and a newline. STATUS_USAGE when the output cannot be written. */
enum status lines_write(struct lines *l, struct json_writer *w);
/* STATUS_PARTIAL with the count when lines failed. */
enum status lines_verdict(const struct lines *l);

#endif
