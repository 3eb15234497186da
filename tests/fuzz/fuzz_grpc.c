/* fuzz_grpc.c: what a gRPC client may send, from hostile bytes. The first byte chooses:
 *
 *   0..2  a protobuf of a request type -> grpc_parse -> grpc_tree -> body_parse_tree
 *   3     DATA payloads -> wire_in, in pieces whose sizes the bytes choose
 *   4     a connection -> h2 and a handler that echoes
 *
 * Whatever comes in: no memory error, no leak, limits hold, and a tree is JSON that can be written.
 */
/* layer: serve */
#include <event2/event.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../support/tiny_facts.h"
#include "serve/grpc_parts.h"
#include "sfumato.pb-c.h"
#include "vllm_engine.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MEMORY_MAX = 4 << 20, ITEMS_MAX = 65536, MESSAGE_MAX = 65536, READ_BYTES = 65536 };

static void check(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "fuzz_grpc: %s\n", what);
    abort();
}

static void open_facts(void) {
    char path[4096];
    const char *root = getenv("SFUMATO_SOURCE_DIR");
    snprintf(path, sizeof path, "%s/models/tiny/tokenizer.json", root ? root : ".");
    if (tiny_facts_open(path, PARAMS_SERVE) != STATUS_OK) {
        fprintf(stderr, "fuzz_grpc: %s\n", fail_text());
        exit(1);
    }
}

static void fuzz_message(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t size) {
    arena memory;
    void *message = NULL;
    json_t *tree = NULL;
    arena_init(&memory, MEMORY_MAX);
    if (grpc_parse(type, &memory, data, size, &message) == STATUS_OK &&
        grpc_tree(message, ITEMS_MAX, &tree) == STATUS_OK) {
        char *text = json_dumps(tree, JSON_COMPACT);
        check(text != NULL, "a tree that is no JSON");
        free(text);
        struct body b;
        const enum status status = body_parse_tree(&facts, tree, &b);
        check(status == STATUS_OK || status == STATUS_REQUEST, "a request failed oddly");
        body_fini(&b);
    }
    check(memory.used_bytes <= MEMORY_MAX, "more memory than allowed");
    arena_fini(&memory);
}

static void fuzz_wire(const uint8_t *data, size_t size) {
    struct wire_in in = {0};
    while (size > 1) {
        const size_t room = size - 1, n = data[0] < room ? data[0] : room;
        if (wire_in_push(&in, data + 1, n, MESSAGE_MAX) != WIRE_OK) break;
        check(in.n <= in.capacity && in.capacity <= MESSAGE_MAX,
              "a buffer that is too small or large");
        data += 1 + n;
        size -= 1 + n;
    }
    wire_in_fini(&in);
}

/* ---- a connection ---- */

static int opened;
static void on_opened(void *user, h2_stream *s) {
    (void)user;
    (void)s;
    opened++;
}
static void on_received(void *user, h2_stream *s, const uint8_t *bytes, size_t n) {
    (void)user;
    h2_stream_send(s, bytes, n);
    h2_stream_end(s, H2_OK, "done");
}
static void on_closed(void *user, h2_stream *s) {
    (void)user;
    (void)s;
    opened--;
}

static void fuzz_connection(const uint8_t *data, size_t size) {
    static struct event_base *base;
    static char answer[READ_BYTES];
    int fds[2];
    h2 *server;
    if (!base) base = event_base_new();
    const struct h2_options options = {.base = base,
                                       .host = "127.0.0.1",
                                       .connections_max = 1,
                                       .streams_max = 8,
                                       .message_bytes_max = MESSAGE_MAX,
                                       .idle_seconds = 60};
    const struct h2_handler handler = {on_opened, on_received, on_closed};
    if (h2_open(&options, &handler, NULL, &server) != STATUS_OK) return; /* no port left */
    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "no sockets");
    h2_adopt(server, fds[0]);
    fcntl(fds[1], F_SETFL, O_NONBLOCK);
    while (size > 0) {
        const ssize_t n = send(fds[1], data, size, MSG_NOSIGNAL);
        if (n > 0) {
            data += n;
            size -= (size_t)n;
        }
        event_base_loop(base, EVLOOP_NONBLOCK);
        while (read(fds[1], answer, sizeof answer) > 0) {
        }
        if (n <= 0 && send(fds[1], "", 0, MSG_NOSIGNAL) < 0) break;
    }
    for (int i = 0; i < 4; i++) event_base_loop(base, EVLOOP_NONBLOCK);
    close(fds[1]);
    event_base_loop(base, EVLOOP_NONBLOCK);
    h2_close(server);
    check(opened == 0, "a stream was not closed");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!facts.params) open_facts();
    if (size == 0) return 0;
    const uint8_t what = data[0] % 5;
    data++;
    size--;
    switch (what) {
        case 0:
            fuzz_message(&sfumato__v1__request__descriptor, data, size);
            break;
        case 1:
            fuzz_message(&sfumato__v1__tokenize_request__descriptor, data, size);
            break;
        case 2:
            fuzz_message(&vllm__grpc__engine__generate_request__descriptor, data, size);
            break;
        case 3:
            fuzz_wire(data, size);
            break;
        default:
            fuzz_connection(data, size);
    }
    return 0;
}
