/* reply.c: see reply.h. */
#include "serve/reply.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct reply {
    const struct body_facts *facts;
    const struct body *body;
    int choice;
    stream *stream;
    struct json_writer ids, trace; /* array items, no brackets */
    struct json_writer content_lp, reasoning_lp;
    struct json_writer thinking, answer; /* plain bytes, not JSON */
    struct json_writer held;             /* thinking that waits for its end (stream_reasoning) */
    struct request_usage usage;
    int64_t thinking_steps, soft_steps; /* seen, also where they count for another choice */
    double entropy_sum;                 /* over them */
    enum think_end end;
    enum finish finish;
    bool loop_break;
    int stop_index;  /* of the matched stop string, or -1 */
    bool held_shown; /* the held thinking was made visible */
    bool stopped_by_id;
    uint32_t stop_id;
};

enum status reply_new(const struct body_facts *facts, const struct body *body, int choice,
                      reply **out) {
    const struct stream_options options = {.stops = body->stops,
                                           .stop_count = body->stop_count,
                                           .include_stop = body->include_stop,
                                           .skip_special = body->skip_special,
                                           .raw = !body->separate_reasoning};
    *out = NULL;
    reply *r = calloc(1, sizeof *r);
    if (!r) return fail(STATUS_MEMORY, "no memory for a reply");
    r->facts = facts;
    r->body = body;
    r->choice = choice;
    r->stop_index = -1;
    const enum status status = stream_open(facts->tokenizer, &options, &r->stream);
    if (status != STATUS_OK) {
        free(r);
        return status;
    }
    *out = r;
    return STATUS_OK;
}

void reply_free(reply *r) {
    if (!r) return;
    stream_close(r->stream);
    json_writer_fini(&r->ids);
    json_writer_fini(&r->trace);
    json_writer_fini(&r->content_lp);
    json_writer_fini(&r->reasoning_lp);
    json_writer_fini(&r->thinking);
    json_writer_fini(&r->answer);
    json_writer_fini(&r->held);
    free(r);
}

bool reply_aborted(const reply *r) {
    return r->finish == FINISH_REASON_ABORT || r->finish == FINISH_REASON_ERROR;
}

/* ---- records ---- */

static void write_trace_record(const struct body_facts *facts, const struct engine_event *e,
                               int entries, struct json_writer *w) {
    const struct think_decision *d = e->decision;
    const struct tokenizer_string piece = tokenizer_piece(facts->tokenizer, d->trace_id);
    json_begin(w, '{');
    json_key(w, "step");
    json_write_int(w, e->step);
    json_key(w, "phase");
    json_write_text(w, think_phase_name(d->phase));
    json_key(w, "id");
    json_write_int(w, d->trace_id);
    json_key(w, "text");
    json_write_string(w, piece.bytes, piece.n);
    json_key(w, "entropy");
    json_write_real(w, (double)d->entropy);
    json_key(w, "p");
    json_write_real(w, d->forced ? NAN : (double)d->p);
    if (d->soft) {
        const int count = d->count < entries ? d->count : entries;
        json_key(w, "ids");
        json_begin(w, '[');
        for (int i = 0; i < count; i++) json_write_int(w, d->ids[i]);
        json_end(w, ']');
        json_key(w, "weights");
        json_begin(w, '[');
        for (int i = 0; i < count; i++) json_write_real(w, (double)d->weights[i]);
        json_end(w, ']');
    }
    json_end(w, '}');
}

static void write_logprob_members(const struct body_facts *facts, uint32_t id, float logprob,
                                  struct json_writer *w) {
    const struct tokenizer_string piece = tokenizer_piece(facts->tokenizer, id);
    json_key(w, "token");
    json_write_string(w, piece.bytes, piece.n);
    json_key(w, "logprob");
    json_write_real(w, (double)logprob);
    json_key(w, "bytes");
    json_begin(w, '[');
    for (size_t i = 0; i < piece.n; i++) json_write_int(w, (unsigned char)piece.bytes[i]);
    json_end(w, ']');
}

