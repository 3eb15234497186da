/* events.c: what the engine says ─► replies ─► fronts.
 *
 * Events of sequences whose client is gone, or that ran past a stop string, are dropped here; the
 * engine's last event of each sequence always arrives and is what frees tickets.
 */
#include <string.h>

#include "base/fault.h"
#include "base/log.h"
#include "serve/service_parts.h"

enum { MESSAGES_AT_ONCE = 256 }; /* then sockets get their turn */
#define TURN_SECONDS_MAX 0.02

static void fail_call(call *c) {
    const struct refused why = refused_last();
    call_end(c, &why);
}

/* ---- steps ---- */

/* When something is first heard of a ticket, its prompt has been read. */
static void note_start(call *c, struct ticket *t) {
    service *s = c->service;
    if (t->started) return;
    t->started = true;
    const int64_t tokens = t->request.prompt.count;
    /* once a prompt, as in its usage: one that is scored and then continued has two tickets */
    const bool again = t->request.score && c->body.prompts[t->prompt].max_tokens > 0;
    if (!again) metric_add(s->metrics, METRIC_prompt_tokens, 0, (uint64_t)tokens);
    s->waiting_tokens -= tokens;
    c->tokens -= tokens;
}

/* The first step of a sequence: its wait in the queue, and how long its prompt took after that. */
static void note_queue(call *c, const struct engine_event *e, double now) {
    struct metrics *m = c->service->metrics;
    if (e->queue_seconds < 0) return; /* held for a shared thought: it was never in the queue */
    const double queued = c->submitted - c->arrival + e->queue_seconds;
    const double prefill = now - c->arrival - queued;
    if (c->queue_seconds < queued) c->queue_seconds = queued;
    metric_observe(m, METRIC_queue_time, 0, queued);
    metric_observe(m, METRIC_prefill_time, 0, prefill > 0 ? prefill : 0);
}

/* A step that is shared was one step, and is counted with its own choice. */
static void count_step(call *c, struct choice *choice, const struct engine_event *e) {
    struct metrics *m = c->service->metrics;
    const struct think_decision *d = e->decision;
    const double now = service_clock();
    if (!e->shared) metric_add(m, METRIC_generation_tokens, 0, 1);
    if (choice->first == 0) {
        choice->first = now;
        note_queue(c, e, now);
        metric_observe(m, METRIC_first_token, 0, now - c->arrival);
    } else {
        metric_observe(m, METRIC_inter_token, 0, now - choice->last);
    }
    choice->last = now;
    if (d->phase == PHASE_THINKING) {
        if (choice->thinking_first == 0) choice->thinking_first = now;
        choice->thinking_last = now;
        choice_enter(c, choice, d->soft ? CHOICE_SOFT : CHOICE_HARD_THINK);
    } else {
        if (choice->phase != CHOICE_ANSWER) {
            metric_observe(m, METRIC_first_answer, 0, now - c->arrival);
        }
        if (!e->shared) metric_add(m, METRIC_answer_tokens, 0, 1);
        choice_enter(c, choice, CHOICE_ANSWER);
    }
}

static void count_thinking(struct metrics *m, const struct think_decision *d) {
    enum { SOFT, HARD };
    metric_add(m, METRIC_thinking_tokens, d->soft ? SOFT : HARD, 1);
    metric_observe(m, METRIC_soft_entropy, 0, (double)d->entropy);
    if (!d->soft) return;
    metric_add(m, METRIC_soft_steps, 0, 1);
    metric_observe(m, METRIC_soft_support, 0, d->count);
}

static void on_step(call *c, struct ticket *t, const struct engine_event *e) {
    const int index = t->prompt * c->body.request.choices + e->choice;
    struct choice *choice = &c->choices[index];
    struct stream_delta delta;
    if (choice->stopping) return;
    note_start(c, t);
    const bool thinking = e->decision->phase == PHASE_THINKING;
    count_step(c, choice, e);
    if (thinking && !e->shared) count_thinking(c->service->metrics, e->decision);
    if (reply_step(choice->reply, e, &delta) != STATUS_OK) {
        fail_call(c);
        return;
    }
    if (delta.stopped) {
        choice->stopping = true;
        call_send_cancel(c->service, t, e->choice);
    }
    c->front->step(c->user, c, index, e, &delta);
}

