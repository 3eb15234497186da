/* messages.c: see messages.h. The tail of a message is packed: 4-byte items one after another. */
#include "serve/messages.h"

#include <string.h>

void up_event(mailbox *up, const struct engine_event *event) {
    static const enum up_kind kinds[] = {
        [ENGINE_STEP] = UP_STEP, [ENGINE_FINISHED] = UP_FINISHED, [ENGINE_SCORED] = UP_SCORED};
    const struct think_decision *d = event->kind == ENGINE_STEP ? event->decision : NULL;
    const size_t count = d ? (size_t)d->count : 0;
    const size_t tops = event->kind == ENGINE_FINISHED ? 0 : (size_t)event->top_count;
    const size_t n = sizeof(struct up_message) + count * (sizeof *d->ids + sizeof *d->weights) +
                     tops * sizeof *event->top;
    char *bytes = mailbox_reserve(up, n);
    struct up_message m;
    memset(&m, 0, sizeof m);
    m.kind = kinds[event->kind];
    m.count = (int)count;
    m.event = *event;
    m.event.top_count = (int)tops;
    if (d) {
        m.decision = (struct think_decision_head){
            d->trace_id,   d->phase, d->soft,   d->forced,  d->marker,
            d->loop_break, d->end,   d->finish, d->entropy, d->p,
        };
    }
    memcpy(bytes, &m, sizeof m);
    bytes += sizeof m;
    if (d) {
        memcpy(bytes, d->ids, count * sizeof *d->ids);
        bytes += count * sizeof *d->ids;
        memcpy(bytes, d->weights, count * sizeof *d->weights);
        bytes += count * sizeof *d->weights;
    }
    if (tops) memcpy(bytes, event->top, tops * sizeof *event->top);
    mailbox_commit(up, n);
}

void up_refused(mailbox *up, uint64_t id, const struct fault *fault) {
    const size_t n = sizeof(struct up_message) + sizeof *fault;
    char *bytes = mailbox_reserve(up, n);
    struct up_message m;
    memset(&m, 0, sizeof m);
    m.kind = UP_REFUSED;
    m.event.request_id = id;
    memcpy(bytes, &m, sizeof m);
    memcpy(bytes + sizeof m, fault, sizeof *fault);
    mailbox_commit(up, n);
}

void up_ready(mailbox *up, const struct body_facts *facts) {
    struct up_message *m = mailbox_reserve(up, sizeof *m);
    memset(m, 0, sizeof *m);
    m->kind = UP_READY;
    m->facts = facts;
    mailbox_commit(up, sizeof *m);
}

void up_read(const void *bytes, size_t n, struct think_decision *decision,
             struct engine_event *event) {
    const struct up_message *m = bytes;
    const char *tail = (const char *)bytes + sizeof *m;
    const size_t count = (size_t)m->count;
    *event = m->event;
    event->decision = NULL;
    if (m->kind == UP_STEP) {
        const struct think_decision_head *h = &m->decision;
        decision->trace_id = h->trace_id;
        decision->phase = h->phase;
        decision->soft = h->soft;
        decision->forced = h->forced;
        decision->marker = h->marker;
        decision->loop_break = h->loop_break;
        decision->end = h->end;
        decision->finish = h->finish;
        decision->entropy = h->entropy;
        decision->p = h->p;
        decision->count = m->count;
        memcpy(decision->ids, tail, count * sizeof *decision->ids);
        tail += count * sizeof *decision->ids;
        memcpy(decision->weights, tail, count * sizeof *decision->weights);
        tail += count * sizeof *decision->weights;
        event->decision = decision;
    }
    event->top = (const struct logprob_entry *)tail; /* 4-byte members at a multiple of 4 */
    ASSERT_EQ((size_t)(tail - (const char *)bytes) + (size_t)event->top_count * sizeof *event->top,
              n);
}

const struct fault *up_fault(const void *bytes, size_t n) {
    ASSERT_EQ(sizeof(struct up_message) + sizeof(struct fault), n);
    return (const struct fault *)((const char *)bytes + sizeof(struct up_message));
}

enum status wires_open(struct wires *w, int sequences_max) {
    /* Per sequence a submit and a cancel may be under way, and one stop: the net thread must never
     * have to wait for the engine. */
    const size_t each = 2 * (sizeof(struct down_message) + 16);
    *w = (struct wires){0};
    TRY(mailbox_new(each * ((size_t)sequences_max + 64), &w->down));
    const enum status status = mailbox_new(UP_BYTES, &w->up);
    if (status != STATUS_OK) wires_close(w);
    return status;
}

void wires_close(struct wires *w) {
    mailbox_free(w->down);
    mailbox_free(w->up);
    *w = (struct wires){0};
}
