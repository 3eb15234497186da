/* call.c: a request from its text to its last event: admission, tickets, deadline, cancel.
 *
 *   service_call ─► LIVE ──────── all choices complete, refused, deadline, client gone ──► OVER ─► freed
 *     chats, long texts: prompts.h ─► tickets: held by the engine, each released when its last sequence ended ┘
 *
 * A call is over as soon as its client knows the end; its memory goes when the engine holds nothing
 * of it any more, because the engine's requests point into the body until then.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "serve/fields.h"
#include "serve/service_parts.h"

/* ---- tickets ---- */

uint64_t ticket_id(const service *s, const struct ticket *t) {
    return (uint64_t)t->serial << 32 | (uint64_t)(t - s->tickets);
}

struct ticket *ticket_find(service *s, uint64_t id) {
    const uint32_t index = (uint32_t)id;
    if (index >= (uint32_t)s->ticket_max) return NULL;
    struct ticket *t = &s->tickets[index];
    return t->call && t->serial == id >> 32 ? t : NULL;
}

static enum status take_ticket(call *c, int place, int prompt, bool score) {
    service *s = c->service;
    ASSERT_LE(0, s->first_free); /* admission: a ticket holds at least one sequence */
    const int index = s->first_free;
    struct ticket *t = &s->tickets[index];
    s->first_free = t->next_free;
    *t = (struct ticket){.serial = ++s->serial, .call = c, .prompt = prompt};
    t->request = body_request(&c->body, prompt, ticket_id(s, t));
    if (score) {
        t->request.score = true;
        t->request.choices = 1;
        t->request.share_thinking = false;
        t->request.max_tokens = t->request.min_tokens = 0;
    }
    t->open_count = t->request.choices;
    c->tickets[place] = index;
    c->tickets_open++;
    const enum status status = task_new(&t->request, s->facts->vocab_count, &t->task);
    if (status != STATUS_MEMORY) return status;
    return fail(STATUS_BUSY, "there is no memory for this request now: try again later");
}

void call_release_ticket(call *c, struct ticket *t) {
    service *s = c->service;
    const int index = (int)(t - s->tickets);
    for (int i = 0; i < c->ticket_count; i++) {
        if (c->tickets[i] == index) c->tickets[i] = -1;
    }
    task_free(t->task);
    t->task = NULL;
    t->call = NULL;
    t->next_free = s->first_free;
    s->first_free = index;
    c->tickets_open--;
}

static void submit(service *s, struct ticket *t) {
    struct down_message *m = mailbox_reserve(s->wires->down, sizeof *m);
    *m = (struct down_message){.kind = DOWN_SUBMIT, .request = &t->request, .task = t->task};
    mailbox_commit(s->wires->down, sizeof *m);
    t->task = NULL;
}

void call_send_cancel(service *s, const struct ticket *t, int choice) {
    struct down_message *m = mailbox_reserve(s->wires->down, sizeof *m);
    *m = (struct down_message){.kind = DOWN_CANCEL, .id = ticket_id(s, t), .choice = choice};
    mailbox_commit(s->wires->down, sizeof *m);
    mailbox_flush(s->wires->down);
}

/* ---- choices ---- */

void choice_enter(call *c, struct choice *choice, enum choice_phase phase) {
    service *s = c->service;
    if (choice->phase == phase) return;
    if (choice->phase != CHOICE_DONE) s->phase_counts[choice->phase]--;
    if (phase != CHOICE_DONE) s->phase_counts[phase]++;
    choice->phase = phase;
}

/* ---- the end ---- */

void call_free_if_over(call *c) {
    service *s = c->service;
    if (c->state != CALL_OVER || c->busy || c->tickets_open > 0) return;
    s->sequence_count -= c->sequences;
    if (c->prev) {
        c->prev->next = c->next;
    } else {
        s->calls = c->next;
    }
    if (c->next) c->next->prev = c->prev;
    for (int i = 0; i < c->choice_count; i++) {
        if (!c->choices) break;
        choice_enter(c, &c->choices[i], CHOICE_DONE);
        reply_free(c->choices[i].reply);
    }
    if (c->timer) event_free(c->timer);
    free(c->choices);
    free(c->tickets);
    body_fini(&c->body);
    free(c);
}

