/* grpc_wire.h: the pure parts of gRPC over HTTP/2 (serving.md §10 "Wire").
 *
 *   DATA frames:  | flag | length (4, big-endian) | message ... | flag | length | ...
 *                   ^ cut anywhere by the peer, put together here, with a cap
 *
 * Owns: the reassembly of the one message of a request, percent-encoding of grpc-message,
 * grpc-timeout, and single protobuf fields written by hand (text may hold NUL, which protobuf-c's
 * strings cannot). Refuses to know: HTTP/2, protobuf schemas,
 * sockets. Pure; one owner at a time. Memory: wire_in grows with the bytes that really came, not
 * with the length a peer claims.
 */
#ifndef SFUMATO_SERVE_GRPC_WIRE_H
#define SFUMATO_SERVE_GRPC_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"

enum { WIRE_PREFIX_BYTES = 5 };

enum wire_fault {
    WIRE_OK,
    WIRE_COMPRESSED, /* flag 1: only identity is spoken here */
    WIRE_BAD_FLAG,
    WIRE_TOO_LARGE,
    WIRE_SECOND_MESSAGE, /* every method here takes one */
    WIRE_NO_MEMORY,
};

/* A request's message, growing. Zeroed = nothing came yet. */
struct wire_in {
    uint8_t prefix[WIRE_PREFIX_BYTES];
    int prefix_n;
    size_t length; /* of the message, once the prefix is there */
    uint8_t *bytes;
    size_t n, capacity;
};
enum wire_fault wire_in_push(struct wire_in *in, const uint8_t *bytes, size_t n, size_t length_max);
bool wire_in_complete(const struct wire_in *in);
void wire_in_fini(struct wire_in *in);

void wire_prefix(uint8_t out[WIRE_PREFIX_BYTES], size_t length);

/* UTF-8 text as grpc-message has it; cut to fit, never inside an escape. */
void wire_percent_encode(const char *text, char *out, size_t out_bytes);
/* 1..8 digits and H M S m u n. False: malformed. A timeout of 0 gives the smallest one. */
bool wire_timeout_parse(const char *value, double *seconds);

/* Appends protobuf field `number` of wire type 2 (string, bytes, message). */
void wire_write_field(struct json_writer *w, uint32_t number, const void *bytes, size_t n);

#endif
