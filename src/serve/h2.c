/* h2.c: see h2.h. In this order: streams and their answers, their requests, what nghttp2 calls,
 * connections, life.
 *
 * nghttp2 may not be told to send from inside its own callbacks, and a connection may not be freed
 * there. So whatever happens marks the connection dirty (touch), and one event of the same turn of
 * the loop writes all that came together: a step of the engine costs a stream one frame and a
 * connection one write.
 */
#include "serve/h2.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/listener.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "base/log.h"
#include "serve/grpc_wire.h"

enum {
    BACKLOG = 4096,
    HEADER_BYTES_MAX = 64 * 1024, /* of one request, as HTTP/2 counts: name + value + 32 */
    STREAM_WINDOW_BYTES = 1 << 20,
    CONNECTION_WINDOW_BYTES = 8 << 20,
    OUTPUT_BYTES_MAX = 64 * 1024, /* in the socket's buffer; the rest stays in the streams */
    UPLOADS_MAX = 8, /* unfinished messages in memory, in largest ones: then the oldest goes */
    CONTINUATIONS_MAX = 8,
    RESETS_BURST = 1000,
    RESETS_PER_SECOND = 200,
    PINGS_BURST = 100,
    PINGS_PER_SECOND = 20,
    SWEEP_SECONDS = 1,
    GOODBYE_SECONDS = 2, /* for a peer that does not answer the ping of a drain, or does not read */
    MESSAGE_TEXT_BYTES = 3 * FAULT_TEXT_BYTES,
};

struct connection {
    h2 *owner;
    struct connection *next, *prev;
    nghttp2_session *session;
    struct bufferevent *wire;
    struct event *flush;
    struct h2_stream *streams;
    double idle_since;     /* last time a stream was there */
    double draining_since; /* 0: not */
    double pings, pinged;  /* token bucket */
    bool heard;            /* something came: with TLS, the handshake is done */
    bool lost;             /* socket gone or protocol broken: free at the next flush */
    double closing_since;  /* free once everything is written; 0: not */
    bool said_goaway;
};

struct h2_stream {
    struct connection *connection;
    h2_stream *next, *prev;
    int32_t id;
    void *user;
    char *headers[H2_HEADER_COUNT];
    size_t header_bytes;
    double timeout, opened_at;
    double moved_at;   /* its answer: last time some of it went out, or its end was said */
    bool headers_done; /* the handler knows it */
    bool too_large;    /* its headers */
    bool encoding_refused;
    size_t message_max;
    struct wire_in in;
    h2_stream *older, *newer; /* among unfinished messages, while in.capacity is not 0 */
    struct evbuffer *out;
    bool answered; /* response headers are on their way */
    bool ended;
    bool answer_complete; /* its last frame is written */
    bool reset;
    bool remote_closed;
    int status;
    char request_id[160];
    char message[MESSAGE_TEXT_BYTES];
};

struct h2 {
    struct h2_options options;
    struct h2_handler handler;
    void *user;
    nghttp2_session_callbacks *callbacks;
    nghttp2_option *option;
    struct evconnlistener *listener;
    struct event *sweep;
    bool listener_rests; /* accept failed: again at the next sweep */
    struct connection *connections;
    int connection_count;
    size_t upload_bytes;        /* of unfinished messages, all streams */
    h2_stream *oldest, *newest; /* of them */
};

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Something may have to be written: once, later in this turn of the loop. */
static void touch(struct connection *c) { event_active(c->flush, EV_TIMEOUT, 0); }

/* ---- streams: their memory ---- */

static h2_stream *stream_new(struct connection *c, int32_t id) {
    h2_stream *s = calloc(1, sizeof *s);
    struct evbuffer *out = evbuffer_new();
    if (!s || !out) {
        free(s);
        if (out) evbuffer_free(out);
        return NULL;
    }
    s->connection = c;
    s->id = id;
    s->out = out;
    s->message_max = c->owner->options.message_bytes_max;
    s->opened_at = now_seconds();
    s->next = c->streams;
    if (c->streams) c->streams->prev = s;
    c->streams = s;
    return s;
}

