/* alloc_watch.c: see alloc_watch.h.
 *
 *   caller ─► malloc (here) ─► __libc_malloc            free is the C library's own
 *                  └─ thread counts and counting is on: counter + 1
 *
 * The thread's flag is in the static TLS block of the program, so looking at it allocates nothing.
 * Chosen over --wrap, which would see our own objects only, and over a preloaded library, which a
 * user of the program would not have.
 */
#include "base/alloc_watch.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define OTHER_ALLOCATOR 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
#define OTHER_ALLOCATOR 1
#endif

#ifdef OTHER_ALLOCATOR

bool alloc_watch_thread(bool counts) {
    (void)counts;
    return false;
}
void alloc_watch_begin(void) {}
int64_t alloc_watch_end(void) { return -1; }

#else

static _Thread_local bool thread_counts;
static atomic_bool counting;
static _Atomic int64_t counted;

bool alloc_watch_thread(bool counts) {
    const bool before = thread_counts;
    thread_counts = counts;
    return before;
}

void alloc_watch_begin(void) {
    atomic_store(&counted, 0);
    atomic_store(&counting, true);
}

int64_t alloc_watch_end(void) {
    atomic_store(&counting, false);
    return atomic_load(&counted);
}

static inline void count(void) {
    if (thread_counts && atomic_load_explicit(&counting, memory_order_relaxed))
        atomic_fetch_add_explicit(&counted, 1, memory_order_relaxed);
}

/* ---- in front of the C library ---- */

#define OURS __attribute__((visibility("default")))

extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t items, size_t bytes);
extern void *__libc_realloc(void *old, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);

OURS void *malloc(size_t bytes) {
    count();
    return __libc_malloc(bytes);
}

OURS void *calloc(size_t items, size_t bytes) {
    count();
    return __libc_calloc(items, bytes);
}

OURS void *realloc(void *old, size_t bytes) {
    count();
    return __libc_realloc(old, bytes);
}

OURS void *aligned_alloc(size_t alignment, size_t bytes) {
    count();
    return __libc_memalign(alignment, bytes);
}

OURS int posix_memalign(void **out, size_t alignment, size_t bytes) {
    count();
    if (alignment % sizeof(void *) != 0 || (alignment & (alignment - 1)) != 0 || alignment == 0)
        return EINVAL;
    void *memory = __libc_memalign(alignment, bytes);
    if (!memory) return ENOMEM;
    *out = memory;
    return 0;
}

#endif
