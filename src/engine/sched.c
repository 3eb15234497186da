/* sched.c: see sched.h. Admission, chunks, preemption, page sharing: integers only.
 *
 * Pages of a sequence:   | kept: shared or published, full | own, being written |
 *                          0 ............ pages_kept         ...... page_count
 *
 * Reuse at admission, longest wins: pages of the prefix cache (by digest), or of a running choice
 * of the same request, which works without the cache too. Neither may reach the first position
 * whose logits are wanted, since those come only from running the row; the rest of a partly usable
 * page is run again. Choices of one request arrive together; the second waits at the head of the
 * queue until the first has run the prompt, rather than run it again.
 *
 * Admission keeps one page in hand per running sequence, and a sequence that was once sent back
 * returns only when all its pages fit, so that two sequences do not take turns evicting one
 * another. With nobody running the head is always admitted: engine_submit refused what cannot fit
 * alone.
 */
#include "engine/sched.h"

#include <stdlib.h>
#include <string.h>

#include "kv/prefix.h"

enum status sched_init(struct sched *s, const struct plan_limits *limits, int running_max,
                       bool prefix_cache, uint64_t digest_seed) {
    *s = (struct sched){.limits = *limits,
                        .prefix_cache = prefix_cache,
                        .running_max = running_max,
                        .digest_start = kv_digest_start(digest_seed)};
    s->running = calloc((size_t)running_max, sizeof *s->running);
    s->works = calloc((size_t)running_max, sizeof *s->works);
    if (!s->running || !s->works)
        return fail(STATUS_MEMORY, "no memory for %d sequences: lower --max-num-seqs", running_max);
    return kv_pool_new(limits->page_count, prefix_cache, &s->pool);
}

void sched_fini(struct sched *s) {
    if (s->pool) kv_pool_free(s->pool);
    free(s->running);
    free(s->works);
    *s = (struct sched){0};
}

void sched_enqueue(struct sched *s, struct sequence *seq) {
    struct sequence *after = s->tail; /* new ones belong at the end, preempted ones near the head */
    if (s->head && seq->arrival < s->head->arrival) after = NULL;
    while (after && after->arrival > seq->arrival) after = after->prev;
    seq->prev = after;
    seq->next = after ? after->next : s->head;
    if (seq->next) {
        seq->next->prev = seq;
    } else {
        s->tail = seq;
    }
    if (after) {
        after->next = seq;
    } else {
        s->head = seq;
    }
    seq->state = SEQUENCE_WAITING;
    s->waiting_count++;
}

static void dequeue(struct sched *s, struct sequence *seq) {
    *(seq->prev ? &seq->prev->next : &s->head) = seq->next;
    *(seq->next ? &seq->next->prev : &s->tail) = seq->prev;
    seq->prev = seq->next = NULL;
    s->waiting_count--;
}

static void release_pages(struct sched *s, struct sequence *seq) {
    /* last page first: of a prefix, the end is the part least likely to be wanted again */
    while (seq->page_count > 0) kv_page_release(s->pool, seq->pages[--seq->page_count]);
    seq->pages_kept = 0;
    seq->computed = 0;
}

static void leave_slot(struct sched *s, struct sequence *seq) {
    int i = 0;
    while (s->running[i] != seq) i++;
    s->running_count--;
    memmove(s->running + i, s->running + i + 1,
            (size_t)(s->running_count - i) * sizeof *s->running);
    release_pages(s, seq);
}

void sched_remove(struct sched *s, struct sequence *seq) {
    if (seq->state == SEQUENCE_WAITING) dequeue(s, seq);
    if (seq->state == SEQUENCE_RUNNING) leave_slot(s, seq);
    seq->state = SEQUENCE_DONE;
}

struct sequence *sched_preempt_youngest(struct sched *s) {
    if (s->running_count == 0) return NULL;
    struct sequence *victim = s->running[s->running_count - 1];
    leave_slot(s, victim);
    sched_enqueue(s, victim);
    s->preemptions++;
    return victim;
}

