/* d_pages.c: the page pool: counts, who is evicted when, and random use against a naive model. */
#include "kv/pages.h"
#include "kv/prefix.h"
#include "suite.h"

static struct kv_digest name(uint64_t a) { return (struct kv_digest){{a, ~a}}; }

static void test_counts(void) {
    kv_pool *pool;
    CHECK_EQ(kv_pool_new(3, true, &pool), STATUS_OK);
    CHECK_EQ(kv_pool_available(pool), 3);
    const int32_t a = kv_page_acquire(pool), b = kv_page_acquire(pool), c = kv_page_acquire(pool);
    CU_ASSERT(a != b && b != c && a != c);
    CU_ASSERT(a >= 0 && a < 3 && b >= 0 && b < 3 && c >= 0 && c < 3);
    CHECK_EQ(kv_page_acquire(pool), -1);
    CHECK_EQ(kv_pool_used(pool), 3);
    kv_page_share(pool, b);
    CHECK_EQ(kv_page_refcount(pool, b), 2);
    kv_page_release(pool, b);
    CHECK_EQ(kv_pool_available(pool), 0);
    kv_page_release(pool, b);
    CHECK_EQ(kv_pool_available(pool), 1);
    CHECK_EQ(kv_page_acquire(pool), b);
    kv_pool_free(pool);
    kv_pool_free(NULL);
    CHECK_EQ(kv_pool_new(0, true, &pool), STATUS_USAGE);
    CU_ASSERT(pool == NULL);
}

static void test_find_and_publish(void) {
    kv_pool *pool;
    CHECK_EQ(kv_pool_new(4, true, &pool), STATUS_OK);
    const int32_t a = kv_page_acquire(pool), b = kv_page_acquire(pool);
    CHECK_EQ(kv_page_find(pool, name(1)), -1);
    kv_page_publish(pool, a, name(1));
    kv_page_publish(pool, a, name(1)); /* again: nothing */
    CHECK_EQ(kv_page_find(pool, name(1)), a);
    CHECK_EQ(kv_page_refcount(pool, a), 2);
    kv_page_publish(pool, b, name(1)); /* already named: the first keeps it */
    CHECK_EQ(kv_page_find(pool, name(1)), a);
    CHECK_EQ(kv_page_find(pool, (struct kv_digest){{1, 0}}), -1); /* all 128 bits count */
    for (int i = 0; i < 3; i++) kv_page_release(pool, a);
    kv_page_release(pool, b);
    CHECK_EQ(kv_pool_cached(pool), 1); /* a; b is plainly free */
    CHECK_EQ(kv_pool_available(pool), 4);
    CHECK_EQ(kv_pool_used(pool), 0);
    CHECK_EQ(kv_page_find(pool, name(1)), a);
    CHECK_EQ(kv_page_refcount(pool, a), 1);
    CHECK_EQ(kv_pool_cached(pool), 0);
    kv_pool_free(pool);

    CHECK_EQ(kv_pool_new(2, false, &pool), STATUS_OK); /* prefix cache off */
    const int32_t page = kv_page_acquire(pool);
    kv_page_publish(pool, page, name(1));
    CHECK_EQ(kv_page_find(pool, name(1)), -1);
    kv_page_release(pool, page);
    CHECK_EQ(kv_pool_cached(pool), 0);
    kv_pool_free(pool);
}

static void test_eviction_order(void) {
    kv_pool *pool;
    CHECK_EQ(kv_pool_new(5, true, &pool), STATUS_OK);
    int32_t page[5];
    for (int i = 0; i < 5; i++) page[i] = kv_page_acquire(pool);
    for (int i = 0; i < 4; i++) kv_page_publish(pool, page[i], name(10 + (uint64_t)i));
    const int order[] = {2, 4, 0, 3, 1}; /* 4 has no name */
    for (int i = 0; i < 5; i++) kv_page_release(pool, page[order[i]]);
    CHECK_EQ(kv_page_find(pool, name(10)), page[0]); /* used again: it becomes the youngest */
    kv_page_release(pool, page[0]);
    CHECK_EQ(kv_page_acquire(pool), page[4]); /* nameless first */
    CHECK_EQ(kv_page_acquire(pool), page[2]); /* then the oldest release */
    CHECK_EQ(kv_page_find(pool, name(12)), -1);
    CHECK_EQ(kv_page_acquire(pool), page[3]);
    CHECK_EQ(kv_page_acquire(pool), page[1]);
    CHECK_EQ(kv_page_find(pool, name(10)), page[0]); /* the last one still findable */
    CHECK_EQ(kv_page_acquire(pool), -1);
    kv_pool_free(pool);
}

/* What the pool must do, with arrays and searches. */
enum { PAGES = 24, NAMES = 60 };
struct model {
    int refs[PAGES], published[PAGES]; /* name or -1 */
    long released[PAGES];              /* time of becoming free */
};

