/* pages.c: see pages.h. Integers only.
 *
 *   free ring    page ⇄ page ⇄ …   never published content: handed out first
 *   cached ring  page ⇄ page ⇄ …   refcount 0 but findable, oldest release first: handed out last
 *   table        slot → page or -1  open addressing on the digest, at most half full
 *
 * Every page is in exactly one place: free ring, cached ring, or in use (refcount > 0). A ring is a
 * circular list through next/prev whose sentinel is one extra entry at page_count (free) and
 * page_count + 1 (cached), so linking and unlinking have no special cases. A published page has a
 * table slot from kv_page_publish until kv_page_acquire evicts it, in use or not.
 */
#include "kv/pages.h"

#include <stdlib.h>

struct kv_pool {
    int32_t page_count;
    bool prefix_cache;
    int32_t used, cached;
    uint32_t table_mask;      /* table size - 1; the size is a power of two >= 2 page_count */
    int32_t *next, *prev;     /* [page_count + 2] */
    int32_t *refcount;        /* [page_count] */
    bool *published;          /* [page_count] */
    struct kv_digest *digest; /* [page_count], valid when published */
    int32_t *table;           /* [table_mask + 1] */
};

static int32_t free_ring(const kv_pool *pool) { return pool->page_count; }
static int32_t cached_ring(const kv_pool *pool) { return pool->page_count + 1; }

static void link_last(kv_pool *pool, int32_t ring, int32_t page) {
    const int32_t last = pool->prev[ring];
    pool->next[last] = page;
    pool->prev[page] = last;
    pool->next[page] = ring;
    pool->prev[ring] = page;
}

static void unlink_page(kv_pool *pool, int32_t page) {
    pool->next[pool->prev[page]] = pool->next[page];
    pool->prev[pool->next[page]] = pool->prev[page];
}

static bool digest_equal(struct kv_digest a, struct kv_digest b) {
    return a.word[0] == b.word[0] && a.word[1] == b.word[1];
}

/* The slot that holds the digest, or the empty slot where it would go. Digests are uniform: their
 * low bits are the hash. */
static uint32_t table_slot(const kv_pool *pool, struct kv_digest digest) {
    uint32_t slot = (uint32_t)digest.word[0] & pool->table_mask;
    while (pool->table[slot] >= 0 && !digest_equal(pool->digest[pool->table[slot]], digest))
        slot = (slot + 1) & pool->table_mask;
    return slot;
}

/* Empties the page's slot and moves later entries of its run back, so that no probe is cut short.
 */
static void table_remove(kv_pool *pool, int32_t page) {
    uint32_t hole = table_slot(pool, pool->digest[page]);
    ASSERT_EQ(pool->table[hole], page);
    for (uint32_t slot = (hole + 1) & pool->table_mask; pool->table[slot] >= 0;
         slot = (slot + 1) & pool->table_mask) {
        const uint32_t home = (uint32_t)pool->digest[pool->table[slot]].word[0] & pool->table_mask;
        if (((slot - home) & pool->table_mask) >= ((slot - hole) & pool->table_mask)) {
            pool->table[hole] = pool->table[slot];
            hole = slot;
        }
    }
    pool->table[hole] = -1;
    pool->published[page] = false;
}