/* Live -> over: no more events for the front; the engine is asked to stop what still runs. */
static void leave(call *c) {
    service *s = c->service;
    c->state = CALL_OVER;
    s->call_count--;
    s->waiting_tokens -= c->tokens;
    c->tokens = 0;
    if (c->timer) event_del(c->timer);
    if (c->making) prompts_cancel(c->making);
    c->making = NULL;
    for (int i = 0; i < c->ticket_count; i++) {
        if (c->tickets[i] >= 0) call_send_cancel(s, &s->tickets[c->tickets[i]], -1);
    }
}

void call_end(call *c, const struct refused *why) {
    ASSERT(c->state == CALL_LIVE);
    const bool was_busy = c->busy;
    record_call(c, why, NULL);
    leave(c);
    c->busy = true;
    c->front->end(c->user, c, why);
    c->busy = was_busy;
    call_free_if_over(c);
}

void call_cancel(call *c, enum call_gone reason) {
    ASSERT(c->state == CALL_LIVE);
    record_call(c, NULL, reason == CALL_SLOW_READER ? "slow_reader" : "disconnected");
    if (reason == CALL_SLOW_READER) metric_add(c->service->metrics, METRIC_slow_readers, 0, 1);
    leave(c);
    call_free_if_over(c);
}

bool service_abort(service *s, const char *request_id) {
    call *c = s->calls;
    while (c && (c->state != CALL_LIVE || strcmp(c->request_id, request_id) != 0)) c = c->next;
    if (!c) return false;
    const struct refused why = refused_as(REFUSAL_CANCELLED, NULL, "aborted by its client");
    call_end(c, &why);
    return true;
}

/* ---- timers ---- */

static void start_timer(call *c, double seconds) {
    const struct timeval wait = service_wait(seconds);
    evtimer_add(c->timer, &wait);
}

/* Nothing for the engine: echo without logprobs and max_tokens 0. */
static void end_with_echoes(call *c) {
    c->busy = true;
    for (int p = 0; p < c->body.prompt_count && c->state == CALL_LIVE; p++) {
        const int64_t tokens = c->body.prompts[p].count;
        metric_add(c->service->metrics, METRIC_prompt_tokens, 0, (uint64_t)tokens);
        call_finish_echoes(c, p);
    }
    c->busy = false;
    if (c->state == CALL_LIVE) {
        call_end(c, NULL);
    } else {
        call_free_if_over(c);
    }
}

/* The deadline, or the moment after service_call of a call that needs no engine. */
static void on_timer(evutil_socket_t fd, short what, void *user) {
    call *c = user;
    (void)fd;
    (void)what;
    if (c->ticket_count == 0 && !c->making) {
        end_with_echoes(c);
        return;
    }
    const struct refused why = refused_as(REFUSAL_TIMEOUT, NULL,
                                          "the request did not end within its time limit "
                                          "(timeout_s, --request-timeout)");
    call_end(c, &why);
}

/* ---- admission ---- */

static enum status check_kind(const struct body *b, enum call_kind kind) {
    if (kind == CALL_CHAT && !b->chat) {
        return fail_param(STATUS_REQUEST, "messages", NULL, "messages is missing");
    }
    if (kind == CALL_COMPLETION && b->chat) {
        return fail_param(STATUS_REQUEST, "prompt", NULL, "prompt is missing");
    }
    return STATUS_OK;
}

static enum status check_timeout(const service *s, const struct body *b) {
    if (!field_get(b->root, "timeout_s")) return STATUS_OK;
    const double most = s->params->request_timeout;
    if (b->timeout_seconds > 0 && (most == 0 || b->timeout_seconds <= most)) return STATUS_OK;
    return fail_param(STATUS_REQUEST, "timeout_s", NULL,
                      "timeout_s is %.9g: it must be above 0 and at most %.9g (--request-timeout)",
                      b->timeout_seconds, most > 0 ? most : 1e9);
}