static void enlist_upload(h2_stream *s) {
    h2 *h = s->connection->owner;
    s->older = h->newest;
    *(h->newest ? &h->newest->newer : &h->oldest) = s;
    h->newest = s;
}

/* What has come of its message, which the caller frees. */
static struct wire_in take_upload(h2_stream *s) {
    h2 *h = s->connection->owner;
    const struct wire_in in = s->in;
    if (in.capacity > 0) {
        *(s->older ? &s->older->newer : &h->oldest) = s->newer;
        *(s->newer ? &s->newer->older : &h->newest) = s->older;
        s->older = s->newer = NULL;
        h->upload_bytes -= in.capacity;
    }
    s->in = (struct wire_in){0};
    return in;
}

static void drop_upload(h2_stream *s) {
    struct wire_in in = take_upload(s);
    wire_in_fini(&in);
}

static void stream_free(h2_stream *s) {
    struct connection *c = s->connection;
    if (s->headers_done) c->owner->handler.closed(c->owner->user, s);
    if (s->prev) {
        s->prev->next = s->next;
    } else {
        c->streams = s->next;
    }
    if (s->next) s->next->prev = s->prev;
    drop_upload(s);
    evbuffer_free(s->out);
    for (int i = 0; i < H2_HEADER_COUNT; i++) free(s->headers[i]);
    free(s);
    c->idle_since = now_seconds();
}

/* ---- streams: answers ---- */

#define HEADER(name, value) \
    { (uint8_t *)(name), (uint8_t *)(value), strlen(name), strlen(value), NGHTTP2_NV_FLAG_NONE }

static void submit_trailer(h2_stream *s) {
    char status[12];
    snprintf(status, sizeof status, "%d", s->status);
    const nghttp2_nv trailer[] = {HEADER("grpc-status", status),
                                  HEADER("grpc-message", s->message)};
    nghttp2_submit_trailer(s->connection->session, s->id, trailer, s->message[0] ? 2 : 1);
}

/* nghttp2 asks for the next bytes of a stream. */
static ssize_t read_out(nghttp2_session *session, int32_t id, uint8_t *bytes, size_t n,
                        uint32_t *flags, nghttp2_data_source *source, void *user) {
    h2_stream *s = source->ptr;
    (void)session;
    (void)id;
    (void)user;
    const int taken = evbuffer_remove(s->out, bytes, n);
    if (taken > 0) s->moved_at = now_seconds();
    if (evbuffer_get_length(s->out) > 0) return taken;
    if (s->ended) {
        *flags = NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
        submit_trailer(s);
        return taken > 0 ? taken : 0;
    }
    return taken > 0 ? taken : NGHTTP2_ERR_DEFERRED;
}

static void answer(h2_stream *s) {
    nghttp2_nv head[4] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc")};
    size_t n = 2;
    const nghttp2_nv id = HEADER("x-request-id", s->request_id);
    if (s->request_id[0]) head[n++] = id;
    const nghttp2_data_provider provider = {.source.ptr = s, .read_callback = read_out};
    nghttp2_submit_response(s->connection->session, s->id, head, n, &provider);
    s->answered = true;
}

/* Headers and trailers in one: the usual form of an error. */
static void answer_trailers_only(h2_stream *s) {
    char status[12];
    snprintf(status, sizeof status, "%d", s->status);
    nghttp2_nv head[6] = {HEADER(":status", "200"), HEADER("content-type", "application/grpc"),
                          HEADER("grpc-status", status)};
    size_t n = 3;
    const nghttp2_nv message = HEADER("grpc-message", s->message);
    const nghttp2_nv id = HEADER("x-request-id", s->request_id);
    const nghttp2_nv accept = HEADER("grpc-accept-encoding", "identity");
    if (s->message[0]) head[n++] = message;
    if (s->request_id[0]) head[n++] = id;
    if (s->encoding_refused) head[n++] = accept;
    nghttp2_submit_response(s->connection->session, s->id, head, n, NULL);
    s->answered = true;
}

