/* generate.c: `sfumato generate`, one prompt to the terminal or a batch of JSON lines (cli.md).
 *
 *   lines ─► body_parse ─► job ─► engine_submit ─► events ─► reply ─► line, in input order
 *                           └──── ring of jobs, oldest first ────┘
 *
 * A job is one input line: its body and one reply per choice. Jobs wait in a ring until all older ones are
 * written, so the output order is the input order however the engine interleaves them; at most
 * JOBS_MAX lines are held. Rank 0 does all of this; the other ranks follow the engine's plans.
 * Thread: engine thread. Memory: per job, freed when its lines are written.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "cmd/commands.h"
#include "cmd/lines.h"
#include "serve/reply.h"

enum { JOBS_MAX = 1024 };

struct job {
    struct body body;
    int choice_count;         /* prompts * n */
    int open_count;           /* choices not finished yet */
    reply **replies;          /* [choice_count] */
    struct json_writer error; /* an error line, ready to write, when not empty */
};

struct generation {
    struct host *host;
    engine *engine;
    struct lines lines;
    struct json_writer writer;
    struct job *jobs;     /* ring [JOBS_MAX], job k at k % JOBS_MAX */
    uint64_t first, next; /* jobs [first, next) are held */
    bool input_ended;
    enum status status; /* the first failure that ends everything */
    struct progress progress;
    int64_t lines_done, tokens_done;
    double start;
    /* -p: the one reply is streamed to the terminal */
    bool single, colour, dimmed, something_shown, ends_with_newline;
};

/* ---- ids: job number and prompt ---- */

static uint64_t request_id(uint64_t job, int prompt) {
    return job * BODY_PROMPTS_MAX + (uint64_t)prompt;
}

static struct job *job_at(struct generation *g, uint64_t number) {
    return &g->jobs[number % JOBS_MAX];
}

static struct job *job_of_event(struct generation *g, const struct engine_event *e, int *choice) {
    struct job *job = job_at(g, e->request_id / BODY_PROMPTS_MAX);
    *choice = (int)(e->request_id % BODY_PROMPTS_MAX) * job->body.request.choices + e->choice;
    return job;
}

/* ---- terminal ---- */

/* Thinking dimmed, the answer plain; in a pipe only the answer goes to standard output. */
static void show(struct generation *g, const struct stream_delta *d) {
    if (!g->single) return;
    const bool merged = !g->jobs[0].body.separate_reasoning;
    if (g->colour && d->thinking_n > 0 && g->jobs[0].body.include_reasoning && !merged) {
        if (!g->dimmed) fputs("\033[2m", stdout);
        g->dimmed = true;
        fwrite(d->thinking, 1, d->thinking_n, stdout);
    }
    if (d->answer_n > 0) {
        if (g->dimmed) fputs("\033[0m\n\n", stdout);
        g->dimmed = false;
        fwrite(d->answer, 1, d->answer_n, stdout);
        g->ends_with_newline = d->answer[d->answer_n - 1] == '\n';
        g->something_shown = true;
    }
    fflush(stdout);
}

static void show_end(struct generation *g, const reply *r) {
    struct reply_summary s;
    char entropy[48] = "", seconds[32];
    reply_summarise(r, &s);
    if (g->dimmed) fputs("\033[0m\n", stdout);
    if (g->something_shown && !g->ends_with_newline) fputc('\n', stdout);
    fflush(stdout);
    const double elapsed = progress_clock() - g->start;
    if (!isnan(s.mean_entropy))
        snprintf(entropy, sizeof entropy, ", mean entropy %.3f nats", s.mean_entropy);
    snprintf(seconds, sizeof seconds, "%.2f", elapsed);
    log_info(
        "%lld prompt tokens, %lld steps: %lld thinking (%lld soft%s), ended by %s; answer ended by "
        "%s; "
        "%s s, %.1f tokens/s, seed %lld",
        (long long)s.usage.prompt_tokens, (long long)s.usage.completion_tokens,
        (long long)s.usage.reasoning_tokens, (long long)s.usage.soft_steps, entropy,
        think_end_name(s.end), finish_name(s.finish), seconds,
        (double)s.usage.completion_tokens / (elapsed > 1e-9 ? elapsed : 1e-9), (long long)s.seed);
}

/* ---- engine events ---- */

static void give_up(struct generation *g, enum status status) {
    if (g->status == STATUS_OK) g->status = status;
}

static void choice_ended(struct generation *g, struct job *job, int choice,
                         const struct engine_event *e) {
    struct stream_delta delta;
    const enum status status = reply_finish(job->replies[choice], e, &delta);
    if (status != STATUS_OK) {
        give_up(g, status);
        return;
    }
    show(g, &delta);
    job->open_count--;
}

static void on_event(void *user, const struct engine_event *e) {
    struct generation *g = user;
    int choice;
    struct job *job = job_of_event(g, e, &choice);
    if (e->kind == ENGINE_FINISHED) {
        choice_ended(g, job, choice, e);
        return;
    }
    struct stream_delta delta;
    g->tokens_done++;
    const enum status status = reply_step(job->replies[choice], e, &delta);
    if (status != STATUS_OK) {
        give_up(g, status);
        return;
    }
    show(g, &delta);
    if (delta.stopped) {
        engine_cancel(g->engine, e->request_id, e->choice, true);
        choice_ended(g, job, choice, NULL);
    }
}

