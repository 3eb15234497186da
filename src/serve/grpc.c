/* grpc.c: the gRPC front (grpc.h): finds methods, lets callers in, moves messages, ends calls. */
#include "serve/grpc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/grpc_parts.h"

enum {
    STREAMS_MAX = 1024, /* of one connection */
    IDLE_SECONDS = 60,
    PUBLIC_MESSAGE_BYTES = 4096, /* of methods that need no key */
    UNPACKED_MIN_BYTES = 1 << 20,
    UNPACKED_FACTOR = 4, /* memory of a message against the largest message: ids are 1 byte or 4 */
};

/* ---- memory of unpacked messages ---- */

size_t grpc_memory_max(const struct rpc *r) {
    return UNPACKED_MIN_BYTES + UNPACKED_FACTOR * (size_t)r->site->params->max_body_bytes;
}

void *grpc_unpack(struct rpc *r, const ProtobufCMessageDescriptor *type, arena *memory,
                  const uint8_t *bytes, size_t n) {
    void *message = NULL;
    switch (grpc_parse(type, memory, bytes, n, &message)) {
        case STATUS_OK:
            return message;
        case STATUS_BUSY:
            grpc_end_as(r, REFUSAL_OVERLOADED, fail_text());
            return NULL;
        default:
            grpc_end_as(r, REFUSAL_INVALID, fail_text());
            return NULL;
    }
}

/* ---- sending ---- */

struct packer {
    ProtobufCBuffer base;
    struct json_writer *out;
};

static void append(ProtobufCBuffer *base, size_t n, const uint8_t *bytes) {
    if (n) json_write_bytes(((struct packer *)base)->out, (const char *)bytes, n);
}

void grpc_pack(const void *message, struct json_writer *out) {
    struct packer p = {{append}, out};
    protobuf_c_message_pack_to_buffer(message, &p.base);
}

/* The call hears nothing more; the stream is the caller's to end. */
static void drop_call(struct rpc *r, enum call_gone reason) {
    if (!r->call) return;
    call *c = r->call;
    r->call = NULL;
    call_cancel(c, reason);
}

bool grpc_send_bytes(struct rpc *r, const struct json_writer *bytes) {
    const bool streams = r->call && call_streams(r->call);
    if (bytes->failed) {
        drop_call(r, CALL_DISCONNECTED);
        h2_stream_cut(r->stream, H2_INTERNAL, "the server ran out of memory");
        return false;
    }
    if (streams && service_too_slow(r->site->service, &r->pace, h2_stream_unsent(r->stream))) {
        drop_call(r, CALL_SLOW_READER);
        h2_stream_cut(r->stream, H2_RESOURCE_EXHAUSTED, "events were not read in time");
        return false;
    }
    h2_stream_send(r->stream, bytes->bytes, bytes->n);
    return true;
}

void grpc_reply(struct rpc *r, const void *message) {
    struct json_writer *out = &r->front->scratch;
    json_writer_clear(out);
    grpc_pack(message, out);
    if (grpc_send_bytes(r, out)) grpc_end_ok(r);
}

/* ---- ends ---- */

void grpc_end_ok(struct rpc *r) { h2_stream_end(r->stream, H2_OK, NULL); }

void grpc_end_refused(struct rpc *r, const struct refused *why) {
    const char *code = why->code ? why->code : why->fault.code;
    const bool not_offered = strcmp(code, "unsupported_parameter") == 0;
    h2_stream_end(r->stream, not_offered ? H2_UNIMPLEMENTED : why->grpc_status, why->fault.text);
}

void grpc_end_last(struct rpc *r) {
    const struct refused why = refused_last();
    grpc_end_refused(r, &why);
}

void grpc_end_as(struct rpc *r, enum refusal kind, const char *text) {
    const struct refused why = refused_as(kind, NULL, "%s", text);
    grpc_end_refused(r, &why);
}

void grpc_end_unimplemented(struct rpc *r, const char *text) {
    h2_stream_end(r->stream, H2_UNIMPLEMENTED, text);
}

/* ---- calls ---- */