/* A peer that does not speak gRPC gets a plain HTTP status. */
static void answer_http(h2_stream *s, const char *status) {
    const nghttp2_nv head[] = {HEADER(":status", status)};
    nghttp2_submit_response(s->connection->session, s->id, head, 1, NULL);
    s->answered = s->ended = true;
    s->moved_at = now_seconds();
    touch(s->connection);
}

void h2_stream_send(h2_stream *s, const void *bytes, size_t n) {
    uint8_t prefix[WIRE_PREFIX_BYTES];
    if (s->ended) return;
    wire_prefix(prefix, n);
    evbuffer_add(s->out, prefix, sizeof prefix);
    evbuffer_add(s->out, bytes, n);
    if (!s->answered) {
        answer(s);
    } else {
        nghttp2_session_resume_data(s->connection->session, s->id); /* fails when not deferred */
    }
    touch(s->connection);
}

size_t h2_stream_unsent(const h2_stream *s) { return evbuffer_get_length(s->out); }

void h2_stream_end(h2_stream *s, int grpc_status, const char *message) {
    if (s->ended) return;
    s->ended = true;
    s->moved_at = now_seconds();
    s->status = grpc_status;
    if (message) wire_percent_encode(message, s->message, sizeof s->message);
    drop_upload(s);
    if (!s->answered) {
        answer_trailers_only(s);
    } else {
        nghttp2_session_resume_data(s->connection->session, s->id);
    }
    touch(s->connection);
}

int h2_stream_status(const h2_stream *s) { return s->ended ? s->status : H2_CANCELLED; }

static void reset_unread(h2_stream *s) {
    s->ended = s->reset = true;
    evbuffer_drain(s->out, evbuffer_get_length(s->out));
    nghttp2_submit_rst_stream(s->connection->session, NGHTTP2_FLAG_NONE, s->id,
                              NGHTTP2_ENHANCE_YOUR_CALM);
    touch(s->connection);
}

/* Trailers would have to wait for the peer's window like the data before them. */
void h2_stream_cut(h2_stream *s, int grpc_status, const char *message) {
    if (s->ended) return;
    if (!s->answered) {
        h2_stream_end(s, grpc_status, message);
        return;
    }
    s->status = grpc_status;
    reset_unread(s);
}

const char *h2_stream_header(const h2_stream *s, enum h2_header which) { return s->headers[which]; }
double h2_stream_timeout(const h2_stream *s) { return s->timeout; }
void h2_stream_limit_message(h2_stream *s, size_t n) {
    if (n < s->message_max) s->message_max = n;
}
void h2_stream_set_user(h2_stream *s, void *user) { s->user = user; }
void *h2_stream_user(const h2_stream *s) { return s->user; }
void h2_stream_set_request_id(h2_stream *s, const char *id) {
    snprintf(s->request_id, sizeof s->request_id, "%s", id);
}

/* ---- streams: requests ---- */

static void refuse_encoding(h2_stream *s) {
    s->encoding_refused = true;
    h2_stream_end(s, H2_UNIMPLEMENTED, "compressed messages are not offered, only identity");
}

static bool is_grpc(const char *content_type) {
    static const char wanted[] = "application/grpc";
    if (!content_type || strncmp(content_type, wanted, sizeof wanted - 1) != 0) return false;
    const char *rest = content_type + sizeof wanted - 1;
    if (strncmp(rest, "+proto", 6) == 0) rest += 6;
    return *rest == '\0' || *rest == ';';
}

