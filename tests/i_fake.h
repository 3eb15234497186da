/* i_fake.h: a model and ranks that are not there, for tests of the engine alone. Include once.
 *
 * The fake keeps a paged cache like a real model: each position stores a digest of its inputs in
 * its page, and a row's logits are a function of the digests it reads through its page table, 0 ..
 * its position. So a wrong page, a missing row, a stale or overwritten cache, a concept token that
 * is not exactly what was fed before: all change the logits. R ranks are played in one process:
 * model_step makes every rank's records (statistics slab by slab along the tree), comm_gather hands
 * them over.
 */
#ifndef SFUMATO_TESTS_I_FAKE_H
#define SFUMATO_TESTS_I_FAKE_H

#include <unistd.h>

#include "base/fmath.h"
#include "comm/comm.h"
#include "engine/plan.h"
#include "kv/pages.h"
#include "model/model.h"
#include "suite.h"

enum {
    FAKE_VOCAB_ROWS = 211,
    FAKE_VOCAB = 203,
    FAKE_SLABS = 8,
    FAKE_PAGES_MAX = 4096,
    FAKE_LAYER_RANKS = 8
};

static struct {
    int ranks;
    uint64_t pages[FAKE_PAGES_MAX][KV_PAGE_TOKENS];
    float logits[256][FAKE_VOCAB]; /* of the last step's logit rows */
    unsigned char *gather;         /* [R][n] */
    size_t gather_capacity;
    bool corrupt;     /* a flipped bit in the next gather */
    int break_one_in; /* > 0: so often a row has no id that can follow */
    int steps, fetches, stops;
    struct plan_limits limits; /* when page_count > 0 every plan is viewed as another rank would */
} fake = {.ranks = 1};

static uint64_t fake_mix(uint64_t h, uint64_t word) {
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    h ^= h >> 29;
    h *= UINT64_C(0xbf58476d1ce4e5b9);
    return h ^ h >> 32;
}

static uint64_t fake_input_digest(const uint32_t *ids, const float *weights, int count) {
    uint64_t h = 7;
    for (int i = 0; i < count; i++) {
        const float w = weights ? weights[i] : 1.0f;
        uint32_t bits;
        memcpy(&bits, &w, sizeof bits);
        h = fake_mix(fake_mix(h, ids[i]), bits);
    }
    return h;
}

/* Raw logits after a prefix whose folded digest is `state`: roughly normal, sometimes sharply
 * peaked. */
static void fake_logits(uint64_t state, float out[FAKE_VOCAB]) {
    if (fake.break_one_in && fake_mix(state, 12) % (uint64_t)fake.break_one_in == 0) {
        for (int v = 0; v < FAKE_VOCAB; v++) out[v] = -INFINITY;
        return;
    }
    const uint64_t kind = fake_mix(state, 11) % 8;
    const float scale = kind < 2 ? 0.3f : kind < 6 ? 2.0f : 5.0f;
    for (int v = 0; v < FAKE_VOCAB; v++) {
        const uint64_t h = fake_mix(state, 1000 + (uint64_t)v);
        float sum = 0;
        for (int i = 0; i < 4; i++) sum += (float)(h >> (16 * i) & 0xffff) * 0x1p-16f - 0.5f;
        out[v] = scale * sum * 2.0f;
    }
}

/* z' of one probe. */
static void fake_edited(const float *raw, const struct batch *b, const struct batch_probe *p,
                        float out[FAKE_VOCAB]) {
    memcpy(out, raw, FAKE_VOCAB * sizeof *out);
    for (int e = p->edit_begin; e < p->edit_begin + p->edit_count; e++) {
        float *z = &out[b->edits[e].id];
        *z = (*z > 0 ? *z / b->edits[e].rep : *z * b->edits[e].rep) + b->edits[e].add;
    }
    for (int v = 0; v < FAKE_VOCAB; v++) out[v] = out[v] / p->temperature;
}

static int64_t fake_slab_begin(int slab) {
    return shard_slab_begin(slab, FAKE_VOCAB_ROWS, FAKE_SLABS);
}
static int fake_rank_slab(int rank, int ranks) { return rank * FAKE_SLABS / ranks; }

