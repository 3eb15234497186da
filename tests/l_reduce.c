/* l_reduce.c: sums and exchanges over peers' memory (kernels/reduce.cu), ranks as threads.
 *
 * Each thread is one rank and one device of the emulation, with its own fibres; the regions are
 * memory all of them see, and every access of it is an atomic of the compiler. A hook delays accesses
 * at random, or one rank's stores of marks, which is when a protocol with two buffers fails. The
 * same file is built with -fsanitize=thread (l_reduce_tsan) and, on a device, with one stream a
 * thread (l_reduce_gpu); there the hook is missing.
 *
 * Expected: tree_reference.h and the bits of kernels_add_norm.
 */
#include <pthread.h>
#include <unistd.h>

#include "kernel_suite.h"
#include "tree_reference.h"

enum {
    RANKS_MAX = KERNELS_PEERS_MAX,
    ONE_SHOT_FLOATS = 6144,
    SLOT_FLOATS = 24576,
    GATHER_WORDS = 1500,
    GUARD = 64,
};

/* One stream a thread, as cudaStreamPerThread. */
static const kernels_stream own_stream = (kernels_stream)(uintptr_t)2;

__attribute__((weak)) void fibre_on_touch(void (*hook)(const void *p, bool store));

#define QUEUE(call)                                                  \
    do {                                                             \
        wrong[rank] += (call) != 0 || kernels_wait(own_stream) != 0; \
    } while (0)

#ifdef REDUCE_ALONE /* without the other kernels: what setup.cu has for all of them */
int kernels_sm_count = 132;
int kernels_setup(void) { return 0; }
int kernels_multiprocessors(void) { return kernels_sm_count; }
int kernels_wait(kernels_stream stream) { return stream == (kernels_stream)1; }
bool kernels_reads_host_memory(void) { return true; }
#endif

/* ---- ranks ---- */

static int ranks, rounds;
static struct kernels_peers peers[RANKS_MAX];
static struct kernels_watch watches[RANKS_MAX];
static size_t wrong[RANKS_MAX];
static void (*rank_main)(int rank);

static void world_open(int ranks_, int buffers, double patience_seconds) {
    struct kernels_peers p = {.ranks = ranks = ranks_,
                              .buffers = buffers,
                              .blocks_max = kernels_multiprocessors() / ranks_,
                              .one_shot_floats = ONE_SHOT_FLOATS,
                              .slot_floats = SLOT_FLOATS,
                              .gather_words = GATHER_WORDS,
                              .patience_ns = (uint64_t)(1e9 * patience_seconds)};
    const size_t bytes = kernels_peers_bytes(&p);
    for (int r = 0; r < ranks; r++) {
        unsigned char *region = aligned_alloc(256, (bytes + 511) / 256 * 256);
        CU_ASSERT_FATAL(region != NULL);
        memset(region, 0xA5, bytes + GUARD);
        p.region[r] = region;
        watches[r] = (struct kernels_watch){0};
        wrong[r] = 0;
    }
    for (int r = 0; r < ranks; r++) {
        peers[r] = p;
        peers[r].rank = r;
        peers[r].watch = &watches[r];
        CHECK_EQ(kernels_peers_clear(NULL, &peers[r]), 0);
        CHECK_EQ(kernels_wait(NULL), 0);
    }
}

static void world_close(void) {
    const size_t bytes = kernels_peers_bytes(&peers[0]);
    for (int r = 0; r < ranks; r++) {
        unsigned char *region = peers[0].region[r];
        for (int i = 0; i < GUARD; i++) CU_ASSERT(region[bytes + (size_t)i] == 0xA5);
        free(region);
    }
}

static void *thread_main(void *argument) {
    rank_main((int)(intptr_t)argument);
    return NULL;
}

/* Ranks [0, count) run. */
static void run_ranks(int count, void (*run)(int rank)) {
    pthread_t threads[RANKS_MAX];
    rank_main = run;
    for (int r = 0; r < count; r++)
        CU_ASSERT_FATAL(pthread_create(&threads[r], NULL, thread_main, (void *)(intptr_t)r) == 0);
    for (int r = 0; r < count; r++) pthread_join(threads[r], NULL);
}

/* ---- delays ---- */

static __thread uint64_t luck;
static __thread int this_rank;

