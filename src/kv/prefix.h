/* prefix.h: names for blocks of KV, safe for soft positions (soft-thinking.md §9).
 *
 * A block's key is the digest of every input from the sequence's start to the block's end: the id
 * for a hard position, the (ids, weights) for a soft one; a one-hot concept token counts as its id.
 * A soft position is never keyed by its trace id. 128 bits, seeded per process so that keys cannot
 * be forged by prompts. SipHash-2-4 chained through its key (prefix.c). Pure functions; no memory.
 */
#ifndef SFUMATO_KV_PREFIX_H
#define SFUMATO_KV_PREFIX_H

#include <stdint.h>

#include "kv/pages.h"

/* The digest before the first position; seed: random per process (or 0 in tests). */
struct kv_digest kv_digest_start(uint64_t seed);
/* The digest after one more input, count >= 1. A hard id is count = 1 with weight 1; weights may be
 * NULL for it. Weights count by their bits. */
struct kv_digest kv_digest_next(struct kv_digest before, const uint32_t *ids, const float *weights,
                                int count);

#endif
