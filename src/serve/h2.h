/* h2.h: gRPC calls over HTTP/2, also over TLS: listener, connections, streams (serving.md §10 "Wire").
 *
 *   socket ─ bufferevent ─ nghttp2 ─► headers ─► opened
 *                                 └─► DATA ─ wire_in ─► received (one whole message)
 *   h2_stream_send ─► queue ─ data provider ─► DATA …, h2_stream_end ─► trailers ─► closed
 *
 * Every method served here takes exactly one message and answers with any number; so a stream is
 * opened (headers fine, nothing read), received (its message, once), closed (gone for any reason,
 * always exactly once). A queue of unsent messages per stream takes what the peer's flow control
 * does not let through; who fills it watches h2_stream_unsent.
 *
 * Owns: framing, HTTP checks, trailers, flow control, limits on connections, streams, headers,
 * message and upload memory, resets and pings, idle connections, GOAWAY. Refuses to know: methods,
 * protobuf, the service. Thread: net. Memory: malloc, bounded by the limits. Handler functions run
 * inside the loop; they may send and end, and never see a stream again after closed.
 */
#ifndef SFUMATO_SERVE_H2_H
#define SFUMATO_SERVE_H2_H

#include <event2/event.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/check.h"
#include "serve/tls.h"

typedef struct h2 h2;
typedef struct h2_stream h2_stream;

enum { /* those of grpc-status that this layer says itself */
       H2_OK = 0,
       H2_CANCELLED = 1,
       H2_INVALID_ARGUMENT = 3,
       H2_DEADLINE_EXCEEDED = 4,
       H2_RESOURCE_EXHAUSTED = 8,
       H2_UNIMPLEMENTED = 12,
       H2_INTERNAL = 13,
};

/* Request headers that are kept. */
enum h2_header {
    H2_METHOD,
    H2_PATH,
    H2_AUTHORITY,
    H2_CONTENT_TYPE,
    H2_ENCODING,
    H2_TIMEOUT,
    H2_AUTHORIZATION,
    H2_REQUEST_ID,
    H2_TRACEPARENT,
    H2_HEADER_COUNT
};

struct h2_options {
    struct event_base *base;
    const char *host;
    int port;        /* 0: any */
    struct tls *tls; /* borrowed; NULL: plain */
    int connections_max, streams_max;
    size_t message_bytes_max;
    double idle_seconds; /* a connection without streams, a request that does not arrive */
};

struct h2_handler {
    void (*opened)(void *user, h2_stream *s);
    void (*received)(void *user, h2_stream *s, const uint8_t *bytes, size_t n);
    void (*closed)(void *user, h2_stream *s);
};

/* STATUS_USAGE: the address cannot be had. */
enum status h2_open(const struct h2_options *options, const struct h2_handler *handler, void *user,
                    h2 **out);
int h2_port(const h2 *h);
/* GOAWAY now, and again with the last stream once the peer has seen it; streams go on. */
void h2_drain(h2 *h);
/* Answers that are not written yet. Streams without an end are not waited for, nor is a peer that
 * never said a word. */
bool h2_busy(const h2 *h);
void h2_close(h2 *h);

/* NULL: not sent. */
const char *h2_stream_header(const h2_stream *s, enum h2_header which);
/* Of grpc-timeout; 0: none. */
double h2_stream_timeout(const h2_stream *s);
/* Its message may have n bytes at most, where that is less than message_bytes_max. In opened. */
void h2_stream_limit_message(h2_stream *s, size_t n);
void h2_stream_set_user(h2_stream *s, void *user);
void *h2_stream_user(const h2_stream *s);
/* Comes back as x-request-id; copied. Before the first send or end. */
void h2_stream_set_request_id(h2_stream *s, const char *id);

/* Queues one message. Nothing happens once the stream has been ended. */
void h2_stream_send(h2_stream *s, const void *bytes, size_t n);
size_t h2_stream_unsent(const h2_stream *s);
/* The grpc-status that was said, or, when the peer left before, that of CANCELLED. */
int h2_stream_status(const h2_stream *s);
/* Trailers after what is queued. message: UTF-8, may be NULL. */
void h2_stream_end(h2_stream *s, int grpc_status, const char *message);
/* For a peer that does not read: what is queued is dropped, and where messages went out before, the
 * stream is reset with ENHANCE_YOUR_CALM, which clients read as RESOURCE_EXHAUSTED. */
void h2_stream_cut(h2_stream *s, int grpc_status, const char *message);

/* One connection on an open socket, as accepted ones are. For tests. */
void h2_adopt(h2 *h, evutil_socket_t fd);

#endif
