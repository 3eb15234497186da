/* grpc_parts.h: what the files of the gRPC front know of one another.
 *
 *   grpc.c          listener, method table, access, sending, errors
 *   grpc_tree.c     bytes ─► protobuf message ─► JSON tree of the same names
 *   grpc_sfumato.c  sfumato.v1.Inference
 *   grpc_vllm.c     vllm.grpc.engine.VllmEngine, the part of proto/vllm_engine.proto
 *   grpc_health.c   grpc.health.v1.Health
 *
 * A generation request becomes the JSON tree the HTTP API would have parsed, and goes through
 * service_call like any other: one validation, and equal results by construction.
 *
 * An rpc lives from opened to closed of its stream. While it has a call the service may report to
 * it; when the stream closes first, the call is cancelled. Thread: net.
 */
#ifndef SFUMATO_SERVE_GRPC_PARTS_H
#define SFUMATO_SERVE_GRPC_PARTS_H

#include <protobuf-c/protobuf-c.h>

#include "base/arena.h"
#include "serve/grpc_wire.h"
#include "serve/h2.h"
#include "serve/net.h"
#include "serve/prompts.h"

struct grpc;
struct rpc;

struct grpc_method {
    const char *path; /* "/package.Service/Method"; NULL ends a table */
    bool public;      /* no key, no Host rule */
    void (*received)(struct rpc *r, const uint8_t *bytes, size_t n);
};
extern const struct grpc_method grpc_sfumato_methods[], grpc_vllm_methods[], grpc_health_methods[];

/* What a choice has said so far, as far as it must be said again at its end. */
struct grpc_choice {
    struct json_writer text, reasoning; /* plain bytes */
    /* serialised messages of repeated fields: joined they are one message */
    struct json_writer records, logprobs;
};

struct rpc {
    struct grpc *front;
    struct front_site *site;
    h2_stream *stream;
    const struct grpc_method *method; /* NULL: there is no such */
    int method_index;                 /* of metrics */
    char request_id[SERVICE_ID_BYTES], trace_id[33];
    double timeout_seconds;   /* 0: none */
    call *call;               /* NULL: none, or over */
    struct service_pace pace; /* of who reads its events */
    prompt_job *making;       /* of Tokenize; NULL: none */
    bool with_pieces;         /* its field */
    struct event *deadline;   /* of Tokenize and Watch: calls have their own; NULL: none */
    struct grpc_choice *choices;
    int choice_count;
    /* health Watch */
    struct rpc *next_watch;
    bool watches, watch_unknown;
    int watch_said; /* status sent last; 0 (UNKNOWN): none */
};

struct grpc {
    struct front_site site;
    struct tls *tls;
    h2 *h2;
    struct rpc *watches;
    struct json_writer scratch; /* one message being packed */
};

/* ---- grpc.c ---- */

/* Unpacks into `memory` (capped). NULL: the rpc has been ended with the right status. */
void *grpc_unpack(struct rpc *r, const ProtobufCMessageDescriptor *type, arena *memory,
                  const uint8_t *bytes, size_t n);
/* Largest memory of an unpacked message. */
size_t grpc_memory_max(const struct rpc *r);
void grpc_pack(const void *message, struct json_writer *out); /* appends */
/* False: the client does not read; the rpc has been ended and its call cancelled. */
bool grpc_send_bytes(struct rpc *r, const struct json_writer *bytes);
/* The one answer of a unary method, and its end. */
void grpc_reply(struct rpc *r, const void *message);
void grpc_end_ok(struct rpc *r);
void grpc_end_refused(struct rpc *r, const struct refused *why);
void grpc_end_last(struct rpc *r); /* from this thread's last failure */
void grpc_end_as(struct rpc *r, enum refusal kind, const char *text);
void grpc_end_unimplemented(struct rpc *r, const char *text);
/* The facts, or NULL and the rpc has been ended with UNAVAILABLE. */
const struct body_facts *grpc_facts(struct rpc *r);
/* Admits a call; `root` is taken over. fills_context: as in call_options. On a refusal the rpc has been
 * ended. */
void grpc_call(struct rpc *r, json_t *root, enum call_kind kind, bool fills_context,
               const struct call_front *front);
/* Ends the rpc with DEADLINE_EXCEEDED when its grpc-timeout has passed. Once an rpc. */
void grpc_start_deadline(struct rpc *r);
/* The end function of call fronts. */
void grpc_call_ended(void *user, call *c, const struct refused *why);

/* ---- grpc_tree.c ---- */

/* Unpacks into `memory` and never past its limit. STATUS_BUSY: it unfolds to more than that;
 * STATUS_REQUEST: no protobuf of this type. */
enum status grpc_parse(const ProtobufCMessageDescriptor *type, arena *memory, const uint8_t *bytes,
                       size_t n, void **out);

/* A JSON object with the message's set fields. Text must be UTF-8 without NUL, numbers finite; at
 * most item_max array elements in all (a JSON body could not hold more either). STATUS_REQUEST,
 * STATUS_MEMORY. */
enum status grpc_tree(const ProtobufCMessage *message, int64_t item_max, json_t **out);

/* ---- grpc_sfumato.c ---- */

/* Nobody waits any more for the tokens that are being made. */
void grpc_tokens_forget(struct rpc *r);

/* ---- grpc_health.c ---- */

void grpc_health_changed(struct grpc *g);
void grpc_health_forget(struct rpc *r);

#endif