static int32_t pages_for(int64_t positions) {
    return (int32_t)((positions + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
}

/* Full pages before the first position whose logits are wanted: the most that may be reused. */
static int32_t pages_reusable(const struct sequence *seq) {
    return (int32_t)(sequence_wanted(seq) / KV_PAGE_TOKENS);
}

/* Takes leading pages that others have computed. False: a running choice of the same request will
 * have more of them soon; wait. */
static bool reuse_pages(struct sched *s, struct sequence *seq) {
    const int32_t reusable = pages_reusable(seq);
    while (s->prefix_cache && seq->page_count < reusable) {
        const int32_t page =
            kv_page_find(s->pool, sequence_digest(seq, seq->page_count, s->digest_start));
        if (page < 0) break;
        seq->pages[seq->page_count++] = page;
    }
    const struct task *t = seq->task;
    int64_t common = sequence_wanted(seq);
    if (t->common < common) common = t->common;
    const int32_t shareable = (int32_t)(common / KV_PAGE_TOKENS);
    const struct sequence *best = NULL;
    for (int i = 0; i < t->sequence_count; i++) {
        const struct sequence *other = &t->sequences[i];
        if (other == seq || other->state != SEQUENCE_RUNNING) continue;
        if (!best || other->computed > best->computed) best = other;
    }
    if (best && seq->page_count < shareable) {
        if (best->computed / KV_PAGE_TOKENS < shareable) return false;
        for (; seq->page_count < shareable; seq->page_count++) {
            kv_page_share(s->pool, best->pages[seq->page_count]);
            seq->pages[seq->page_count] = best->pages[seq->page_count];
        }
    }
    seq->pages_kept = seq->page_count;
    seq->computed = (int64_t)seq->page_count * KV_PAGE_TOKENS;
    return true;
}

/* Gives a slot to a waiting sequence if its pages allow. rows: what is left of this step; promised:
 * pages that sequences admitted in this call will take. */
static bool admit(struct sched *s, struct sequence *seq, int64_t rows, int32_t *promised) {
    if (!reuse_pages(s, seq)) {
        release_pages(s, seq);
        return false;
    }
    const int64_t total = sequence_total(seq);
    int64_t first = seq->computed + rows;
    if (first > total || seq->admitted) first = total;
    const int32_t wanted = pages_for(first) - seq->page_count;
    if (s->running_count > 0 &&
        (int64_t)wanted + *promised + s->running_count > kv_pool_available(s->pool)) {
        release_pages(s, seq);
        return false;
    }
    *promised += wanted;
    dequeue(s, seq);
    int at = s->running_count++;
    for (; at > 0 && s->running[at - 1]->arrival > seq->arrival; at--)
        s->running[at] = s->running[at - 1];
    s->running[at] = seq;
    seq->state = SEQUENCE_RUNNING;
    if (!seq->admitted) {
        const int64_t prompt = seq->task->request.prompt.count;
        seq->cached_tokens = seq->computed < prompt ? seq->computed : prompt;
    }
    seq->admitted = true;
    if (!seq->task->counted) { /* a prompt counts once, however many choices it has */
        seq->task->counted = true;
        s->prompt_tokens += (uint64_t)seq->task->request.prompt.count;
        s->cached_tokens += (uint64_t)seq->cached_tokens;
    }
    return true;
}

static bool is_decode(const struct sequence *seq) {
    return !seq->task->request.score && sequence_total(seq) - seq->computed == 1;
}

static void admit_all(struct sched *s) {
    int64_t rows = s->limits.rows_max;
    for (int i = 0; i < s->running_count; i++)
        rows -= sequence_total(s->running[i]) - s->running[i]->computed;
    int32_t promised = 0;
    while (s->head && s->running_count < s->running_max && rows > 0) {
        struct sequence *seq = s->head;
        if (!admit(s, seq, rows, &promised)) break;
        rows -= sequence_total(seq) - seq->computed;
    }
}

/* Pages for positions < end, taking them from younger sequences if need be. False: seq itself had
 * to go. */
static bool reserve_pages(struct sched *s, struct sequence *seq, int64_t end) {
    while (seq->page_count < pages_for(end)) {
        const int32_t page = kv_page_acquire(s->pool);
        if (page >= 0) {
            seq->pages[seq->page_count++] = page;
            continue;
        }
        /* alone it fits (engine_submit), so the oldest never gets here as its own victim */
        ASSERT(!(s->running_count == 1 && s->running[0] == seq));
        sched_preempt_youngest(s);
        if (seq->state != SEQUENCE_RUNNING) return false;
    }
    return true;
}

/* What is left of this step's bounds. */
struct room {
    int64_t rows;
    int32_t logit_rows;
};

/* The next chunk of a sequence within the room; row_count 0: nothing now. */
static struct sched_work choose_chunk(struct sequence *seq, const struct room *room,
                                      int64_t edits) {
    const int64_t total = sequence_total(seq), wanted = sequence_wanted(seq);
    int64_t end = total;
    if (end - seq->computed > room->rows) end = seq->computed + room->rows;
    int64_t logits = end > wanted ? end - (wanted > seq->computed ? wanted : seq->computed) : 0;
    if (logits > room->logit_rows) {
        end -= logits - room->logit_rows;
        logits = room->logit_rows;
    }
    if (logits > 0 && sequence_edit_bound(seq) > edits) { /* one logit row: scores have no edits */
        end -= logits;
        logits = 0;
    }
    const int32_t rows = (int32_t)(end - seq->computed);
    return (struct sched_work){seq, rows, (int32_t)logits, rows};
}

void sched_plan(struct sched *s) {
    admit_all(s);
    int decodes = 0;
    for (int i = 0; i < s->running_count; i++) decodes += is_decode(s->running[i]);
    struct room decode_room = {decodes, decodes};
    struct room chunk_room = {s->limits.rows_max - decodes, s->limits.logit_rows_max - decodes};
    int64_t edits = s->limits.edits_max;
    s->work_count = 0;
    /* oldest first, so a victim of reserve_pages is never already in works */
    for (int i = 0; i < s->running_count; i++) {
        struct sequence *seq = s->running[i];
        struct room *room = is_decode(seq) ? &decode_room : &chunk_room;
        const struct sched_work work = choose_chunk(seq, room, edits);
        if (work.row_count == 0) continue;
        if (!reserve_pages(s, seq, seq->computed + work.row_count)) break;
        s->works[s->work_count++] = work;
        room->rows -= work.row_count;
        room->logit_rows -= work.logit_row_count;
        if (work.logit_row_count) edits -= sequence_edit_bound(seq);
    }
}

void sched_advance(struct sched *s, struct sequence *seq, int32_t rows) {
    seq->computed += rows;
    for (; seq->pages_kept < seq->computed / KV_PAGE_TOKENS; seq->pages_kept++)
        if (s->prefix_cache)
            kv_page_publish(s->pool, seq->pages[seq->pages_kept],
                            sequence_digest(seq, seq->pages_kept, s->digest_start));
}

void sched_computed(struct sched *s) {
    for (int i = 0; i < s->work_count; i++)
        sched_advance(s, s->works[i].sequence, s->works[i].row_count);
}

bool sched_is_steady(const struct sched *s) {
    if (s->work_count != s->running_count) return false;
    for (int i = 0; i < s->work_count; i++)
        if (!is_decode(s->works[i].sequence) || s->works[i].logit_row_count != 1) return false;
    return true;
}

void sched_extend(struct sched *s, struct sched_work *work, int32_t rows) {
    struct sequence *seq = work->sequence;
    while (seq->page_count < pages_for(seq->computed + rows)) {
        const int32_t page = kv_page_acquire(s->pool);
        if (page < 0) break;
        seq->pages[seq->page_count++] = page;
    }
    const int64_t held = (int64_t)seq->page_count * KV_PAGE_TOKENS - seq->computed;
    work->reach = held < rows ? (int32_t)held : rows;
}

void sched_trim(struct sched *s, struct sequence *seq) {
    while (seq->page_count > pages_for(seq->computed))
        kv_page_release(s->pool, seq->pages[--seq->page_count]);
}