/* All request headers are here. */
static void start_stream(h2_stream *s) {
    const h2 *h = s->connection->owner;
    if (s->ended) return; /* its headers took too long */
    if (!s->headers[H2_METHOD] || strcmp(s->headers[H2_METHOD], "POST") != 0) {
        answer_http(s, "405");
        return;
    }
    if (!is_grpc(s->headers[H2_CONTENT_TYPE])) {
        answer_http(s, "415");
        return;
    }
    if (s->too_large) {
        answer_http(s, "431");
        return;
    }
    s->headers_done = true;
    h->handler.opened(h->user, s);
    if (s->ended) return;
    const char *encoding = s->headers[H2_ENCODING];
    if (encoding && strcmp(encoding, "identity") != 0) {
        refuse_encoding(s);
    } else if (s->headers[H2_TIMEOUT] && !wire_timeout_parse(s->headers[H2_TIMEOUT], &s->timeout)) {
        h2_stream_end(s, H2_INVALID_ARGUMENT, "grpc-timeout must be 1 to 8 digits and H M S m u n");
    }
}

/* Whoever holds memory longest without being done gives way, not who comes next: else a few uploads
 * that never end would shut everybody else out. */
static void make_room(h2 *h) {
    while (h->upload_bytes > UPLOADS_MAX * h->options.message_bytes_max) {
        h2_stream_end(h->oldest, H2_RESOURCE_EXHAUSTED,
                      "too many large requests at once, and this one took longest to arrive");
    }
}

static void read_data(h2_stream *s, const uint8_t *bytes, size_t n) {
    h2 *h = s->connection->owner;
    const size_t before = s->in.capacity;
    char text[160];
    const enum wire_fault fault = wire_in_push(&s->in, bytes, n, s->message_max);
    if (before == 0 && s->in.capacity > 0) enlist_upload(s);
    h->upload_bytes += s->in.capacity - before;
    switch (fault) {
        case WIRE_OK:
            make_room(h);
            return;
        case WIRE_COMPRESSED:
            refuse_encoding(s);
            return;
        case WIRE_TOO_LARGE:
            snprintf(text, sizeof text, "the message has %zu bytes, at most %zu are accepted",
                     s->in.length, s->message_max);
            h2_stream_end(s, H2_RESOURCE_EXHAUSTED, text);
            return;
        case WIRE_NO_MEMORY:
            h2_stream_end(s, H2_RESOURCE_EXHAUSTED, "no memory for the message");
            return;
        case WIRE_BAD_FLAG:
            h2_stream_end(s, H2_INVALID_ARGUMENT, "a message must begin with a flag of 0 or 1");
            return;
        case WIRE_SECOND_MESSAGE:
            h2_stream_end(s, H2_INVALID_ARGUMENT, "the method takes one message");
            return;
    }
}

/* The peer has sent all it wants to send. */
static void finish_request(h2_stream *s) {
    const h2 *h = s->connection->owner;
    s->remote_closed = true;
    if (s->ended || !s->headers_done) return;
    if (!wire_in_complete(&s->in)) {
        h2_stream_end(s, H2_INVALID_ARGUMENT, "the request ended before its message did");
        return;
    }
    struct wire_in in = take_upload(s); /* the handler may end the stream while it reads */
    h->handler.received(h->user, s, in.bytes, in.n);
    wire_in_fini(&in);
}