static void on_scored(call *c, struct ticket *t, const struct engine_event *e) {
    note_start(c, t);
    ASSERT(c->front->scored);
    c->front->scored(c->user, c, t->prompt, e);
}

/* ---- ends ---- */

/* Choices that only echo have no sequence of their own: they end when their prompt is scored, or at
 * once. */
void call_finish_echoes(call *c, int prompt) {
    const struct engine_event done = {.kind = ENGINE_FINISHED, .finish = FINISH_REASON_LENGTH};
    const int n = c->body.request.choices;
    for (int i = prompt * n; i < (prompt + 1) * n && c->state == CALL_LIVE; i++) {
        struct stream_delta last;
        if (reply_finish(c->choices[i].reply, &done, &last) != STATUS_OK) {
            fail_call(c);
            return;
        }
        c->open_count--;
        record_choice(c, &c->choices[i]);
        c->front->finish(c->user, c, i, &last);
    }
}

static void on_finished(call *c, struct ticket *t, const struct engine_event *e) {
    if (t->request.score) {
        if (e->finish == FINISH_REASON_ERROR || e->finish == FINISH_REASON_ABORT) {
            fail(STATUS_BUG, "the engine gave up scoring a prompt");
            fail_call(c);
        } else if (c->body.prompts[t->prompt].max_tokens == 0) {
            call_finish_echoes(c, t->prompt);
        }
        return;
    }
    const int index = t->prompt * c->body.request.choices + e->choice;
    struct choice *choice = &c->choices[index];
    struct stream_delta last;
    if (reply_finish(choice->reply, e, &last) != STATUS_OK || reply_aborted(choice->reply)) {
        if (reply_aborted(choice->reply)) fail(STATUS_BUG, "the engine gave a sequence up");
        fail_call(c);
        return;
    }
    c->open_count--;
    record_choice(c, choice);
    c->front->finish(c->user, c, index, &last);
}

static void on_refused(call *c, const struct fault *fault) {
    fail_param(fault->status, fault->param, fault->code, "%s", fault->text);
    fail_call(c);
}

/* ---- one message ---- */

static void on_ready(service *s, const struct body_facts *facts) {
    s->facts = facts;
    metrics_set_context(s->metrics, facts->max_model_len);
    service_set_state(s, SERVICE_READY);
}

static void on_message(service *s, const void *bytes, size_t n) {
    static struct think_decision decision; /* 600 bytes, net thread only */
    const struct up_message *m = bytes;
    ASSERT(!fault_hit("net-bug"));
    if (m->kind == UP_READY) {
        on_ready(s, m->facts);
        return;
    }
    struct ticket *t = ticket_find(s, m->event.request_id);
    if (!t) return; /* cannot be: tickets outlive their events; harmless */
    call *c = t->call;
    const bool last = m->kind == UP_REFUSED || (m->kind == UP_FINISHED && --t->open_count == 0);
    c->busy = true;
    if (c->state == CALL_LIVE) {
        struct engine_event event;
        if (m->kind == UP_REFUSED) {
            on_refused(c, up_fault(bytes, n));
        } else {
            up_read(bytes, n, &decision, &event);
            if (m->kind == UP_STEP) on_step(c, t, &event);
            if (m->kind == UP_SCORED) on_scored(c, t, &event);
            if (m->kind == UP_FINISHED) on_finished(c, t, &event);
        }
    }
    if (last) call_release_ticket(c, t);
    c->busy = false;
    if (c->state == CALL_LIVE && c->open_count == 0 && c->tickets_open == 0) {
        call_end(c, NULL);
    } else {
        call_free_if_over(c);
    }
}

/* Sockets have had their turn since the last time; of a long absence a moment counts. */
static void count_turn(service *s) {
    const double now = service_clock(), away = now - s->read_at;
    s->turning += away < TURN_SECONDS_MAX ? away : TURN_SECONDS_MAX;
    s->read_at = now;
}

void service_read(service *s) {
    size_t n;
    const void *bytes;
    count_turn(s);
    for (int i = 0; i < MESSAGES_AT_ONCE; i++) {
        bytes = mailbox_peek(s->wires->up, &n);
        if (!bytes) { /* silent until the next flush; what came in between is looked for once more */
            mailbox_fd_clear(s->wires->up);
            bytes = mailbox_peek(s->wires->up, &n);
        }
        if (!bytes) return;
        on_message(s, bytes, n);
        mailbox_pop(s->wires->up);
    }
}