static void write_logprob_record(const struct body_facts *facts, const struct engine_event *e,
                                 struct json_writer *w) {
    json_begin(w, '{');
    write_logprob_members(facts, e->decision->trace_id, e->logprob, w);
    json_key(w, "top_logprobs");
    json_begin(w, '[');
    for (int i = 0; i < e->top_count; i++) {
        json_begin(w, '{');
        write_logprob_members(facts, e->top[i].id, e->top[i].logprob, w);
        json_end(w, '}');
    }
    json_end(w, ']');
    json_end(w, '}');
}

/* ---- steps ---- */

/* An id that ends the reply is part of its ids, not of its text. */
static bool ends_reply(const reply *r, const struct think_decision *d) {
    const struct request *q = &r->body->request;
    if (d->finish == FINISH_EOS) return true;
    if (d->phase != PHASE_ANSWER || d->forced) return false;
    for (int i = 0; !q->think.ignore_eos && i < q->think.eos_count; i++) {
        if (d->trace_id == (uint32_t)q->think.eos_ids[i]) return true;
    }
    for (int i = 0; i < q->stop_id_count; i++) {
        if (d->trace_id == q->stop_ids[i]) return true;
    }
    return false;
}

/* Hides or holds back thinking as the request wants it, and keeps what is visible. thinking_over:
 * nothing more of it will come. */
static void show_text(reply *r, struct stream_delta *delta, bool thinking_over) {
    if (!r->body->include_reasoning) delta->thinking_n = 0;
    if (!r->body->stream_reasoning) {
        json_write_bytes(&r->held, delta->thinking, delta->thinking_n);
        delta->thinking_n = 0;
        if (thinking_over && !r->held_shown) {
            delta->thinking = r->held.n > 0 ? r->held.bytes : "";
            delta->thinking_n = r->held.n;
            r->held_shown = true;
        }
    }
    json_write_bytes(&r->thinking, delta->thinking, delta->thinking_n);
    json_write_bytes(&r->answer, delta->answer, delta->answer_n);
}

/* A marker's id never shows in either field, also where it switches nothing, as a second </think>. */
static bool is_idle_marker(const reply *r, const struct think_decision *d) {
    const int id = (int)d->trace_id;
    return !d->marker && r->body->separate_reasoning &&
           (id == r->facts->open_id || id == r->facts->close_id);
}

static enum status check_memory(const reply *r) {
    const bool failed = r->ids.failed || r->trace.failed || r->content_lp.failed ||
                        r->reasoning_lp.failed || r->thinking.failed || r->answer.failed ||
                        r->held.failed;
    return failed ? fail(STATUS_MEMORY, "no memory for a reply") : STATUS_OK;
}

enum status reply_step(reply *r, const struct engine_event *e, struct stream_delta *delta) {
    const struct think_decision *d = e->decision;
    const bool thinking = d->phase == PHASE_THINKING;
    *delta = (struct stream_delta){.stop_index = -1};
    if (!e->shared) {
        r->usage.completion_tokens++;
        r->usage.reasoning_tokens += thinking;
        r->usage.soft_steps += d->soft;
    }
    r->thinking_steps += thinking;
    r->soft_steps += d->soft;
    if (thinking) r->entropy_sum += (double)d->entropy;
    if (d->end != END_NONE) r->end = d->end;
    json_write_int(&r->ids, d->trace_id);
    if (r->body->trace_entries > 0) {
        write_trace_record(r->facts, e, r->body->trace_entries, &r->trace);
    }
    if (r->body->request.logprobs) {
        write_logprob_record(r->facts, e, thinking ? &r->reasoning_lp : &r->content_lp);
    }
    if (ends_reply(r, d) || is_idle_marker(r, d)) return check_memory(r);
    TRY(stream_push(r->stream, d->trace_id, thinking, d->marker, delta));
    const bool thought = r->thinking_steps > 0;
    show_text(r, delta, thought && (!thinking || (d->marker && d->end != END_NONE)));
    if (delta->stopped) r->stop_index = delta->stop_index;
    return check_memory(r);
}