/* ---- what nghttp2 calls ---- */

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct connection *c = user;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    h2_stream *s = stream_new(c, frame->hd.stream_id);
    if (!s) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, s);
    return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t name_n, const uint8_t *value, size_t value_n, uint8_t flags,
                     void *user) {
    static const char *const names[H2_HEADER_COUNT] = {
        [H2_METHOD] = ":method",
        [H2_PATH] = ":path",
        [H2_AUTHORITY] = ":authority",
        [H2_CONTENT_TYPE] = "content-type",
        [H2_ENCODING] = "grpc-encoding",
        [H2_TIMEOUT] = "grpc-timeout",
        [H2_AUTHORIZATION] = "authorization",
        [H2_REQUEST_ID] = "x-request-id",
        [H2_TRACEPARENT] = "traceparent",
    };
    h2_stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    (void)flags;
    (void)user;
    if (!s || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0; /* a client's trailers */
    s->header_bytes += name_n + value_n + 32;
    if (s->header_bytes > HEADER_BYTES_MAX) {
        s->too_large = true;
        return 0;
    }
    for (int i = 0; i < H2_HEADER_COUNT; i++) {
        if (strlen(names[i]) != name_n || memcmp(names[i], name, name_n) != 0) continue;
        if (!s->headers[i]) s->headers[i] = strndup((const char *)value, value_n);
        return 0;
    }
    return 0;
}

/* Pings keep connections alive; a flood of them only costs (gRPC calls it too_many_pings). */
static void count_ping(struct connection *c) {
    static const char text[] = "too_many_pings"; /* clients look for this text */
    const double now = now_seconds();
    c->pings += (now - c->pinged) * PINGS_PER_SECOND;
    if (c->pings > PINGS_BURST) c->pings = PINGS_BURST;
    c->pinged = now;
    c->pings -= 1;
    if (c->pings >= 0 || c->closing_since > 0) return;
    nghttp2_submit_goaway(c->session, NGHTTP2_FLAG_NONE,
                          nghttp2_session_get_last_proc_stream_id(c->session),
                          NGHTTP2_ENHANCE_YOUR_CALM, (const uint8_t *)text, sizeof text - 1);
    c->closing_since = now;
}

/* The second GOAWAY of a drain: streams the peer began before it saw the first are known by now. */
static void say_last_stream(struct connection *c) {
    if (c->said_goaway) return;
    c->said_goaway = true;
    nghttp2_submit_goaway(c->session, NGHTTP2_FLAG_NONE,
                          nghttp2_session_get_last_proc_stream_id(c->session), NGHTTP2_NO_ERROR,
                          NULL, 0);
    touch(c);
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct connection *c = user;
    h2_stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    switch (frame->hd.type) {
        case NGHTTP2_PING:
            if (!(frame->hd.flags & NGHTTP2_FLAG_ACK)) {
                count_ping(c);
            } else if (c->draining_since > 0) {
                say_last_stream(c);
            }
            return 0;
        case NGHTTP2_HEADERS:
            if (s && frame->headers.cat == NGHTTP2_HCAT_REQUEST) start_stream(s);
            /* fall through */
        case NGHTTP2_DATA:
            if (s && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) finish_request(s);
            return 0;
        default:
            return 0;
    }
}

/* The answer is complete and the peer still sends: it need not go on (RFC 9113 §8.1). Not said
 * earlier, as some clients take a reset for an error while they have not read the answer. */
static void stop_upload(h2_stream *s) {
    if (!s->answer_complete || s->reset) return;
    s->reset = true;
    nghttp2_submit_rst_stream(s->connection->session, NGHTTP2_FLAG_NONE, s->id, NGHTTP2_NO_ERROR);
    touch(s->connection);
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *bytes,
                   size_t n, void *user) {
    h2_stream *s = nghttp2_session_get_stream_user_data(session, id);
    (void)flags;
    (void)user;
    if (s && s->ended) {
        stop_upload(s);
    } else if (s && s->headers_done) {
        read_data(s, bytes, n);
    }
    return 0;
}

static int on_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct connection *c = user;
    h2_stream *s = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    const bool end = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (frame->hd.type == NGHTTP2_HEADERS && end && s) s->answer_complete = true;
    if (frame->hd.type == NGHTTP2_GOAWAY && c->draining_since > 0 && !c->said_goaway) {
        nghttp2_submit_ping(session, NGHTTP2_FLAG_NONE, NULL); /* earlier it would overtake */
    }
    return 0;
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
    h2_stream *s = nghttp2_session_get_stream_user_data(session, id);
    (void)error;
    (void)user;
    if (!s) return 0;
    nghttp2_session_set_stream_user_data(session, id, NULL);
    stream_free(s);
    return 0;
}

/* ---- connections ---- */

