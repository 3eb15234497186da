/* k_h2.c: the HTTP/2 layer of gRPC against nghttp2's own client over a socket pair, frame by frame.
 *
 * The handler echoes: a request's message comes back `echoes` times, then status 0. What the peer sees
 * is compared with the gRPC protocol description; limits with those named in h2.c.
 */
#include <errno.h>
#include <event2/event.h>
#include <fcntl.h>
#include <nghttp2/nghttp2.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "serve/grpc_wire.h"
#include "serve/h2.h"
#include "suite.h"

enum { BYTES_MAX = 1 << 20, STREAMS = 64, MESSAGE_MAX = 100000 };

/* ---- the server's handler ---- */

static struct handled {
    int opened, received, closed;
    int echoes;      /* answers to each message */
    bool keep_open;  /* no end: the test does it */
    size_t limit;    /* of a message; 0: the general one */
    h2_stream *last; /* received last */
    char timeout[32];
} handled;

static void on_opened(void *user, h2_stream *s) {
    (void)user;
    if (handled.limit) h2_stream_limit_message(s, handled.limit);
    handled.opened++;
}

static void on_received(void *user, h2_stream *s, const uint8_t *bytes, size_t n) {
    (void)user;
    handled.received++;
    handled.last = s;
    snprintf(handled.timeout, sizeof handled.timeout, "%.9g", h2_stream_timeout(s));
    for (int i = 0; i < handled.echoes; i++) h2_stream_send(s, bytes, n);
    if (!handled.keep_open) h2_stream_end(s, H2_OK, NULL);
}

static void on_closed(void *user, h2_stream *s) {
    (void)user;
    handled.closed++;
    if (handled.last == s) handled.last = NULL;
}

/* ---- the client ---- */

static struct client {
    nghttp2_session *session;
    int fd;
    bool gone; /* the server closed the connection */
    struct answer {
        char status[8], grpc_status[8], grpc_message[64], accept[16];
        uint8_t bytes[4096];
        size_t n; /* all bytes, also those not kept */
        bool closed;
        uint32_t error;
    } answers[STREAMS + 1];
    int goaways;
    int32_t goaway_last[4];
    uint32_t goaway_error;
    int pongs;
} client;

static struct event_base *base;
static h2 *server;

static int client_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                         size_t name_n, const uint8_t *value, size_t value_n, uint8_t flags,
                         void *user) {
    struct answer *a = &client.answers[frame->hd.stream_id / 2];
    const struct {
        const char *name;
        char *to;
        size_t n;
    } kept[] = {{":status", a->status, sizeof a->status},
                {"grpc-status", a->grpc_status, sizeof a->grpc_status},
                {"grpc-message", a->grpc_message, sizeof a->grpc_message},
                {"grpc-accept-encoding", a->accept, sizeof a->accept}};
    (void)session;
    (void)flags;
    (void)user;
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        if (strlen(kept[i].name) != name_n || memcmp(kept[i].name, name, name_n) != 0) continue;
        snprintf(kept[i].to, kept[i].n, "%.*s", (int)value_n, (const char *)value);
    }
    return 0;
}

static int client_data(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *bytes,
                       size_t n, void *user) {
    struct answer *a = &client.answers[id / 2];
    (void)session;
    (void)flags;
    (void)user;
    for (size_t i = 0; i < n && a->n + i < sizeof a->bytes; i++) a->bytes[a->n + i] = bytes[i];
    a->n += n;
    return 0;
}

static int client_closed(nghttp2_session *session, int32_t id, uint32_t error, void *user) {
    (void)session;
    (void)user;
    client.answers[id / 2].closed = true;
    client.answers[id / 2].error = error;
    return 0;
}

static int client_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    (void)session;
    (void)user;
    if (frame->hd.type == NGHTTP2_GOAWAY && client.goaways < 4) {
        client.goaway_last[client.goaways++] = frame->goaway.last_stream_id;
        client.goaway_error = frame->goaway.error_code;
    }
    if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK)) client.pongs++;
    return 0;
}

static double idle_seconds = 60;

