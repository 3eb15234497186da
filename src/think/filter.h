/* filter.h: top_k, top_p, min_p over a sorted candidate list: exactly, or "the list is too short".
 *
 *   list   z'_0 >= z'_1 >= ... z'_{n-1} | ids that were not sent (all <= z'_{n-1})
 *          survivors are always a prefix: [0, count)
 *
 * All three filters cut a suffix, so the survivors are a prefix of the row's full order, and they
 * are kept as masses e_i = e^(z'_i - M) without dividing: renormalising between the filters changes
 * only the total that top_p is compared with (S, or the sum of the first top_k).
 * The row goes on past the list unless the list is complete, shows an id without mass (everything
 * after has none either), or a filter cut inside it. filter_run answers false unless the wanted
 * survivors are exactly those of the complete row; then every list that is long enough gives the
 * same bits: the same masses, added in the same order. Totals are sums in double: over 150,000
 * sorted masses an fp32 sum loses the tail.
 */
#ifndef SFUMATO_THINK_FILTER_H
#define SFUMATO_THINK_FILTER_H

#include "think/token.h"

enum { FILTER_ALL = INT32_MAX }; /* wanted: every survivor */

struct filter_result {
    int count; /* survivors listed, at most `wanted` */
    bool cut;  /* some filter is on: the survivors' total is the sum of their masses */
    bool more; /* only when !cut: the row goes on past the list */
    float mass[THINK_TOPK_MAX]; /* of the first survivors: nearly always all that are needed */
};

static inline SFUMATO_DEVICE float filter_mass(const struct filter_result *r,
                                               const struct think_candidates *c, int i) {
    return i < THINK_TOPK_MAX ? r->mass[i] : token_mass(c, i);
}

static inline SFUMATO_DEVICE double filter_total(const struct filter_result *r,
                                                 const struct think_candidates *c, int count) {
    double total = 0;
    for (int i = 0; i < count; i++) total += (double)filter_mass(r, c, i);
    return total;
}

/* The first `wanted` survivors (all of them: FILTER_ALL). False: the list is too short to know. An
 * unfiltered row is never refused: `more` then tells that it goes on. */
static inline SFUMATO_DEVICE bool filter_run(const struct think_filters *f,
                                             const struct think_candidates *c, int wanted,
                                             struct filter_result *out) {
    int n = 0;
    while (n < c->count && c->z[n] - c->m >= FMATH_EXP_MIN) n++; /* ids with mass */
    bool whole = c->complete || n < c->count; /* nothing with mass is missing from [0, n) */
    out->cut = f->top_k > 0 || f->top_p < 1.0f || f->min_p > 0.0f;

    const bool top_k_listed = f->top_k > 0 && f->top_k <= n;
    if (top_k_listed) {
        n = f->top_k;
        whole = true;
    }
    for (int i = 0; i < n && i < THINK_TOPK_MAX; i++) out->mass[i] = token_mass(c, i);
    if (f->top_p < 1.0f) {
        /* a top_k cut past the list: part of the kept sum is there too */
        if (f->top_k > 0 && !whole) return false;
        const double total = top_k_listed ? filter_total(out, c, n) : (double)c->s;
        const double target = (double)f->top_p * total;
        double cumulative = 0;
        for (int i = 0; i < n; i++) {
            cumulative += (double)filter_mass(out, c, i);
            if (cumulative >= target) {
                n = i + 1;
                whole = true;
                break;
            }
        }
    }
    if (f->min_p > 0.0f) {
        const double floor = (double)f->min_p * (double)out->mass[0];
        for (int i = 1; i < n; i++)
            if ((double)filter_mass(out, c, i) < floor) {
                n = i;
                whole = true;
                break;
            }
    }
    out->more = !whole;
    if (n >= wanted) {
        n = wanted;
        out->more = false; /* what lies past the list was not asked for */
    }
    out->count = n;
    return !out->more || !out->cut; /* an uncut row may go on: its total is S */
}

#endif
