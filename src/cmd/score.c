/* score.c: `sfumato score`, teacher-forced entropy and log-probabilities (cli.md, soft-thinking.md §8).
 *
 *   {"steps":[7, [[3,0.9],[5,0.1]], 12]} ─► CSR of inputs ─► engine, no generation ─► one record a position
 *
 * Lines may also say "text" or "messages". Concept tokens are used exactly as recorded: no sorting, no
 * renormalising, so a trace read back gives the bits of the run that wrote it. Output is in input order:
 * jobs wait in a ring as in generate.c. Rank 0; the others follow. Memory: per job, freed when written.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "cmd/commands.h"
#include "cmd/lines.h"
#include "serve/fields.h"
#include "serve/reply.h"

enum { SCORE_JOBS_MAX = 256, SCORE_MEMORY_MAX = 1 << 28 };

struct score_job {
    struct body body; /* root, custom_id and memory; the rest is not used */
    bool done;
    struct json_writer positions; /* items of the array */
    struct json_writer error;
};

struct scoring {
    struct host *host;
    engine *engine;
    struct lines lines;
    struct json_writer writer;
    struct score_job *jobs;
    uint64_t first, next;
    bool input_ended;
    int64_t lines_done, positions_done;
    struct progress progress;
};

static struct score_job *score_job_at(struct scoring *s, uint64_t number) {
    return &s->jobs[number % SCORE_JOBS_MAX];
}

static void on_event(void *user, const struct engine_event *e) {
    struct scoring *s = user;
    struct score_job *job = score_job_at(s, e->request_id);
    struct json_writer *w = &job->positions;
    if (e->kind == ENGINE_FINISHED) {
        job->done = true;
        if (e->finish == FINISH_REASON_ERROR || e->finish == FINISH_REASON_ABORT) {
            fail(STATUS_BUG, "the engine gave this request up");
            reply_write_error_line(&s->host->facts, &job->body, &job->error);
            s->lines.failed++;
        }
    }
    if (e->kind != ENGINE_SCORED) return;
    s->positions_done++;
    json_begin(w, '{');
    json_key(w, "entropy");
    json_write_real(w, (double)e->entropy);
    json_key(w, "logprob");
    json_write_real(w, e->next_logprob);
    json_key(w, "top");
    json_begin(w, '[');
    for (int i = 0; i < e->top_count; i++) {
        json_begin(w, '[');
        json_write_int(w, e->top[i].id);
        json_write_real(w, (double)e->top[i].logprob);
        json_end(w, ']');
    }
    json_end(w, ']');
    json_end(w, '}');
}

/* ---- one line ---- */

static enum status wrong_step(size_t i, const char *what) {
    char path[FAULT_NAME_BYTES];
    snprintf(path, sizeof path, "steps[%zu]", i);
    return fail_param(STATUS_REQUEST, path, NULL, "%s must be %s", path, what);
}

/* One element of "steps" appended to the CSR; ranges of weights are the engine's to check. */
static enum status read_step(size_t i, const json_t *step, int vocab_count, uint32_t *ids,
                             float *weights, int32_t *count) {
    const size_t entries = json_is_array(step) ? json_array_size(step) : 1;
    if (entries < 1 || entries > THINK_TOPK_MAX ||
        !(json_is_array(step) || json_is_integer(step))) {
        return wrong_step(i, "a token id or 1..64 pairs [id, weight]");
    }
    for (size_t k = 0; k < entries; k++) {
        const json_t *pair = json_is_array(step) ? json_array_get(step, k) : NULL;
        const json_t *id = pair ? json_array_get(pair, 0) : step;
        const json_t *weight = pair ? json_array_get(pair, 1) : NULL;
        if (pair && (json_array_size(pair) != 2 || !json_is_number(weight))) {
            return wrong_step(i, "a token id or pairs [id, weight]");
        }
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= vocab_count) {
            return wrong_step(i, "made of token ids of this model");
        }
        ids[*count] = (uint32_t)json_integer_value(id);
        weights[*count] = pair ? (float)json_number_value(weight) : 1.0f;
        (*count)++;
    }
    return STATUS_OK;
}

