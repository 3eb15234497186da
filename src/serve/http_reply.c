/* http_reply.c: answers: whole bodies, errors, event streams (serving.md §4.2, §5). */
#include <event2/bufferevent.h>
#include <event2/http.h>
#include <event2/http_struct.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "serve/http_parts.h"

enum { GATHER_BYTES = 16 * 1024 }; /* of one stream, then they are sent */

void http_header(struct exchange *x, const char *name, const char *value) {
    evhttp_add_header(evhttp_request_get_output_headers(x->request), name, value);
}

void http_count(const struct exchange *x) {
    struct metrics *m = x->site->metrics;
    const int handler = x->route ? (int)(x->route - http_routes) : http_route_count;
    enum { METHODS = 3, STATUSES = 4 };
    const int class = x->status / 100 - 2;
    if (class >= 0 && class < STATUSES) {
        metric_add(m, METRIC_http_requests, (handler * METHODS + (int)x->method) * STATUSES + class,
                   1);
    }
    metric_observe(m, METRIC_http_time, handler, service_clock() - x->begin);
}

/* Headers of every answer. */
static void common_headers(struct exchange *x) {
    http_header(x, "X-Request-Id", x->request_id);
    if (service_get_state(x->site->service) == SERVICE_DRAINING) {
        http_header(x, "Connection", "close");
    }
}

static const char *reason_of(int status) {
    switch (status) {
        case 200:
            return "OK";
        case 202:
            return "Accepted";
        case 204:
            return "No Content";
        case 400:
            return "Bad Request";
        case 401:
            return "Unauthorized";
        case 403:
            return "Forbidden";
        case 404:
            return "Not Found";
        case 405:
            return "Method Not Allowed";
        case 415:
            return "Unsupported Media Type";
        case 429:
            return "Too Many Requests";
        case 500:
            return "Internal Server Error";
        case 503:
            return "Service Unavailable";
        case 504:
            return "Gateway Timeout";
        default:
            return "Status";
    }
}

void http_reply(struct exchange *x, int status, const char *type, const void *bytes, size_t n) {
    struct evhttp_request *request = x->request;
    struct evbuffer *body = evbuffer_new();
    char length[32];
    http_answered(x, status);
    common_headers(x);
    if (type) http_header(x, "Content-Type", type);
    if (x->head) {
        snprintf(length, sizeof length, "%zu", n);
        http_header(x, "Content-Length", length);
    } else if (body) {
        evbuffer_add(body, bytes, n);
    }
    evhttp_send_reply(request, status, reason_of(status), body);
    if (body) evbuffer_free(body);
}

void http_reply_json(struct exchange *x, int status, const struct json_writer *w) {
    if (w->failed) {
        static const char text[] =
            "{\"error\":{\"message\":\"no memory for the answer\",\"type\":\"server_error\","
            "\"param\":null,\"code\":\"internal_error\"}}";
        http_reply(x, 500, "application/json", text, sizeof text - 1);
        return;
    }
    http_reply(x, status, "application/json", w->bytes, w->n);
}

void http_reply_error(struct exchange *x, const struct refused *why) {
    struct json_writer w;
    char seconds[16];
    json_writer_init(&w);
    refused_write(why, &w);
    if (why->retry_after_seconds > 0) {
        snprintf(seconds, sizeof seconds, "%d", why->retry_after_seconds);
        http_header(x, "Retry-After", seconds);
    }
    http_reply_json(x, why->http_status, &w);
    json_writer_fini(&w);
}

/* ---- streams ---- */

void http_stream_begin(struct exchange *x) {
    common_headers(x);
    http_header(x, "Content-Type", "text/event-stream; charset=utf-8");
    http_header(x, "Cache-Control", "no-cache");
    http_header(x, "X-Accel-Buffering", "no");
    if (x->request->major == 1 && x->request->minor == 0) {
        /* HTTP/1.0 knows no chunks: the end of the connection ends the stream. libevent would keep
         * the connection when asked to, and say Content-Length: 0. */
        evhttp_remove_header(evhttp_request_get_input_headers(x->request), "Connection");
        http_header(x, "Connection", "close");
    }
    x->streaming = true;
    evhttp_send_reply_start(x->request, 200, reason_of(200));
}

static struct bufferevent *wire_of(const struct exchange *x) {
    return evhttp_connection_get_bufferevent(evhttp_request_get_connection(x->request));
}

/* Chunked transfer puts a length before each part and an end of line behind it. */
static void gather(struct exchange *x, const char *before, const void *bytes, size_t n) {
    static const char end[] = "\n\n\r\n";
    char head[32] = "";
    const bool chunked = x->request->chunked;
    const size_t before_n = strlen(before);
    const int head_n = chunked ? snprintf(head, sizeof head, "%zx\r\n", before_n + n + 2) : 0;
    struct json_writer *out = &x->out;
    json_write_bytes(out, head, (size_t)head_n);
    json_write_bytes(out, before, before_n);
    json_write_bytes(out, bytes, n);
    json_write_bytes(out, end, chunked ? 4 : 2);
}

/* Straight to the socket: libevent would arm the descriptor, come round, write and disarm it again,
 * four system calls an event instead of one. What the socket does not take, or what must wait behind
 * such bytes, libevent writes when there is room. */
static void send_gathered(struct exchange *x) {
    struct evbuffer *waiting = bufferevent_get_output(wire_of(x));
    struct json_writer *out = &x->out;
    size_t sent = 0;
    if (x->http->gathering == x) x->http->gathering = NULL;
    if (out->n > 0 && evbuffer_get_length(waiting) == 0 && !x->http->tls) {
        const ssize_t n = send(bufferevent_getfd(wire_of(x)), out->bytes, out->n, MSG_NOSIGNAL);
        if (n > 0) sent = (size_t)n; /* an error: libevent meets it again, and tells */
    }
    if (sent < out->n) evbuffer_add(waiting, out->bytes + sent, out->n - sent);
    json_writer_clear(out);
}

void http_flush(void *state) {
    struct http *h = state;
    if (h->gathering) send_gathered(h->gathering);
}

bool http_stream_data(struct exchange *x, const void *bytes, size_t n) {
    struct exchange *other = x->http->gathering;
    if (other && other != x) send_gathered(other);
    if (x->out.n > GATHER_BYTES) send_gathered(x);
    const size_t unsent = evbuffer_get_length(bufferevent_get_output(wire_of(x)));
    if (service_too_slow(x->site->service, &x->pace, unsent)) return false;
    gather(x, "data: ", bytes, n);
    x->http->gathering = x;
    return !x->out.failed;
}

void http_stream_comment(struct exchange *x, const char *text) {
    gather(x, ": ", text, strlen(text));
    send_gathered(x);
}

void http_stream_end(struct exchange *x, bool close) {
    http_answered(x, 200);
    if (x->http->gathering == x) x->http->gathering = NULL;
    evbuffer_add(bufferevent_get_output(wire_of(x)), x->out.bytes, x->out.n);
    /* The headers are out; libevent looks here again when the last byte has been written. */
    if (close) http_header(x, "Connection", "close");
    evhttp_send_reply_end(x->request);
}
