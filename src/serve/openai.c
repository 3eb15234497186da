/* openai.c: see openai.h. The life of a generation over HTTP. */
#include "serve/openai.h"

#include <stdlib.h>
#include <string.h>

/* ---- pieces of JSON ---- */

void openai_write_usage(const struct request_usage *u, struct json_writer *w) {
    json_key(w, "usage");
    json_begin(w, '{');
    json_key(w, "prompt_tokens");
    json_write_int(w, u->prompt_tokens);
    json_key(w, "completion_tokens");
    json_write_int(w, u->completion_tokens);
    json_key(w, "total_tokens");
    json_write_int(w, u->prompt_tokens + u->completion_tokens);
    json_key(w, "prompt_tokens_details");
    json_begin(w, '{');
    json_key(w, "cached_tokens");
    json_write_int(w, u->cached_tokens);
    json_end(w, '}');
    json_key(w, "completion_tokens_details");
    json_begin(w, '{');
    json_key(w, "reasoning_tokens");
    json_write_int(w, u->reasoning_tokens);
    json_end(w, '}');
    json_end(w, '}');
}

void openai_end_delta(const struct reply_parts *parts, struct json_writer *w) {
    json_key(w, "finish_reason");
    json_write_null(w);
    if (parts->trace->n > 0) {
        json_key(w, "sfumato");
        json_begin(w, '{');
        reply_write_items(w, "trace", parts->trace);
        json_end(w, '}');
    }
    json_end(w, '}');
}

void openai_end_choice(const reply *r, bool with_trace, struct json_writer *w) {
    struct reply_summary s;
    reply_summarise(r, &s);
    json_key(w, "finish_reason");
    json_write_text(w, s.finish == FINISH_REASON_LENGTH ? "length" : "stop");
    reply_write_stop_reason(r, w);
    reply_write_info(r, with_trace, w);
    json_end(w, '}');
}

static void write_head(const struct generation *g, const char *object, struct json_writer *w) {
    char id[64];
    snprintf(id, sizeof id, "%s-%s", g->shape->id_prefix, call_id(g->call));
    json_begin(w, '{');
    json_key(w, "id");
    json_write_text(w, id);
    json_key(w, "object");
    json_write_text(w, object);
    json_key(w, "created");
    json_write_int(w, call_created(g->call));
    json_key(w, "model");
    json_write_text(w, service_model_name(g->x->site->service));
    json_key(w, "system_fingerprint");
    json_write_text(w, service_fingerprint(g->x->site->service));
    json_key(w, "choices");
    json_begin(w, '[');
}

/* ---- life ---- */

static void generation_free(struct generation *g) {
    if (g->shape->close) g->shape->close(g);
    if (g->ping) event_free(g->ping);
    json_writer_fini(&g->w);
    free(g->head);
    free(g);
}

static void on_gone(struct exchange *x) {
    struct generation *g = x->user;
    call_cancel(g->call, CALL_DISCONNECTED);
    generation_free(g);
}

/* The client does not read: nothing more is written for it. */
static void cut(struct generation *g) {
    call_cancel(g->call, CALL_SLOW_READER);
    http_cut(g->x);
    generation_free(g);
}

/* ---- streams ---- */

static void chunk_begin(struct generation *g) {
    json_writer_clear(&g->w);
    json_write_bytes(&g->w, g->head, g->head_n);
}

/* Closes the choices, adds usage where it belongs, sends. False: the generation is gone. */
static bool chunk_send(struct generation *g, bool with_usage) {
    struct json_writer *w = &g->w;
    json_end(w, ']');
    if (with_usage || g->body->continuous_usage) {
        const struct request_usage usage = call_usage(g->call);
        openai_write_usage(&usage, w);
    } else if (g->body->include_usage) {
        json_key(w, "usage");
        json_write_null(w);
    }
    json_end(w, '}');
    g->last_sent = service_clock();
    if (!w->failed && http_stream_data(g->x, w->bytes, w->n)) return true;
    cut(g);
    return false;
}

static bool start_stream(struct generation *g) {
    if (g->started) return true;
    g->started = true;
    if (!g->x->streaming) http_stream_begin(g->x);
    for (int i = 0; g->shape->begin && i < call_choice_count(g->call); i++) {
        chunk_begin(g);
        g->shape->begin(g, i, &g->w);
        if (!chunk_send(g, false)) return false;
    }
    return true;
}

static void on_ping(evutil_socket_t fd, short what, void *user) {
    struct generation *g = user;
    const double interval = g->x->site->params->sse_ping_interval;
    const double now = service_clock(), left = g->last_sent + interval - now;
    (void)fd;
    (void)what;
    if (left <= 0.001) {
        if (!g->x->streaming) http_stream_begin(g->x);
        http_stream_comment(g->x, "ping");
        g->last_sent = now;
    }
    const struct timeval again = service_wait(left <= 0.001 ? interval : left);
    evtimer_add(g->ping, &again);
}

