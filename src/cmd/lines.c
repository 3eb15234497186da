/* lines.c: see lines.h. */
#include "cmd/lines.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int64_t count_lines(FILE *file) {
    struct stat facts;
    if (fstat(fileno(file), &facts) != 0 || !S_ISREG(facts.st_mode)) return 0;
    int64_t count = 0;
    bool blank = true;
    for (int c = getc_unlocked(file); c != EOF; c = getc_unlocked(file)) {
        if (c == '\n') {
            count += !blank;
            blank = true;
        } else if (c != ' ' && c != '\t' && c != '\r') {
            blank = false;
        }
    }
    rewind(file);
    return count + !blank;
}

static bool is_same_file(FILE *in, const char *path) {
    struct stat a, b;
    return fstat(fileno(in), &a) == 0 && stat(path, &b) == 0 && S_ISREG(b.st_mode) &&
           a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

enum status lines_open_output(struct lines *l, const char *output) {
    l->out = strcmp(output, "-") == 0 ? stdout : fopen(output, "we");
    return l->out ? STATUS_OK : fail(STATUS_USAGE, "--output %s: %s", output, strerror(errno));
}

enum status lines_open(struct lines *l, const char *input, const char *output) {
    *l = (struct lines){0};
    if (!input) return fail(STATUS_USAGE, "--input FILE is needed (- = standard input)");
    l->in = strcmp(input, "-") == 0 ? stdin : fopen(input, "re");
    if (!l->in) return fail(STATUS_USAGE, "--input %s: %s", input, strerror(errno));
    struct stat facts;
    if (fstat(fileno(l->in), &facts) == 0 && S_ISDIR(facts.st_mode)) {
        return fail(STATUS_USAGE, "--input %s: it is a folder", input);
    }
    if (is_same_file(l->in, output)) {
        return fail(STATUS_USAGE, "--output %s is the input file: opening it would empty it",
                    output);
    }
    l->line_total = count_lines(l->in);
    return lines_open_output(l, output);
}

void lines_close(struct lines *l) {
    if (l->in && l->in != stdin) fclose(l->in);
    if (l->out && l->out != stdout) fclose(l->out);
    free(l->line);
    *l = (struct lines){0};
}

static bool is_blank(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r') return false;
    }
    return true;
}

/* Reads up to the newline, keeping at most LINES_BYTES_MAX bytes. False at the end of the input. */
static bool read_line(struct lines *l, bool *too_long) {
    int c;
    l->n = 0;
    *too_long = false;
    while ((c = getc_unlocked(l->in)) != EOF && c != '\n') {
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
        if (!read_line(l, &too_long)) return STATUS_END;
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
