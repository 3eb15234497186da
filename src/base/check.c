/* check.c: the thread-local text of the last failure, and the end of the road for bugs.
 *
 * Owns: one struct fault per thread. Allocates nothing, so it works when memory is gone.
 * Invariant: `text` is always NUL-terminated printable UTF-8-ish bytes without control characters, so
 * that a hostile file cannot send escape sequences to the terminal through an error message.
 */
#include "base/check.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"

static _Thread_local struct fault last;
static void (*bug_hook)(int exit_code);

const char *status_name(enum status s) {
    switch (s) {
#define X(name, value, text) \
    case STATUS_##name:      \
        return #name;
        STATUS_LIST(X)
#undef X
    }
    return "UNKNOWN";
}

static void clean_control_bytes(char *text) {
    for (unsigned char *p = (unsigned char *)text; *p; p++) {
        if (*p < 0x20 || *p == 0x7f) *p = '?';
    }
}

static void copy_name(char out[FAULT_NAME_BYTES], const char *name) {
    snprintf(out, FAULT_NAME_BYTES, "%s", name ? name : "");
    clean_control_bytes(out);
}

static enum status fail_va(enum status s, const char *param, const char *code, const char *format,
                           va_list args) {
    last.status = s;
    copy_name(last.param, param);
    copy_name(last.code, code);
    vsnprintf(last.text, sizeof last.text, format, args);
    clean_control_bytes(last.text);
    return s;
}

enum status fail(enum status s, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fail_va(s, NULL, NULL, format, args);
    va_end(args);
    return s;
}

enum status fail_param(enum status s, const char *param, const char *code, const char *format,
                       ...) {
    va_list args;
    va_start(args, format);
    fail_va(s, param, code, format, args);
    va_end(args);
    return s;
}

enum status fail_prefix(enum status s, const char *format, ...) {
    char prefix[FAULT_TEXT_BYTES / 2], joined[FAULT_TEXT_BYTES + FAULT_TEXT_BYTES / 2 + 4];
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof prefix, format, args);
    va_end(args);
    snprintf(joined, sizeof joined, "%s: %s", prefix, last.text);
    clean_control_bytes(joined);
    memcpy(last.text, joined, sizeof last.text - 1);
    last.text[sizeof last.text - 1] = '\0';
    last.status = s;
    return s;
}

const struct fault *fail_last(void) { return &last; }
const char *fail_text(void) { return last.text; }

void check_on_bug(void (*hook)(int exit_code)) { bug_hook = hook; }

void check_bug(const char *file, int line, const char *what, bool has_operands, long long a,
               long long b) {
    char text[512];
    int n = has_operands
                ? snprintf(text, sizeof text,
                           "sfumato: bug on rank %d: %s:%d: %s does not hold (%lld, %lld)\n",
                           log_rank(), file, line, what, a, b)
                : snprintf(text, sizeof text, "sfumato: bug on rank %d: %s:%d: %s does not hold\n",
                           log_rank(), file, line, what);
    if (n > (int)sizeof text - 1) n = (int)sizeof text - 1;
    if (n > 0 && write(STDERR_FILENO, text, (size_t)n) < 0) { /* nothing is left to tell it to */
    }
    if (bug_hook) bug_hook(STATUS_BUG);
    _exit(STATUS_BUG);
}

void check_device_fault(const char *format, ...) {
    char what[400], text[480];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    snprintf(text, sizeof text, "device fault on rank %d: %s: stopping all ranks", log_rank(),
             what);
    log_failure(text);
    if (bug_hook) bug_hook(STATUS_COMM);
    _exit(STATUS_COMM);
}
