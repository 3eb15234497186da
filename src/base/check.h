/* check.h: the three kinds of error (architecture.md §5), and nothing else.
 *
 * 1. A bug: ASSERT. Always compiled in; prints rank, file:line and both operands, ends the job (7).
 * 2. A circumstance (bad request, missing file, no memory): a function returns `enum status`, and the
 *    place where it fails writes the text once, with the user's fix in it, by fail(). Callers pass
 *    the status on with TRY or unwind with TRY_GOTO; they never reword it.
 * 3. A device or peer fault: logged, then the whole job is aborted (comm_abort).
 *
 * Thread: the text lives in a thread-local buffer, so a status and its text must be consumed on the
 * thread where fail() was called. Memory: none. Refuses to know: MPI (see check_on_bug).
 */
#ifndef SFUMATO_BASE_CHECK_H
#define SFUMATO_BASE_CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

/* name, value (1..7 are the process exit codes of cli.md), what it means */
#define STATUS_LIST(X)                                            \
    X(OK, 0, "ok")                                                \
    X(PARTIAL, 1, "some lines failed or requests were aborted")   \
    X(USAGE, 2, "bad command line or configuration")              \
    X(MODEL, 3, "the model or one of its files is unusable")      \
    X(MEMORY, 4, "not enough memory")                             \
    X(COMM, 5, "communication between ranks failed")              \
    X(WATCHDOG, 6, "a step took too long")                        \
    X(BUG, 7, "a broken invariant")                               \
    X(REQUEST, 16, "one request is invalid; the process goes on") \
    X(BUSY, 17, "no room now; try again later")                   \
    X(END, 18, "no more input")

enum status {
#define X(name, value, text) STATUS_##name = value,
    STATUS_LIST(X)
#undef X
};

enum {
    FAULT_TEXT_BYTES = 1024, /* a message and its fix fit in one line */
    FAULT_NAME_BYTES = 96,
};

/* The last failure of this thread. `param` and `code` are empty unless a request field is to blame;
 * they become the same-named members of the JSON error object (serving.md §5). */
struct fault {
    enum status status;
    char param[FAULT_NAME_BYTES];
    char code[FAULT_NAME_BYTES];
    char text[FAULT_TEXT_BYTES];
};

const char *status_name(enum status s);

/* Records the failure of this thread and returns `s`. The text is one line without a final dot or
 * newline; control bytes that came in from outside are replaced by '?'. */
enum status fail(enum status s, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same with the request field to blame (dotted path) and an API error code; either may be NULL. */
enum status fail_param(enum status s, const char *param, const char *code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

const struct fault *fail_last(void);
const char *fail_text(void);

/* Puts "PREFIX: " before the text of this thread's last failure (a file name, a line number). */
enum status fail_prefix(enum status s, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#define TRY(expression)                                   \
    do {                                                  \
        const enum status try_status_ = (expression);     \
        if (try_status_ != STATUS_OK) return try_status_; \
    } while (0)

/* Needs `enum status status` in scope; the label is by convention the only one: `out`. */
#define TRY_GOTO(expression, label)          \
    do {                                     \
        status = (expression);               \
        if (status != STATUS_OK) goto label; \
    } while (0)

/* Broken invariants. The operand forms print both values. */
#define ASSERT(condition)                                           \
    do {                                                            \
        if (__builtin_expect(!(condition), 0))                      \
            check_bug(__FILE__, __LINE__, #condition, false, 0, 0); \
    } while (0)
#define ASSERT_OP_(a, op, b)                                                              \
    do {                                                                                  \
        const long long assert_a_ = (long long)(a), assert_b_ = (long long)(b);           \
        if (__builtin_expect(!(assert_a_ op assert_b_), 0))                               \
            check_bug(__FILE__, __LINE__, #a " " #op " " #b, true, assert_a_, assert_b_); \
    } while (0)
#define ASSERT_EQ(a, b) ASSERT_OP_(a, ==, b)
#define ASSERT_LT(a, b) ASSERT_OP_(a, <, b)
#define ASSERT_LE(a, b) ASSERT_OP_(a, <=, b)

/* Prints the bug and ends the job: through the hook when one is set (comm sets it to MPI_Abort), else
 * by _exit(7). */
void check_bug(const char *file, int line, const char *what, bool has_operands, long long a,
               long long b) __attribute__((noreturn)); /* not _Noreturn: CUDA C++ reads this too */
void check_on_bug(void (*hook)(int exit_code));

/* A device fault inside a call that returns nothing: says it with the rank and ends the job (5). */
void check_device_fault(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#endif
