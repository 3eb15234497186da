/* attention_work.cuh: who computes what in the attention: found by every block from the rows alone.
 *
 *   group   up to group_max consecutive rows of one sequence; it ends where the next row is of
 *           another sequence, or at a position that is a multiple of group_max
 *   unit    a group and a tile of query heads: one pass over the keys of a kv head
 *   item    a unit and a split of 256 tokens: all items cost about the same
 *
 *   items   | group 0: tile 0: split 0 1 2 | tile 1: 0 1 2 | group 1: tile 0: 0 | tile 1: 0 | ...
 *   blocks  |----- 0 -----|----- 1 -----|----- 2 -----|----- 3 -----|
 *
 * Every block sums up the items of all rows, so a step's lengths may change without the host (a
 * captured graph), and takes an equal share of consecutive items. `whole`: shares are rounded to
 * units, for when there is no room to put half a unit. A group is known by its last row, and that a
 * row is the last can be seen from the next one: no pass over the rows but the sum.
 */
#ifndef SFUMATO_KERNELS_ATTENTION_WORK_CUH
#define SFUMATO_KERNELS_ATTENTION_WORK_CUH

#include "kernels/device.cuh"

struct attention_work {
    const struct kernels_row *rows;
    int row_count, group_max, tile_count;
};

/* An item: row is the last of its group, position that row's. */
struct work_item {
    int64_t index;
    int row, position, page_begin, tile, split;
};

/* What the threads of a block tell one another. */
struct work_shared {
    int64_t sums[WARP], end;
    int64_t begin_rest; /* items of begin_row's group before the block's first one */
    int begin_row;
};

/* items: of the step; [begin, end): of this block. blocks: how many got a share. */
struct work_share {
    int64_t items, begin, end;
    int blocks;
};

static __device__ __forceinline__ int work_splits(int position) {
    return position / KERNELS_SPLIT_TOKENS + 1;
}

/* Is r the last row of a group? place: the row. */
static __device__ __forceinline__ bool work_group_ends(const struct attention_work &w, int r,
                                                       struct kernels_row &place) {
    place = w.rows[r];
    if (place.position < 0) return false; /* padding */
    if (r + 1 == w.row_count) return true;
    const struct kernels_row next = w.rows[r + 1];
    return next.page_begin != place.page_begin || next.position != place.position + 1 ||
           next.position % w.group_max == 0;
}

/* Rows of the item's group. */
static __device__ __forceinline__ int work_group_rows(const struct attention_work &w,
                                                      const struct work_item &item) {
    int n = 1;
    for (; n < w.group_max && item.row - n >= 0 && (item.position - n + 1) % w.group_max != 0;
         n++) {
        const struct kernels_row before = w.rows[item.row - n];
        if (before.page_begin != item.page_begin || before.position != item.position - n) break;
    }
    return n;
}

/* The group that ends at row r or next after it; none: row = row_count. */
static __device__ __forceinline__ void work_find_group(const struct attention_work &w, int r,
                                                       struct work_item &item) {
    struct kernels_row place = {};
    while (r < w.row_count && !work_group_ends(w, r, place)) r++;
    item.row = r;
    if (r == w.row_count) return;
    item.position = place.position;
    item.page_begin = place.page_begin;
}

static __device__ __forceinline__ void work_next_unit(const struct attention_work &w,
                                                      struct work_item &item) {
    item.index += work_splits(item.position) - item.split;
    item.split = 0;
    if (++item.tile < w.tile_count) return;
    item.tile = 0;
    work_find_group(w, item.row + 1, item);
}

static __device__ __forceinline__ void work_next(const struct attention_work &w,
                                                 struct work_item &item) {
    if (item.split + 1 == work_splits(item.position)) {
        work_next_unit(w, item);
        return;
    }
    item.split++;
    item.index++;
}

/* First item of a block's share, and the block whose share has an item. */
static __device__ __forceinline__ int64_t work_begin(const struct work_share &share, int block) {
    return share.items * block / share.blocks;
}
static __device__ __forceinline__ int work_block_of(const struct work_share &share, int64_t item) {
    return (int)(((item + 1) * share.blocks - 1) / share.items);
}

/* The block's share and its first item; an empty share has begin >= end. More than room items are
 * shared out as whole units. All threads call. */
static __device__ __forceinline__ struct work_share work_divide(const struct attention_work &w,
                                                                int64_t room,
                                                                struct work_shared &shared,
                                                                struct work_item &first) {
    const int tid = (int)threadIdx.x, threads = (int)blockDim.x, lane = tid % WARP,
              warp = tid / WARP;
    const int each = (w.row_count + threads - 1) / threads;
    const int row_begin = min(tid * each, w.row_count),
              row_end = min(row_begin + each, w.row_count);
    struct kernels_row place;
    int64_t mine = 0;
    for (int r = row_begin; r < row_end; r++)
        if (work_group_ends(w, r, place))
            mine += (int64_t)work_splits(place.position) * w.tile_count;
    int64_t upto = mine; /* of the warp's threads up to this one */
    for (int step = 1; step < WARP; step *= 2) {
        const int64_t other = __shfl_sync(WARP_ALL, upto, lane - step);
        if (lane >= step) upto += other;
    }
    if (lane == WARP - 1) shared.sums[warp] = upto;
    __syncthreads();
    int64_t before = upto - mine;
    struct work_share share = {0, 0, 0, 0};
    for (int i = 0; i < threads / WARP; i++) {
        if (i < warp) before += shared.sums[i];
        share.items += shared.sums[i];
    }
    const int block = (int)blockIdx.x;
    share.blocks = (int)min((int64_t)gridDim.x, share.items);
    if (block >= share.blocks) return share;
    share.begin = work_begin(share, block);
    share.end = work_begin(share, block + 1);
    const bool whole = share.items > room;
    if (tid == 0) shared.end = share.end;
    __syncthreads();
    for (int border = 0; border < 2; border++) {
        const int64_t item = border ? share.end : share.begin;
        if (item < before || item >= before + mine || (border && !whole)) continue;
        int64_t rest = item - before;
        for (int r = row_begin; r < row_end; r++) {
            if (!work_group_ends(w, r, place)) continue;
            const int splits = work_splits(place.position);
            if (rest >= (int64_t)splits * w.tile_count) {
                rest -= (int64_t)splits * w.tile_count;
                continue;
            }
            if (border) {
                shared.end = (item + splits - 1) - (rest + splits - 1) % splits;
            } else {
                shared.begin_row = r;
                shared.begin_rest = rest;
            }
            break;
        }
    }
    __syncthreads();
    share.end = shared.end;
    first = {share.begin, 0, 0, 0, 0, 0};
    work_find_group(w, shared.begin_row, first);
    first.tile = (int)(shared.begin_rest / work_splits(first.position));
    first.split = (int)(shared.begin_rest % work_splits(first.position));
    if (whole && first.split > 0) work_next_unit(w, first);
    share.begin = first.index;
    return share;
}

#endif