static uint32_t draw(void) {
    luck = luck * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(luck >> 33);
}

static void delay_at_random(const void *p, bool store) {
    (void)p, (void)store;
    const uint32_t word = draw();
    if (word % 8192 == 0) usleep(word / 8192 % 400);
}

/* Rank 1 loses time when it is about to store the last mark of a call (a store to its own region):
 * long enough for rank 0 to end that call and push for the next one. */
enum { MARKED_FLOATS = 2048, MARKS_OF_CALL = MARKED_FLOATS / 4 };
static void delay_marks(const void *p, bool store) {
    static __thread uint32_t marks;
    const struct kernels_peers *own = &peers[this_rank];
    const char *begin = own->region[this_rank], *end = (const char *)kernels_peers_slot(own);
    if (this_rank != 1 || !store || (const char *)p < begin || (const char *)p >= end) return;
    if (++marks % MARKS_OF_CALL == 0) usleep(30000);
}

static void begin_rank(int rank, void (*hook)(const void *p, bool store)) {
    this_rank = rank;
    luck = 12345 + 977 * (uint64_t)rank;
    if (fibre_on_touch) fibre_on_touch(hook);
}

/* ---- every call, mixed ---- */

/* Rank 1 brings nothing in every third call; some operands are zeros, subnormal or huge. */
static float operand(int rank, int round, size_t i) {
    const uint64_t seed = 1000 * (uint64_t)round + (uint64_t)rank;
    if (rank == 1 && round % 3 == 0) return -0.0f;
    switch (suite_random(seed, (uint32_t)i) % 32) {
        case 0:
            return 0.0f;
        case 1:
            return -0.0f;
        case 2:
            return 0x1p-140f;
        case 3:
            return 3e7f * suite_random_float(seed, (uint32_t)i);
        default:
            return suite_random_float(seed, (uint32_t)i);
    }
}

static float expected(int round, size_t i) {
    float x[RANKS_MAX];
    for (int r = 0; r < ranks; r++) x[r] = operand(r, round, i);
    return tree_reference(x, ranks);
}

static void fill_slot(int rank, int round, size_t count) {
    float *slot = kernels_peers_slot(&peers[rank]);
    for (size_t i = 0; i < count; i++) slot[i] = operand(rank, round, i);
}

static void plain_sum(int rank, int round, enum kernels_way way, size_t count, float *sum) {
    fill_slot(rank, round, count);
    sum[count] = 7.0f;
    QUEUE(kernels_peers_sum(own_stream, way, &peers[rank], (int64_t)count, sum));
    for (size_t i = 0; i < count; i++) {
        const float want = expected(round, i);
        wrong[rank] += memcmp(&want, &sum[i], sizeof want) != 0;
    }
    wrong[rank] += sum[count] != 7.0f;
}

static void normed_sum(int rank, int round, enum kernels_way way, int rows, int hidden,
                       float *sum) {
    const size_t count = (size_t)rows * (size_t)hidden;
    const bool first = round % 4 == 1;
    float *x = malloc(sizeof *x * (count + 1)), *x_want = malloc(sizeof *x * (count + 1)),
          *weight = malloc(sizeof *x * (size_t)hidden);
    uint16_t *h = malloc(sizeof *h * (count + 1)), *h_want = malloc(sizeof *h * (count + 1));
    for (size_t i = 0; i < count; i++)
        x[i] = x_want[i] = first ? NAN : suite_random_float((uint64_t)round, (uint32_t)i);
    for (int i = 0; i < hidden; i++) weight[i] = 1.0f + suite_random_float(5, (uint32_t)i) / 8;
    fill_slot(rank, round, count);
    x[count] = 7.0f;
    h[count] = 77;
    QUEUE(kernels_peers_sum_norm(own_stream, way, &peers[rank], rows, hidden, first, 0.7f, x,
                                 weight, 1e-6f, h));
    for (size_t i = 0; i < count; i++) sum[i] = expected(round, i);
    QUEUE(kernels_add_norm(own_stream, rows, hidden, first, 0.7f, sum, x_want, weight, 1e-6f,
                           h_want));
    wrong[rank] += memcmp(x, x_want, sizeof *x * count) != 0;
    wrong[rank] += memcmp(h, h_want, sizeof *h * count) != 0;
    wrong[rank] += x[count] != 7.0f || h[count] != 77;
    free(x), free(x_want), free(weight), free(h), free(h_want);
}

