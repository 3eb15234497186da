/* alloc_watch.h: counts what engine threads allocate while the service runs; the answer must be 0.
 *
 * The program's own malloc, calloc, realloc and aligned relatives stand in front of the C library's
 * (which documents that they may be replaced), so calls from inside libraries count as well. They
 * pass everything on and add to a counter when the calling thread is an engine thread and counting
 * is on. Owns: one flag per thread, one counter per process. Thread: any. Memory: none.
 * Compiled out under AddressSanitizer and ThreadSanitizer, which bring their own, and where the C
 * library is not glibc: then alloc_watch_end gives -1. valgrind needs
 * --soname-synonyms=somalloc=NONE to see the heap through it.
 */
#ifndef SFUMATO_BASE_ALLOC_WATCH_H
#define SFUMATO_BASE_ALLOC_WATCH_H

#include <stdbool.h>
#include <stdint.h>

/* What this thread allocates from now on counts, or no longer does (around calls of a library whose
 * memory is not ours to plan, as MPI's). Returns what was set before. */
bool alloc_watch_thread(bool counts);
/* From "ready" on. */
void alloc_watch_begin(void);
/* Stops counting: allocations since alloc_watch_begin, -1 when this build cannot count. */
int64_t alloc_watch_end(void);

#endif
