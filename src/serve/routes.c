/* routes.c: the table of all HTTP paths, and the small ones: health, metrics, drain, page.
 *
 * A new endpoint is one row here and one function. /health?deep=1 runs one decode step through the
 * whole service and the engine, one at a time, with a deadline of its own.
 */
#include <event2/keyvalq_struct.h>
#include <stdlib.h>
#include <string.h>

#include "serve/embedded.h"
#include "serve/http.h"

#define DEEP_SECONDS 5.0

/* ---- health ---- */

static void reply_state(struct exchange *x, int status, const char *state) {
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "status");
    json_write_text(&w, state);
    if (strcmp(state, "loading") == 0) {
        json_key(&w, "progress");
        json_write_real(&w, service_load_progress(x->site->service));
    }
    json_end(&w, '}');
    if (status == 503) http_header(x, "Retry-After", "1");
    http_reply_json(x, status, &w);
    json_writer_fini(&w);
}

static void deep_step(void *user, call *c, int choice, const struct engine_event *event,
                      const struct stream_delta *delta) {
    (void)user, (void)c, (void)choice, (void)event, (void)delta;
}
static void deep_finish(void *user, call *c, int choice, const struct stream_delta *last) {
    (void)user, (void)c, (void)choice, (void)last;
}
static bool deep_runs; /* net thread only */

static void deep_end(void *user, call *c, const struct refused *why) {
    struct exchange *x = user;
    (void)c;
    deep_runs = false;
    if (why) {
        http_reply_error(x, why);
    } else {
        reply_state(x, 200, "ok");
    }
}

static void deep_gone(struct exchange *x) {
    deep_runs = false;
    call_cancel(x->user, CALL_DISCONNECTED);
}

static void run_deep(struct exchange *x) {
    static const struct call_front front = {deep_step, deep_finish, NULL, deep_end};
    static const char body[] =
        "{\"prompt\":[0],\"max_tokens\":1,\"soft_thinking\":{\"mode\":\"off\"}}";
    struct refused why;
    if (!access_key_ok(x->site->access, http_find(x, "Authorization"))) {
        http_header(x, "WWW-Authenticate", "Bearer");
        why = refused_as(REFUSAL_UNAUTHORIZED, NULL, "a valid key is needed for ?deep=1");
        http_reply_error(x, &why);
        return;
    }
    if (deep_runs) {
        why = refused_as(REFUSAL_OVERLOADED, NULL, "a deep health check is running");
        http_reply_error(x, &why);
        return;
    }
    struct call_options options = {.text = body,
                                   .n = sizeof body - 1,
                                   .kind = CALL_COMPLETION,
                                   .request_id = x->request_id,
                                   .timeout_seconds = DEEP_SECONDS,
                                   .front = &front,
                                   .user = x};
    call *c = service_call(x->site->service, &options, &why);
    if (!c) {
        http_reply_error(x, &why);
        return;
    }
    deep_runs = true;
    x->user = c;
    x->on_gone = deep_gone;
    http_hold(x);
}

static bool wants_deep(const struct exchange *x) {
    struct evkeyvalq fields;
    bool deep = false;
    if (!x->query || evhttp_parse_query_str(x->query, &fields) != 0) return false;
    const char *value = evhttp_find_header(&fields, "deep");
    deep = value && strcmp(value, "1") == 0;
    evhttp_clear_headers(&fields);
    return deep;
}

static void health(struct exchange *x) {
    const enum service_state state = service_get_state(x->site->service);
    if (state == SERVICE_READY && wants_deep(x)) {
        run_deep(x);
    } else {
        reply_state(x, state == SERVICE_READY ? 200 : 503, service_state_name(state));
    }
}

static void livez(struct exchange *x) {
    const bool dead = service_get_state(x->site->service) == SERVICE_DEAD;
    reply_state(x, dead ? 503 : 200, dead ? "dead" : "ok");
}

/* ---- metrics, drain ---- */

static void metrics(struct exchange *x) {
    struct json_writer w;
    json_writer_init(&w);
    service_refresh_metrics(x->site->service);
    metrics_write(x->site->metrics, &w);
    http_reply(x, w.failed ? 500 : 200, "text/plain; version=0.0.4; charset=utf-8", w.bytes, w.n);
    json_writer_fini(&w);
}

static void drain(struct exchange *x) {
    struct json_writer w;
    service *s = x->site->service;
    net *n = x->site->net;
    if (service_get_state(s) == SERVICE_LOADING) {
        const struct refused why = refused_as(REFUSAL_LOADING, NULL, "the model is loading");
        http_reply_error(x, &why);
        return;
    }
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "status");
    json_write_text(&w, "draining");
    json_key(&w, "in_flight");
    json_write_int(&w, service_calls(s));
    json_end(&w, '}');
    net_drain(n);
    http_reply_json(x, 202, &w);
    json_writer_fini(&w);
}

/* ---- embedded files ---- */

static void openapi(struct exchange *x) {
    http_reply(x, 200, "application/json", embedded_openapi, embedded_openapi_bytes());
}

static void page(struct exchange *x) {
    http_header(x, "Content-Security-Policy", embedded_page_policy());
    http_header(x, "X-Content-Type-Options", "nosniff");
    http_header(x, "Referrer-Policy", "no-referrer");
    http_reply(x, 200, "text/html; charset=utf-8", embedded_page, embedded_page_bytes());
}

/* ---- the table ---- */

const struct route http_routes[] = {
    {"chat", "/v1/chat/completions", ROUTE_POST, ROUTE_KEY, openai_chat},
    {"completions", "/v1/completions", ROUTE_POST, ROUTE_KEY, openai_completions},
    {"models", "/v1/models", ROUTE_GET, ROUTE_KEY, openai_models},
    {"model", "/v1/models/", ROUTE_GET, ROUTE_KEY, openai_model},
    {"tokenize", "/tokenize", ROUTE_POST, ROUTE_KEY, text_tokenize},
    {"detokenize", "/detokenize", ROUTE_POST, ROUTE_KEY, text_detokenize},
    {"apply_template", "/apply-template", ROUTE_POST, ROUTE_KEY, text_apply_template},
    {"openapi", "/openapi.json", ROUTE_GET, ROUTE_OPEN, openapi},
    {"health", "/health", ROUTE_GET, ROUTE_OPEN, health},
    {"livez", "/livez", ROUTE_GET, ROUTE_OPEN, livez},
    {"metrics", "/metrics", ROUTE_GET, ROUTE_OPEN, metrics},
    {"drain", "/admin/drain", ROUTE_POST, ROUTE_ADMIN, drain},
    {"page", "/", ROUTE_GET, ROUTE_OPEN, page},
};
const int http_route_count = sizeof http_routes / sizeof *http_routes;

const char *http_handlers(void) {
    static char names[512];
    if (*names) return names;
    for (int i = 0; i < http_route_count; i++) {
        strcat(names, http_routes[i].name);
        strcat(names, "|");
    }
    return strcat(names, "other");
}