enum status kv_pool_new(int32_t page_count, bool prefix_cache, kv_pool **out) {
    *out = NULL;
    if (page_count < 1 || page_count > INT32_MAX / 4)
        return fail(STATUS_USAGE, "a KV cache of %d pages is impossible: raise --kv-memory",
                    page_count);
    kv_pool *pool = calloc(1, sizeof *pool);
    if (!pool) goto no_memory;
    const size_t pages = (size_t)page_count;
    size_t slots = 2;
    while (slots < 2 * pages) slots *= 2;
    pool->page_count = page_count;
    pool->prefix_cache = prefix_cache;
    pool->table_mask = (uint32_t)slots - 1;
    pool->next = calloc(pages + 2, sizeof *pool->next);
    pool->prev = calloc(pages + 2, sizeof *pool->prev);
    pool->refcount = calloc(pages, sizeof *pool->refcount);
    pool->published = calloc(pages, sizeof *pool->published);
    pool->digest = calloc(pages, sizeof *pool->digest);
    pool->table = malloc(slots * sizeof *pool->table);
    if (!pool->next || !pool->prev || !pool->refcount || !pool->published || !pool->digest ||
        !pool->table)
        goto no_memory;
    for (size_t i = 0; i < slots; i++) pool->table[i] = -1;
    for (int32_t ring = page_count; ring < page_count + 2; ring++)
        pool->next[ring] = pool->prev[ring] = ring;
    for (int32_t page = 0; page < page_count; page++) link_last(pool, free_ring(pool), page);
    *out = pool;
    return STATUS_OK;
no_memory:
    kv_pool_free(pool);
    return fail(STATUS_MEMORY, "no memory for the tables of %d KV pages", page_count);
}

void kv_pool_free(kv_pool *pool) {
    if (!pool) return;
    free(pool->next);
    free(pool->prev);
    free(pool->refcount);
    free(pool->published);
    free(pool->digest);
    free(pool->table);
    free(pool);
}

int32_t kv_page_acquire(kv_pool *pool) {
    int32_t page = pool->next[free_ring(pool)];
    if (page == free_ring(pool)) {
        page = pool->next[cached_ring(pool)];
        if (page == cached_ring(pool)) return -1;
        table_remove(pool, page);
        pool->cached--;
    }
    unlink_page(pool, page);
    pool->refcount[page] = 1;
    pool->used++;
    return page;
}

void kv_page_share(kv_pool *pool, int32_t page) {
    ASSERT_LT((uint32_t)page, (uint32_t)pool->page_count);
    ASSERT_LT(0, pool->refcount[page]);
    pool->refcount[page]++;
}

void kv_page_release(kv_pool *pool, int32_t page) {
    ASSERT_LT((uint32_t)page, (uint32_t)pool->page_count);
    ASSERT_LT(0, pool->refcount[page]);
    if (--pool->refcount[page] > 0) return;
    pool->used--;
    link_last(pool, pool->published[page] ? cached_ring(pool) : free_ring(pool), page);
    pool->cached += pool->published[page];
}

int32_t kv_pool_available(const kv_pool *pool) { return pool->page_count - pool->used; }
int32_t kv_pool_used(const kv_pool *pool) { return pool->used; }
int32_t kv_pool_cached(const kv_pool *pool) { return pool->cached; }

int kv_page_refcount(const kv_pool *pool, int32_t page) {
    ASSERT_LT((uint32_t)page, (uint32_t)pool->page_count);
    return pool->refcount[page];
}

void kv_page_publish(kv_pool *pool, int32_t page, struct kv_digest digest) {
    ASSERT_LT((uint32_t)page, (uint32_t)pool->page_count);
    ASSERT_LT(0, pool->refcount[page]);
    if (!pool->prefix_cache) return;
    if (pool->published[page]) {
        ASSERT(digest_equal(pool->digest[page], digest)); /* a full page never changes */
        return;
    }
    const uint32_t slot = table_slot(pool, digest);
    if (pool->table[slot] >= 0) return; /* computed twice at the same time: the first stays */
    pool->table[slot] = page;
    pool->digest[page] = digest;
    pool->published[page] = true;
}

int32_t kv_page_find(kv_pool *pool, struct kv_digest digest) {
    if (!pool->prefix_cache) return -1;
    const int32_t page = pool->table[table_slot(pool, digest)];
    if (page < 0) return -1;
    if (pool->refcount[page]++ == 0) {
        unlink_page(pool, page);
        pool->cached--;
        pool->used++;
    }
    return page;
}