/* True: something was sent and the generation is still there, or there was nothing to send. */
static bool send_delta(struct generation *g, int choice, const struct stream_delta *delta) {
    chunk_begin(g);
    if (!g->shape->delta(g, choice, delta, &g->w)) return true;
    return chunk_send(g, false);
}

/* ---- the front ---- */

static void on_step(void *user, call *c, int choice, const struct engine_event *event,
                    const struct stream_delta *delta) {
    struct generation *g = user;
    if (g->shape->note) g->shape->note(g, choice, event);
    if (!g->stream) return;
    if (!start_stream(g) || !send_delta(g, choice, delta)) return;
    reply_forget(call_reply(c, choice));
}

static void on_finish(void *user, call *c, int choice, const struct stream_delta *last) {
    struct generation *g = user;
    (void)c;
    if (!g->stream) return;
    if (!start_stream(g) || !send_delta(g, choice, last)) return;
    chunk_begin(g);
    g->shape->last(g, choice, &g->w);
    chunk_send(g, false);
}

static void on_scored(void *user, call *c, int prompt, const struct engine_event *event) {
    struct generation *g = user;
    (void)c;
    if (g->shape->note_prompt) g->shape->note_prompt(g, prompt, event);
}

static void end_stream(struct generation *g, const struct refused *why) {
    if (why) {
        json_writer_clear(&g->w);
        refused_write(why, &g->w);
        http_stream_data(g->x, g->w.bytes, g->w.n);
    } else {
        if (g->body->include_usage) {
            /* The call is over: a reader too slow for the last chunks just loses its connection. */
            chunk_begin(g);
            json_end(&g->w, ']');
            const struct request_usage usage = call_usage(g->call);
            openai_write_usage(&usage, &g->w);
            json_end(&g->w, '}');
            http_stream_data(g->x, g->w.bytes, g->w.n);
        }
        http_stream_data(g->x, "[DONE]", 6);
    }
    http_stream_end(g->x, why != NULL);
}

static void on_end(void *user, call *c, const struct refused *why) {
    struct generation *g = user;
    if (g->stream && (g->x->streaming || !why)) {
        if (!g->x->streaming) http_stream_begin(g->x);
        end_stream(g, why);
    } else if (why) {
        http_reply_error(g->x, why);
    } else {
        struct json_writer *w = &g->w;
        json_writer_clear(w);
        write_head(g, g->shape->object, w);
        for (int i = 0; i < call_choice_count(c); i++) g->shape->whole(g, i, w);
        json_end(w, ']');
        const struct request_usage usage = call_usage(c);
        openai_write_usage(&usage, w);
        json_end(w, '}');
        http_reply_json(g->x, 200, w);
    }
    generation_free(g);
}

static const struct call_front front = {on_step, on_finish, on_scored, on_end};

/* ---- start ---- */

static enum status prepare(struct generation *g) {
    g->body = call_body(g->call);
    g->stream = call_streams(g->call);
    g->last_sent = service_clock();
    if (g->shape->open) TRY(g->shape->open(g));
    if (!g->stream) return STATUS_OK;
    write_head(g, g->shape->chunk_object, &g->w);
    g->head_n = g->w.n;
    g->head = malloc(g->head_n + 1);
    g->ping = evtimer_new(g->x->site->base, on_ping, g);
    if (!g->head || !g->ping || g->w.failed) return fail(STATUS_MEMORY, "no memory for a stream");
    memcpy(g->head, g->w.bytes, g->head_n);
    const struct timeval wait = service_wait(g->x->site->params->sse_ping_interval);
    evtimer_add(g->ping, &wait);
    return STATUS_OK;
}

void generation_start(struct exchange *x, const struct shape *shape) {
    struct refused why;
    struct generation *g = calloc(1, sizeof *g);
    if (!g) {
        fail(STATUS_MEMORY, "no memory for a request");
        why = refused_last();
        http_reply_error(x, &why);
        return;
    }
    g->x = x;
    g->shape = shape;
    struct call_options options = {.kind = shape->kind,
                                   .request_id = x->request_id,
                                   .trace_id = x->trace_id,
                                   .front = &front,
                                   .user = g};
    options.text = http_body(x, &options.n);
    g->call = service_call(x->site->service, &options, &why);
    if (!g->call) {
        http_reply_error(x, &why);
        free(g);
        return;
    }
    if (prepare(g) != STATUS_OK) {
        why = refused_last();
        call_cancel(g->call, CALL_DISCONNECTED);
        http_reply_error(x, &why);
        generation_free(g);
        return;
    }
    x->user = g;
    x->on_gone = on_gone;
    http_hold(x);
}
