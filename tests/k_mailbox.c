/* k_mailbox.c: whole messages arrive once, in order, unbroken, however the ring wraps and fills; a
 * sleeping reader is woken; a full ring makes the writer wait.
 */
#include <stdatomic.h>
#include <threads.h>
#include <time.h>

#include "base/mailbox.h"
#include "suite.h"

static mailbox *box;

static size_t length_of(uint32_t i) { return 1 + suite_random(11, i) % 900; }

static void put(uint32_t i) {
    const size_t n = length_of(i);
    unsigned char *bytes = mailbox_reserve(box, n);
    for (size_t k = 0; k < n; k++) bytes[k] = (unsigned char)(suite_random(12, i) + k);
    mailbox_commit(box, n);
}

static int check(uint32_t i) {
    size_t n = 0;
    const unsigned char *bytes = mailbox_peek(box, &n);
    if (!bytes || n != length_of(i)) return 0;
    for (size_t k = 0; k < n; k++) {
        if (bytes[k] != (unsigned char)(suite_random(12, i) + k)) return 0;
    }
    mailbox_pop(box);
    return 1;
}

static void test_one_thread(void) {
    size_t n;
    CHECK_EQ(mailbox_new(4096, &box), STATUS_OK);
    CU_ASSERT_PTR_NULL(mailbox_peek(box, &n));
    for (uint32_t i = 0; i < 2000; i += 3) { /* at most 3 x 900 bytes of 4096 are under way */
        for (uint32_t k = 0; k < 3; k++) put(i + k);
        CU_ASSERT_PTR_NULL(mailbox_peek(box, &n)); /* not flushed: not visible */
        mailbox_flush(box);
        for (uint32_t k = 0; k < 3; k++) CU_ASSERT(check(i + k));
        CU_ASSERT_PTR_NULL(mailbox_peek(box, &n));
    }
    mailbox_free(box);
}

static void test_shrunk_message(void) {
    size_t n;
    CHECK_EQ(mailbox_new(4096, &box), STATUS_OK);
    memset(mailbox_reserve(box, 1000), 7, 10);
    mailbox_commit(box, 10);
    mailbox_flush(box);
    const unsigned char *bytes = mailbox_peek(box, &n);
    CU_ASSERT_PTR_NOT_NULL_FATAL(bytes);
    CHECK_EQ(n, 10);
    CHECK_EQ(bytes[9], 7);
    mailbox_free(box);
}

enum { COUNT = 60000 };

static int writer(void *unused) {
    (void)unused;
    for (uint32_t i = 0; i < COUNT; i++) {
        put(i);
        if (suite_random(13, i) % 4 == 0) mailbox_flush(box);
    }
    mailbox_flush(box);
    return 0;
}

/* The ring holds about nine messages: the writer is often full, the reader often empty. */
static void test_two_threads(void) {
    thrd_t thread;
    unsigned good = 0;
    CHECK_EQ(mailbox_new(4096, &box), STATUS_OK);
    CHECK_EQ(thrd_create(&thread, writer, NULL), thrd_success);
    for (uint32_t i = 0; i < COUNT; i++) {
        CU_ASSERT_FATAL(mailbox_wait(box, 20));
        good += (unsigned)check(i);
    }
    CHECK_EQ(good, COUNT);
    thrd_join(thread, NULL);
    mailbox_free(box);
}

static void test_wait_gives_up(void) {
    struct timespec begin, end;
    CHECK_EQ(mailbox_new(4096, &box), STATUS_OK);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    CU_ASSERT(!mailbox_wait(box, 0.05));
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds =
        (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    CU_ASSERT(seconds >= 0.049);
    put(1);
    mailbox_flush(box);
    CU_ASSERT(mailbox_wait(box, 0));
    mailbox_free(box);
}

const struct suite_case suite_cases[] = {
    {"messages of every length, in order, visible by flush only", test_one_thread},
    {"a message may end up shorter than reserved", test_shrunk_message},
    {"two threads, a small ring: nothing lost, broken or out of order", test_two_threads},
    {"waiting ends in time, and at once when there is a message", test_wait_gives_up},
    {NULL, NULL},
};
