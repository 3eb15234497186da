/* e_rows.h: rows of logits for the thinking suites: what the merged candidates would be.
 *
 * row_build does it the slow, obvious way: divide, sort everything, statistics in double. row_list
 * then shows the first `count` ids as a candidate list, or the whole row.
 */
#ifndef SFUMATO_TESTS_E_ROWS_H
#define SFUMATO_TESTS_E_ROWS_H

#include "suite.h"
#include "think/think.h"

enum { ROW_MAX = 4096 };

struct row {
    int vocab; /* ids; those with z = -inf are listed last in a complete list */
    float m, s, q;
    float z[ROW_MAX]; /* z', sorted by (z' desc, id asc) */
    uint32_t id[ROW_MAX];
    float by_id[ROW_MAX]; /* z' of each id */
};

static int row_compare(const void *a, const void *b) {
    const struct {
        float z;
        uint32_t id;
    } *x = a, *y = b;
    if (x->z != y->z) return x->z < y->z ? 1 : -1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static inline void row_build(struct row *r, const float *logits, int vocab, float temperature) {
    static struct {
        float z;
        uint32_t id;
    } pair[ROW_MAX];
    r->vocab = vocab;
    for (int i = 0; i < vocab; i++) {
        pair[i].z = r->by_id[i] = logits[i] / temperature;
        pair[i].id = (uint32_t)i;
    }
    qsort(pair, (size_t)vocab, sizeof pair[0], row_compare);
    r->m = pair[0].z;
    double s = 0, q = 0;
    for (int i = 0; i < vocab; i++) {
        r->z[i] = pair[i].z;
        r->id[i] = pair[i].id;
        if (pair[i].z == -INFINITY) continue;
        const double d = (double)pair[i].z - (double)r->m;
        s += exp(d);
        q += d * exp(d);
    }
    r->s = (float)s;
    r->q = (float)q;
}

/* count <= 0 or >= vocab: the complete list. close_id < 0: no close marker. */
static inline struct think_candidates row_list(const struct row *r, int count, int close_id) {
    const bool complete = count <= 0 || count >= r->vocab;
    const struct think_candidates c = {
        .m = r->m,
        .s = r->s,
        .q = r->q,
        .count = complete ? r->vocab : count,
        .complete = complete,
        .z = r->z,
        .id = r->id,
        .close_z = close_id >= 0 ? r->by_id[close_id] : -INFINITY,
    };
    return c;
}

/* Logits of several kinds: broad, language-like, nearly certain, exact ties, uniform, wide. */
static inline void row_logits(float *z, int vocab, uint64_t seed) {
    const uint32_t kind = suite_random(seed, 1u << 30) % 6;
    for (int i = 0; i < vocab; i++) {
        const float x = suite_random_float(seed, (uint32_t)i);
        z[i] = kind == 3 ? roundf(2 * x) : kind == 4 ? -3.5f : kind == 5 ? 30 * x : 2 * x;
    }
    if (kind == 1)
        for (int k = 0; k < 8; k++) z[suite_random(seed, (1u << 30) + 1 + k) % vocab] += 7;
    if (kind == 2) z[suite_random(seed, (1u << 30) + 1) % vocab] += 25;
}

/* Soft mode, no filter, no end of any kind; everything else at its default. */
static inline struct think_params row_params(enum think_mode mode) {
    struct think_params p;
    memset(&p, 0, sizeof p);
    p.mode = mode;
    p.max_topk = 10;
    p.thinking = p.answer =
        (struct think_filters){.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0};
    p.start = START_FIRST_TOKEN;
    p.gumbel_temperature = 0.5f;
    p.dirichlet_alpha = 1;
    p.seed = 1;
    p.open_id = p.close_id = -1;
    return p;
}

static inline struct think_state row_state(const struct think_params *p) {
    struct think_state s;
    think_state_init(&s, p, NULL, 0);
    return s;
}

#endif
