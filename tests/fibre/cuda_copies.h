/* cuda_copies.h: asynchronous copies into shared memory (cp.async) and ldmatrix, for the emulation.
 *
 * A copy is carried out when its thread waits for the group it belongs to, and not before: a kernel
 * that reads too early finds what was there. The source is read at that time too; a GPU may do it
 * at any time in between, so nobody may write it meanwhile. A queue belongs to a thread of the block;
 * what a thread did not wait for is forgotten when the next one of its number starts a copy.
 */
#ifndef SFUMATO_TESTS_CUDA_COPIES_H
#define SFUMATO_TESTS_CUDA_COPIES_H

#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <vector>

#include "fibre/cuda_fibre.h"

struct fibre_copy {
    void *to;
    const void *from; /* NULL: zeros */
    unsigned bytes;
};
struct fibre_copies {
    const unsigned char *shared = nullptr; /* of the block that the queue belongs to */
    dim3 block = {~0u, ~0u, ~0u};
    std::vector<fibre_copy> open;
    std::deque<std::vector<fibre_copy>> groups;
};

static inline fibre_copies &fibre_my_copies() {
    static thread_local std::vector<fibre_copies> all(1024);
    fibre_copies &mine = all[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
    const dim3 b = blockIdx;
    if (mine.shared != fibre_shared || mine.block.x != b.x || mine.block.y != b.y ||
        mine.block.z != b.z) {
        mine = fibre_copies();
        mine.shared = fibre_shared;
        mine.block = b;
    }
    return mine;
}

static inline void fibre_aligned(const void *p, unsigned bytes, const char *what) {
    if ((uintptr_t)p % bytes == 0) return;
    fprintf(stderr, "fibre: %s: an address that is no multiple of %u\n", what, bytes);
    abort();
}

static inline void fibre_copy_async(void *to, const void *from, unsigned bytes, bool valid) {
    fibre_aligned(to, bytes, "copy to shared memory");
    fibre_aligned(from, bytes, "copy to shared memory, source");
    fibre_my_copies().open.push_back({to, valid ? from : nullptr, bytes});
}
static inline void fibre_copy_commit() {
    fibre_copies &mine = fibre_my_copies();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
/* All groups but the last `pending` are carried out. */
static inline void fibre_copy_wait(unsigned pending) {
    fibre_copies &mine = fibre_my_copies();
    for (; mine.groups.size() > pending; mine.groups.pop_front())
        for (const fibre_copy &c : mine.groups.front()) {
            if (c.from)
                memcpy(c.to, c.from, c.bytes);
            else
                memset(c.to, 0, c.bytes);
        }
}

/* Four 8 x 8 matrices of 2-byte elements; lane l gives the address of row l % 8 of matrix l / 8 and
 * gets, of each, row g's elements 2t and 2t + 1 (transposed: column g's). */
static inline uint4 fibre_load_matrices(const void *row, bool transposed) {
    fibre_aligned(row, 16, "ldmatrix");
    uint64_t rows[32];
    memcpy(rows, fibre_exchange((uint64_t)(uintptr_t)row), sizeof rows);
    const unsigned lane = fibre_lane(), g = lane / 4, t = lane % 4;
    uint16_t out[4][2];
    for (unsigned m = 0; m < 4; m++)
        for (unsigned e = 0; e < 2; e++) {
            const unsigned i = transposed ? 2 * t + e : g, k = transposed ? g : 2 * t + e;
            memcpy(&out[m][e], (const unsigned char *)(uintptr_t)rows[8 * m + i] + 2 * k, 2);
        }
    uint4 answer;
    memcpy(&answer, out, sizeof answer);
    return answer;
}

#endif
