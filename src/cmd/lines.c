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
    const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY;
    const int out = strcmp(output, "-") == 0 ? STDOUT_FILENO : open(output, flags, 0666);
    if (out < 0) return fail(STATUS_USAGE, "--output %s: %s", output, strerror(errno));
    l->out = out;
    return STATUS_OK;
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

static enum status output_failure(void) {
    return fail(STATUS_USAGE, "the output cannot be written: %s", strerror(errno));
}

enum status lines_close(struct lines *l, enum status status) {
    if (l->in > STDIN_FILENO) close(l->in);
    /* where a file system writes late, this is when it says so */
    if (l->out > STDERR_FILENO && close(l->out) != 0 && status == STATUS_OK)
        status = output_failure();
    free(l->chunk);
    free(l->line);
    *l = (struct lines){0};
    return status;
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

/* Room for one byte more; false when there is none: *why. */
static bool grow_line(struct lines *l, const char **why) {
    if (l->n < l->capacity) return true;
    if (l->n == LINES_BYTES_MAX) {
        *why = "it is too long";
        return false;
    }
    const size_t capacity = l->capacity ? 2 * l->capacity : 4096; /* up to LINES_BYTES_MAX */
    char *grown = realloc(l->line, capacity);
    if (!grown) {
        *why = "there is no memory for it";
        return false;
    }
    l->line = grown;
    l->capacity = capacity;
    return true;
}

/* Reads up to the newline. False at the end of the input. *why: the line could not be kept. */
static bool read_line(struct lines *l, const char **why) {
    int c;
    bool any = false;
    l->n = 0;
    *why = NULL;
    while ((c = next_byte(l)) != EOF && c != '\n') {
        any = true;
        if (!*why && grow_line(l, why)) l->line[l->n++] = (char)c;
    }
    if (c == EOF && !any) return false;
    l->number++;
    return true;
}

enum status lines_next(struct lines *l) {
    const char *why;
    do {
        const bool found = read_line(l, &why);
        if (l->read_error) {
            return fail(STATUS_USAGE, "the input cannot be read: %s", strerror(l->read_error));
        }
        if (!found) return STATUS_END;
        if (why) {
            return fail(STATUS_REQUEST, "line %lld: %s (at most %d bytes)", (long long)l->number,
                        why, LINES_BYTES_MAX);
        }
    } while (is_blank(l->line, l->n));
    return STATUS_OK;
}

enum status lines_write(struct lines *l, struct json_writer *w) {
    json_write_bytes(w, "\n", 1);
    if (w->failed) return fail(STATUS_MEMORY, "no memory for an output line");
    for (size_t at = 0; at < w->n;) {
        const ssize_t n = write(l->out, w->bytes + at, w->n - at);
        if (n > 0) {
            at += (size_t)n;
        } else if (n < 0 && errno == EAGAIN) { /* made not to block by who shares it */
            struct pollfd ready = {.fd = l->out, .events = POLLOUT};
            poll(&ready, 1, -1);
        } else if (n == 0 || errno != EINTR) {
            return output_failure();
        }
    }
    json_writer_clear(w);
    return STATUS_OK;
}

enum status lines_verdict(const struct lines *l) {
    if (l->failed == 0) return STATUS_OK;
    return fail(STATUS_PARTIAL, "%lld line%s failed: see the error member of each",
                (long long)l->failed, l->failed == 1 ? "" : "s");
}
