/* tree_reference.h: the sum tree of cpu.md §3.1 written out by hand, one line a rank count.
 * Independent of comm_tree.c on purpose: no loop, no shared helper. */
#ifndef SFUMATO_TESTS_TREE_REFERENCE_H
#define SFUMATO_TESTS_TREE_REFERENCE_H

#include <math.h>

/* x[ranks], 1 <= ranks <= 8. volatile: every partial sum is rounded to float, on every machine. */
static inline float tree_reference(const float *x, int ranks) {
    volatile float p01, p23, p45, p67, q;
    switch (ranks) {
        case 1:
            return x[0];
        case 2:
            return x[0] + x[1];
        case 3:
            p01 = x[0] + x[1];
            return p01 + x[2];
        case 4:
            p01 = x[0] + x[1];
            p23 = x[2] + x[3];
            return p01 + p23;
        case 5:
            p01 = x[0] + x[1];
            p23 = x[2] + x[3];
            q = p01 + p23;
            return q + x[4];
        case 6:
            p01 = x[0] + x[1];
            p23 = x[2] + x[3];
            q = p01 + p23;
            p45 = x[4] + x[5];
            return q + p45;
        case 7:
            p01 = x[0] + x[1];
            p23 = x[2] + x[3];
            q = p01 + p23;
            p45 = x[4] + x[5];
            p67 = p45 + x[6];
            return q + p67;
        case 8:
            p01 = x[0] + x[1];
            p23 = x[2] + x[3];
            q = p01 + p23;
            p45 = x[4] + x[5];
            p67 = x[6] + x[7];
            p45 = p45 + p67;
            return q + p45;
        default:
            return NAN;
    }
}

#endif
