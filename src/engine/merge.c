/* merge.c: see merge.h. Statistics tree, K-way merge of sorted pairs, full sort of a fetched row.
 *
 * A record comes from another process and is checked completely before use: a flipped bit must end
 * the job with a name, not become a plausible token. R and K are at most 64, so the merge looks at
 * all R heads for each pair taken. The full sort is the slow path (a filter wider than the
 * candidate list): a radix sort of (z descending, id ascending) keys in memory the engine has
 * ready, 1-2 ms for 150,000 ids.
 */
#include "engine/merge.h"

#include <math.h>
#include <string.h>

#include "base/fmath.h"

struct stats {
    float m, s, q;
};

static const struct batch_record *record_of(const void *gathered, const struct batch *b, int rank,
                                            int probe) {
    const size_t stride = (size_t)batch_record_bytes(b->candidate_count, b->watch_max);
    const size_t index = (size_t)rank * (size_t)b->probe_count + (size_t)probe;
    return (const void *)((const unsigned char *)gathered + index * stride);
}

static enum status impossible(int rank, const char *what, double value) {
    return fail(STATUS_COMM, "rank %d gave an impossible candidate record: %s (%g)", rank, what,
                value);
}

/* Everything a flipped bit or a broken kernel could do to what follows. NaN fails every comparison.
 */
static enum status check_record(const struct batch_record *r, const struct batch *b, int rank,
                                int64_t vocab_begin, int64_t vocab_end) {
    const struct batch_pair *pairs = (const void *)(r + 1);
    if (r->count < 0 || r->count > b->candidate_count) return impossible(rank, "count", r->count);
    if (!(r->m < INFINITY)) return impossible(rank, "maximum", (double)r->m);
    if (r->m == -INFINITY) {
        if (r->count != 0) return impossible(rank, "candidates without a maximum", r->count);
    } else {
        if (r->count < 1 || pairs[0].z != r->m)
            return impossible(rank, "best candidate", (double)r->m);
        if (!(r->s >= 1.0f && r->s < INFINITY)) return impossible(rank, "sum", (double)r->s);
        if (!(r->q <= 0.0f && r->q > -INFINITY))
            return impossible(rank, "entropy sum", (double)r->q);
    }
    for (int i = 0; i < r->count; i++) {
        const bool after = i == 0 || pairs[i].z < pairs[i - 1].z ||
                           (pairs[i].z == pairs[i - 1].z && pairs[i].id > pairs[i - 1].id);
        if (!after || !(pairs[i].z > -INFINITY))
            return impossible(rank, "order of candidates", (double)pairs[i].z);
        if (pairs[i].id < vocab_begin || pairs[i].id >= vocab_end)
            return impossible(rank, "candidate id", pairs[i].id);
    }
    return STATUS_OK;
}

/* The `keep` best of R sorted lists: the best head wins, ties cannot happen (ids are distinct). */
static void merge_pairs(const struct batch_record *const *records, int ranks, int keep,
                        struct merge_row *out) {
    int next[MERGE_RANKS_MAX] = {0};
    for (out->count = 0; out->count < keep; out->count++) {
        int best = -1;
        struct batch_pair top = {0};
        for (int r = 0; r < ranks; r++) {
            if (next[r] == records[r]->count) continue;
            const struct batch_pair p =
                ((const struct batch_pair *)(const void *)(records[r] + 1))[next[r]];
            if (best < 0 || p.z > top.z || (p.z == top.z && p.id < top.id)) {
                best = r;
                top = p;
            }
        }
        if (best < 0) return;
        next[best]++;
        out->z[out->count] = top.z;
        out->id[out->count] = top.id;
    }
}

enum status merge_records(const void *gathered, int ranks, const struct batch *batch, int probe,
                          int keep, const int64_t *vocab_begin, struct merge_row *out) {
    ASSERT(ranks >= 1 && ranks <= MERGE_RANKS_MAX);
    ASSERT_LE(keep, batch->candidate_count);
    const struct batch_record *records[MERGE_RANKS_MAX];
    struct stats level[MERGE_RANKS_MAX];
    const struct batch_probe *p = &batch->probes[probe];
    for (int w = 0; w < p->watch_count; w++) out->watch_z[w] = -INFINITY;
    for (int r = 0; r < ranks; r++) {
        records[r] = record_of(gathered, batch, r, probe);
        TRY(check_record(records[r], batch, r, vocab_begin[r], vocab_begin[r + 1]));
        level[r] = (struct stats){records[r]->m, records[r]->s, records[r]->q};
        const struct batch_pair *watch =
            (const struct batch_pair *)(const void *)(records[r] + 1) + batch->candidate_count;
        for (int w = 0; w < p->watch_count; w++) {
            if (!(watch[w].z < INFINITY)) return impossible(r, "watched logit", (double)watch[w].z);
            if (watch[w].z > out->watch_z[w]) out->watch_z[w] = watch[w].z;
        }
    }
    for (int n = ranks; n > 1; n = (n + 1) / 2) { /* adjacent pairs; an odd one out moves up */
        for (int i = 0; i < n / 2; i++) {
            const struct stats right = level[2 * i + 1];
            level[i] = level[2 * i];
            batch_stats_join(&level[i].m, &level[i].s, &level[i].q, right.m, right.s, right.q);
        }
        if (n % 2) level[n / 2] = level[n - 1];
    }
    out->m = level[0].m;
    out->s = level[0].s;
    out->q = level[0].q;
    merge_pairs(records, ranks, keep, out);
    return STATUS_OK;
}

float merge_logprob(const struct merge_row *row, float z) {
    return (z - row->m) - fmath_log(row->s);
}

/* Descending floats as ascending integers (-0 and +0 are equal to think_step, so they are here). */
static uint32_t descending_key(float z) {
    uint32_t bits;
    z += 0.0f; /* -0 becomes +0 */
    memcpy(&bits, &z, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

int64_t merge_full(const float *gathered, int ranks, int64_t stride, const int64_t *vocab_begin,
                   int64_t vocab_count, uint64_t *scratch, float *z, uint32_t *id) {
    uint64_t *from = scratch, *to = scratch + vocab_count;
    int64_t n = 0;
    for (int r = 0; r < ranks; r++) {
        const float *local = gathered + r * stride;
        for (int64_t i = vocab_begin[r]; i < vocab_begin[r + 1] && i < vocab_count; i++) {
            const float value = local[i - vocab_begin[r]];
            if (value > -INFINITY) from[n++] = (uint64_t)descending_key(value) << 32 | (uint64_t)i;
        }
    }
    /* radix sort of the keys, 11 bits a pass; stable, so equal keys stay in order of their ids */
    for (int shift = 32; shift < 64; shift += 11) {
        int64_t begin[1 << 11] = {0}, sum = 0;
        for (int64_t i = 0; i < n; i++) begin[from[i] >> shift & 0x7ff]++;
        for (int d = 0; d < 1 << 11; d++) {
            const int64_t count = begin[d];
            begin[d] = sum;
            sum += count;
        }
        for (int64_t i = 0; i < n; i++) to[begin[from[i] >> shift & 0x7ff]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    for (int64_t i = 0; i < n; i++) {
        const uint32_t key = (uint32_t)(from[i] >> 32);
        const uint32_t bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
        id[i] = (uint32_t)from[i];
        memcpy(&z[i], &bits, sizeof bits);
    }
    return n;
}