static void set_up(void) {
    const struct h2_options options = {.base = base ? base : (base = event_base_new()),
                                       .host = "127.0.0.1",
                                       .connections_max = 4,
                                       .streams_max = STREAMS,
                                       .message_bytes_max = MESSAGE_MAX,
                                       .idle_seconds = idle_seconds};
    const struct h2_handler handler = {on_opened, on_received, on_closed};
    int fds[2];
    nghttp2_session_callbacks *callbacks;
    log_init(LOG_OFF, false);
    handled = (struct handled){.echoes = 1};
    client = (struct client){0};
    CU_ASSERT_FATAL(h2_open(&options, &handler, NULL, &server) == STATUS_OK);
    CU_ASSERT(h2_port(server) > 0);
    CU_ASSERT_FATAL(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    h2_adopt(server, fds[0]);
    client.fd = fds[1];
    fcntl(client.fd, F_SETFL, O_NONBLOCK);
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, client_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, client_data);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, client_closed);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, client_frame);
    nghttp2_session_client_new(&client.session, callbacks, NULL);
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_submit_settings(client.session, 0, NULL, 0);
}

static void tear_down(void) {
    nghttp2_session_del(client.session);
    close(client.fd);
    h2_close(server);
    CHECK_EQ(handled.opened, handled.closed);
}

/* Client and server take turns until neither has anything to say. */
static void exchange(void) {
    static uint8_t bytes[65536];
    for (int quiet = 0; quiet < 3 && !client.gone;) {
        bool moved = false;
        const uint8_t *out;
        ssize_t n;
        while ((n = nghttp2_session_mem_send(client.session, &out)) > 0) {
            for (ssize_t sent = 0; sent < n;) {
                const ssize_t now = send(client.fd, out + sent, (size_t)(n - sent), MSG_NOSIGNAL);
                if (now > 0) sent += now;
                if (now < 0 && errno != EAGAIN)
                    break; /* closed; what it said is still to be read */
                event_base_loop(base, EVLOOP_NONBLOCK);
            }
            moved = true;
        }
        event_base_loop(base, EVLOOP_NONBLOCK);
        while ((n = read(client.fd, bytes, sizeof bytes)) > 0) {
            nghttp2_session_mem_recv(client.session, bytes, (size_t)n);
            event_base_loop(base, EVLOOP_NONBLOCK);
            moved = true;
        }
        client.gone = n == 0 || errno != EAGAIN;
        quiet = moved ? 0 : quiet + 1;
    }
}

/* A body in pieces of `step` bytes, one DATA frame each. */
static struct body_source {
    const uint8_t *bytes;
    size_t n, at, step;
    bool hold; /* never ends */
} source;

static ssize_t read_body(nghttp2_session *session, int32_t id, uint8_t *to, size_t room,
                         uint32_t *flags, nghttp2_data_source *data, void *user) {
    size_t n = source.n - source.at;
    (void)session;
    (void)id;
    (void)data;
    (void)user;
    if (n > source.step) n = source.step;
    if (n > room) n = room;
    memcpy(to, source.bytes + source.at, n);
    source.at += n;
    if (source.at == source.n && source.hold) return n ? (ssize_t)n : NGHTTP2_ERR_DEFERRED;
    if (source.at == source.n) *flags = NGHTTP2_DATA_FLAG_EOF;
    return (ssize_t)n;
}

#define FIELD(name, value) \
    { (uint8_t *)(name), (uint8_t *)(value), strlen(name), strlen(value), NGHTTP2_NV_FLAG_NONE }

static struct answer *request_with(const char *method, const char *type, const char *extra,
                                   const char *extra_value, const uint8_t *bytes, size_t n,
                                   size_t step) {
    const nghttp2_nv head[] = {FIELD(":method", method),    FIELD(":scheme", "http"),
                               FIELD(":path", "/a.B/C"),    FIELD(":authority", "localhost"),
                               FIELD("content-type", type), FIELD("te", "trailers"),
                               FIELD(extra, extra_value)};
    const nghttp2_data_provider provider = {.read_callback = read_body};
    source = (struct body_source){bytes, n, 0, step, source.hold};
    const int32_t id = nghttp2_submit_request(client.session, NULL, head, *extra ? 7 : 6,
                                              bytes ? &provider : NULL, NULL);
    exchange();
    return &client.answers[id / 2];
}

