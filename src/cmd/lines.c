/* lines.c: see lines.h. */
#include "cmd/lines.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of what is left of a plain file; the place to read from stays where it was. */
static int64_t count_lines(struct lines *l) {
    struct stat facts;
    int64_t count = 0;
    bool blank = true;
    ssize_t n = 0;
    const off_t start = lseek(l->in, 0, SEEK_CUR);
    if (start < 0 || fstat(l->in, &facts) != 0 || !S_ISREG(facts.st_mode)) return 0;
    for (off_t at = start; (n = pread(l->in, l->chunk, LINES_CHUNK_BYTES, at)) > 0; at += n) {
        for (ssize_t i = 0; i < n; i++) {
            const char c = l->chunk[i];
            if (c == '\n') {
                count += !blank;
                blank = true;
            } else if (c != ' ' && c != '\t' && c != '\r') {
                blank = false;
            }
        }
    }
    return count + !blank;
}

static bool is_same_file(int in, const char *path) {
    struct stat a, b;
    return fstat(in, &a) == 0 && stat(path, &b) == 0 && S_ISREG(b.st_mode) &&
           a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

enum status lines_open_output(struct lines *l, const char *output) {
    l->out = strcmp(output, "-") == 0 ? stdout : fopen(output, "we");
    return l->out ? STATUS_OK : fail(STATUS_USAGE, "--output %s: %s", output, strerror(errno));
}

enum status lines_open(struct lines *l, const char *input, const char *output) {
    *l = (struct lines){0};
    if (!input) return fail(STATUS_USAGE, "--input FILE is needed (- = standard input)");
    const int in =
        strcmp(input, "-") == 0 ? STDIN_FILENO : open(input, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (in < 0) return fail(STATUS_USAGE, "--input %s: %s", input, strerror(errno));
    l->in = in;
    struct stat facts;
    if (fstat(l->in, &facts) == 0 && S_ISDIR(facts.st_mode)) {
        return fail(STATUS_USAGE, "--input %s: it is a folder", input);
    }
    if (is_same_file(l->in, output)) {
        return fail(STATUS_USAGE, "--output %s is the input file: opening it would empty it",
                    output);
    }
    l->chunk = malloc(LINES_CHUNK_BYTES);
    if (!l->chunk) return fail(STATUS_MEMORY, "no memory for lines");
    l->line_total = count_lines(l);
    return lines_open_output(l, output);
}

void lines_close(struct lines *l) {
    if (l->in > STDIN_FILENO) close(l->in);
    if (l->out && l->out != stdout) fclose(l->out);
    free(l->chunk);
    free(l->line);
    *l = (struct lines){0};
}

static bool is_blank(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r') return false;
    }
    return true;
}

bool lines_waits(const struct lines *l) {
    struct pollfd ready = {.fd = l->in, .events = POLLIN};
    return !l->ended && l->chunk_begin == l->chunk_end && poll(&ready, 1, 0) == 0;
}

/* The next byte, or EOF. */
static int next_byte(struct lines *l) {
    if (l->chunk_begin == l->chunk_end && !l->ended) {
        struct pollfd ready = {.fd = l->in, .events = POLLIN};
        ssize_t n;
        while ((n = read(l->in, l->chunk, LINES_CHUNK_BYTES)) < 0) {
            if (errno == EAGAIN) {
                poll(&ready, 1, -1); /* the pipe was made not to block by who shares it */
            } else if (errno != EINTR) {
                break;
            }
        }
        l->ended = n <= 0;
        l->read_error = n < 0 ? errno : 0;
        l->chunk_begin = 0;
        l->chunk_end = n > 0 ? (size_t)n : 0;
    }
    return l->ended ? EOF : (unsigned char)l->chunk[l->chunk_begin++];
}

/* Reads up to the newline, keeping at most LINES_BYTES_MAX bytes. False at the end of the input. */
static bool read_line(struct lines *l, bool *too_long) {
    int c;
    l->n = 0;
    *too_long = false;
    while ((c = next_byte(l)) != EOF && c != '\n') {
        if (l->n + 1 >= l->capacity && !*too_long) {
            const size_t capacity = l->capacity ? 2 * l->capacity : 4096;
            char *grown = l->n < LINES_BYTES_MAX ? realloc(l->line, capacity) : NULL;
            if (grown) {
                l->line = grown;
                l->capacity = capacity;
            } else {
                *too_long = true;
            }
        }
        if (!*too_long) l->line[l->n++] = (char)c;
    }
    if (c == EOF && l->n == 0) return false;
    l->number++;
    return true;
}

enum status lines_next(struct lines *l) {
    bool too_long;
    do {
        const bool found = read_line(l, &too_long);
        if (l->read_error) {
            return fail(STATUS_USAGE, "the input cannot be read: %s", strerror(l->read_error));
        }
        if (!found) return STATUS_END;
        if (too_long) {
            return fail(STATUS_REQUEST, "line %lld is longer than %d bytes", (long long)l->number,
                        LINES_BYTES_MAX);
        }
    } while (is_blank(l->line, l->n));
    return STATUS_OK;
}

enum status lines_write(struct lines *l, struct json_writer *w) {
    if (w->failed) return fail(STATUS_MEMORY, "no memory for an output line");
    json_write_bytes(w, "\n", 1);
    if (fwrite(w->bytes, 1, w->n, l->out) != w->n || fflush(l->out) != 0) {
        return fail(STATUS_USAGE, "the output cannot be written: %s", strerror(errno));
    }
    json_writer_clear(w);
    return STATUS_OK;
}

enum status lines_verdict(const struct lines *l) {
    if (l->failed == 0) return STATUS_OK;
    return fail(STATUS_PARTIAL, "%lld line%s failed: see the error member of each",
                (long long)l->failed, l->failed == 1 ? "" : "s");
}
