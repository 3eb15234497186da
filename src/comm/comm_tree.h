/* comm_tree.h: the fixed tree in which partial sums meet (cpu.md §3.1). Pure; any thread.
 *
 *   R = 4: (0+1) + (2+3)      R = 3: (0+1) + 2      R = 7: ((0+1) + (2+3)) + ((4+5) + 6)
 *
 * Adjacent pairs; an odd one out moves up unchanged. Every element of the result sees its R
 * operands in this order whatever the vector width, the range or the path, so bits are equal
 * everywhere.
 */
#ifndef SFUMATO_COMM_COMM_TREE_H
#define SFUMATO_COMM_COMM_TREE_H

#include <stddef.h>

/* out[count] = tree over slots[R][count]; 1 <= R <= COMM_RANKS_MAX. out may be one of the slots
 * (each element is read before it is written) but must not overlap one otherwise. */
void comm_tree_sum(const float *const *slots, int ranks, size_t count, float *out);

#endif