const struct body_facts *grpc_facts(struct rpc *r) {
    const struct body_facts *facts = service_facts(r->site->service);
    if (!facts) grpc_end_as(r, REFUSAL_LOADING, "the model is loading: try again later");
    return facts;
}

void grpc_call(struct rpc *r, json_t *root, enum call_kind kind, bool fills_context,
               const struct call_front *front) {
    struct refused why;
    const struct call_options options = {.root = root,
                                         .kind = kind,
                                         .request_id = r->request_id,
                                         .trace_id = r->trace_id,
                                         .timeout_seconds = r->timeout_seconds,
                                         .fills_context = fills_context,
                                         .front = front,
                                         .user = r};
    call *c = service_call(r->site->service, &options, &why);
    if (!c) {
        grpc_end_refused(r, &why);
        return;
    }
    r->call = c;
    r->choice_count = call_choice_count(c);
    r->choices = calloc((size_t)r->choice_count, sizeof *r->choices);
    if (!r->choices) {
        drop_call(r, CALL_DISCONNECTED);
        h2_stream_end(r->stream, H2_INTERNAL, "the server ran out of memory");
    }
}

static void on_deadline(evutil_socket_t fd, short what, void *user) {
    struct rpc *r = user;
    (void)fd;
    (void)what;
    grpc_tokens_forget(r);
    grpc_health_forget(r);
    grpc_end_as(r, REFUSAL_TIMEOUT, "the deadline (grpc-timeout) has passed");
}

void grpc_start_deadline(struct rpc *r) {
    const struct timeval wait = service_wait(r->timeout_seconds);
    if (r->timeout_seconds <= 0) return;
    r->deadline = evtimer_new(r->site->base, on_deadline, r);
    if (r->deadline) evtimer_add(r->deadline, &wait); /* else the client keeps it alone */
}

void grpc_call_ended(void *user, call *c, const struct refused *why) {
    struct rpc *r = user;
    (void)c;
    r->call = NULL;
    if (why) {
        grpc_end_refused(r, why);
    } else {
        grpc_end_ok(r);
    }
}

/* ---- streams ---- */

static const struct grpc_method *const tables[] = {grpc_sfumato_methods, grpc_vllm_methods,
                                                   grpc_health_methods};
enum { TABLE_COUNT = sizeof tables / sizeof *tables };

/* *index: its place among all, which is one behind the last when there is no such method. */
static const struct grpc_method *find_method(const char *path, int *index) {
    *index = 0;
    for (int t = 0; t < TABLE_COUNT; t++) {
        for (const struct grpc_method *m = tables[t]; m->path; m++, ++*index) {
            if (path && strcmp(m->path, path) == 0) return m;
        }
    }
    return NULL;
}

const char *grpc_methods(void) {
    static char names[1024];
    if (*names) return names;
    for (int t = 0; t < TABLE_COUNT; t++) {
        for (const struct grpc_method *m = tables[t]; m->path; m++) {
            const size_t at = strlen(names);
            snprintf(names + at, sizeof names - at, "%s|", m->path + 1);
        }
    }
    return strcat(names, "other");
}

static void count(const struct rpc *r) {
    static const int codes[] = {0, 1, 3, 4, 5, 7, 8, 12, 13, 14, 16}; /* of metrics.def */
    enum { CODES = sizeof codes / sizeof *codes };
    const int status = h2_stream_status(r->stream);
    for (int i = 0; i < CODES; i++) {
        if (codes[i] != status) continue;
        metric_add(r->site->metrics, METRIC_grpc_requests, r->method_index * CODES + i, 1);
    }
}

static bool may_enter(struct rpc *r) {
    const struct access *access = r->site->access;
    if (!access_key_ok(access, h2_stream_header(r->stream, H2_AUTHORIZATION))) {
        grpc_end_as(r, REFUSAL_UNAUTHORIZED, "a valid key is needed: authorization: Bearer KEY");
        return false;
    }
    if (!access_needs_key(access) &&
        !access_host_ok(access, h2_stream_header(r->stream, H2_AUTHORITY))) {
        grpc_end_as(r, REFUSAL_FORBIDDEN, "this server answers to loopback names only");
        return false;
    }
    return true;
}

