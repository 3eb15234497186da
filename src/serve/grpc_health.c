/* grpc_health.c: grpc.health.v1.Health: Check, and Watch with a message at every change of state. */
#include <stdlib.h>
#include <string.h>

#include "health.pb-c.h"
#include "serve/grpc_parts.h"

typedef Grpc__Health__V1__HealthCheckResponse response;

static const char *const names[] = {"", "sfumato.v1.Inference", "vllm.grpc.engine.VllmEngine",
                                    "grpc.health.v1.Health"};

static bool is_known(const char *name) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], name) == 0) return true;
    }
    return false;
}

static response response_now(const struct rpc *r, bool known) {
    response m = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    if (!known) {
        m.status = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    } else if (service_get_state(r->site->service) == SERVICE_READY) {
        m.status = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    } else {
        m.status = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    }
    return m;
}

/* False: the rpc has been ended. */
static bool read_name(struct rpc *r, const uint8_t *bytes, size_t n, bool *known) {
    arena memory;
    arena_init(&memory, grpc_memory_max(r));
    const Grpc__Health__V1__HealthCheckRequest *m =
        grpc_unpack(r, &grpc__health__v1__health_check_request__descriptor, &memory, bytes, n);
    if (m) *known = is_known(m->service);
    arena_fini(&memory);
    return m != NULL;
}

static void check(struct rpc *r, const uint8_t *bytes, size_t n) {
    bool known;
    if (!read_name(r, bytes, n, &known)) return;
    if (known) {
        const response m = response_now(r, true);
        grpc_reply(r, &m);
    } else {
        grpc_end_as(r, REFUSAL_NO_MODEL, "this server has no such service");
    }
}

/* ---- Watch ---- */

static void send_now(struct rpc *r) {
    const response m = response_now(r, !r->watch_unknown);
    if (r->watch_said == (int)m.status) return; /* draining, then dead: nothing new */
    r->watch_said = (int)m.status;
    struct json_writer *out = &r->front->scratch;
    json_writer_clear(out);
    grpc_pack(&m, out);
    grpc_send_bytes(r, out);
}

static void watch(struct rpc *r, const uint8_t *bytes, size_t n) {
    bool known;
    if (!read_name(r, bytes, n, &known)) return;
    r->watches = true;
    r->watch_unknown = !known;
    r->next_watch = r->front->watches;
    r->front->watches = r;
    grpc_start_deadline(r);
    send_now(r);
}

void grpc_health_forget(struct rpc *r) {
    if (!r->watches) return;
    struct rpc **at = &r->front->watches;
    while (*at != r) at = &(*at)->next_watch;
    *at = r->next_watch;
    r->watches = false;
}

void grpc_health_changed(struct grpc *g) {
    for (struct rpc *r = g->watches; r; r = r->next_watch) {
        if (!r->watch_unknown) send_now(r);
    }
}

const struct grpc_method grpc_health_methods[] = {
    {"/grpc.health.v1.Health/Check", true, check},
    {"/grpc.health.v1.Health/Watch", true, watch},
    {NULL, false, NULL},
};
