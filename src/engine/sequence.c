/* sequence.c: see sequence.h. Inputs, logit edits and books of one choice; no queue, no batch.
 *
 * Edits are a sorted list, because penalties must be sent as (id, factor, addend) with distinct ids
 * and most requests have none at all: a request without bias, penalties or masks costs nothing per
 * step.
 */
#include "engine/sequence.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kv/prefix.h"
#include "load/config.h"

static bool has_penalties(const struct request *r) {
    return r->presence_penalty != 0 || r->frequency_penalty != 0 || r->repetition_penalty != 1;
}

/* ---- the record of what a sequence made ---- */

/* Takes what the sequence can come to need at most. Not zeroed: pages of it that are never written
 * cost address space only. */
static bool history_init(struct history *h, const struct request *r) {
    const struct think_params *p = &r->think;
    int64_t thinking = r->max_tokens;
    if (p->budget > 0 && p->budget < thinking) thinking = p->budget;
    const int64_t wide = p->mode == THINK_OFF ? 0 : p->max_topk - 1;
    h->capacity = r->max_tokens;
    h->entry_capacity = r->max_tokens + thinking * wide;
    h->begin = malloc(((size_t)h->capacity + 1) * sizeof *h->begin);
    h->ids = malloc((size_t)h->entry_capacity * sizeof *h->ids + 1);
    h->weights = malloc((size_t)h->entry_capacity * sizeof *h->weights + 1);
    if (!h->begin || !h->ids || !h->weights) return false;
    h->begin[0] = 0;
    return true;
}

static void history_append(struct history *h, const uint32_t *ids, const float *weights,
                           int count) {
    ASSERT_LT(h->count, h->capacity);
    ASSERT_LE(h->entry_count + count, h->entry_capacity);
    memcpy(h->ids + h->entry_count, ids, (size_t)count * sizeof *ids);
    memcpy(h->weights + h->entry_count, weights, (size_t)count * sizeof *weights);
    h->entry_count += count;
    h->begin[++h->count] = (int32_t)h->entry_count;
}

static void history_copy(struct history *to, const struct history *from) {
    ASSERT_LE(from->count, to->capacity);
    ASSERT_LE(from->entry_count, to->entry_capacity);
    to->count = from->count;
    to->entry_count = from->entry_count;
    memcpy(to->begin, from->begin, ((size_t)from->count + 1) * sizeof *from->begin);
    memcpy(to->ids, from->ids, (size_t)from->entry_count * sizeof *from->ids);
    memcpy(to->weights, from->weights, (size_t)from->entry_count * sizeof *from->weights);
}

static void history_free(struct history *h) {
    free(h->begin);
    free(h->ids);
    free(h->weights);
    *h = (struct history){0};
}

/* ---- logit edits ---- */

/* The entry of an id, made when missing. */
static struct edit_entry *edit_at(struct edit_book *b, uint32_t id) {
    int64_t low = 0, high = b->count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (b->entries[middle].id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low < b->count && b->entries[low].id == id) return &b->entries[low];
    ASSERT_LT(b->count, b->capacity);
    memmove(b->entries + low + 1, b->entries + low, (size_t)(b->count - low) * sizeof *b->entries);
    b->count++;
    b->entries[low] = (struct edit_entry){.id = id};
    return &b->entries[low];
}

static uint32_t prompt_first_id(const struct request_inputs *p, int64_t position) {
    return p->ids[p->begin ? p->begin[position] : position];
}