static void gathering(int rank, int round, size_t bytes) {
    const size_t stride = bytes + (size_t)(round % 2) * 3;
    unsigned char mine[4 * GATHER_WORDS], all[RANKS_MAX * (4 * GATHER_WORDS + 3)];
    for (size_t i = 0; i < bytes; i++)
        mine[i] = (unsigned char)suite_random((uint64_t)(round * 10 + rank), (uint32_t)i);
    QUEUE(kernels_peers_gather(own_stream, &peers[rank], mine, bytes, all, stride));
    for (int r = 0; r < ranks; r++)
        for (size_t i = 0; i < bytes; i++)
            wrong[rank] += all[(size_t)r * stride + i] !=
                           (unsigned char)suite_random((uint64_t)(round * 10 + r), (uint32_t)i);
}

static void run_mixed(int rank) {
    static const int shapes[][2] = {{1, 512}, {1, 2048}, {3, 320}, {2, 63}, {5, 1024}};
    float *sum = malloc(sizeof *sum * (SLOT_FLOATS + 1));
    begin_rank(rank, delay_at_random);
    for (int round = 0; round < rounds; round++) {
        const uint32_t word = suite_random(31, (uint32_t)round); /* the same on all ranks */
        const int *shape = shapes[word / 8 % 5];
        if (draw() % 8 == 0) usleep(draw() % 1000);
        switch (word % 8) {
            case 0:
            case 1:
                plain_sum(rank, round, KERNELS_ONE_SHOT, 1 + word / 8 % ONE_SHOT_FLOATS, sum);
                break;
            case 2:
                plain_sum(rank, round, KERNELS_TWO_SHOT, 4 + word / 8 % 4 * 2500, sum);
                break;
            case 3:
            case 4:
            case 5:
                normed_sum(rank, round, KERNELS_ONE_SHOT, shape[0], shape[1], sum);
                break;
            case 6:
                normed_sum(rank, round, KERNELS_TWO_SHOT, shape[0], shape[1], sum);
                break;
            default:
                gathering(rank, round, 1 + word / 8 % (4 * GATHER_WORDS));
        }
    }
    free(sum);
}

static void mixed(int ranks_, int rounds_) {
    world_open(ranks_, 3, 60);
    rounds = rounds_;
    run_ranks(ranks, run_mixed);
    for (int r = 0; r < ranks; r++) {
        CHECK_EQ(wrong[r], 0);
        CHECK_EQ(watches[r].failed, 0);
    }
    world_close();
}

static void test_mixed(void) {
#ifdef REDUCE_ALONE
    mixed(2, 30);
    mixed(3, 20);
#else
    mixed(2, 30);
    for (int n = 3; n < RANKS_MAX; n++) mixed(n, 10);
    mixed(8, 14);
#endif
}

/* ---- the buffers ---- */

/* Stops at the first fault, so that a hang costs one patience. */
static void run_one_shots(int rank) {
    float *sum = malloc(sizeof *sum * (MARKED_FLOATS + 1));
    begin_rank(rank, delay_marks);
    for (int round = 0; round < rounds && wrong[rank] == 0 && watches[rank].failed == 0; round++)
        plain_sum(rank, round, KERNELS_ONE_SHOT, MARKED_FLOATS, sum);
    free(sum);
}

static size_t faults_of(int buffers) {
    world_open(2, buffers, buffers == 3 ? 60 : 0.5);
    rounds = 8;
    run_ranks(2, run_one_shots);
    size_t faults = 0;
    for (int r = 0; r < 2; r++) faults += wrong[r] + watches[r].failed;
    world_close();
    return faults;
}

static void test_buffers(void) {
    CHECK_EQ(faults_of(3), 0);
#ifndef REDUCE_ALONE /* the sanitizer is too slow for delays that are meant to be long */
    if (fibre_on_touch) CU_ASSERT(faults_of(2) > 0);
#endif
}

/* Numbers of calls choose buffers beyond 2^32, where 32 bits would use one twice in a row. */
static void run_far(int rank) {
    float *sum = malloc(sizeof *sum * 1025);
    begin_rank(rank, NULL);
    for (int round = 0; round < 6; round++) {
        plain_sum(rank, round, KERNELS_ONE_SHOT, 1024, sum);
        plain_sum(rank, round, KERNELS_TWO_SHOT, 1024, sum);
        gathering(rank, round, 100);
    }
    free(sum);
}

