/* merge.h: the ranks' answers about one row become one answer (engine-internal, rank 0).
 *
 *   rank 0 record ─┐
 *   rank 1 record ─┼─► statistics along the tree, K best pairs, watched ids
 *   rank 2 record ─┘
 *
 * Statistics are merged exactly as inside a rank (cpu.md §3.1), so that 1, 2, 4 and 8 ranks give
 * one and the same tree over slabs and equal bits. Records come from other processes: each is
 * checked before it is believed. Pure functions; the caller's memory.
 */
#ifndef SFUMATO_ENGINE_MERGE_H
#define SFUMATO_ENGINE_MERGE_H

#include <stdint.h>

#include "backend/batch.h"
#include "base/check.h"
#include "think/think.h"

enum { MERGE_RANKS_MAX = 64 };

struct merge_row {
    float m, s, q;
    int count; /* pairs listed */
    float z[THINK_TOPK_MAX];
    uint32_t id[THINK_TOPK_MAX];
    float watch_z[THINK_TOPK_MAX]; /* in the order asked; -inf: masked */
};

/* gathered: [R][probe_count] records of batch_record_bytes(K, watch_max). Answers probe `probe`:
 * the `keep` best pairs (keep <= K; a row's own width, so that it does not see its neighbours') and
 * the first `watch_count` watched ids. vocab_begin: [R + 1] first id of each rank. STATUS_COMM
 * names the rank whose record is impossible. */
enum status merge_records(const void *gathered, int ranks, const struct batch *batch, int probe,
                          int keep, const int64_t *vocab_begin, struct merge_row *out);

/* ln of the probability of z under the row's statistics. */
float merge_logprob(const struct merge_row *row, float z);

/* The slow path. gathered: [R][stride] z' of every local id. Fills z and id [<= vocab_count] with
 * all ids of z' > -inf in candidate order (z desc, id asc) and returns how many. scratch: [2 *
 * vocab_count]. */
int64_t merge_full(const float *gathered, int ranks, int64_t stride, const int64_t *vocab_begin,
                   int64_t vocab_count, uint64_t *scratch, float *z, uint32_t *id);

#endif