enum status reply_finish(reply *r, const struct engine_event *e, struct stream_delta *delta) {
    *delta = (struct stream_delta){.stop_index = -1};
    r->usage.prompt_tokens = r->body->prompts[r->choice / r->body->request.choices].count;
    if (e) r->usage.cached_tokens = e->usage.cached_tokens;
    if (!e || r->stop_index >= 0) { /* a stop string: what the stream holds back lies behind it */
        r->finish = FINISH_REASON_STOP;
        return STATUS_OK;
    }
    r->usage = e->usage; /* the same counts, and exact about what was shared */
    r->finish = e->finish;
    r->end = e->thinking_end;
    r->loop_break = e->loop_break;
    r->stopped_by_id = e->stopped_by_id;
    r->stop_id = e->stop_id;
    TRY(stream_finish(r->stream, delta));
    show_text(r, delta, true);
    if (delta->stopped) { /* by the U+FFFD of a character that never ended */
        r->stop_index = delta->stop_index;
        r->finish = FINISH_REASON_STOP;
        r->stopped_by_id = false;
    }
    return check_memory(r);
}

void reply_summarise(const reply *r, struct reply_summary *out) {
    const double n = (double)r->thinking_steps;
    *out = (struct reply_summary){
        .usage = r->usage,
        .finish = r->finish,
        .end = r->end,
        .mean_entropy = n > 0 ? r->entropy_sum / n : NAN,
        .soft_steps = r->soft_steps,
        .seed = r->body->request.think.seed,
        .loop_break = r->loop_break,
        .stop_text = r->stop_index >= 0 ? r->body->stops[r->stop_index] : NULL,
        .stopped_by_id = r->stopped_by_id,
        .stop_id = r->stop_id};
}

/* ---- the service's forms ---- */

void reply_get_parts(const reply *r, struct reply_parts *out) {
    *out =
        (struct reply_parts){&r->thinking, &r->answer, &r->trace, &r->content_lp, &r->reasoning_lp};
}

void reply_forget(reply *r) {
    json_writer_clear(&r->ids);
    json_writer_clear(&r->trace);
    json_writer_clear(&r->content_lp);
    json_writer_clear(&r->reasoning_lp);
    json_writer_clear(&r->thinking);
    json_writer_clear(&r->answer);
}

void reply_write_info(const reply *r, bool with_trace, struct json_writer *w) {
    struct reply_summary s;
    reply_summarise(r, &s);
    json_key(w, "sfumato");
    json_begin(w, '{');
    json_key(w, "mode");
    json_write_text(w, think_mode_name(r->body->request.think.mode));
    json_key(w, "soft_steps");
    json_write_int(w, s.soft_steps);
    json_key(w, "thinking_end");
    json_write_text(w, think_end_name(s.end));
    json_key(w, "mean_entropy");
    json_write_real(w, s.mean_entropy);
    json_key(w, "seed");
    json_write_int(w, (int64_t)s.seed);
    if (r->loop_break) {
        json_key(w, "loop_break");
        json_write_bool(w, true);
    }
    if (with_trace && r->body->trace_entries > 0) reply_write_items(w, "trace", &r->trace);
    json_end(w, '}');
}

/* ---- lines ---- */