static struct answer *request(const uint8_t *bytes, size_t n, size_t step) {
    return request_with("POST", "application/grpc", "", "", bytes, n, step);
}

static const uint8_t hello[] = {0, 0, 0, 0, 5, 'h', 'e', 'l', 'l', 'o'};

/* ---- cases ---- */

static void test_echo(void) {
    set_up();
    handled.echoes = 3;
    for (size_t step = 1; step <= sizeof hello; step++) { /* a DATA frame per `step` bytes */
        const struct answer *a = request(hello, sizeof hello, step);
        CHECK_STR(a->status, "200");
        CHECK_STR(a->grpc_status, "0");
        CHECK_EQ(a->n, 3 * sizeof hello);
        for (int i = 0; i < 3; i++) {
            CU_ASSERT(suite_equal_bytes("echo", a->bytes + i * 10, hello, sizeof hello));
        }
        CU_ASSERT(a->closed);
        CHECK_EQ(a->error, NGHTTP2_NO_ERROR);
    }
    CHECK_EQ(handled.received, 10);
    tear_down();
}

static void test_refusals(void) {
    static const uint8_t half[] = {0, 0, 0, 0, 9, 'h'}, zipped[] = {1, 0, 0, 0, 1, 'z'};
    static const uint8_t two[] = {0, 0, 0, 0, 1, 'a', 0, 0, 0, 0, 1, 'b'};
    static const uint8_t huge[] = {0, 0, 0x10, 0, 0}; /* 1 MiB */
    const struct {
        const uint8_t *bytes;
        size_t n;
        const char *status;
    } cases[] = {{half, sizeof half, "3"},
                 {two, sizeof two, "3"},
                 {NULL, 0, "3"},
                 {zipped, sizeof zipped, "12"},
                 {huge, sizeof huge, "8"}};
    set_up();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct answer *a = request(cases[i].bytes, cases[i].n, 100);
        CHECK_STR(a->status, "200");
        CHECK_STR(a->grpc_status, cases[i].status);
        CHECK_EQ(a->n, 0);
        CU_ASSERT(a->closed);
        if (cases[i].bytes == zipped) CHECK_STR(a->accept, "identity");
    }
    CHECK_EQ(handled.received, 0);
    tear_down();
}

static void test_http_rules(void) {
    set_up();
    CHECK_STR(request_with("GET", "application/grpc", "", "", NULL, 0, 0)->status, "405");
    CHECK_STR(request_with("POST", "application/json", "", "", hello, 10, 10)->status, "415");
    CHECK_STR(request_with("POST", "application/grpc-web", "", "", hello, 10, 10)->status, "415");
    CHECK_STR(request_with("POST", "application/grpc+json", "", "", hello, 10, 10)->status, "415");
    CHECK_EQ(handled.opened, 0);
    CHECK_STR(request_with("POST", "application/grpc+proto", "", "", hello, 10, 10)->grpc_status,
              "0");
    CHECK_STR(request_with("POST", "application/grpc", "grpc-encoding", "gzip", hello, 10, 10)
                  ->grpc_status,
              "12");
    CHECK_STR(request_with("POST", "application/grpc", "grpc-timeout", "1.5S", hello, 10, 10)
                  ->grpc_status,
              "3");
    request_with("POST", "application/grpc", "grpc-timeout", "1500m", hello, 10, 10);
    CHECK_STR(handled.timeout, "1.5");
    static char large[65536];
    memset(large, 'a', sizeof large - 1); /* name and 32 more: over 64 KiB */
    struct answer *a = request_with("POST", "application/grpc", "x-large", large, hello, 10, 10);
    CU_ASSERT(a->closed || client.gone);
    CU_ASSERT(strcmp(a->grpc_status, "0") != 0);
    tear_down();
}

static void test_reset_is_closed(void) {
    set_up();
    handled.keep_open = true;
    request(hello, sizeof hello, 10);
    CHECK_EQ(handled.received, 1);
    CHECK_EQ(handled.closed, 0);
    nghttp2_submit_rst_stream(client.session, 0, 1, NGHTTP2_CANCEL);
    exchange();
    CHECK_EQ(handled.closed, 1);
    request(hello, sizeof hello, 10);
    shutdown(client.fd, SHUT_WR); /* half-close: the client is gone */
    exchange();
    CHECK_EQ(handled.closed, 2);
    tear_down();
}