static int order_ids(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Sorting first keeps a long prompt from costing a move of the list per id. */
static bool edits_from_prompt(struct sequence *s) {
    const struct request_inputs *p = &s->task->request.prompt;
    uint32_t *ids = malloc((size_t)p->count * sizeof *ids);
    if (!ids) return false;
    for (int64_t i = 0; i < p->count; i++) ids[i] = prompt_first_id(p, i);
    qsort(ids, (size_t)p->count, sizeof *ids, order_ids);
    for (int64_t i = 0; i < p->count; i++) {
        if (i == 0 || ids[i] != ids[i - 1]) edit_at(&s->edits, ids[i])->in_prompt = 1;
    }
    free(ids);
    return true;
}

/* Takes what the list can come to hold at most, then fills in what is known from the start. */
static bool edits_init(struct sequence *s) {
    const struct request *r = &s->task->request;
    struct edit_book *b = &s->edits;
    if (r->score) return true;
    b->capacity = r->bias_count + s->think.eos_count + r->stop_id_count;
    if (r->repetition_penalty != 1) b->capacity += r->prompt.count;
    if (has_penalties(r)) b->capacity += r->max_tokens;
    if (b->capacity == 0) return true;
    b->entries = malloc((size_t)b->capacity * sizeof *b->entries);
    if (!b->entries) return false;
    if (r->repetition_penalty != 1 && !edits_from_prompt(s)) return false;
    for (int i = 0; i < r->bias_count; i++) edit_at(b, r->bias[i].id)->bias = r->bias[i].add;
    const bool masks_eos =
        (r->min_tokens > 0 || s->think.on_eos == ON_EOS_MASK) && !s->think.ignore_eos;
    for (int i = 0; masks_eos && i < s->think.eos_count; i++) {
        /* a close marker that is also listed as an end must stay possible: thinking ends by it */
        if (s->think.eos_ids[i] < 0 || s->think.eos_ids[i] == s->think.close_id) continue;
        edit_at(b, (uint32_t)s->think.eos_ids[i])->is_eos = 1;
    }
    for (int i = 0; r->min_tokens > 0 && i < r->stop_id_count; i++)
        edit_at(b, r->stop_ids[i])->is_stop = 1;
    return true;
}

int64_t sequence_edit_bound(const struct sequence *s) { return s->edits.count; }

int32_t sequence_edits(const struct sequence *s, struct batch_edit *out) {
    const struct request *r = &s->task->request;
    const bool young = (int64_t)s->thought.step < r->min_tokens;
    const bool mask_eos =
        (young && !s->think.ignore_eos) || think_row_masks_eos(&s->think, &s->thought);
    const bool mask_stop =
        young && s->thought.phase == PHASE_ANSWER; /* stop ids end answers only */
    /* a factor near 0 would turn a large logit into infinity */
    const float repetition = fmaxf(r->repetition_penalty, 1e-6f);
    int32_t n = 0;
    for (int64_t i = 0; i < s->edits.count; i++) {
        const struct edit_entry *e = &s->edits.entries[i];
        struct batch_edit edit = {e->id, 1.0f, e->bias};
        if (e->generated || e->in_prompt) edit.rep = repetition;
        if (e->generated) {
            edit.add -= r->presence_penalty;
            edit.add -= r->frequency_penalty * (float)e->generated;
        }
        if ((e->is_eos && mask_eos) || (e->is_stop && mask_stop)) edit.add = -INFINITY;
        if (edit.rep != 1.0f || edit.add != 0.0f) out[n++] = edit;
    }
    return n;
}

static int32_t pages_for(int64_t positions) {
    return (int32_t)((positions + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
}

static bool copy_request(struct task *t, const struct request *r) {
    arena *a = &t->memory;
    t->request = *r;
    struct request_inputs *p = &t->request.prompt;
    const int64_t entries = r->prompt.begin ? r->prompt.begin[r->prompt.count] : r->prompt.count;
    uint32_t *ids = arena_alloc_array(a, (size_t)entries, sizeof *ids);
    if (!ids) return false;
    memcpy(ids, r->prompt.ids, (size_t)entries * sizeof *ids);
    p->ids = ids;
    p->weights = NULL;
    if (r->prompt.begin) {
        int32_t *begin = arena_alloc_array(a, (size_t)r->prompt.count + 1, sizeof *begin);
        float *weights = arena_alloc_array(a, (size_t)entries, sizeof *weights);
        if (!begin || !weights) return false;
        memcpy(begin, r->prompt.begin, ((size_t)r->prompt.count + 1) * sizeof *begin);
        memcpy(weights, r->prompt.weights, (size_t)entries * sizeof *weights);
        p->begin = begin;
        p->weights = weights;
    }
    if (r->bias_count) {
        struct request_bias *bias = arena_alloc_array(a, (size_t)r->bias_count, sizeof *bias);
        if (!bias) return false;
        memcpy(bias, r->bias, (size_t)r->bias_count * sizeof *bias);
        t->request.bias = bias;
    }
    return true;
}

/* think_state_init wants one id a position: the first id of a soft one. */
static const uint32_t *first_ids(struct task *t) {
    const struct request_inputs *p = &t->request.prompt;
    if (!p->begin) return p->ids;
    uint32_t *ids = arena_alloc_array(&t->memory, (size_t)p->count, sizeof *ids);
    for (int64_t i = 0; ids && i < p->count; i++) ids[i] = prompt_first_id(p, i);
    return ids;
}

enum status task_new(const struct request *r, int vocab_count, struct task **out) {
    *out = NULL;
    TRY(request_check(r, vocab_count));
    struct task *t = NULL;
    /* more positions than any context has would overflow the sums below */
    if (r->max_tokens > CONFIG_POSITION_MAX || r->prompt.count > CONFIG_POSITION_MAX)
        goto no_memory;
    t = calloc(1, sizeof *t);
    if (!t) goto no_memory;
    arena_init(&t->memory, 0);
    if (!copy_request(t, r)) goto no_memory;
    const int n = r->score ? 1 : r->choices;
    t->sequences = arena_alloc_array(&t->memory, (size_t)n, sizeof *t->sequences);
    const uint32_t *ids = first_ids(t);
    if (!t->sequences || !ids) goto no_memory;
    const int32_t pages_max = pages_for(r->prompt.count + r->max_tokens);
    for (int i = 0; i < n; i++) {
        struct sequence *s = &t->sequences[i];
        t->sequence_count = i + 1; /* task_free looks at what is there */
        s->task = t;
        s->choice = i;
        s->think = r->think;
        s->think.choice = (uint32_t)i;
        think_state_init(&s->thought, &s->think, ids, r->prompt.count);
        s->pages = arena_alloc_array(&t->memory, (size_t)pages_max, sizeof *s->pages);
        s->digests = arena_alloc_array(&t->memory, (size_t)pages_max, sizeof *s->digests);
        if (!s->pages || !s->digests || !history_init(&s->made, r) || !edits_init(s))
            goto no_memory;
    }
    t->live_count = n;
    t->common = r->prompt.count;
    if (n > 1 && r->share_thinking) {
        const bool thinks = t->sequences[0].thought.phase == PHASE_THINKING;
        t->sharing = thinks ? SHARING_THINKING : SHARING_OPENING;
        t->kept =
            thinks ? NULL : arena_alloc_array(&t->memory, SHARING_OPEN_STEPS, sizeof *t->kept);
        if (!thinks && !t->kept) goto no_memory;
    }
    *out = t;
    return STATUS_OK;
no_memory:
    task_free(t);
    return fail(STATUS_MEMORY, "no memory for a request of %lld prompt tokens and max_tokens %lld",
                (long long)r->prompt.count, (long long)r->max_tokens);
}

void task_free(struct task *t) {
    if (!t) return;
    for (int i = 0; i < t->sequence_count; i++) {
        history_free(&t->sequences[i].made);
        free(t->sequences[i].edits.entries);
    }
    arena_fini(&t->memory);
    free(t);
}

int64_t sequence_total(const struct sequence *s) {
    return s->task->request.prompt.count + s->made.count;
}

int sequence_input(const struct sequence *s, int64_t position, const uint32_t **ids,
                   const float **weights) {
    const struct request_inputs *p = &s->task->request.prompt;
    const int32_t *begin;
    if (position >= p->count) {
        begin = s->made.begin + (position - p->count);
        *ids = s->made.ids + begin[0];
        *weights = s->made.weights + begin[0];
        return begin[1] - begin[0];
    }
    if (!p->begin) {
        *ids = p->ids + position;
        *weights = NULL;
        return 1;
    }
    begin = p->begin + position;
    *ids = p->ids + begin[0];
    *weights = p->weights + begin[0];
    return begin[1] - begin[0];
}

int64_t sequence_wanted(const struct sequence *s) {
    return s->task->request.score ? s->scored : sequence_total(s) - 1;
}

void sequence_append(struct sequence *s, const struct think_decision *d) {
    history_append(&s->made, d->ids, d->weights, d->count);
    if (has_penalties(&s->task->request)) edit_at(&s->edits, d->trace_id)->generated++;
}

void sequence_share_books(struct sequence *to, const struct sequence *from) {
    to->thought = from->thought;
    to->shared_steps = from->thought.step;
    to->shared_thinking = from->thought.thinking_steps;
    to->shared_soft = from->thought.soft_steps;
}

void sequence_fork(struct sequence *to, const struct sequence *from) {
    history_copy(&to->made, &from->made);
    ASSERT_LE(from->edits.count, to->edits.capacity);
    to->edits.count = from->edits.count;
    if (from->edits.count)
        memcpy(to->edits.entries, from->edits.entries,
               (size_t)from->edits.count * sizeof *to->edits.entries);
    to->digest_count = from->digest_count;
    memcpy(to->digests, from->digests, (size_t)from->digest_count * sizeof *to->digests);
    sequence_share_books(to, from);
}

struct kv_digest sequence_digest(struct sequence *s, int32_t page, struct kv_digest start) {
    static const float one = 1.0f;
    while (s->digest_count <= page) {
        struct kv_digest d = s->digest_count ? s->digests[s->digest_count - 1] : start;
        const int64_t from = (int64_t)s->digest_count * KV_PAGE_TOKENS;
        ASSERT_LE(from + KV_PAGE_TOKENS, sequence_total(s));
        for (int64_t i = from; i < from + KV_PAGE_TOKENS; i++) {
            const uint32_t *ids;
            const float *weights;
            const int count = sequence_input(s, i, &ids, &weights);
            d = kv_digest_next(d, ids, weights ? weights : &one, count);
        }
        s->digests[s->digest_count++] = d;
    }
    return s->digests[page];
}

void sequence_usage(const struct sequence *s, struct request_usage *out) {
    *out = (struct request_usage){
        .prompt_tokens = s->task->request.prompt.count,
        .cached_tokens = s->cached_tokens,
        .completion_tokens = (int64_t)s->thought.step - s->shared_steps,
        .reasoning_tokens = s->thought.thinking_steps - s->shared_thinking,
        .soft_steps = s->thought.soft_steps - s->shared_soft,
    };
}
