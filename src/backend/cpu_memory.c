/* cpu_memory.c: see cpu_memory.h. */
#include "backend/cpu_memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/check.h"

#define HUGE_BYTES ((size_t)2 << 20)
#define BLOCK_BYTES ((size_t)64 << 20) /* address space; only touched pages cost memory */

struct cpu_memory_block {
    struct cpu_memory_block *next;
    unsigned char *map; /* what munmap gets */
    size_t map_bytes;
    unsigned char *begin; /* 2 MiB-aligned */
    size_t used, size;
};

static struct cpu_memory_block *block_new(size_t size) {
    struct cpu_memory_block *b = malloc(sizeof *b);
    if (!b) return NULL;
    b->map_bytes = size + HUGE_BYTES;
    b->map = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (b->map == MAP_FAILED) {
        free(b);
        return NULL;
    }
    b->begin = b->map + (HUGE_BYTES - (uintptr_t)b->map % HUGE_BYTES) % HUGE_BYTES;
    b->used = 0;
    b->size = size;
    madvise(b->begin, size, MADV_HUGEPAGE); /* a refusal costs speed only */
    return b;
}

void *cpu_memory_take(struct cpu_memory *memory, size_t bytes, const char *what) {
    if (bytes > SIZE_MAX / 2) {
        fail(STATUS_MEMORY, "%s: %zu bytes is more than a machine has", what, bytes);
        return NULL;
    }
    bytes = (bytes + CPU_MEMORY_ALIGN - 1) / CPU_MEMORY_ALIGN * CPU_MEMORY_ALIGN;
    struct cpu_memory_block *b = memory->head;
    if (!b || b->size - b->used < bytes) {
        const bool large = bytes >= BLOCK_BYTES / 4;
        b = block_new(large ? (bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES : BLOCK_BYTES);
        if (!b) {
            fail(STATUS_MEMORY,
                 "%s: cannot get %zu MiB of memory: use fewer pages or rows, a smaller model, or "
                 "more ranks on "
                 "other hosts",
                 what, bytes >> 20);
            return NULL;
        }
        if (large && memory->head) { /* keep filling the block in front */
            b->next = memory->head->next;
            memory->head->next = b;
        } else {
            b->next = memory->head;
            memory->head = b;
        }
    }
    void *out = b->begin + b->used;
    b->used += bytes;
    return out;
}

void cpu_memory_fini(struct cpu_memory *memory) {
    for (struct cpu_memory_block *b = memory->head, *next; b; b = next) {
        next = b->next;
        munmap(b->map, b->map_bytes);
        free(b);
    }
    memory->head = NULL;
}