/* Before anything is sent an error is trailers only; after it, it is trailers; percent-encoded. */
static void test_end_after_messages(void) {
    set_up();
    handled.keep_open = true;
    struct answer *a = request(hello, sizeof hello, 10);
    CHECK_STR(a->grpc_status, "");
    h2_stream_send(handled.last, "abc", 3);
    exchange();
    CHECK_EQ(a->n, sizeof hello + 8);
    h2_stream_end(handled.last, H2_RESOURCE_EXHAUSTED, "100% full");
    h2_stream_send(handled.last, "late", 4); /* nothing happens */
    exchange();
    CHECK_STR(a->grpc_status, "8");
    CHECK_STR(a->grpc_message, "100%25 full");
    CHECK_EQ(a->n, sizeof hello + 8);
    tear_down();
}

/* The peer's window holds 65,535 bytes; more waits in the stream's queue, and a slow reader can be cut off. */
static void test_flow_control(void) {
    static uint8_t large[50005];
    set_up();
    handled.keep_open = true;
    request(hello, sizeof hello, 10);
    for (int i = 0; i < 4; i++) h2_stream_send(handled.last, large, sizeof large);
    CHECK_EQ(h2_stream_unsent(handled.last), 4 * (sizeof large + 5));
    event_base_loop(base, EVLOOP_NONBLOCK); /* the server alone: the client acknowledges nothing */
    CU_ASSERT(h2_stream_unsent(handled.last) >= 4 * (sizeof large + 5) - 65535);
    h2_stream_cut(handled.last, H2_RESOURCE_EXHAUSTED, "too slow");
    exchange();
    CU_ASSERT(client.answers[0].closed);
    CHECK_EQ(client.answers[0].error, NGHTTP2_ENHANCE_YOUR_CALM);
    CHECK_EQ(handled.closed, 1);
    tear_down();
}

/* The upload that goes on after its refusal is told to stop; the answer is kept. */
static void test_upload_after_refusal(void) {
    static uint8_t large[5 + 500000];
    set_up();
    wire_prefix(large, sizeof large - 5);
    const struct answer *a = request(large, sizeof large, 16384);
    CHECK_STR(a->grpc_status, "8");
    CU_ASSERT(a->closed);
    CHECK_EQ(a->error, NGHTTP2_NO_ERROR);
    CHECK_STR(request(hello, sizeof hello, 10)->grpc_status, "0"); /* the connection lives */
    tear_down();
}

/* Eight largest messages that lack a byte fill the memory for them; the oldest makes room, for one of
 * five bytes as for a large one, and the others go on. */
static void test_uploads_that_never_end(void) {
    static uint8_t large[5 + MESSAGE_MAX];
    enum { HELD = 8 };
    set_up();
    wire_prefix(large, MESSAGE_MAX);
    source.hold = true;
    for (int i = 0; i < HELD; i++)
        CHECK_STR(request(large, sizeof large - 1, 16384)->grpc_status, "");
    source.hold = false;
    CHECK_STR(request(hello, sizeof hello, 10)->grpc_status, "0");
    CHECK_STR(client.answers[0].grpc_status, "8");
    CHECK_STR(request(large, sizeof large, 16384)->grpc_status, "0");
    for (int i = 1; i < HELD; i++) CHECK_STR(client.answers[i].grpc_status, "");
    source = (struct body_source){large, 1, 0, 1, false}; /* the byte it lacked */
    nghttp2_session_resume_data(client.session, 3);
    exchange();
    CHECK_STR(client.answers[1].grpc_status, "0");
    CHECK_EQ(handled.received, 3);
    tear_down();
}

static void test_limit_of_a_stream(void) {
    set_up();
    handled.limit = 5;
    CHECK_STR(request(hello, sizeof hello, 10)->grpc_status, "0");
    handled.limit = 4;
    CHECK_STR(request(hello, sizeof hello, 10)->grpc_status, "8");
    handled.limit = 2 * MESSAGE_MAX;                     /* the general limit stays */
    static const uint8_t huge[] = {0, 0, 1, 0x86, 0xa1}; /* 100,001 bytes */
    CHECK_STR(request(huge, sizeof huge, 10)->grpc_status, "8");
    tear_down();
}