/* Statistics of slabs [begin, end) along the tree. */
static void fake_stats(const float *z, int begin, int end, float *m, float *s, float *q) {
    float level[FAKE_SLABS][3];
    int n = end - begin;
    for (int i = 0; i < n; i++) {
        float top = -INFINITY, sum = 0, shifted = 0;
        const int64_t from = fake_slab_begin(begin + i);
        int64_t to = fake_slab_begin(begin + i + 1);
        if (to > FAKE_VOCAB) to = FAKE_VOCAB;
        for (int64_t v = from; v < to; v++) top = z[v] > top ? z[v] : top;
        for (int64_t v = from; v < to && top > -INFINITY; v++) {
            if (z[v] == -INFINITY) continue;
            const float x = fmath_exp(z[v] - top);
            sum += x;
            shifted += (z[v] - top) * x;
        }
        level[i][0] = top;
        level[i][1] = sum;
        level[i][2] = shifted;
    }
    for (; n > 1; n = (n + 1) / 2) {
        for (int i = 0; i < n / 2; i++) {
            memmove(level[i], level[2 * i], sizeof level[i]);
            batch_stats_join(&level[i][0], &level[i][1], &level[i][2], level[2 * i + 1][0],
                             level[2 * i + 1][1], level[2 * i + 1][2]);
        }
        if (n % 2) memmove(level[n / 2], level[n - 1], sizeof level[0]);
    }
    *m = level[0][0];
    *s = level[0][1];
    *q = level[0][2];
}

