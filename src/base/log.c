/* log.c: see log.h. Text lines are "sfumato: [warning: ]TEXT"; JSON lines carry ts, level, rank, msg. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/json.h"

enum { LINE_BYTES = 2048 };

static enum log_level threshold = LOG_INFO;
static bool as_json;
static int own_rank;

void log_init(enum log_level level, bool json) {
    threshold = level;
    as_json = json;
}
void log_set_rank(int rank) { own_rank = rank; }
int log_rank(void) { return own_rank; }

bool log_enabled(enum log_level level) {
    return level >= threshold && threshold != LOG_OFF && (own_rank == 0 || level >= LOG_WARN);
}

static void write_all(const char *bytes, size_t n) {
    while (n > 0) {
        const ssize_t written = write(STDERR_FILENO, bytes, n);
        if (written <= 0) return; /* standard error is gone: there is nobody to tell */
        bytes += written;
        n -= (size_t)written;
    }
}

/* Appends text as the inside of a JSON string; returns the new length, always < capacity. Bytes that are no
 * UTF-8 (a file's name, a character that was cut) become U+FFFD. */
static size_t append_json_escaped(char *out, size_t n, size_t capacity, const char *text) {
    for (const char *p = text, *end = text + strlen(text); p < end && n + 7 < capacity;) {
        size_t skip;
        const size_t length = json_utf8_length(p, (size_t)(end - p), &skip);
        if (*p == '"' || *p == '\\') {
            out[n++] = '\\';
            out[n++] = *p;
        } else if (length == 0 || (unsigned char)*p < 0x20) {
            n += (size_t)snprintf(out + n, capacity - n, "\\u%04x", length ? *p : 0xfffd);
        } else {
            memcpy(out + n, p, length);
            n += length;
        }
        p += length ? length : skip;
    }
    return n;
}

static void write_json_line(enum log_level level, const char *text) {
    static const char *const names[] = {"debug", "info", "warning", "error", "off"};
    char line[2 * LINE_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    size_t n = (size_t)snprintf(
        line, sizeof line, "{\"ts\":%lld.%03ld,\"level\":\"%s\",\"rank\":%d,\"msg\":\"",
        (long long)now.tv_sec, now.tv_nsec / 1000000, names[level], own_rank);
    n = append_json_escaped(line, n, sizeof line - 4, text);
    memcpy(line + n, "\"}\n", 3);
    write_all(line, n + 3);
}

void log_record(const char *name, const char *json, size_t n) {
    char line[2 * LINE_BYTES];
    struct timespec now;
    if (!log_enabled(LOG_INFO) || n < 2 || n > LINE_BYTES) return;
    clock_gettime(CLOCK_REALTIME, &now);
    const int length =
        as_json
            ? snprintf(line, sizeof line,
                       "{\"ts\":%lld.%03ld,\"level\":\"info\",\"rank\":%d,\"msg\":\"%s\",%.*s\n",
                       (long long)now.tv_sec, now.tv_nsec / 1000000, own_rank, name, (int)n - 1,
                       json + 1)
            : snprintf(line, sizeof line, "sfumato: %s %.*s\n", name, (int)n, json);
    write_all(line, (size_t)length);
}

static void write_text_line(const char *prefix, const char *text) {
    char line[LINE_BYTES + 64];
    int n = snprintf(line, sizeof line, "sfumato: %s%s\n", prefix, text);
    if (n >= (int)sizeof line) {
        n = (int)sizeof line - 1;
        line[n - 1] = '\n';
    }
    write_all(line, (size_t)n);
}

void log_line(enum log_level level, const char *format, ...) {
    if (!log_enabled(level)) return;
    char text[LINE_BYTES], prefix[48] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (as_json) {
        write_json_line(level, text);
        return;
    }
    const char *kind = level == LOG_WARN ? "warning: " : level == LOG_ERROR ? "error: " : "";
    if (own_rank > 0) {
        snprintf(prefix, sizeof prefix, "rank %d: %s", own_rank, kind);
    } else {
        snprintf(prefix, sizeof prefix, "%s", kind);
    }
    write_text_line(prefix, text);
}

void log_failure(const char *text) {
    if (as_json) {
        write_json_line(LOG_ERROR, text);
    } else {
        write_text_line("", text);
    }
}