static void test_drain(void) {
    set_up();
    handled.keep_open = true;
    struct answer *a = request(hello, sizeof hello, 10);
    h2_drain(server);
    exchange();
    CHECK_EQ(client.goaways, 2);
    CHECK_EQ(client.goaway_last[0], 0x7fffffff);
    CHECK_EQ(client.goaway_last[1], 1);
    CU_ASSERT(!client.gone); /* what runs goes on */
    h2_stream_end(handled.last, H2_OK, NULL);
    exchange();
    CHECK_STR(a->grpc_status, "0");
    CU_ASSERT(client.gone);
    CU_ASSERT(!h2_busy(server));
    tear_down();
}

/* The answer is complete; that the client does not say it is done is no reason to wait. */
static void test_drain_unfinished(void) {
    static const uint8_t huge[] = {0, 0, 0x10, 0, 0}; /* 1 MiB */
    set_up();
    source.hold = true;
    const struct answer *a = request(huge, sizeof huge, 10);
    source.hold = false;
    CHECK_STR(a->grpc_status, "8");
    CU_ASSERT(!a->closed);
    CU_ASSERT(!h2_busy(server));
    tear_down();
}

/* A peer that never says a word, and to which nothing can be written, as before a TLS handshake. */
static void test_drain_mute(void) {
    static uint8_t junk[65536];
    int fds[2];
    ssize_t n;
    set_up();
    exchange();
    CU_ASSERT_FATAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) == 0);
    while (write(fds[0], junk, sizeof junk) > 0) continue;
    h2_adopt(server, fds[0]);
    exchange();
    CU_ASSERT(!h2_busy(server));
    h2_drain(server);
    for (int ms = 0; ms < 4000; ms += 20) {
        usleep(20000);
        exchange();
    }
    do n = read(fds[1], junk, sizeof junk);
    while (n > 0);
    CHECK_EQ(n, 0); /* closed */
    close(fds[1]);
    tear_down();
}

/* A request that is on its way when the drain begins is served. */
static void test_drain_race(void) {
    const nghttp2_nv head[] = {FIELD(":method", "POST"), FIELD(":scheme", "http"),
                               FIELD(":path", "/a.B/C"), FIELD(":authority", "localhost"),
                               FIELD("content-type", "application/grpc")};
    const nghttp2_data_provider provider = {.read_callback = read_body};
    const uint8_t *out;
    ssize_t n;
    set_up();
    exchange();
    source = (struct body_source){hello, sizeof hello, 0, 100, false};
    nghttp2_submit_request(client.session, NULL, head, 5, &provider, NULL);
    while ((n = nghttp2_session_mem_send(client.session, &out)) > 0) {
        CHECK_EQ(send(client.fd, out, (size_t)n, MSG_NOSIGNAL), n);
    }
    h2_drain(server);
    exchange();
    CHECK_STR(client.answers[0].grpc_status, "0");
    CHECK_EQ(client.goaways, 1); /* without streams nghttp2's client does not look at the second */
    CU_ASSERT(client.gone);
    tear_down();
}

/* Connections without streams, and requests that do not arrive, end after idle_seconds. */
static void test_idle(void) {
    idle_seconds = 0.01;
    set_up();
    source.hold = true;
    const struct answer *a = request(hello, 7, 7);
    CHECK_STR(a->grpc_status, "");
    for (int ms = 0; ms < 6000 && !client.gone; ms += 20) {
        usleep(20000);
        exchange();
    }
    CHECK_STR(a->grpc_status, "4");
    CHECK_EQ(handled.received, 0);
    CHECK_EQ(client.goaway_error, NGHTTP2_NO_ERROR);
    CU_ASSERT(client.gone);
    source.hold = false;
    idle_seconds = 60;
    tear_down();
}

