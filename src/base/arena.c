/* arena.c: see arena.h.
 *
 *   head -> [block header | used ... | free ...] -> [older block] -> ... -> NULL
 *
 * A request that does not fit into the head block gets a new block: 2 KiB at first, as most requests
 * of a server need no more, then twice the last one up to 64 KiB, and never less than what is asked
 * for. The rest of the old block is wasted, which is at most half on average for the small sizes we
 * hand out.
 */
#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

struct arena_block {
    struct arena_block *older;
    size_t size_bytes, used_bytes;
    _Alignas(ARENA_ALIGN_BYTES) unsigned char bytes[];
};

/* Of the next block when `bytes` are asked for. */
static size_t block_size(const arena *a, size_t bytes) {
    size_t size = a->head ? 2 * a->head->size_bytes : ARENA_FIRST_BYTES;
    if (size > ARENA_BLOCK_BYTES) size = ARENA_BLOCK_BYTES;
    return bytes > size ? bytes : size;
}

void arena_init(arena *a, size_t limit_bytes) { *a = (arena){.limit_bytes = limit_bytes}; }

void arena_fini(arena *a) {
    struct arena_block *block = a->head;
    while (block) {
        struct arena_block *older = block->older;
        free(block);
        block = older;
    }
    *a = (arena){.limit_bytes = a->limit_bytes};
}

void *arena_alloc(arena *a, size_t bytes) {
    if (bytes > SIZE_MAX / 2) goto full;
    bytes = (bytes + ARENA_ALIGN_BYTES - 1) / ARENA_ALIGN_BYTES * ARENA_ALIGN_BYTES;
    if (a->limit_bytes && bytes > a->limit_bytes - a->used_bytes) goto full;
    if (!a->head || a->head->size_bytes - a->head->used_bytes < bytes) {
        const size_t size = block_size(a, bytes);
        struct arena_block *block = calloc(1, sizeof *block + size);
        if (!block) goto full;
        block->older = a->head;
        block->size_bytes = size;
        a->head = block;
    }
    void *p = a->head->bytes + a->head->used_bytes;
    a->head->used_bytes += bytes;
    a->used_bytes += bytes;
    return p;
full:
    fail(STATUS_MEMORY, "cannot allocate %zu bytes (%zu in use, limit %zu)", bytes, a->used_bytes,
         a->limit_bytes);
    return NULL;
}

void *arena_alloc_array(arena *a, size_t count, size_t size) {
    if (size && count > SIZE_MAX / 2 / size) {
        fail(STATUS_MEMORY, "cannot allocate %zu items of %zu bytes", count, size);
        return NULL;
    }
    return arena_alloc(a, count * size);
}

char *arena_strndup(arena *a, const char *text, size_t n) {
    char *copy = arena_alloc(a, n + 1);
    if (copy) memcpy(copy, text, n);
    return copy;
}
