/* comm_tree.c: see comm_tree.h.
 *
 * Written with the compiler's four-float vectors (SSE2, NEON: every target has them), so it does
 * not depend on what an optimiser makes of loops whose operands may overlap. Wider vectors gain
 * nothing: the slots come from other cores' caches, and their lines arrive more slowly than this
 * adds.
 */
#include "comm/comm_tree.h"

#include <string.h>

#include "comm/comm_path.h"

typedef float lanes __attribute__((vector_size(16), aligned(4), may_alias));
enum { LANES = 4 };

/* Sums any number of operands, of one vector or one float, level by level. */
#define SUM_LEVELS(node, ranks)                                                                   \
    for (int count_ = (ranks); count_ > 1; count_ = (count_ + 1) / 2) {                           \
        for (int i_ = 0; i_ < count_ / 2; i_++) (node)[i_] = (node)[2 * i_] + (node)[2 * i_ + 1]; \
        if (count_ % 2) (node)[count_ / 2] = (node)[count_ - 1];                                  \
    }

static float sum_one(const float *const *slots, int ranks, size_t at) {
    float node[COMM_RANKS_MAX];
    for (int r = 0; r < ranks; r++) node[r] = slots[r][at];
    SUM_LEVELS(node, ranks)
    return node[0];
}

static lanes sum_lanes(const float *const *slots, int ranks, size_t at) {
    lanes node[COMM_RANKS_MAX];
    for (int r = 0; r < ranks; r++) node[r] = *(const lanes *)(slots[r] + at);
    SUM_LEVELS(node, ranks)
    return node[0];
}

void comm_tree_sum(const float *const *slots, int ranks, size_t count, float *out) {
    ASSERT_LT(0, ranks);
    ASSERT_LE(ranks, COMM_RANKS_MAX);
    const size_t whole = count - count % LANES;
#define AT(r) (*(const lanes *)(slots[r] + i))
#define ALL_COLUMNS(expression) \
    for (size_t i = 0; i < whole; i += LANES) *(lanes *)(out + i) = (expression)
    switch (ranks) { /* the usual counts without a loop over ranks; the same tree */
        case 1:
            if (out != slots[0]) memcpy(out, slots[0], count * sizeof *out);
            return;
        case 2:
            ALL_COLUMNS(AT(0) + AT(1));
            break;
        case 3:
            ALL_COLUMNS((AT(0) + AT(1)) + AT(2));
            break;
        case 4:
            ALL_COLUMNS((AT(0) + AT(1)) + (AT(2) + AT(3)));
            break;
        case 8:
            ALL_COLUMNS(((AT(0) + AT(1)) + (AT(2) + AT(3))) + ((AT(4) + AT(5)) + (AT(6) + AT(7))));
            break;
        default:
            ALL_COLUMNS(sum_lanes(slots, ranks, i));
    }
#undef AT
#undef ALL_COLUMNS
    for (size_t i = whole; i < count; i++) out[i] = sum_one(slots, ranks, i);
}