/* As many streams at once as the settings say; one more is refused and may be tried again. */
static void test_streams(void) {
    const nghttp2_nv head[] = {FIELD(":method", "POST"), FIELD(":scheme", "http"),
                               FIELD(":path", "/a.B/C"), FIELD(":authority", "localhost"),
                               FIELD("content-type", "application/grpc")};
    set_up();
    for (int i = 0; i <= STREAMS; i++) { /* before the client has seen the server's settings */
        CU_ASSERT(nghttp2_submit_headers(client.session, NGHTTP2_FLAG_NONE, -1, NULL, head, 5,
                                         NULL) >= 0);
    }
    exchange();
    CHECK_EQ(handled.opened, STREAMS);
    for (int i = 0; i < STREAMS; i++) CU_ASSERT(!client.answers[i].closed);
    CU_ASSERT(client.answers[STREAMS].closed);
    CHECK_EQ(client.answers[STREAMS].error, NGHTTP2_REFUSED_STREAM);
    CU_ASSERT(!client.gone);
    tear_down();
}

/* An answer that nobody takes goes after idle_seconds: the window stays shut, or the socket full. */
static void test_unread(void) {
    static uint8_t large[1 << 20];
    enum { ROOM = 1 << 24 };
    const nghttp2_settings_entry wide = {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, ROOM};
    for (int full = 0; full < 2; full++) {
        idle_seconds = 0.3;
        set_up();
        if (full) {
            nghttp2_submit_settings(client.session, 0, &wide, 1);
            nghttp2_session_set_local_window_size(client.session, 0, 0, ROOM);
        }
        handled.keep_open = true;
        request(hello, sizeof hello, 10);
        for (int i = 0; i < 4; i++) h2_stream_send(handled.last, large, sizeof large);
        h2_stream_end(handled.last, H2_OK, NULL);
        event_base_loop(base, EVLOOP_NONBLOCK);
        CHECK_EQ(handled.closed, 0);
        for (int ms = 0; ms < 6000 && !handled.closed; ms += 20) {
            usleep(20000);
            event_base_loop(base, EVLOOP_NONBLOCK);
        }
        CHECK_EQ(handled.closed, 1);
        idle_seconds = 60;
        tear_down();
    }
}

static void test_ping_flood(void) {
    set_up();
    for (int i = 0; i < 50; i++) nghttp2_submit_ping(client.session, 0, NULL);
    exchange();
    CHECK_EQ(client.pongs, 50); /* a lively client is answered */
    CHECK_EQ(client.goaways, 0);
    for (int i = 0; i < 200; i++) nghttp2_submit_ping(client.session, 0, NULL);
    exchange();
    CHECK_EQ(client.goaways, 1);
    CHECK_EQ(client.goaway_error, NGHTTP2_ENHANCE_YOUR_CALM);
    CU_ASSERT(client.gone);
    tear_down();
}

static void test_not_http2(void) {
    set_up();
    const char text[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    char in[4096];
    CU_ASSERT(write(client.fd, text, sizeof text - 1) > 0);
    for (int i = 0; i < 10; i++) event_base_loop(base, EVLOOP_NONBLOCK);
    ssize_t n;
    do n = read(client.fd, in, sizeof in);
    while (n > 0);
    CHECK_EQ(n, 0); /* closed */
    tear_down();
}

const struct suite_case suite_cases[] = {
    {"one message, in frames of any size", test_echo},
    {"half, two, no, compressed and too large messages", test_refusals},
    {"what is not gRPC gets an HTTP status", test_http_rules},
    {"reset and half-close end the stream", test_reset_is_closed},
    {"messages, then trailers", test_end_after_messages},
    {"the peer's window is kept, a slow reader is cut off", test_flow_control},
    {"an upload goes on after its refusal", test_upload_after_refusal},
    {"uploads that never end shut nobody out", test_uploads_that_never_end},
    {"a stream's own limit of its message", test_limit_of_a_stream},
    {"drain: two goodbyes, running streams complete", test_drain},
    {"drain: a client that never ends its request", test_drain_unfinished},
    {"drain: a peer that never says a word", test_drain_mute},
    {"drain: a request on its way is served", test_drain_race},
    {"idle connections and requests that do not arrive", test_idle},
    {"streams at once", test_streams},
    {"answers that nobody reads", test_unread},
    {"too many pings", test_ping_flood},
    {"another protocol on the port", test_not_http2},
    {NULL, NULL},
};
