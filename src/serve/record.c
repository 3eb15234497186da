/* record.c: one log line and the metrics of a request that has ended (serving.md §6, §9). */
#include <math.h>
#include <stdio.h>

#include "base/log.h"
#include "serve/service_parts.h"

/* A sequence ended by itself or by its stop string. */
void record_choice(call *c, struct choice *choice) {
    enum { STOP, LENGTH };
    struct metrics *m = c->service->metrics;
    struct reply_summary s;
    reply_summarise(choice->reply, &s);
    metric_add(m, METRIC_success, s.finish == FINISH_REASON_LENGTH ? LENGTH : STOP, 1);
    metric_observe(m, METRIC_generation_tokens_request, 0, (double)s.usage.completion_tokens);
    if (s.end != END_NONE) metric_add(m, METRIC_thinking_end, (int)s.end - END_MODEL, 1);
    if (choice->first > 0) metric_observe(m, METRIC_decode_time, 0, choice->last - choice->first);
    if (choice->thinking_first > 0) {
        metric_observe(m, METRIC_thinking_time, 0, choice->thinking_last - choice->thinking_first);
    }
    choice_enter(c, choice, CHOICE_DONE);
}

struct line {
    const char *request_id, *trace_id, *status, *finish, *thinking_end, *mode; /* NULL: null */
    struct request_usage usage;
    double queue_ms, ttft_ms, itl_ms, e2e_ms; /* NAN: null */
};

static void write_line(const struct line *l) {
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "request_id");
    json_write_text(&w, l->request_id);
    json_key(&w, "trace_id");
    json_write_text(&w, l->trace_id[0] ? l->trace_id : NULL);
    json_key(&w, "status");
    json_write_text(&w, l->status);
    json_key(&w, "prompt_tokens");
    json_write_int(&w, l->usage.prompt_tokens);
    json_key(&w, "thinking_tokens");
    json_write_int(&w, l->usage.reasoning_tokens);
    json_key(&w, "answer_tokens");
    json_write_int(&w, l->usage.completion_tokens - l->usage.reasoning_tokens);
    json_key(&w, "cached_tokens");
    json_write_int(&w, l->usage.cached_tokens);
    json_key(&w, "queue_ms");
    json_write_real(&w, round(10 * l->queue_ms) / 10);
    json_key(&w, "ttft_ms");
    json_write_real(&w, round(10 * l->ttft_ms) / 10);
    json_key(&w, "itl_ms");
    json_write_real(&w, round(1000 * l->itl_ms) / 1000);
    json_key(&w, "e2e_ms");
    json_write_real(&w, round(10 * l->e2e_ms) / 10);
    json_key(&w, "finish");
    json_write_text(&w, l->finish);
    json_key(&w, "thinking_end");
    json_write_text(&w, l->thinking_end);
    json_key(&w, "mode");
    json_write_text(&w, l->mode);
    json_end(&w, '}');
    if (!w.failed) log_record("request", w.bytes, w.n);
    json_writer_fini(&w);
}

void record_refused(const char *request_id, const char *trace_id, const struct refused *why) {
    const char *code = why->code ? why->code : why->fault.code;
    const struct line line = {.request_id = request_id,
                              .trace_id = trace_id,
                              .status = *code ? code : "invalid",
                              .queue_ms = NAN,
                              .ttft_ms = NAN,
                              .itl_ms = NAN,
                              .e2e_ms = NAN,
                              .finish = "refused"};
    write_line(&line);
}

/* first: of all choices; between: seconds from the first to the last step of each, added up. */
static void log_call(const call *c, const char *status, double first, double between,
                     const char *finish, const char *end) {
    const struct request_usage u = call_usage(c);
    const int64_t more = u.completion_tokens - c->choice_count; /* steps with one before them */
    const struct line line = {
        .request_id = c->request_id,
        .trace_id = c->trace_id,
        .status = status,
        .usage = u,
        .queue_ms = c->queue_seconds < 0 ? NAN : 1e3 * c->queue_seconds,
        .ttft_ms = first > 0 ? 1e3 * (first - c->arrival) : NAN,
        .itl_ms = more > 0 ? 1e3 * between / (double)more : NAN,
        .e2e_ms = 1e3 * (service_clock() - c->arrival),
        .finish = finish,
        .thinking_end = end,
        .mode = think_mode_name(c->body.request.think.mode),
    };
    write_line(&line);
}

void record_call(call *c, const struct refused *why, const char *gone) {
    enum { ABORT = 2, ERROR = 3 };
    struct metrics *m = c->service->metrics;
    double first = 0, last = 0, between = 0;
    int unfinished = 0;
    for (int i = 0; i < c->choice_count; i++) {
        const struct choice *choice = &c->choices[i];
        if (choice->first > 0 && (first == 0 || choice->first < first)) first = choice->first;
        if (choice->last > last) last = choice->last;
        between += choice->last - choice->first;
        unfinished += choice->phase != CHOICE_DONE;
    }
    const bool error = why && (why->kind == REFUSAL_BUG || why->kind == REFUSAL_DEAD);
    metric_add(m, METRIC_success, error ? ERROR : ABORT, (uint64_t)unfinished);
    metric_observe(m, METRIC_e2e, 0, service_clock() - c->arrival);
    if (first > 0) {
        const double queued = c->queue_seconds > 0 ? c->queue_seconds : 0;
        metric_observe(m, METRIC_inference_time, 0, last - c->arrival - queued);
    }
    struct reply_summary s;
    reply_summarise(c->choices[0].reply, &s);
    log_call(c,
             why    ? (why->code ? why->code : "invalid")
             : gone ? gone
                    : "ok",
             first, between, why || gone ? (error ? "error" : "abort") : finish_name(s.finish),
             think_end_name(s.end));
}
