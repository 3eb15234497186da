/* arena.h: memory with one lifetime and one free.
 *
 * A chain of blocks; allocation bumps a pointer, everything goes at once with arena_fini. Used for a
 * request, a parsed file, a tokenizer: whatever dies together. Thread: one owner at a time.
 * Memory: growing blocks, up to ARENA_BLOCK_BYTES, from malloc; a request larger than the limit given at
 * init fails with STATUS_MEMORY's NULL instead of growing, so hostile counts cannot eat the machine.
 */
#ifndef SFUMATO_BASE_ARENA_H
#define SFUMATO_BASE_ARENA_H

#include <stddef.h>

enum { ARENA_FIRST_BYTES = 2 * 1024, ARENA_BLOCK_BYTES = 64 * 1024, ARENA_ALIGN_BYTES = 16 };

struct arena_block;
typedef struct arena {
    struct arena_block *head;
    size_t used_bytes;  /* handed out so far */
    size_t limit_bytes; /* 0: no limit */
} arena;

void arena_init(arena *a, size_t limit_bytes);
void arena_fini(arena *a);

/* Zeroed, aligned to 16; NULL when memory or the limit is exhausted (fail() has been called). */
void *arena_alloc(arena *a, size_t bytes);
/* count * size with an overflow check. */
void *arena_alloc_array(arena *a, size_t count, size_t size);
/* A NUL-terminated copy of n bytes. */
char *arena_strndup(arena *a, const char *text, size_t n);

#endif
