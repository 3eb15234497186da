/* pages.h: the page pool of the KV cache: integers only, no keys or values.
 *
 * Lives on rank 0; the physical page numbers it hands out travel in the plan and mean the same page
 * on every rank. A page holds KV_PAGE_TOKENS positions of one sequence for all layers and local kv
 * heads. Pages are counted: a page shared by the prefix cache or by n answers of one thought is
 * released by its last holder. Free pages that still hold a cached block are reused last, oldest
 * first (prefix.h). Thread: engine. Memory: fixed arrays made by kv_pool_new.
 */
#ifndef SFUMATO_KV_PAGES_H
#define SFUMATO_KV_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/check.h"

enum { KV_PAGE_TOKENS = 64 };

typedef struct kv_pool kv_pool;

enum status kv_pool_new(int32_t page_count, bool prefix_cache, kv_pool **out);
void kv_pool_free(kv_pool *pool);

/* One page with refcount 1, or -1 when none is free. May evict the oldest cached free page. */
int32_t kv_page_acquire(kv_pool *pool);
void kv_page_share(kv_pool *pool, int32_t page); /* refcount + 1 */
void kv_page_release(kv_pool *pool, int32_t page);
int32_t kv_pool_available(const kv_pool *pool); /* free + cached-free */
int32_t kv_pool_used(const kv_pool *pool);      /* refcount > 0 */
int32_t kv_pool_cached(const kv_pool *pool);    /* refcount 0, still findable */
int kv_page_refcount(const kv_pool *pool, int32_t page);

/* Prefix cache: a full page's content is named by a 128-bit digest of all inputs up to its end
 * (prefix.h). kv_page_publish makes a full page findable; kv_page_find returns it with refcount +
 * 1, or -1. Pages with refcount 0 stay findable until they are reused, oldest release first:
 * release a sequence's pages from its last to its first, so that the ends of a prompt are forgotten
 * before its beginning. A digest that another page already has stays with that page. Without
 * prefix_cache both do nothing. */
struct kv_digest {
    uint64_t word[2];
};
void kv_page_publish(kv_pool *pool, int32_t page, struct kv_digest digest);
int32_t kv_page_find(kv_pool *pool, struct kv_digest digest);

#endif
