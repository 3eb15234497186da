/* shard.h: which rank holds what. Pure integers, no I/O, no memory; tested exhaustively.
 *
 * Every sharded dimension is always cut into S slabs, whatever the number of ranks R: unit i of n is in
 * slab floor(i*S/n). Rank r of R owns the contiguous slabs [floor(r*S/R), floor((r+1)*S/R)). The map
 * depends on the model and S only, which is what makes R = 1, 2, 4, 8 give equal bits (cpu.md §3.1).
 *
 *   vocabulary   unit = one row of the matrix, padding rows included
 *   ffn          unit = SHARD_FFN_UNIT columns (the last one may be short)
 *   attention    unit = kv group: group i anchors at slab a_i = floor(i*S/n) and spans
 *                r_i = max(1, a_{i+1} - a_i) slabs; query head j of g goes to slab a_i + floor(j*r_i/g)
 *
 * A rank stores every kv head one of its query heads reads, so kv heads are replicated where a rank
 * border cuts a group. Slabs may be empty (fewer units than slabs): they are absent from sums.
 */
#ifndef SFUMATO_LOAD_SHARD_H
#define SFUMATO_LOAD_SHARD_H

#include <stdint.h>

#include "base/check.h"

enum { SHARD_SLABS_DEFAULT = 8, SHARD_SLABS_MAX = 64, SHARD_RANKS_MAX = 64, SHARD_FFN_UNIT = 32 };

/* The sharded dimensions of a model. */
struct shard_dims {
    int64_t vocab_rows; /* rows of the embedding and output matrices */
    int64_t ffn;        /* intermediate size, columns */
    int heads, kv_heads, head_dim;
};

/* What one rank holds. Ranges are half open. Per-slab arrays are indexed by slab - slab_begin and have
 * slab_count + 1 entries; entries are global indices, so slab s holds [begin[s], begin[s+1]). */
typedef struct shard_map {
    int slabs, ranks, rank; /* S, R, r */
    int slab_begin, slab_count;
    int64_t vocab_begin[SHARD_SLABS_MAX + 1];
    int64_t ffn_begin[SHARD_SLABS_MAX + 1]; /* columns */
    int head_begin[SHARD_SLABS_MAX + 1];    /* query heads */
    int kv_begin, kv_end; /* kv heads stored, global indices; empty when no heads */
} shard_map;

/* floor(i*S/n), and the first unit whose slab is >= s: ceil(s*n/S). */
int shard_slab_of(int64_t i, int64_t n, int slabs);
int64_t shard_slab_begin(int s, int64_t n, int slabs);
/* The slab of query head h (global index). */
int shard_head_slab(int h, int heads, int kv_heads, int slabs);
/* The default slab count for R ranks: max(8, next power of two >= R). */
int shard_default_slabs(int ranks);

/* STATUS_USAGE (naming the legal counts) when R ranks or S slabs cannot split the model: R <= 64,
 * S a power of two in [R, 64], and at least one query head, ffn unit and vocabulary row a rank. */
enum status shard_check(const struct shard_dims *dims, int slabs, int ranks);
/* Fills the map of one rank; the arguments must have passed shard_check. */
void shard_map_init(shard_map *map, const struct shard_dims *dims, int slabs, int ranks, int rank);

/* Sizes of what the rank holds. */
int64_t shard_vocab_count(const shard_map *map);
int64_t shard_ffn_count(const shard_map *map);
int shard_head_count(const shard_map *map);
int shard_kv_count(const shard_map *map);

#endif
