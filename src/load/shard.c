/* shard.c: see shard.h. All products are taken in 64 bits: i*S stays far below 2^63. */
#include "load/shard.h"

#include <stdio.h>
#include <string.h>

int shard_slab_of(int64_t i, int64_t n, int slabs) { return (int)(i * slabs / n); }

int64_t shard_slab_begin(int s, int64_t n, int slabs) { return (s * n + slabs - 1) / slabs; }

int shard_head_slab(int h, int heads, int kv_heads, int slabs) {
    const int group_heads = heads / kv_heads;
    const int group = h / group_heads, j = h % group_heads;
    const int anchor = shard_slab_of(group, kv_heads, slabs);
    const int next = shard_slab_of(group + 1, kv_heads, slabs);
    const int span = next - anchor > 1 ? next - anchor : 1;
    return anchor + j * span / group_heads;
}

int shard_default_slabs(int ranks) {
    int slabs = SHARD_SLABS_DEFAULT;
    while (slabs < ranks) slabs *= 2;
    return slabs;
}

static int first_slab(int rank, int slabs, int ranks) { return rank * slabs / ranks; }

/* First query head whose slab is >= s. Heads are monotone in slabs, so a scan is a search. */
static int head_slab_begin(int s, const struct shard_dims *dims, int slabs) {
    int h = 0;
    while (h < dims->heads && shard_head_slab(h, dims->heads, dims->kv_heads, slabs) < s) h++;
    return h;
}

static int64_t ffn_units(const struct shard_dims *dims) {
    return (dims->ffn + SHARD_FFN_UNIT - 1) / SHARD_FFN_UNIT;
}

static bool rank_count_fits(const struct shard_dims *dims, int slabs, int ranks) {
    for (int r = 0; r < ranks; r++) {
        const int s0 = first_slab(r, slabs, ranks), s1 = first_slab(r + 1, slabs, ranks);
        const int64_t units = ffn_units(dims);
        if (head_slab_begin(s0, dims, slabs) == head_slab_begin(s1, dims, slabs)) return false;
        if (shard_slab_begin(s0, units, slabs) == shard_slab_begin(s1, units, slabs)) return false;
        if (shard_slab_begin(s0, dims->vocab_rows, slabs) ==
            shard_slab_begin(s1, dims->vocab_rows, slabs))
            return false;
    }
    return true;
}

enum status shard_check(const struct shard_dims *dims, int slabs, int ranks) {
    if (slabs < 1 || slabs > SHARD_SLABS_MAX || (slabs & (slabs - 1)) != 0 || slabs < ranks) {
        return fail(STATUS_USAGE,
                    "--slabs %d: must be a power of two, at least the number of ranks (%d) and at "
                    "most %d",
                    slabs, ranks, SHARD_SLABS_MAX);
    }
    if (ranks >= 1 && ranks <= SHARD_RANKS_MAX && rank_count_fits(dims, slabs, ranks)) {
        return STATUS_OK;
    }
    char legal[256] = "";
    size_t n = 0;
    for (int r = 1; r <= SHARD_RANKS_MAX && n + 8 < sizeof legal; r++) {
        if (rank_count_fits(dims, shard_default_slabs(r), r)) {
            n += (size_t)snprintf(legal + n, sizeof legal - n, "%s%d", n ? ", " : "", r);
        }
    }
    return fail(
        STATUS_USAGE,
        "%d ranks cannot split a model with %d query heads, %d kv heads and %lld ffn columns: "
        "start mpirun with -n %s",
        ranks, dims->heads, dims->kv_heads, (long long)dims->ffn, legal);
}

void shard_map_init(shard_map *map, const struct shard_dims *dims, int slabs, int ranks, int rank) {
    memset(map, 0, sizeof *map);
    map->slabs = slabs;
    map->ranks = ranks;
    map->rank = rank;
    map->slab_begin = first_slab(rank, slabs, ranks);
    map->slab_count = first_slab(rank + 1, slabs, ranks) - map->slab_begin;
    for (int i = 0; i <= map->slab_count; i++) {
        const int s = map->slab_begin + i;
        const int64_t column = shard_slab_begin(s, ffn_units(dims), slabs) * SHARD_FFN_UNIT;
        map->vocab_begin[i] = shard_slab_begin(s, dims->vocab_rows, slabs);
        map->ffn_begin[i] = column < dims->ffn ? column : dims->ffn;
        map->head_begin[i] = head_slab_begin(s, dims, slabs);
    }
    const int h0 = map->head_begin[0], h1 = map->head_begin[map->slab_count];
    if (h1 > h0) {
        const int group_heads = dims->heads / dims->kv_heads;
        map->kv_begin = h0 / group_heads;
        map->kv_end = (h1 - 1) / group_heads + 1;
    }
}

int64_t shard_vocab_count(const shard_map *map) {
    return map->vocab_begin[map->slab_count] - map->vocab_begin[0];
}
int64_t shard_ffn_count(const shard_map *map) {
    return map->ffn_begin[map->slab_count] - map->ffn_begin[0];
}
int shard_head_count(const shard_map *map) {
    return map->head_begin[map->slab_count] - map->head_begin[0];
}
int shard_kv_count(const shard_map *map) { return map->kv_end - map->kv_begin; }