static enum status read_steps(const struct body_facts *facts, struct body *b, const json_t *steps,
                              struct request_inputs *out) {
    const size_t positions = json_array_size(steps);
    if (!json_is_array(steps) || positions == 0)
        return field_wrong("", "steps", "an array, not empty");
    if (positions > (size_t)facts->max_model_len) {
        b->too_long = (int64_t)positions;
        return fail_param(STATUS_REQUEST, "steps", "context_length_exceeded",
                          "steps holds %zu positions, the model's maximum context length is %lld",
                          positions, (long long)facts->max_model_len);
    }
    size_t entries = 0;
    for (size_t i = 0; i < positions; i++) {
        const size_t n = json_array_size(json_array_get(steps, i));
        entries += n > 1 ? n : 1;
    }
    uint32_t *ids = arena_alloc_array(&b->memory, entries, sizeof *ids);
    float *weights = arena_alloc_array(&b->memory, entries, sizeof *weights);
    int32_t *begin = arena_alloc_array(&b->memory, positions + 1, sizeof *begin);
    if (!ids || !weights || !begin) return STATUS_MEMORY;
    int32_t count = 0;
    for (size_t i = 0; i < positions; i++) {
        TRY(read_step(i, json_array_get(steps, i), facts->vocab_count, ids, weights, &count));
        begin[i + 1] = count;
    }
    *out = (struct request_inputs){(int64_t)positions, begin, ids, weights};
    return STATUS_OK;
}

static enum status read_text(const struct body_facts *facts, struct body *b,
                             struct request_inputs *out) {
    char *prompt = NULL;
    const char *text = NULL;
    uint32_t *ids = NULL;
    size_t n = 0, count = 0;
    enum status status;
    TRY(field_text(b->root, "", "text", &text));
    if (!text) {
        TRY(body_render_messages(facts, b->root, &prompt, &n));
    } else {
        n = strlen(text);
    }
    TRY_GOTO(
        tokenizer_encode(facts->tokenizer, text ? text : prompt, n, text != NULL, &ids, &count),
        out);
    uint32_t *copy = arena_alloc_array(&b->memory, count + 1, sizeof *copy);
    if (!copy) {
        status = STATUS_MEMORY;
        goto out;
    }
    if (count) memcpy(copy, ids, count * sizeof *copy);
    *out = (struct request_inputs){.count = (int64_t)count, .ids = copy};
out:
    free(prompt);
    free(ids);
    return status;
}

static enum status submit_line(struct scoring *s, struct score_job *job, uint64_t number) {
    const struct body_facts *facts = &s->host->facts;
    struct body *b = &job->body;
    arena_init(&b->memory, SCORE_MEMORY_MAX);
    TRY(json_load_text(s->lines.line, s->lines.n, STATUS_REQUEST, &b->root));
    if (!json_is_object(b->root)) return fail(STATUS_REQUEST, "a line must be a JSON object");
    b->custom_id = json_object_get(b->root, "custom_id");
    static const char *const known[] = {"steps",
                                        "text",
                                        "messages",
                                        "temperature",
                                        "custom_id",
                                        "chat_template_kwargs",
                                        "add_generation_prompt",
                                        "continue_final_message",
                                        "reasoning_effort",
                                        "reasoning"};
    TRY(field_only(b->root, known, sizeof known / sizeof *known,
                   "a line has steps, text or messages, and temperature"));
    double temperature = 1;
    TRY(field_real(b->root, "", "temperature", 0, 5, &temperature));
    struct request r = {.id = number,
                        .choices = 1,
                        .repetition_penalty = 1,
                        .top_logprobs = (int)s->host->params.top,
                        .logprobs = true,
                        .score = true,
                        .think = {.mode = THINK_OFF,
                                  .max_topk = 1,
                                  .thinking = {(float)temperature, 0, 1, 0},
                                  .answer = {(float)temperature, 0, 1, 0},
                                  .gumbel_temperature = 1,
                                  .dirichlet_alpha = 1,
                                  .open_id = -1,
                                  .close_id = -1}};
    const json_t *steps = field_get(b->root, "steps");
    if ((steps != NULL) + (field_get(b->root, "text") != NULL) +
            (field_get(b->root, "messages") != NULL) !=
        1) {
        return fail_param(STATUS_REQUEST, "steps", NULL,
                          "a line needs one of steps, text and messages");
    }
    TRY(steps ? read_steps(facts, b, steps, &r.prompt) : read_text(facts, b, &r.prompt));
    const enum status status = engine_submit(s->engine, &r);
    if (status == STATUS_REQUEST && strcmp(fail_last()->param, "prompt") == 0) {
        const struct fault fault = *fail_last(); /* the engine's name for it; the line says steps */
        fail_param(status, steps ? "steps" : "text", fault.code, "%s", fault.text);
    }
    return status;
}

