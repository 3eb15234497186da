/* http.h: what the HTTP front and its routes know of one another (internal to serve/).
 *
 *   http.c          listener, connections, limits, access, dispatch
 *   http_reply.c    answers: whole bodies, errors, event streams
 *   routes.c        the table {method, path, key, function}; small routes
 *   openai*.c       generation: chat, completions, and what they share
 *
 * An *exchange* is one request and its answer. It is answered exactly once: by http_reply*, or by a
 * stream that is begun and ended; the exchange is gone after that. A route that starts a call keeps
 * the exchange until the call ends; a client that leaves meanwhile cancels it (http_on_gone).
 * Thread: net. Memory: one struct per exchange, malloc.
 */
#ifndef SFUMATO_SERVE_HTTP_H
#define SFUMATO_SERVE_HTTP_H

#include <event2/buffer.h>
#include <event2/http.h>

#include "serve/net.h"

enum {
    HTTP_HEADERS_MAX = 64 * 1024,
    HTTP_IDLE_SECONDS = 60,
    HTTP_BACKLOG = 4096,
    HTTP_AHEAD_MAX = 64 * 1024
};

struct http;
struct exchange;

enum route_method { ROUTE_GET, ROUTE_POST, ROUTE_OTHER }; /* in the order of metrics.def */
enum route_access { ROUTE_OPEN, ROUTE_KEY, ROUTE_ADMIN };
struct route {
    const char *name; /* label of metrics */
    const char *path; /* exact, or a beginning when it ends in '/' and is not "/" */
    enum route_method method;
    enum route_access access;
    void (*run)(struct exchange *x);
};
extern const struct route http_routes[];
extern const int http_route_count;
/* Names of all routes and "other", joined by '|', for metrics_new. Static. */
const char *http_handlers(void);

struct exchange {
    struct http *http;
    const struct front_site *site;
    struct evhttp_request *request; /* borrowed from libevent until answered */
    const struct route *route;      /* NULL: unknown path */
    const char *path, *query;       /* of the request; query NULL or without '?' */
    char request_id[SERVICE_ID_BYTES], trace_id[33];
    double begin;
    enum route_method method;
    bool held;              /* http_hold */
    bool head;              /* HEAD: headers only */
    bool large;             /* its body was */
    bool streaming;         /* the status line of a stream is out */
    bool answered;          /* nothing more will be said; x lives until it is written */
    int status;             /* of the answer */
    struct json_writer out; /* of a stream: gathered bytes, to be sent in one go */
    struct service_pace pace;
    struct exchange *next, *prev;
    /* The client has gone, before an answer; the exchange is freed after this. May be NULL. */
    void (*on_gone)(struct exchange *x);
    void *user; /* of the route */
};

/* ---- answers (each ends the exchange) ---- */
void http_reply(struct exchange *x, int status, const char *type, const void *bytes, size_t n);
void http_reply_json(struct exchange *x, int status, const struct json_writer *w);
void http_reply_error(struct exchange *x, const struct refused *why);
void http_header(struct exchange *x, const char *name, const char *value);

/* ---- streams ---- */
void http_stream_begin(struct exchange *x);
/* One event: "data: " bytes "\n\n". It is sent when another stream has its turn, or at the end of
 * the engine's news. False: the reader is too slow; the caller cancels and calls http_cut. */
bool http_stream_data(struct exchange *x, const void *bytes, size_t n);
void http_stream_comment(struct exchange *x, const char *text);
/* close: also end the connection (after an error event). */
void http_stream_end(struct exchange *x, bool close);
/* Drops the connection at once. */
void http_cut(struct exchange *x);

/* ---- requests ---- */
/* The body, contiguous; borrowed until answered. */
const char *http_body(struct exchange *x, size_t *n);
/* Value of a header, or NULL. */
const char *http_find(const struct exchange *x, const char *name);
/* The route keeps the exchange: no idle limit while the client waits. */
void http_hold(struct exchange *x);

/* ---- routes ---- */
void openai_chat(struct exchange *x);
void openai_completions(struct exchange *x);
void openai_models(struct exchange *x);
void openai_model(struct exchange *x);
void text_tokenize(struct exchange *x);
void text_detokenize(struct exchange *x);
void text_apply_template(struct exchange *x);

extern const struct front http_front;

#endif