void reply_write_custom_id(const json_t *custom_id, struct json_writer *w) {
    json_key(w, "custom_id");
    char *text = custom_id ? json_dumps(custom_id, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    if (text) {
        json_write_raw(w, text, strlen(text));
        free(text);
    } else {
        json_write_null(w);
    }
}

void reply_write_items(struct json_writer *w, const char *key, const struct json_writer *items) {
    json_key(w, key);
    json_begin(w, '[');
    if (items->n) json_write_raw(w, items->bytes, items->n);
    json_end(w, ']');
    w->failed |= items->failed;
}

static void write_usage(const struct request_usage *u, struct json_writer *w) {
    json_key(w, "usage");
    json_begin(w, '{');
    json_key(w, "prompt_tokens");
    json_write_int(w, u->prompt_tokens);
    json_key(w, "completion_tokens");
    json_write_int(w, u->completion_tokens);
    json_key(w, "reasoning_tokens");
    json_write_int(w, u->reasoning_tokens);
    json_key(w, "soft_steps");
    json_write_int(w, u->soft_steps);
    json_end(w, '}');
}

void reply_write_stop_reason(const reply *r, struct json_writer *w) {
    json_key(w, "stop_reason");
    if (r->stop_index >= 0) {
        json_write_text(w, r->body->stops[r->stop_index]);
    } else if (r->stopped_by_id) {
        json_write_int(w, r->stop_id);
    } else {
        json_write_null(w);
    }
}

void reply_write_line(const reply *r, struct json_writer *w) {
    struct reply_summary s;
    reply_summarise(r, &s);
    json_begin(w, '{');
    reply_write_custom_id(r->body->custom_id, w);
    if (r->body->request.choices * r->body->prompt_count > 1) {
        json_key(w, "index");
        json_write_int(w, r->choice);
    }
    json_key(w, "prompt_tokens");
    json_write_int(w, r->usage.prompt_tokens);
    reply_write_items(w, "ids", &r->ids);
    json_key(w, "thinking");
    json_write_string(w, r->thinking.bytes, r->thinking.n);
    json_key(w, "answer");
    json_write_string(w, r->answer.bytes, r->answer.n);
    json_key(w, "finish_reason");
    json_write_text(w, finish_name(r->finish));
    reply_write_stop_reason(r, w);
    json_key(w, "thinking_end");
    json_write_text(w, think_end_name(r->end));
    if (r->loop_break) {
        json_key(w, "loop_break");
        json_write_bool(w, true);
    }
    write_usage(&r->usage, w);
    json_key(w, "mean_entropy");
    json_write_real(w, s.mean_entropy);
    json_key(w, "seed");
    json_write_int(w, (int64_t)s.seed);
    if (r->body->request.logprobs) {
        json_key(w, "logprobs");
        json_begin(w, '{');
        reply_write_items(w, "content", &r->content_lp);
        reply_write_items(w, "reasoning", &r->reasoning_lp);
        json_end(w, '}');
    }
    if (r->body->trace_entries > 0) reply_write_items(w, "trace", &r->trace);
    json_end(w, '}');
}

static void write_error_members(const struct fault *fault, struct json_writer *w) {
    const bool caller = fault->status == STATUS_REQUEST;
    json_key(w, "message");
    json_write_text(w, fault->text);
    json_key(w, "type");
    json_write_text(w, caller                         ? "invalid_request_error"
                       : fault->status == STATUS_BUSY ? "overloaded_error"
                                                      : "server_error");
    json_key(w, "param");
    json_write_text(w, fault->param[0] ? fault->param : NULL);
    json_key(w, "code");
    json_write_text(w, fault->code[0] ? fault->code : NULL);
}

void reply_write_error(const struct fault *fault, struct json_writer *w) {
    json_begin(w, '{');
    write_error_members(fault, w);
    json_end(w, '}');
}

void reply_write_error_line(const struct body_facts *facts, const struct body *body,
                            struct json_writer *w) {
    const struct fault fault = *fail_last();
    json_begin(w, '{');
    reply_write_custom_id(body->custom_id, w);
    json_key(w, "error");
    json_begin(w, '{');
    write_error_members(&fault, w);
    if (body->too_long > 0) {
        json_key(w, "n_prompt_tokens");
        json_write_int(w, body->too_long);
        json_key(w, "n_ctx");
        json_write_int(w, facts->max_model_len);
    }
    json_end(w, '}');
    json_end(w, '}');
}