static void test_far(void) {
    world_open(2, 3, 60);
    for (int r = 0; r < 2; r++) { /* the region begins with the three numbers */
        uint64_t *calls = peers[0].region[r];
        for (int i = 0; i < 3; i++) calls[i] = ((uint64_t)1 << 32) - 3;
    }
    run_ranks(2, run_far);
    for (int r = 0; r < 2; r++) CHECK_EQ(wrong[r] + watches[r].failed, 0);
    world_close();
}

/* ---- the mark is no payload ---- */

static void run_mark(int rank) {
    float sum[9];
    for (int round = 0; round < 4; round++) {
        uint32_t *slot = (uint32_t *)(void *)kernels_peers_slot(&peers[rank]);
        for (int i = 0; i < 8; i++) slot[i] = i % 2 ? 0xffa5a5a5u : 0x80000000u;
        QUEUE(kernels_peers_sum(own_stream, KERNELS_ONE_SHOT, &peers[rank], 8, sum));
        for (int i = 0; i < 8; i++) /* absent everywhere stays absent */
            wrong[rank] += i % 2 ? !isnan(sum[i]) : sum[i] != 0.0f || !signbit(sum[i]);
    }
}

static void test_mark(void) {
    world_open(3, 3, 60);
    run_ranks(3, run_mark);
    for (int r = 0; r < 3; r++) CHECK_EQ(wrong[r] + watches[r].failed, 0);
    world_close();
}

/* ---- a rank that does not come ---- */

enum call { SMALL, LARGE, RECORDS };
static enum call missed;

static void run_without_the_last(int rank) {
    float sum[1025];
    unsigned char mine[64] = {0}, all[64 * RANKS_MAX];
    begin_rank(rank, NULL);
    for (int i = 0; i < 3; i++) { /* the later ones leave at once */
        if (missed == SMALL)
            QUEUE(kernels_peers_sum(own_stream, KERNELS_ONE_SHOT, &peers[rank], 1024, sum));
        if (missed == LARGE)
            QUEUE(kernels_peers_sum(own_stream, KERNELS_TWO_SHOT, &peers[rank], 1024, sum));
        if (missed == RECORDS)
            QUEUE(kernels_peers_gather(own_stream, &peers[rank], mine, 64, all, 64));
    }
}

static void missing_rank(enum call call, double patience_seconds, uint64_t reason) {
    struct timespec begin, end;
    missed = call;
    world_open(3, 3, patience_seconds);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    pthread_t threads[2];
    rank_main = run_without_the_last;
    for (int r = 0; r < 2; r++)
        CU_ASSERT_FATAL(pthread_create(&threads[r], NULL, thread_main, (void *)(intptr_t)r) == 0);
    if (patience_seconds == 0) {
        usleep(50000);
        for (int r = 0; r < 2; r++) __atomic_store_n(&watches[r].abort, 1, __ATOMIC_RELEASE);
    }
    for (int r = 0; r < 2; r++) pthread_join(threads[r], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds =
        (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    CU_ASSERT(seconds < 30); /* a loaded machine; without patience it would be for ever */
    for (int r = 0; r < 2; r++) {
        CHECK_EQ(wrong[r], 0);
        CHECK_EQ(watches[r].failed, reason);
        CHECK_EQ(watches[r].missing, 2);
        CHECK_EQ(watches[r].gather, call == RECORDS);
        CHECK_EQ(watches[r].number, 1);
    }
    world_close();
}

static void test_missing(void) {
    for (int call = SMALL; call <= RECORDS; call++) {
        missing_rank((enum call)call, 0.1, 1);
        missing_rank((enum call)call, 0, 2);
    }
}

const struct suite_case suite_cases[] = {
    {"sums, sums with norm and gathers in any order, ranks late at random: the tree's bits",
     test_mixed},
    {"one-shot: three buffers run clean, two do not", test_buffers},
    {"the three kinds of call beyond number 2^32", test_far},
    {"the mark of an empty place cannot be sent, -0.0f can", test_mark},
    {"a rank that does not come: patience and abort end every wait and say whom it was for",
     test_missing},
    {NULL, NULL},
};