static void check_model(const struct model *m, const kv_pool *pool) {
    int used = 0, cached = 0;
    for (int i = 0; i < PAGES; i++) {
        used += m->refs[i] > 0;
        cached += m->refs[i] == 0 && m->published[i] >= 0;
        CHECK_EQ(kv_page_refcount(pool, i), m->refs[i]);
    }
    CHECK_EQ(kv_pool_used(pool), used);
    CHECK_EQ(kv_pool_cached(pool), cached);
    CHECK_EQ(kv_pool_available(pool), PAGES - used);
}

static void model_acquire(struct model *m, kv_pool *pool) {
    int nameless = 0, oldest = -1;
    for (int i = 0; i < PAGES; i++) {
        if (m->refs[i]) continue;
        nameless += m->published[i] < 0;
        if (m->published[i] >= 0 && (oldest < 0 || m->released[i] < m->released[oldest]))
            oldest = i;
    }
    const int32_t page = kv_page_acquire(pool);
    if (nameless) {
        CU_ASSERT_FATAL(page >= 0 && m->refs[page] == 0 && m->published[page] < 0);
    } else {
        CHECK_EQ(page, oldest);
        if (page < 0) return;
        m->published[page] = -1;
    }
    m->refs[page] = 1;
}

/* Names that share the low bits, so that runs of the table collide, wrap and are repaired. */
static struct kv_digest crowded(int n) {
    return (struct kv_digest){{(uint64_t)(n % 3 ? 63 : n) | (uint64_t)n << 32, 7}};
}

static void test_random_use(void) {
    for (uint64_t seed = 0; seed < 20; seed++) {
        kv_pool *pool;
        CU_ASSERT_FATAL(kv_pool_new(PAGES, true, &pool) == STATUS_OK);
        struct model m;
        memset(&m, 0, sizeof m);
        for (int i = 0; i < PAGES; i++) m.published[i] = -1;
        for (uint32_t t = 0; t < 4000; t++) {
            const uint32_t r = suite_random(seed, t);
            const int page = (int)(r >> 8) % PAGES, n = (int)(r >> 16) % NAMES;
            int holder = -1;
            for (int i = 0; i < PAGES; i++)
                if (m.published[i] == n) holder = i;
            switch (r % 6) {
                case 0:
                    model_acquire(&m, pool);
                    break;
                case 1:
                    if (m.refs[page] == 0 || m.published[page] >= 0) break;
                    kv_page_publish(pool, page, crowded(n));
                    if (holder < 0) m.published[page] = n;
                    break;
                case 2:
                    if (m.refs[page] == 0 || m.refs[page] > 5) break;
                    kv_page_share(pool, page);
                    m.refs[page]++;
                    break;
                case 3:
                    CHECK_EQ(kv_page_find(pool, crowded(n)), holder);
                    if (holder >= 0) m.refs[holder]++;
                    break;
                default:
                    if (m.refs[page] == 0) break;
                    kv_page_release(pool, page);
                    if (--m.refs[page] == 0) m.released[page] = t;
            }
            check_model(&m, pool);
        }
        kv_pool_free(pool);
    }
}

/* Blocks of a soft run are found by their inputs, never by the ids that were displayed. */
static void test_soft_blocks(void) {
    kv_pool *pool;
    CHECK_EQ(kv_pool_new(4, true, &pool), STATUS_OK);
    const float one = 1, w[] = {0.6f, 0.4f};
    struct kv_digest prompt = kv_digest_start(3), soft, shown;
    for (uint32_t i = 0; i < KV_PAGE_TOKENS; i++) prompt = kv_digest_next(prompt, &i, &one, 1);
    soft = shown = prompt;
    for (uint32_t i = 0; i < KV_PAGE_TOKENS; i++) {
        const uint32_t ids[] = {i, i + 1};
        if (i == 40)
            soft = kv_digest_next(soft, ids, w, 2); /* one soft position is enough */
        else
            soft = kv_digest_next(soft, ids, &one, 1);
        shown = kv_digest_next(shown, ids, &one, 1);
    }
    const int32_t a = kv_page_acquire(pool), b = kv_page_acquire(pool);
    kv_page_publish(pool, a, prompt);
    kv_page_publish(pool, b, soft);
    CHECK_EQ(kv_page_find(pool, prompt), a); /* the hard prefix is shared */
    CHECK_EQ(kv_page_find(pool, shown), -1);
    CHECK_EQ(kv_page_find(pool, soft), b);
    kv_pool_free(pool);
}

const struct suite_case suite_cases[] = {
    {"acquire, share, release, exhaustion", test_counts},
    {"publish and find", test_find_and_publish},
    {"eviction: nameless first, then oldest release", test_eviction_order},
    {"random use against a naive model", test_random_use},
    {"soft blocks are never found by their trace ids", test_soft_blocks},
    {NULL, NULL}};