/* What the call takes of the engine: sequences, tickets, and prompt tokens where they are known. */
struct load {
    int sequences, tickets;
    int64_t tokens;
    bool scores, generates;
};
static struct load load_of(const struct body *b) {
    struct load l = {.scores = b->echo && b->request.logprobs, .generates = b->asked_tokens != 0};
    const int prompts = b->prompt_count;
    for (int i = 0; i < b->prompt_count; i++) {
        l.tokens += b->prompts[i].count * (l.scores + l.generates);
    }
    l.tickets = prompts * (l.scores + l.generates);
    l.sequences = prompts * (l.generates ? b->request.choices : 0) + (l.scores ? prompts : 0);
    return l;
}

enum { REJECTED_QUEUE, REJECTED_TOKENS, REJECTED_LOADING = 3, REJECTED_DRAINING };

static enum status check_room(service *s, const struct body *b, const struct load *l) {
    if (l->sequences > s->sequences_max) {
        return fail_param(STATUS_REQUEST, b->prompt_count > 1 ? "prompt" : "n", NULL,
                          "the request has %d sequences, this server holds at most %d",
                          l->sequences, s->sequences_max);
    }
    if (s->sequence_count + l->sequences > s->sequences_max) {
        metric_add(s->metrics, METRIC_rejections, REJECTED_QUEUE, 1);
        return fail(STATUS_BUSY, "the server holds %d sequences, at most %d: try again later",
                    s->sequence_count, s->sequences_max);
    }
    return STATUS_OK;
}

static enum status check_tokens(service *s, const struct load *l) {
    const int64_t most = s->params->max_num_queued_tokens;
    if (most > 0 && s->waiting_tokens > 0 && s->waiting_tokens + l->tokens > most) {
        metric_add(s->metrics, METRIC_rejections, REJECTED_TOKENS, 1);
        return fail(STATUS_BUSY, "%lld prompt tokens are waiting, at most %lld: try again later",
                    (long long)s->waiting_tokens, (long long)most);
    }
    return STATUS_OK;
}

static enum status read_body(service *s, const struct call_options *o, struct body *b) {
    if (o->text) {
        TRY(body_begin(s->facts, o->text, o->n, b));
    } else {
        TRY(body_begin_tree(s->facts, o->root, b));
    }
    TRY(check_kind(b, o->kind));
    TRY(check_timeout(s, b));
    if (!b->chat) b->separate_reasoning = false; /* completions: the raw reply (serving.md §4.3) */
    b->fills_context = o->fills_context;
    return STATUS_OK;
}

static enum status open_replies(call *c) {
    c->choice_count = c->open_count = c->body.prompt_count * c->body.request.choices;
    c->choices = calloc((size_t)c->choice_count, sizeof *c->choices);
    if (!c->choices) return fail(STATUS_MEMORY, "no memory for replies");
    for (int i = 0; i < c->choice_count; i++) {
        c->choices[i].phase = CHOICE_DONE;
        TRY(reply_new(c->service->facts, &c->body, i, &c->choices[i].reply));
    }
    return STATUS_OK;
}

/* Counts the call and its sequences, before its prompt is known. */
static void enlist(call *c, const struct load *l) {
    service *s = c->service;
    c->next = s->calls;
    if (s->calls) s->calls->prev = c;
    s->calls = c;
    s->call_count++;
    c->sequences = l->sequences;
    s->sequence_count += c->sequences;
    for (int i = 0; i < c->choice_count; i++) choice_enter(c, &c->choices[i], CHOICE_PREFILL);
}

/* Tickets with all the memory the engine will need for them: here, not on the engine thread. */
static enum status take_tickets(call *c, const struct load *l) {
    for (int p = 0; p < c->body.prompt_count; p++) {
        const int place = p * (l->scores + l->generates);
        if (l->scores) TRY(take_ticket(c, place, p, true));
        if (l->generates) TRY(take_ticket(c, place + l->scores, p, false));
    }
    return STATUS_OK;
}

/* Of a call that never came to the engine. */
static void drop_tickets(call *c) {
    for (int i = 0; c->tickets && i < c->ticket_count; i++) {
        if (c->tickets[i] >= 0) call_release_ticket(c, &c->service->tickets[c->tickets[i]]);
    }
}