/* ---- jobs ---- */

static void job_fini(struct job *job) {
    for (int i = 0; job->replies && i < job->choice_count; i++) reply_free(job->replies[i]);
    free(job->replies);
    json_writer_fini(&job->error);
    body_fini(&job->body);
    *job = (struct job){0};
}

/* A bad line becomes an error line in its place. Failures of the process are passed on. */
static enum status job_failed(struct generation *g, struct job *job, enum status status) {
    if (status != STATUS_REQUEST) return status;
    g->lines.failed++;
    job->open_count = 0;
    reply_write_error_line(&g->host->facts, &job->body, &job->error);
    return STATUS_OK;
}

static enum status job_submit(struct generation *g, struct job *job, uint64_t number) {
    job->choice_count = job->body.prompt_count * job->body.request.choices;
    job->open_count = job->choice_count;
    job->replies = calloc((size_t)job->choice_count, sizeof *job->replies);
    if (!job->replies) return fail(STATUS_MEMORY, "no memory for replies");
    for (int i = 0; i < job->choice_count; i++) {
        TRY(reply_new(&g->host->facts, &job->body, i, &job->replies[i]));
    }
    for (int p = 0; p < job->body.prompt_count; p++) {
        const struct request request = body_request(&job->body, p, request_id(number, p));
        const enum status status = engine_submit(g->engine, &request);
        if (status != STATUS_OK) {
            const struct fault fault = *fail_last();
            for (int q = 0; q < p; q++) engine_cancel(g->engine, request_id(number, q), -1, true);
            return fail_param(status, fault.param, fault.code, "%s", fault.text);
        }
    }
    return STATUS_OK;
}

/* Reads lines into the ring while there is room, waiting for one only when none is running. */
static enum status take_lines(struct generation *g) {
    while (!g->input_ended && g->next - g->first < JOBS_MAX) {
        if (g->first < g->next && lines_waits(&g->lines)) break;
        struct job *job = job_at(g, g->next);
        enum status status = lines_next(&g->lines);
        if (status == STATUS_END) {
            g->input_ended = true;
            break;
        }
        if (status == STATUS_OK) {
            status = body_parse(&g->host->facts, g->lines.line, g->lines.n, &job->body);
        }
        if (status == STATUS_OK) status = job_submit(g, job, g->next);
        if (status != STATUS_OK) TRY(job_failed(g, job, status));
        g->next++;
    }
    return STATUS_OK;
}

static enum status write_job(struct generation *g, struct job *job) {
    if (job->error.n > 0) return lines_write(&g->lines, &job->error);
    for (int i = 0; i < job->choice_count; i++) {
        if (reply_aborted(job->replies[i])) {
            g->lines.failed++;
            fail(STATUS_BUG, "the engine gave this request up");
            reply_write_error_line(&g->host->facts, &job->body, &g->writer);
        } else {
            reply_write_line(job->replies[i], &g->writer);
        }
        TRY(lines_write(&g->lines, &g->writer));
    }
    return STATUS_OK;
}

/* Writes what is complete, from the oldest on. */
static enum status write_lines(struct generation *g) {
    while (g->first < g->next && job_at(g, g->first)->open_count == 0) {
        struct job *job = job_at(g, g->first);
        progress_break(&g->progress);
        TRY(write_job(g, job));
        job_fini(job);
        g->first++;
        g->lines_done++;
    }
    return STATUS_OK;
}

static void show_progress(struct generation *g) {
    char note[64];
    struct engine_counters counters;
    engine_counters_get(g->engine, &counters);
    snprintf(note, sizeof note, "%.1f tokens/s, %d running",
             (double)g->tokens_done / (progress_clock() - g->start + 1e-9), counters.running);
    g->progress.total = g->lines.line_total;
    progress_update(&g->progress, g->lines_done, note);
}

static enum status run_batch(struct generation *g) {
    progress_begin(&g->progress, "generating", g->lines.line_total, !g->host->params.quiet);
    g->start = progress_clock();
    for (;;) {
        TRY(take_lines(g));
        const bool worked = engine_tick(g->engine);
        TRY(g->status);
        TRY(write_lines(g));
        show_progress(g);
        if (!worked && g->input_ended && g->first == g->next) break;
    }
    progress_end(&g->progress);
    struct engine_counters c;
    engine_counters_get(g->engine, &c);
    const double seconds = progress_clock() - g->start;
    log_info(
        "%lld line%s, %llu prompt tokens (%llu cached), %llu steps of sequences (%llu soft), %.2f "
        "s, "
        "%.1f tokens/s, %llu preemptions, decisions %016llx",
        (long long)g->lines_done, g->lines_done == 1 ? "" : "s",
        (unsigned long long)c.prompt_tokens, (unsigned long long)c.cached_tokens,
        (unsigned long long)c.generated_tokens, (unsigned long long)c.soft_steps, seconds,
        (double)c.generated_tokens / (seconds > 1e-9 ? seconds : 1e-9),
        (unsigned long long)c.preemptions, (unsigned long long)c.decision_hash);
    return lines_verdict(&g->lines);
}