/* ---- the batch ---- */

static void score_job_fini(struct score_job *job) {
    body_fini(&job->body);
    json_writer_fini(&job->positions);
    json_writer_fini(&job->error);
    *job = (struct score_job){0};
}

static enum status take_lines(struct scoring *s) {
    while (!s->input_ended && s->next - s->first < SCORE_JOBS_MAX) {
        if (s->first < s->next && lines_waits(&s->lines)) break;
        struct score_job *job = score_job_at(s, s->next);
        enum status status = lines_next(&s->lines);
        if (status == STATUS_END) {
            s->input_ended = true;
            break;
        }
        if (status == STATUS_OK) status = submit_line(s, job, s->next);
        if (status == STATUS_REQUEST) {
            reply_write_error_line(&s->host->facts, &job->body, &job->error);
            job->done = true;
            s->lines.failed++;
        } else {
            TRY(status);
        }
        s->next++;
    }
    return STATUS_OK;
}

static enum status write_lines(struct scoring *s) {
    while (s->first < s->next && score_job_at(s, s->first)->done) {
        struct score_job *job = score_job_at(s, s->first);
        struct json_writer *w = &job->error;
        if (w->n == 0) {
            w = &s->writer;
            json_begin(w, '{');
            if (job->body.custom_id) reply_write_custom_id(job->body.custom_id, w);
            json_key(w, "positions");
            json_begin(w, '[');
            if (job->positions.failed) return fail(STATUS_MEMORY, "no memory for an output line");
            if (job->positions.n) json_write_raw(w, job->positions.bytes, job->positions.n);
            json_end(w, ']');
            json_end(w, '}');
        }
        progress_break(&s->progress);
        TRY(lines_write(&s->lines, w));
        score_job_fini(job);
        s->first++;
        s->lines_done++;
    }
    return STATUS_OK;
}

static enum status run_batch(struct scoring *s) {
    progress_begin(&s->progress, "scoring", s->lines.line_total, !s->host->params.quiet);
    for (;;) {
        TRY(take_lines(s));
        const bool worked = engine_tick(s->engine);
        TRY(write_lines(s));
        progress_update(&s->progress, s->lines_done, NULL);
        if (!worked && s->input_ended && s->first == s->next) break;
    }
    progress_end(&s->progress);
    const double seconds = progress_clock() - s->progress.start;
    log_info("%lld lines, %lld positions, %.2f s, %.1f positions/s", (long long)s->lines_done,
             (long long)s->positions_done, seconds, (double)s->positions_done / (seconds + 1e-9));
    return lines_verdict(&s->lines);
}

static enum status check_usage(const struct params *p) {
    if (p->positional)
        return fail(STATUS_USAGE, "%s: unexpected argument; options start with --", p->positional);
    if (!p->input) return fail(STATUS_USAGE, "--input FILE is needed (- = standard input)");
    return STATUS_OK;
}

enum status cmd_score(struct host *h) {
    struct scoring s = {.host = h};
    enum status status;
    TRY(comm_agree(h->comm, check_usage(&h->params)));
    TRY(host_open_text(h));
    status = h->rank == 0 ? lines_open(&s.lines, h->params.input, h->params.output) : STATUS_OK;
    TRY_GOTO(comm_agree(h->comm, status), out);
    TRY_GOTO(host_open_model(h), out);
    if (h->rank > 0) {
        engine_follow(h->model, h->comm, &h->engine_options);
        return STATUS_OK;
    }
    s.jobs = calloc(SCORE_JOBS_MAX, sizeof *s.jobs);
    status = s.jobs ? engine_new(h->model, h->comm, &h->engine_options, on_event, &s, &s.engine)
                    : fail(STATUS_MEMORY, "no memory for the queue");
    if (status != STATUS_OK)
        comm_abort(h->comm, status, fail_text()); /* the others follow already */
    status = run_batch(&s);
    engine_stop(s.engine);
out:
    for (int i = 0; s.jobs && i < SCORE_JOBS_MAX; i++) score_job_fini(&s.jobs[i]);
    free(s.jobs);
    engine_free(s.engine);
    progress_end(&s.progress);
    json_writer_fini(&s.writer);
    return lines_close(&s.lines, status);
}