/* Gives the prompts to the engine. Nothing fails here. */
static void submit_all(call *c, const struct load *l) {
    service *s = c->service;
    c->submitted = service_clock();
    c->tokens = l->tokens;
    s->waiting_tokens += c->tokens;
    for (int p = 0; p < c->body.prompt_count; p++) {
        metric_observe(s->metrics, METRIC_prompt_tokens_request, 0,
                       (double)c->body.prompts[p].count);
        metric_observe(s->metrics, METRIC_params_max_tokens, 0,
                       (double)c->body.prompts[p].max_tokens);
    }
    metric_observe(s->metrics, METRIC_params_n, 0, c->body.request.choices);
    for (int i = 0; i < c->ticket_count; i++) submit(s, &s->tickets[c->tickets[i]]);
    mailbox_flush(s->wires->down);
}

/* From this thread's last failure. */
static struct refused refusal_of(const call *c) {
    struct refused why = service_refused(c->service);
    why.prompt_tokens = c->body.too_long;
    why.context = c->service->facts->max_model_len;
    return why;
}

static enum status order_prompts(const struct body_facts *facts, const struct body *b,
                                 struct prompt_order *o) {
    o->tokenizer = facts->tokenizer;
    o->add_special = !b->chat;
    if (b->chat) return body_read_template(facts, b->root, &o->template);
    for (int i = 0; i < b->prompt_count; i++) {
        const struct body_prompt *p = &b->prompts[i];
        if (!p->ids) TRY(prompt_order_add(o, p->text, p->text_bytes));
    }
    return STATUS_OK;
}

/* made: what order_prompts asked for. */
static enum status take_prompts(call *c, const struct prompt_made *made) {
    struct body *b = &c->body;
    for (int i = 0; i < b->prompt_count; i++) {
        if (b->prompts[i].ids) continue;
        TRY(body_give_ids(c->service->facts, b, i, made->ids, made->count));
        made++;
    }
    return body_end(c->service->facts, b);
}

static enum status prepare_late(call *c, const struct prompt_made *made, struct load *l) {
    TRY(take_prompts(c, made));
    *l = load_of(&c->body);
    TRY(check_tokens(c->service, l));
    return take_tickets(c, l);
}

static void refuse_late(call *c, const struct refused *why) {
    record_refused(c->request_id, c->trace_id, why);
    drop_tickets(c);
    leave(c);
    c->busy = true;
    c->front->end(c->user, c, why);
    c->busy = false;
    call_free_if_over(c);
}

static void on_made(void *user, const struct prompt_made *made, const struct refused *why) {
    call *c = user;
    struct load l;
    c->making = NULL;
    if (!made) {
        refuse_late(c, why);
    } else if (prepare_late(c, made, &l) != STATUS_OK) {
        const struct refused own = refusal_of(c);
        refuse_late(c, &own);
    } else {
        submit_all(c, &l);
        if (c->ticket_count == 0) end_with_echoes(c);
    }
}

/* The shortest of what the body, the protocol and the server say; 0 = none. */
static double timeout_of(const service *s, const struct body *b, double given) {
    const double all[] = {b->timeout_seconds, given, s->params->request_timeout};
    double least = 0;
    for (int i = 0; i < 3; i++) {
        if (all[i] > 0 && (least == 0 || all[i] < least)) least = all[i];
    }
    return least;
}

