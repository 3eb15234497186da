/* tokenizer_bench.c: see tokenizer_bench.h. */
#include "text/tokenizer_bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 9 };

struct bench {
    const tokenizer *t;
    const char *text;
    size_t n;
    uint32_t *ids;
    size_t count;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static enum status encode_whole(struct bench *b) {
    free(b->ids);
    return tokenizer_encode(b->t, b->text, b->n, false, &b->ids, &b->count);
}

static enum status encode_lines(struct bench *b) {
    for (size_t at = 0; at < b->n;) {
        const char *end = memchr(b->text + at, '\n', b->n - at);
        const size_t line_n = end == NULL ? b->n - at : (size_t)(end - b->text) + 1 - at;
        uint32_t *ids;
        size_t count;
        TRY(tokenizer_encode(b->t, b->text + at, line_n, false, &ids, &count));
        free(ids);
        at += line_n;
    }
    return STATUS_OK;
}

static enum status decode_whole(struct bench *b) {
    char *text;
    size_t n;
    TRY(tokenizer_decode(b->t, b->ids, b->count, false, &text, &n));
    free(text);
    return STATUS_OK;
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static enum status measure(struct bench *b, const char *name, enum status (*run)(struct bench *),
                           bool json) {
    double seconds[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        const double start = now();
        TRY(run(b));
        seconds[i] = now() - start;
    }
    qsort(seconds, ROUNDS, sizeof *seconds, compare);
    const double megabytes = (double)b->n * 1e-6;
    const char *format = json
                             ? "{\"bench\":\"tokenizer\",\"what\":\"%s\",\"bytes\":%zu,\"ids\":%zu,"
                               "\"mb_s\":%.2f,\"mb_s_min\":%.2f,\"mb_s_max\":%.2f}\n"
                             : "%-13s %10zu bytes %9zu ids  %8.2f MB/s  (%.2f .. %.2f)\n";
    printf(format, name, b->n, b->count, megabytes / seconds[ROUNDS / 2],
           megabytes / seconds[ROUNDS - 1], megabytes / seconds[0]);
    return STATUS_OK;
}

enum status tokenizer_bench(const tokenizer *t, const char *text, size_t n, bool json) {
    if (n == 0) return fail(STATUS_USAGE, "bench tokenizer needs a text that is not empty");
    struct bench b = {.t = t, .text = text, .n = n};
    enum status status = STATUS_OK;
    TRY_GOTO(measure(&b, "encode", encode_whole, json), out);
    TRY_GOTO(measure(&b, "encode lines", encode_lines, json), out);
    TRY_GOTO(measure(&b, "decode", decode_whole, json), out);
out:
    free(b.ids);
    return status;
}