static void connection_free(struct connection *c) {
    h2 *h = c->owner;
    while (c->streams) stream_free(c->streams);
    nghttp2_session_del(c->session);
    if (c->wire) bufferevent_free(c->wire);
    if (c->flush) event_free(c->flush);
    if (c->prev) {
        c->prev->next = c->next;
    } else {
        h->connections = c->next;
    }
    if (c->next) c->next->prev = c->prev;
    h->connection_count--;
    free(c);
}

/* Moves frames into the socket's buffer, as long as the peer takes them. */
static void write_frames(struct connection *c) {
    struct evbuffer *out = bufferevent_get_output(c->wire);
    while (!c->lost && evbuffer_get_length(out) < OUTPUT_BYTES_MAX) {
        const uint8_t *bytes;
        const ssize_t n = nghttp2_session_mem_send(c->session, &bytes);
        if (n < 0) c->lost = true;
        if (n <= 0) break;
        if (bufferevent_write(c->wire, bytes, (size_t)n) != 0) c->lost = true;
    }
}

static void on_flush(evutil_socket_t fd, short what, void *user) {
    struct connection *c = user;
    (void)fd;
    (void)what;
    if (!c->lost) write_frames(c);
    const bool written = c->lost || evbuffer_get_length(bufferevent_get_output(c->wire)) == 0;
    const bool goodbye = c->draining_since > 0 && !c->said_goaway; /* the second one must go out */
    const bool over = c->closing_since > 0 || (!goodbye && !nghttp2_session_want_read(c->session) &&
                                               !nghttp2_session_want_write(c->session));
    if (c->lost || (over && written)) connection_free(c);
}

static void on_readable(struct bufferevent *wire, void *user) {
    struct connection *c = user;
    struct evbuffer *in = bufferevent_get_input(wire);
    c->heard = true;
    while (!c->lost && c->closing_since == 0 && evbuffer_get_length(in) > 0) {
        const size_t n = evbuffer_get_contiguous_space(in);
        const uint8_t *bytes = evbuffer_pullup(in, (ev_ssize_t)n);
        if (nghttp2_session_mem_recv(c->session, bytes, n) < 0) c->closing_since = now_seconds();
        evbuffer_drain(in, n);
    }
    if (c->closing_since > 0) evbuffer_drain(in, evbuffer_get_length(in));
    touch(c);
}

static void on_writable(struct bufferevent *wire, void *user) {
    (void)wire;
    touch(user);
}

/* FIN, half-close and RST alike: nobody is there who could read an answer. */
static void on_wire_event(struct bufferevent *wire, short what, void *user) {
    struct connection *c = user;
    (void)wire;
    if (!(what & (BEV_EVENT_EOF | BEV_EVENT_ERROR | BEV_EVENT_TIMEOUT))) return;
    c->lost = true;
    touch(c);
}

static bool connection_start(struct connection *c) {
    const h2 *h = c->owner;
    const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, (uint32_t)h->options.streams_max},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, HEADER_BYTES_MAX},
    };
    if (!c->wire || !c->flush ||
        nghttp2_session_server_new2(&c->session, h->callbacks, c, h->option) != 0) {
        return false;
    }
    nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings,
                            sizeof settings / sizeof *settings);
    nghttp2_session_set_local_window_size(c->session, NGHTTP2_FLAG_NONE, 0,
                                          CONNECTION_WINDOW_BYTES);
    bufferevent_setcb(c->wire, on_readable, on_writable, on_wire_event, c);
    bufferevent_setwatermark(c->wire, EV_WRITE, OUTPUT_BYTES_MAX / 4, 0);
    bufferevent_setwatermark(c->wire, EV_READ, 0, CONNECTION_WINDOW_BYTES);
    const struct timeval idle = {.tv_sec = (time_t)h->options.idle_seconds,
                                 .tv_usec = (suseconds_t)(1e6 * fmod(h->options.idle_seconds, 1))};
    bufferevent_set_timeouts(c->wire, NULL, &idle); /* while something waits to be written */
    return bufferevent_enable(c->wire, EV_READ | EV_WRITE) == 0;
}