/* ---- one prompt ---- */

static enum status prompt_body(struct host *h, struct json_writer *w) {
    const struct params *p = &h->params;
    json_begin(w, '{');
    if (p->chat || (!p->raw && h->chat)) {
        json_key(w, "messages");
        json_begin(w, '[');
        json_begin(w, '{');
        json_key(w, "role");
        json_write_text(w, "user");
        json_key(w, "content");
        json_write_text(w, p->prompt);
        json_end(w, '}');
        json_end(w, ']');
    } else {
        json_key(w, "prompt");
        json_write_text(w, p->prompt);
    }
    json_end(w, '}');
    return w->failed ? fail(STATUS_MEMORY, "no memory for the prompt") : STATUS_OK;
}

static enum status run_single(struct generation *g) {
    struct host *h = g->host;
    struct json_writer text;
    struct job *job = &g->jobs[0];
    enum status status;
    g->single = true;
    g->colour = progress_is_terminal(STDOUT_FILENO);
    json_writer_init(&text);
    for (size_t i = 0, n = strlen(h->params.prompt), skip; i < n;) {
        const size_t length = json_utf8_length(h->params.prompt + i, n - i, &skip);
        if (length == 0) TRY_GOTO(fail(STATUS_USAGE, "--prompt: not UTF-8 at byte %zu", i), out);
        i += length;
    }
    TRY_GOTO(prompt_body(h, &text), out);
    g->start = progress_clock();
    g->next = 1;
    TRY_GOTO(body_parse(&h->facts, text.bytes, text.n, &job->body), out);
    TRY_GOTO(job_submit(g, job, 0), out);
    while (job->open_count > 0 && g->status == STATUS_OK) engine_tick(g->engine);
    TRY_GOTO(g->status, out);
    if (reply_aborted(job->replies[0])) {
        TRY_GOTO(fail(STATUS_PARTIAL, "the engine gave the request up"), out);
    }
    show_end(g, job->replies[0]);
    if (g->lines.out) { /* --output FILE: the line that a batch would have written */
        reply_write_line(job->replies[0], &g->writer);
        status = lines_write(&g->lines, &g->writer);
    }
out:
    json_writer_fini(&text);
    return status;
}

/* ---- the command ---- */

static enum status check_usage(const struct params *p) {
    const bool to_file = strcmp(p->output, "-") != 0;
    if (p->positional) {
        return fail(STATUS_USAGE, "%s: unexpected argument; a prompt is given by -p TEXT",
                    p->positional);
    }
    if (!p->prompt == !p->input) {
        return fail(STATUS_USAGE,
                    "give either -p TEXT or --input FILE.jsonl (see generate --help)");
    }
    if (p->chat && p->raw) return fail(STATUS_USAGE, "--chat contradicts --raw");
    if (p->input && (p->chat || p->raw)) {
        return fail(STATUS_USAGE, "--%s is for -p; a line of --input says messages or prompt",
                    p->chat ? "chat" : "raw");
    }
    if (p->prompt && p->return_trace > 0 && !to_file) {
        return fail(STATUS_USAGE,
                    "--return-trace with -p needs --output FILE to write the trace to");
    }
    return STATUS_OK;
}

/* What rank 0 can find wrong before anything slow happens. */
static enum status check_early(struct generation *g) {
    const struct params *p = &g->host->params;
    TRY(body_facts_check(&g->host->facts));
    if (!p->prompt) return lines_open(&g->lines, p->input, p->output);
    return strcmp(p->output, "-") == 0 ? STATUS_OK : lines_open_output(&g->lines, p->output);
}

static void generation_fini(struct generation *g) {
    for (int i = 0; g->jobs && i < JOBS_MAX; i++) job_fini(&g->jobs[i]);
    free(g->jobs);
    engine_free(g->engine);
    progress_end(&g->progress);
    json_writer_fini(&g->writer);
}

enum status cmd_generate(struct host *h) {
    struct generation g = {.host = h};
    enum status status;
    TRY(comm_agree(h->comm, check_usage(&h->params)));
    TRY(host_open_text(h));
    TRY_GOTO(comm_agree(h->comm, h->rank == 0 ? check_early(&g) : STATUS_OK), out);
    TRY_GOTO(host_open_model(h), out);
    if (h->rank > 0) {
        engine_follow(h->model, h->comm, &h->engine_options);
        return STATUS_OK;
    }
    g.jobs = calloc(JOBS_MAX, sizeof *g.jobs);
    status = g.jobs ? engine_new(h->model, h->comm, &h->engine_options, on_event, &g, &g.engine)
                    : fail(STATUS_MEMORY, "no memory for the queue");
    if (status != STATUS_OK)
        comm_abort(h->comm, status, fail_text()); /* the others follow already */
    status = h->params.prompt ? run_single(&g) : run_batch(&g);
    engine_stop(g.engine);
out:
    generation_fini(&g);
    return lines_close(&g.lines, status);
}
