/* g_window.c: the window path over threads, not processes: ThreadSanitizer sees every race.
 *
 * Each thread is one rank with its own struct comm on the same memory. Some rounds have a long
 * pause on one rank, so that all phases of waiting are met, the futex included.
 */
#include <pthread.h>
#include <unistd.h>

#include "comm/comm_path.h"
#include "suite.h"
#include "tree_reference.h"

enum { RANKS_MAX = 8, SLOT_FLOATS = 20000, ROUNDS = 40, POISON = 0x5a };

static void *memory;
static size_t memory_bytes;
static pthread_barrier_t barrier;
static int ranks;
static bool crowded;
static size_t wrong[RANKS_MAX];

static float value(int rank, int round, size_t i) {
    return suite_random_float((uint64_t)round, (uint32_t)((size_t)rank * SLOT_FLOATS + i)) *
           (i % 3 ? 1.0f : 1e6f);
}

static void nap(int rank, int round) {
    const uint32_t word = suite_random(5 + (uint64_t)rank, (uint32_t)round);
    if (word % 8 == 0) usleep(word / 8 % 3000);
}

static void sum_and_check(comm *c, int round, size_t count, float *sum) {
    float *slot = comm_slot(c);
    for (size_t i = 0; i < count; i++) slot[i] = value(c->rank, round, i);
    comm_all_reduce(c, count, sum);
    for (size_t i = 0; i < count; i += i < 64 ? 1 : 37) {
        float x[RANKS_MAX];
        for (int r = 0; r < ranks; r++) x[r] = value(r, round, i);
        const float expected = tree_reference(x, ranks);
        wrong[c->rank] += memcmp(&expected, &sum[i], sizeof expected) != 0;
    }
}

/* Pages of the window that nobody has written yet: taken later, they may not be there. */
static size_t untouched_pages(void) {
    size_t count = 0;
    for (size_t at = 0; at < memory_bytes; at += 4096) count += ((char *)memory)[at] == POISON;
    return count;
}

static void *run_rank(void *argument) {
    const int rank = (int)(intptr_t)argument;
    comm c = {.job = &comm_self_job, .rank = rank, .size = ranks, .crowded = crowded};
    c.config = (struct comm_config){.slot_floats = SLOT_FLOATS,
                                    .bcast_bytes_max = 4000,
                                    .gather_bytes_max = 64,
                                    .timeout_seconds = 60};
    float *sum = malloc(SLOT_FLOATS * sizeof *sum);
    wrong[rank] += comm_window_attach(&c, memory) != STATUS_OK;
    pthread_barrier_wait(&barrier);
    if (rank == 0) wrong[rank] += untouched_pages();
    pthread_barrier_wait(&barrier);
    for (int round = 0; round < ROUNDS; round++) {
        int plan[1000] = {0};
        const void *bytes;
        plan[0] = plan[999] = round;
        if (rank == 0 && round % 10 == 9) usleep(5000); /* the others go to sleep */
        nap(rank, round);
        wrong[rank] += comm_bcast(&c, plan, rank == 0 ? sizeof plan : 0, &bytes) != sizeof plan;
        sum_and_check(&c, round, 100, sum);
        wrong[rank] += memcmp(bytes, plan, sizeof plan) != 0;
        if (round % 4 == 0) sum_and_check(&c, round + 1000, SLOT_FLOATS, sum);
        const int record[2] = {rank, round};
        const int *records = comm_gather(&c, record, sizeof record);
        nap(rank, round + 500);
        for (int r = 0; rank == 0 && r < ranks; r++) {
            wrong[rank] += records[2 * r] != r || records[2 * r + 1] != round;
        }
    }
    pthread_barrier_wait(&barrier);
    free(sum);
    c.path->close(&c);
    return NULL;
}

static void run(int count, bool is_crowded) {
    pthread_t threads[RANKS_MAX];
    const struct comm_config config = {
        .slot_floats = SLOT_FLOATS, .bcast_bytes_max = 4000, .gather_bytes_max = 64};
    ranks = count;
    crowded = is_crowded;
    memset(wrong, 0, sizeof wrong);
    memory_bytes = comm_window_bytes(&config, ranks);
    memory = aligned_alloc(4096, memory_bytes);
    memset(memory, POISON, memory_bytes);
    comm_window_clear(memory, ranks);
    pthread_barrier_init(&barrier, NULL, (unsigned)ranks);
    for (int r = 0; r < ranks; r++)
        pthread_create(&threads[r], NULL, run_rank, (void *)(intptr_t)r);
    for (int r = 0; r < ranks; r++) pthread_join(threads[r], NULL);
    for (int r = 0; r < ranks; r++) CHECK_EQ(wrong[r], 0);
    pthread_barrier_destroy(&barrier);
    free(memory);
}

static void test_two(void) { run(2, false); }
static void test_many(void) {
    run(3, true);
    run(4, false); /* the second half of an all-reduce, spinning with too few cores */
    run(8, true);
}

static void test_sizes(void) {
    struct comm_config config = {0};
    CU_ASSERT(comm_window_bytes(&config, 1) > 0);
    config.slot_floats = SIZE_MAX / 2;
    CHECK_EQ(comm_window_bytes(&config, 2), 0);
    config.slot_floats = SIZE_MAX / 64;
    CHECK_EQ(comm_window_bytes(&config, 64), 0);
    config = (struct comm_config){.gather_bytes_max = SIZE_MAX / 4};
    CHECK_EQ(comm_window_bytes(&config, 8), 0);
    config = (struct comm_config){.bcast_bytes_max = SIZE_MAX - 5};
    CHECK_EQ(comm_window_bytes(&config, 8), 0);
}

const struct suite_case suite_cases[] = {
    {"sizes that overflow are refused", test_sizes},
    {"two ranks", test_two},
    {"three, four, eight ranks", test_many},
    {NULL, NULL},
};