void h2_adopt(h2 *h, evutil_socket_t fd) {
    const int on = 1;
    struct connection *c = calloc(1, sizeof *c);
    if (!c) {
        evutil_closesocket(fd);
        return;
    }
    evutil_make_socket_nonblocking(fd);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    c->owner = h;
    c->idle_since = c->pinged = now_seconds();
    c->pings = PINGS_BURST;
    c->next = h->connections;
    if (c->next) c->next->prev = c;
    h->connections = c;
    h->connection_count++;
    c->wire = tls_wire(h->options.tls, h->options.base, fd, BEV_OPT_CLOSE_ON_FREE);
    c->flush = event_new(h->options.base, -1, 0, on_flush, c);
    if (!c->wire) evutil_closesocket(fd);
    if (connection_start(c)) {
        touch(c);
    } else {
        log_warn("a gRPC connection could not be set up: no memory");
        connection_free(c);
    }
}

static void drain_connection(struct connection *c) {
    if (c->draining_since > 0) return;
    c->draining_since = now_seconds();
    nghttp2_submit_shutdown_notice(c->session);
    touch(c);
}

/* ---- life ---- */

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *address,
                      int n, void *user) {
    h2 *h = user;
    (void)listener;
    (void)address;
    (void)n;
    if (h->connection_count >= h->options.connections_max) {
        evutil_closesocket(fd);
        return;
    }
    h2_adopt(h, fd);
}

/* No file descriptors left: without a rest the loop would spin on the waiting connection. */
static void on_accept_failed(struct evconnlistener *listener, void *user) {
    h2 *h = user;
    log_warn("accepting a gRPC connection failed: %s", strerror(errno));
    evconnlistener_disable(listener);
    h->listener_rests = true;
}

/* Its end is not written yet. */
static bool owes_answer(const h2_stream *s) { return s->ended && !s->reset && !s->answer_complete; }

/* No handshake, or no word after it: nothing can be written to it, so a goodbye would wait for ever. */
static bool is_mute(const struct connection *c, double now) {
    const bool drained = c->draining_since > 0 && now - c->draining_since > GOODBYE_SECONDS;
    return !c->heard && (drained || now - c->idle_since > c->owner->options.idle_seconds);
}

/* Requests that do not arrive, answers that nobody takes. */
static void sweep_streams(struct connection *c, double now) {
    const double idle = c->owner->options.idle_seconds;
    for (h2_stream *s = c->streams; s; s = s->next) {
        if (owes_answer(s) && now - s->moved_at > idle) reset_unread(s);
        if (s->remote_closed || now - s->opened_at < idle) continue;
        h2_stream_end(s, H2_DEADLINE_EXCEEDED, "the request did not arrive in time");
        stop_upload(s);
    }
}

static void on_sweep(evutil_socket_t fd, short what, void *user) {
    h2 *h = user;
    const double now = now_seconds();
    (void)fd;
    (void)what;
    if (h->listener_rests) {
        h->listener_rests = false;
        evconnlistener_enable(h->listener);
    }
    for (struct connection *c = h->connections; c; c = c->next) {
        sweep_streams(c, now);
        if (!c->streams && now - c->idle_since > h->options.idle_seconds) drain_connection(c);
        if (c->draining_since > 0 && now - c->draining_since > GOODBYE_SECONDS) say_last_stream(c);
        const bool closed = c->closing_since > 0 && now - c->closing_since > GOODBYE_SECONDS;
        if (closed || is_mute(c, now)) {
            c->lost = true;
            touch(c);
        }
    }
}

