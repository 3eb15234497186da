/* refusal.h: every way a request can be turned down, once (serving.md §5 and the table of §10).
 *
 *   fault of body_parse, of admission, of the engine ─► struct refused ─► HTTP status + JSON error
 *                                                              └────────► gRPC status + message
 *
 * One row a case; the protocols read their own column. Refuses to know: how an answer is written.
 * Pure; no memory.
 */
#ifndef SFUMATO_SERVE_REFUSAL_H
#define SFUMATO_SERVE_REFUSAL_H

#include <stdint.h>

#include "base/check.h"
#include "base/json.h"

/* clang-format off */
#define REFUSAL_LIST(X)                                                                   \
    /* name, HTTP status, gRPC status, type, code (NULL: the fault's own) */              \
    X(INVALID,       400,  3, "invalid_request_error", NULL)                              \
    X(UNAUTHORIZED,  401, 16, "invalid_request_error", "invalid_api_key")                 \
    X(FORBIDDEN,     403,  7, "invalid_request_error", "forbidden")                       \
    X(NO_MODEL,      404,  5, "invalid_request_error", "model_not_found")                 \
    X(NO_PATH,       404, 12, "invalid_request_error", NULL)                              \
    X(METHOD,        405, 12, "invalid_request_error", NULL)                              \
    X(MEDIA_TYPE,    415,  3, "invalid_request_error", NULL)                              \
    X(CANCELLED,     499,  1, "server_error", "cancelled") /* the client asked: Abort */  \
    X(BUG,           500, 13, "server_error", "internal_error")                           \
    X(DEAD,          503, 14, "server_error", "engine_dead") /* 500 when it was running */ \
    X(OVERLOADED,    503,  8, "overloaded_error", "server_overloaded")                    \
    X(SLOW_READER,   503,  8, "server_error", "slow_reader") /* HTTP: just closed */      \
    X(LOADING,       503, 14, "unavailable_error", "model_loading")                       \
    X(DRAINING,      503, 14, "unavailable_error", "shutting_down")                       \
    X(TIMEOUT,       504,  4, "server_error", "timeout")
/* clang-format on */

enum refusal {
#define X(name, ...) REFUSAL_##name,
    REFUSAL_LIST(X)
#undef X
        REFUSAL_COUNT
};

struct refused {
    enum refusal kind;
    int http_status, grpc_status;
    int retry_after_seconds;        /* 0: no Retry-After */
    const char *type, *code;        /* code may be NULL; static, or inside fault */
    struct fault fault;             /* text and param */
    int64_t prompt_tokens, context; /* of context_length_exceeded, else 0 */
};

/* From this thread's last failure: STATUS_REQUEST becomes INVALID or NO_MODEL, STATUS_BUSY
 * OVERLOADED, anything else BUG (its text goes to the log, not to the client). */
struct refused refused_last(void);
/* A case of the table with a text of its own. */
struct refused refused_as(enum refusal kind, const char *param, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* {"error":{"message",...}} */
void refused_write(const struct refused *r, struct json_writer *w);

#endif