static enum status open_call(call *c, const struct call_options *o) {
    service *s = c->service;
    struct body *b = &c->body;
    struct prompt_order order = {0};
    enum status status;
    TRY(read_body(s, o, b));
    TRY_GOTO(order_prompts(s->facts, b, &order), out);
    const bool later = !prompt_order_is_short(&order);
    if (!later) {
        TRY_GOTO(prompt_order_make(&order), out);
        TRY_GOTO(take_prompts(c, order.all), out);
    }
    const struct load l = load_of(b);
    TRY_GOTO(check_room(s, b, &l), out);
    TRY_GOTO(check_tokens(s, &l), out);
    TRY_GOTO(open_replies(c), out);
    const double timeout = timeout_of(s, b, o->timeout_seconds);
    const bool idle = l.tickets == 0 && !later;
    c->ticket_count = l.tickets;
    c->tickets = malloc(((size_t)l.tickets + 1) * sizeof *c->tickets);
    c->timer = evtimer_new(s->base, on_timer, c);
    if (!c->tickets || !c->timer) TRY_GOTO(fail(STATUS_MEMORY, "no memory for a request"), out);
    for (int i = 0; i < l.tickets; i++) c->tickets[i] = -1;
    TRY_GOTO(
        later ? prompts_start(s->prompter, &order, on_made, c, &c->making) : take_tickets(c, &l),
        out);
    enlist(c, &l); /* from here on nothing fails */
    if (!later) submit_all(c, &l);
    if (idle || timeout > 0) start_timer(c, idle ? 0 : timeout);
out:
    prompt_order_fini(&order);
    return status;
}

/* Not by service_free: it was never on the list. */
static void discard(call *c) {
    drop_tickets(c);
    for (int i = 0; c->choices && i < c->choice_count; i++) reply_free(c->choices[i].reply);
    if (c->timer) event_free(c->timer);
    free(c->choices);
    free(c->tickets);
    body_fini(&c->body);
    free(c);
}

static bool may_call(service *s, struct refused *why) {
    switch (s->state) {
        case SERVICE_READY:
            return true;
        case SERVICE_LOADING:
            metric_add(s->metrics, METRIC_rejections, REJECTED_LOADING, 1);
            *why = refused_as(REFUSAL_LOADING, NULL, "the model is loading: try again later");
            return false;
        case SERVICE_DRAINING:
            metric_add(s->metrics, METRIC_rejections, REJECTED_DRAINING, 1);
            *why = refused_as(REFUSAL_DRAINING, NULL, "the server is shutting down");
            return false;
        case SERVICE_DEAD:
            break;
    }
    *why = refused_as(REFUSAL_DEAD, NULL, "a rank of this server is lost");
    return false;
}

call *service_call(service *s, const struct call_options *o, struct refused *why) {
    if (!may_call(s, why)) {
        record_refused(o->request_id, o->trace_id ? o->trace_id : "", why);
        json_decref(o->root);
        return NULL;
    }
    call *c = calloc(1, sizeof *c);
    if (!c) {
        json_decref(o->root);
        fail(STATUS_MEMORY, "no memory for a request");
        *why = refused_last();
        return NULL;
    }
    c->service = s;
    c->arrival = service_clock();
    c->queue_seconds = -1;
    c->created = (int64_t)time(NULL);
    c->front = o->front;
    c->user = o->user;
    service_request_id(o->request_id, c->request_id);
    service_random_hex(c->id);
    snprintf(c->trace_id, sizeof c->trace_id, "%s", o->trace_id ? o->trace_id : "");
    if (open_call(c, o) == STATUS_OK) return c;
    *why = refusal_of(c);
    record_refused(c->request_id, c->trace_id, why);
    discard(c);
    return NULL;
}

/* ---- what fronts may ask ---- */

const struct body *call_body(const call *c) { return &c->body; }
reply *call_reply(const call *c, int choice) { return c->choices[choice].reply; }
int call_choice_count(const call *c) { return c->choice_count; }
const char *call_request_id(const call *c) { return c->request_id; }
const char *call_id(const call *c) { return c->id; }
int64_t call_created(const call *c) { return c->created; }
bool call_streams(const call *c) { return c->body.stream; }

struct request_usage call_usage(const call *c) {
    struct request_usage sum = {0};
    const int n = c->body.request.choices;
    for (int i = 0; i < c->choice_count; i++) {
        struct reply_summary s;
        reply_summarise(c->choices[i].reply, &s);
        if (i % n == 0) {
            sum.prompt_tokens += c->body.prompts[i / n].count;
            sum.cached_tokens += s.usage.cached_tokens;
        }
        /* a shared thinking is in the first choice's counts alone */
        sum.completion_tokens += s.usage.completion_tokens;
        sum.reasoning_tokens += s.usage.reasoning_tokens;
        sum.soft_steps += s.usage.soft_steps;
    }
    return sum;
}