static enum status listen_on(h2 *h) {
    const struct h2_options *o = &h->options;
    char port[12];
    struct evutil_addrinfo *found = NULL;
    const struct evutil_addrinfo hints = {.ai_family = AF_UNSPEC,
                                          .ai_socktype = SOCK_STREAM,
                                          .ai_flags = EVUTIL_AI_PASSIVE | EVUTIL_AI_ADDRCONFIG};
    snprintf(port, sizeof port, "%d", o->port);
    const int error = evutil_getaddrinfo(o->host, port, &hints, &found);
    if (error != 0) {
        return fail(STATUS_USAGE, "--host %s: %s", o->host, evutil_gai_strerror(error));
    }
    h->listener = evconnlistener_new_bind(
        o->base, on_accept, h, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC | LEV_OPT_REUSEABLE,
        BACKLOG, found->ai_addr, (int)found->ai_addrlen);
    evutil_freeaddrinfo(found);
    if (!h->listener) {
        return fail(STATUS_USAGE, "cannot listen on %s port %d (--grpc-port): %s", o->host, o->port,
                    strerror(errno));
    }
    evconnlistener_set_error_cb(h->listener, on_accept_failed);
    return STATUS_OK;
}

static bool set_up_nghttp2(h2 *h) {
    if (nghttp2_session_callbacks_new(&h->callbacks) != 0 || nghttp2_option_new(&h->option) != 0) {
        return false;
    }
    nghttp2_session_callbacks_set_on_begin_headers_callback(h->callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(h->callbacks, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(h->callbacks, on_frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(h->callbacks, on_data);
    nghttp2_session_callbacks_set_on_frame_send_callback(h->callbacks, on_sent);
    nghttp2_session_callbacks_set_on_stream_close_callback(h->callbacks, on_stream_close);
    nghttp2_option_set_stream_reset_rate_limit(h->option, RESETS_BURST, RESETS_PER_SECOND);
    nghttp2_option_set_max_continuations(h->option, CONTINUATIONS_MAX);
    return true;
}

enum status h2_open(const struct h2_options *options, const struct h2_handler *handler, void *user,
                    h2 **out) {
    const struct timeval every = {.tv_sec = SWEEP_SECONDS};
    *out = NULL;
    h2 *h = calloc(1, sizeof *h);
    if (!h) return fail(STATUS_MEMORY, "no memory for the gRPC listener");
    h->options = *options;
    h->handler = *handler;
    h->user = user;
    enum status status = STATUS_OK;
    h->sweep = event_new(options->base, -1, EV_PERSIST, on_sweep, h);
    if (!h->sweep || !set_up_nghttp2(h)) {
        status = fail(STATUS_MEMORY, "no memory for the gRPC listener");
    } else {
        status = listen_on(h);
    }
    if (status != STATUS_OK) {
        h2_close(h);
        return status;
    }
    event_add(h->sweep, &every);
    *out = h;
    return STATUS_OK;
}

int h2_port(const h2 *h) {
    struct sockaddr_storage address;
    socklen_t n = sizeof address;
    if (getsockname(evconnlistener_get_fd(h->listener), (struct sockaddr *)&address, &n) != 0) {
        return 0;
    }
    return ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                               : ((struct sockaddr_in *)&address)->sin_port);
}

void h2_drain(h2 *h) {
    for (struct connection *c = h->connections; c; c = c->next) drain_connection(c);
}

bool h2_busy(const h2 *h) {
    for (struct connection *c = h->connections; c; c = c->next) {
        if (!c->heard) continue;
        if (evbuffer_get_length(bufferevent_get_output(c->wire)) > 0) return true;
        if (nghttp2_session_want_write(c->session)) return true;
        for (const h2_stream *s = c->streams; s; s = s->next) {
            if (owes_answer(s)) return true;
        }
    }
    return false;
}

void h2_close(h2 *h) {
    if (!h) return;
    if (h->listener) evconnlistener_free(h->listener);
    while (h->connections) connection_free(h->connections);
    if (h->sweep) event_free(h->sweep);
    if (h->callbacks) nghttp2_session_callbacks_del(h->callbacks);
    if (h->option) nghttp2_option_del(h->option);
    free(h);
}
