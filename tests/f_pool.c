/* f_pool.c: the thread pool: everything runs once, nobody hangs, idle threads sleep. */
#include <sched.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "backend/cpu_pool.h"
#include "f_backend.h"

enum { THREADS = 5, N = 1003 };

struct count {
    int threads;
    atomic_int calls[THREADS];
    int touched[N];
};

static void count_task(void *context, int thread) {
    struct count *c = context;
    atomic_fetch_add(&c->calls[thread], 1);
    const int64_t end = cpu_range_begin(N, thread + 1, c->threads);
    for (int64_t i = cpu_range_begin(N, thread, c->threads); i < end; i++) c->touched[i]++;
}

/* Many short tasks, more threads than this machine may have cores: each index exactly once per
 * task, and what the threads wrote is seen by the caller. */
static void test_every_part_once(void) {
    for (int threads = 1; threads <= THREADS; threads++) {
        cpu_pool *pool = NULL;
        CU_ASSERT_FATAL(cpu_pool_open(threads, 0, 1, &pool) == STATUS_OK);
        CHECK_EQ(cpu_pool_threads(pool), threads);
        struct count c = {.threads = threads};
        for (int run = 1; run <= 200; run++) {
            cpu_pool_run(pool, count_task, &c);
            int wrong = 0;
            for (int i = 0; i < N; i++) wrong += c.touched[i] != run;
            for (int t = 0; t < threads; t++) wrong += atomic_load(&c.calls[t]) != run;
            CHECK_EQ(wrong, 0);
        }
        cpu_pool_close(pool);
    }
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void sleep_task(void *context, int thread) {
    (void)context;
    if (thread == 1) usleep(200000);
}

/* Workers between tasks, and a caller whose worker is late, park after about a millisecond. */
static void test_idle_sleeps(void) {
    cpu_pool *pool = NULL;
    CU_ASSERT_FATAL(cpu_pool_open(3, 0, 1, &pool) == STATUS_OK);
    struct count c = {.threads = 3};
    cpu_pool_run(pool, count_task, &c);
    usleep(20000);
    double before = cpu_seconds();
    usleep(200000);
    CU_ASSERT(cpu_seconds() - before < 0.05);
    before = cpu_seconds();
    cpu_pool_run(pool, sleep_task, NULL);
    CU_ASSERT(cpu_seconds() - before < 0.05);
    cpu_pool_run(pool, count_task, &c); /* and they wake again */
    CHECK_EQ(c.touched[N - 1], 2);
    cpu_pool_close(pool);
}

/* The caller's affinity is only borrowed. */
static void test_affinity_returns(void) {
    cpu_set_t before, after;
    CU_ASSERT(sched_getaffinity(0, sizeof before, &before) == 0);
    cpu_pool *pool = NULL;
    CU_ASSERT_FATAL(cpu_pool_open(2, 0, 1, &pool) == STATUS_OK);
    cpu_pool_close(pool);
    CU_ASSERT(sched_getaffinity(0, sizeof after, &after) == 0);
    CU_ASSERT(CPU_EQUAL(&before, &after));
}

static void test_counts(void) {
    cpu_pool *pool = NULL;
    CHECK_EQ(cpu_pool_open(-1, 0, 1, &pool), STATUS_USAGE);
    CHECK_EQ(cpu_pool_open(CPU_THREADS_MAX + 1, 0, 1, &pool), STATUS_USAGE);
    /* more ranks than cores: one thread each, not zero */
    CU_ASSERT_FATAL(cpu_pool_open(0, 4094, 4096, &pool) == STATUS_OK);
    CHECK_EQ(cpu_pool_threads(pool), 1);
    cpu_pool_close(pool);
}

const struct suite_case suite_cases[] = {{"every part once, results visible", test_every_part_once},
                                         {"idle threads sleep", test_idle_sleeps},
                                         {"the caller's affinity returns", test_affinity_returns},
                                         {"thread counts", test_counts},
                                         {NULL, NULL}};