static int fake_order(const void *a, const void *b) {
    const struct batch_pair *x = a, *y = b;
    if (x->z != y->z) return x->z > y->z ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static void fake_record(const float *z, const struct batch *b, const struct batch_probe *p,
                        int rank, int ranks, unsigned char *out) {
    const int slab_begin = fake_rank_slab(rank, ranks), slab_end = fake_rank_slab(rank + 1, ranks);
    struct batch_record r;
    struct batch_pair pairs[FAKE_VOCAB], watch[64];
    int n = 0;
    fake_stats(z, slab_begin, slab_end, &r.m, &r.s, &r.q);
    for (int64_t v = fake_slab_begin(slab_begin); v < fake_slab_begin(slab_end) && v < FAKE_VOCAB;
         v++)
        if (z[v] > -INFINITY) pairs[n++] = (struct batch_pair){z[v], (uint32_t)v};
    qsort(pairs, (size_t)n, sizeof *pairs, fake_order);
    r.count = n < b->candidate_count ? n : b->candidate_count;
    for (int w = 0; w < p->watch_count; w++) {
        const uint32_t id = b->watch_ids[p->watch_begin + w];
        const bool mine = id >= fake_slab_begin(slab_begin) && id < fake_slab_begin(slab_end);
        watch[w] = (struct batch_pair){mine ? z[id] : -INFINITY, id};
    }
    memset(
        out, 0xee,
        (size_t)batch_record_bytes(b->candidate_count, b->watch_max)); /* never read unused pairs */
    memcpy(out, &r, sizeof r);
    memcpy(out + sizeof r, pairs, (size_t)r.count * sizeof *pairs);
    memcpy(out + sizeof r + (size_t)b->candidate_count * sizeof *pairs, watch,
           (size_t)p->watch_count * sizeof *watch);
}

static unsigned char *fake_gather_room(size_t bytes) {
    if (bytes > fake.gather_capacity) {
        free(fake.gather);
        fake.gather = malloc(bytes);
        fake.gather_capacity = bytes;
    }
    return fake.gather;
}

/* ---- the functions the engine calls ---- */

void model_step(model *m, const struct batch *b, void *records) {
    (void)m;
    fake.steps++;
    int logit_row = 0;
    for (int i = 0; i < b->segment_count; i++) {
        const struct batch_segment *s = &b->segments[i];
        const int32_t *pages = b->pages + s->page_begin;
        for (int r = 0; r < s->row_count; r++) {
            const int row = s->row_begin + r, position = s->position + r, begin = b->mix_begin[row];
            fake.pages[pages[position / KV_PAGE_TOKENS]][position % KV_PAGE_TOKENS] =
                fake_input_digest(b->mix_ids + begin, b->mix_weights + begin,
                                  b->mix_begin[row + 1] - begin);
            if (logit_row == b->logit_row_count || b->logit_rows[logit_row] != row) continue;
            uint64_t state = 1;
            for (int p = 0; p <= position; p++)
                state = fake_mix(state, fake.pages[pages[p / KV_PAGE_TOKENS]][p % KV_PAGE_TOKENS]);
            fake_logits(state, fake.logits[logit_row++]);
        }
    }
    const size_t stride = (size_t)batch_record_bytes(b->candidate_count, b->watch_max);
    const size_t bytes = stride * (size_t)b->probe_count;
    unsigned char *all = fake_gather_room(bytes * (size_t)fake.ranks);
    for (int rank = 0; rank < fake.ranks; rank++)
        for (int p = 0; p < b->probe_count; p++) {
            float z[FAKE_VOCAB];
            fake_edited(fake.logits[b->probes[p].logit_row], b, &b->probes[p], z);
            fake_record(z, b, &b->probes[p], rank, fake.ranks,
                        all + (size_t)rank * bytes + (size_t)p * stride);
        }
    memcpy(records, all, bytes);
}

void model_fetch(model *m, const struct batch *b, int probe, float *out) {
    float z[FAKE_VOCAB];
    const int64_t stride = model_vocab_local_max(m);
    fake.fetches++;
    fake_edited(fake.logits[b->probes[probe].logit_row], b, &b->probes[probe], z);
    float *all = (float *)(void *)fake_gather_room((size_t)(stride * fake.ranks) * sizeof *all);
    for (int rank = 0; rank < fake.ranks; rank++) {
        const int64_t begin = fake_slab_begin(fake_rank_slab(rank, fake.ranks));
        const int64_t end = fake_slab_begin(fake_rank_slab(rank + 1, fake.ranks));
        for (int64_t i = 0; i < stride; i++) /* padding rows and the padded end hold garbage */
            all[rank * stride + i] =
                i < end - begin && begin + i < FAKE_VOCAB ? z[begin + i] : 1e9f;
    }
    memcpy(out, all, (size_t)stride * sizeof *out);
}

const struct model_config *model_get_config(const model *m) {
    static const struct model_config config = {.vocab_rows = FAKE_VOCAB_ROWS};
    (void)m;
    return &config;
}
const shard_map *model_get_shard(const model *m) {
    static shard_map map;
    (void)m;
    map.slabs = FAKE_SLABS;
    map.slab_count = 1; /* as borders: with one rank, all there is */
    map.vocab_begin[1] = FAKE_VOCAB_ROWS;
    return &map;
}
int64_t model_vocab_local_max(const model *m) {
    int64_t most = 0;
    (void)m;
    for (int r = 0; r < fake.ranks; r++) {
        const int64_t n = fake_slab_begin(fake_rank_slab(r + 1, fake.ranks)) -
                          fake_slab_begin(fake_rank_slab(r, fake.ranks));
        most = n > most ? n : most;
    }
    return most;
}

int comm_rank(const comm *c) { return c ? 0 : 0; }
int comm_size(const comm *c) { return c ? 0 : fake.ranks; }
size_t comm_bcast(comm *c, const void *mine, size_t n, const void **bytes) {
    (void)c;
    (void)bytes;
    enum plan_kind kind = PLAN_STEP;
    uint64_t step;
    int probe;
    struct batch view;
    struct plan_run run;
    const enum status seen = plan_view(mine, n, &fake.limits, &kind, &step, &probe, &view, &run);
    if (seen != STATUS_OK) printf("\n    %s\n", fail_text());
    CU_ASSERT(seen == STATUS_OK);
    fake.stops += kind == PLAN_STOP;
    return n;
}
const void *comm_gather(comm *c, const void *mine, size_t n) {
    (void)c;
    CU_ASSERT(memcmp(mine, fake.gather, n) == 0);
    if (fake.corrupt) fake.gather[n + 3] ^= 0x40; /* exponent of rank 1's first maximum */
    return fake.gather;
}
_Noreturn void comm_abort(comm *c, int exit_code, const char *text) {
    (void)c;
    if (!fake.corrupt) printf("\n    comm_abort(%d): %s\n", exit_code, text);
    const bool named = strstr(text, "step 0, request 1000, position 29: rank 1 gave") ||
                       strstr(text, "step 2, row 0: rank 1 decided otherwise");
    _exit(fake.corrupt && !named ? 99 : exit_code);
}

#include "i_fake_run.h"

#endif