static void on_opened(void *user, h2_stream *s) {
    struct grpc *g = user;
    const char *path = h2_stream_header(s, H2_PATH);
    const char *parent = h2_stream_header(s, H2_TRACEPARENT);
    struct rpc *r = calloc(1, sizeof *r);
    h2_stream_set_user(s, r);
    if (!r) {
        h2_stream_end(s, H2_INTERNAL, "the server ran out of memory");
        return;
    }
    r->front = g;
    r->site = &g->site;
    r->stream = s;
    service_request_id(h2_stream_header(s, H2_REQUEST_ID), r->request_id);
    if (parent) service_trace_id(parent, r->trace_id);
    h2_stream_set_request_id(s, r->request_id);
    r->method = find_method(path, &r->method_index);
    if (r->method && r->method->public) {
        h2_stream_limit_message(s, PUBLIC_MESSAGE_BYTES);
        return;
    }
    if (may_enter(r) && !r->method) {
        grpc_end_unimplemented(r, "this server has no such method (see proto/)");
    }
}

static void on_received(void *user, h2_stream *s, const uint8_t *bytes, size_t n) {
    struct rpc *r = h2_stream_user(s);
    (void)user;
    r->timeout_seconds = h2_stream_timeout(s);
    r->method->received(r, bytes, n);
}

static void on_closed(void *user, h2_stream *s) {
    struct rpc *r = h2_stream_user(s);
    (void)user;
    if (!r) return;
    count(r);
    drop_call(r, CALL_DISCONNECTED);
    grpc_tokens_forget(r);
    grpc_health_forget(r);
    if (r->deadline) event_free(r->deadline);
    for (int i = 0; r->choices && i < r->choice_count; i++) {
        json_writer_fini(&r->choices[i].text);
        json_writer_fini(&r->choices[i].reasoning);
        json_writer_fini(&r->choices[i].records);
        json_writer_fini(&r->choices[i].logprobs);
    }
    free(r->choices);
    free(r);
}

/* ---- the front ---- */

static void on_state(void *user, enum service_state state) {
    (void)state;
    grpc_health_changed(user);
}

static enum status front_open(const struct front_site *site, void **state) {
    const struct params *p = site->params;
    *state = NULL;
    if (!param_given(p, PARAM_grpc_port)) return STATUS_OK;
    struct grpc *g = calloc(1, sizeof *g);
    if (!g) return fail(STATUS_MEMORY, "no memory for the gRPC front");
    g->site = *site;
    enum status status = tls_open(p, "h2", &g->tls);
    const struct h2_options options = {.base = site->base,
                                       .host = p->host,
                                       .port = (int)p->grpc_port,
                                       .tls = g->tls,
                                       .connections_max = (int)p->max_connections,
                                       .streams_max = STREAMS_MAX,
                                       .message_bytes_max = (size_t)p->max_body_bytes,
                                       .idle_seconds = IDLE_SECONDS};
    const struct h2_handler handler = {on_opened, on_received, on_closed};
    if (status == STATUS_OK) status = h2_open(&options, &handler, g, &g->h2);
    if (status != STATUS_OK) {
        tls_close(g->tls);
        free(g);
        return status;
    }
    service_watch(site->service, on_state, g);
    *state = g;
    return STATUS_OK;
}

static int front_port(const void *state) { return h2_port(((const struct grpc *)state)->h2); }
static void front_drain(void *state) { h2_drain(((struct grpc *)state)->h2); }

static bool front_busy(const void *state) { return h2_busy(((const struct grpc *)state)->h2); }

static void front_close(void *state) {
    struct grpc *g = state;
    if (!g) return;
    h2_close(g->h2);
    tls_close(g->tls);
    json_writer_fini(&g->scratch);
    free(g);
}

const struct front grpc_front = {
    .name = "grpc",
    .open = front_open,
    .port = front_port,
    .drain = front_drain,
    .busy = front_busy,
    .close = front_close,
};
