/* cpu_memory.h: all memory of the CPU backend: taken before "ready", given back at close.
 *
 * Pages are zeroed by the kernel and stay unbacked until first written, so the thread that fills a
 * range decides on which memory node it lies. Blocks of 2 MiB-aligned address space are asked to
 * use huge pages
 * (+20 % bandwidth). Matrices follow one another inside a block instead of having a mapping each: a
 * huge page is backed as a whole, and a small model has more than a hundred matrices of about one
 * megabyte. Thread: the engine thread. Refuses to know: what the bytes mean.
 */
#ifndef SFUMATO_BACKEND_CPU_MEMORY_H
#define SFUMATO_BACKEND_CPU_MEMORY_H

#include <stddef.h>

struct cpu_memory {
    struct cpu_memory_block *head;
};

enum { CPU_MEMORY_ALIGN = 128 }; /* bytes: two cache lines, what adjacent-line prefetch fetches */

/* Zeroed, aligned to 128 bytes (2 MiB for large blocks); NULL after fail(STATUS_MEMORY) naming
 * `what`. */
void *cpu_memory_take(struct cpu_memory *memory, size_t bytes, const char *what);
void cpu_memory_fini(struct cpu_memory *memory);

#endif
