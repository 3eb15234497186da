/* filter.h: top_k, top_p, min_p over a sorted candidate list, exactly, or an honest "list too
 * short".
 *
 *   list   z'_0 >= z'_1 >= ... z'_{n-1} | ids that were not sent (all <= z'_{n-1})
 *          survivors are always a prefix: [0, count)
 *
 * All three filters cut a suffix, so the survivors are a prefix of the row's full order, and they
 * are kept as masses e_i = e^(z'_i - M) without dividing: renormalising between the filters changes
 * only the total that top_p is compared with (S, or the sum of the first top_k). The row goes on
 * past the list unless the list is complete, shows an id without mass (everything after has none
 * either), or a filter cut inside it. filter_run answers false unless the asked-for survivors are
 * exactly those of the complete row; then every list that is long enough gives the same bits: the
 * same masses, added in the same order. Totals are sums in double: over 150,000 sorted masses an
 * fp32 sum loses the tail.
 */
#ifndef SFUMATO_THINK_FILTER_H
#define SFUMATO_THINK_FILTER_H

#include "think/token.h"

enum { FILTER_ALL = INT32_MAX }; /* wanted: every survivor */

struct filter_result {
    int count; /* survivors listed, at most `wanted` */
    bool cut;  /* some filter is on: the survivors' total is the sum of their masses */
    bool more; /* only when !cut: the row goes on past the list */
};

static inline SFUMATO_DEVICE bool filter_run(const struct think_filters *f,
                                             const struct think_candidates *c, int wanted,
                                             struct filter_result *out) {
    int n = 0;
    while (n < c->count && c->z[n] - c->m >= FMATH_EXP_MIN) n++; /* ids with mass */
    bool whole = c->complete || n < c->count; /* nothing with mass is missing from [0, n) */
    bool total_known = true;
    double total = (double)c->s;
    out->cut = f->top_k > 0 || f->top_p < 1.0f || f->min_p > 0.0f;

    if (f->top_k > 0 && f->top_k <= n) {
        n = f->top_k;
        whole = true;
        total = 0;
        if (f->top_p < 1.0f)
            for (int i = 0; i < n; i++) total += (double)token_mass(c, i);
    } else if (f->top_k > 0 && !whole) {
        total_known =
            false; /* a cut somewhere past the list: its sum is unknown, its prefix is not */
    }
    if (f->top_p < 1.0f) {
        if (!total_known) return false;
        const double target = (double)f->top_p * total;
        double cumulative = 0;
        for (int i = 0; i < n; i++) {
            cumulative += (double)token_mass(c, i);
            if (cumulative >= target) {
                n = i + 1;
                whole = true;
                break;
            }
        }
    }
    if (f->min_p > 0.0f) {
        const double floor = (double)f->min_p * (double)token_mass(c, 0);
        for (int i = 1; i < n; i++)
            if ((double)token_mass(c, i) < floor) {
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
