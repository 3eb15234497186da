/* refusal.c: see refusal.h. */
#include "serve/refusal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

static const struct {
    int http_status, grpc_status;
    const char *type, *code;
} rows[REFUSAL_COUNT] = {
#define X(name, http, grpc, type, code) [REFUSAL_##name] = {http, grpc, type, code},
    REFUSAL_LIST(X)
#undef X
};

static void fill(struct refused *r, enum refusal kind) {
    r->kind = kind;
    r->http_status = rows[kind].http_status;
    r->grpc_status = rows[kind].grpc_status;
    r->type = rows[kind].type;
    r->code = rows[kind].code;
    r->retry_after_seconds = kind == REFUSAL_OVERLOADED || kind == REFUSAL_LOADING ? 1 : 0;
}

struct refused refused_last(void) {
    struct refused r = {.fault = *fail_last()};
    switch (r.fault.status) {
        case STATUS_REQUEST:
            fill(&r,
                 strcmp(r.fault.code, "model_not_found") == 0 ? REFUSAL_NO_MODEL : REFUSAL_INVALID);
            break;
        case STATUS_BUSY:
            fill(&r, REFUSAL_OVERLOADED);
            break;
        default: /* no memory, a helper that died: the client can only try again */
            log_error("a request failed: %s", r.fault.text);
            fill(&r, REFUSAL_BUG);
            snprintf(r.fault.text, sizeof r.fault.text, "the server failed at this request");
            r.fault.param[0] = r.fault.code[0] = '\0';
    }
    return r;
}

struct refused refused_as(enum refusal kind, const char *param, const char *format, ...) {
    struct refused r = {0};
    va_list args;
    va_start(args, format);
    vsnprintf(r.fault.text, sizeof r.fault.text, format, args);
    va_end(args);
    if (param) snprintf(r.fault.param, sizeof r.fault.param, "%s", param);
    fill(&r, kind);
    return r;
}

void refused_write(const struct refused *r, struct json_writer *w) {
    json_begin(w, '{');
    json_key(w, "error");
    json_begin(w, '{');
    json_key(w, "message");
    json_write_text(w, r->fault.text);
    json_key(w, "type");
    json_write_text(w, r->type);
    json_key(w, "param");
    json_write_text(w, r->fault.param[0] ? r->fault.param : NULL);
    json_key(w, "code");
    json_write_text(w, r->code ? r->code : r->fault.code[0] ? r->fault.code : NULL);
    if (r->prompt_tokens > 0) {
        json_key(w, "n_prompt_tokens");
        json_write_int(w, r->prompt_tokens);
        json_key(w, "n_ctx");
        json_write_int(w, r->context);
    }
    json_end(w, '}');
    json_end(w, '}');
}
