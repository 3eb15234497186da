/* g_comm.c: everything ranks say to one another, run with 1, 2, 3, 4, 8 ranks; window and message
 * path.
 *
 * Data are counter-based, so each rank knows what all others bring and what the sum must be. Ranks
 * run the same cases in step; no case returns early, or its peers would wait for ever.
 */
#include <jansson.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "comm/comm_bench.h"
#include "comm/comm_path.h"
#include "comm/comm_tree.h"
#include "suite.h"
#include "tree_reference.h"

enum { SLOT_FLOATS = 70000, PLAN_BYTES = 100000, GATHER_BYTES = 5000 };

static comm *c;
static int rank, size;

int suite_setup(int *argc, char ***argv) {
    log_init(LOG_INFO, false);
    if (comm_open(argc, argv, &c) != STATUS_OK) {
        fprintf(stderr, "%s\n", fail_text());
        return 1;
    }
    rank = comm_rank(c);
    size = comm_size(c);
    return 0;
}
unsigned suite_total_failures(unsigned mine) { return (unsigned)-comm_agree_min(c, -(int)mine); }
void suite_teardown(void) { comm_close(c); }

/* Changes the path of the open job; the program itself sets it once. */
static void use_path(enum comm_kind kind) {
    if (c->path) {
        c->path->close(c);
        c->path = NULL;
    }
    const struct comm_config config = {
        .kind = kind,
        .slot_floats = SLOT_FLOATS,
        .bcast_bytes_max = PLAN_BYTES,
        .gather_bytes_max = GATHER_BYTES,
        .timeout_seconds = 60,
    };
    CHECK_EQ(comm_setup(c, &config), STATUS_OK);
}

static float sample(uint64_t seed, int of_rank, size_t i) {
    static const float scales[] = {1.0f, 3e7f, 1e-5f, 4096.0f};
    const uint32_t at = (uint32_t)((size_t)of_rank * SLOT_FLOATS + i);
    return suite_random_float(seed, at) * scales[at % 4];
}

static void nap_randomly(uint32_t i, unsigned up_to_us) {
    const uint32_t word = suite_random(77 + (uint64_t)rank, i);
    if (word % 4 == 0) usleep(word / 4 % up_to_us);
}

/* ---- before comm_setup ---- */

static void test_join(void) {
    const char *launched = getenv("OMPI_COMM_WORLD_SIZE");
    CHECK_EQ(size, launched ? atoi(launched) : 1);
    CU_ASSERT(rank >= 0 && rank < size);
    CHECK_EQ(log_rank(), rank);
    CHECK_EQ(comm_local_size(c), size); /* the suite runs on one host */
    CHECK_EQ(comm_local_rank(c), rank);
}

static void test_agree(void) {
    CHECK_EQ(comm_agree(c, STATUS_OK), STATUS_OK);
    /* one fails: all leave with its status, text, field and code */
    for (int failing = 0; failing < size; failing++) {
        enum status mine = STATUS_OK;
        fail(STATUS_BUSY, "an old failure that must not show");
        if (rank == failing) {
            mine =
                fail_param(STATUS_MODEL, "layers.3", "short_file", "shard %d ends early", failing);
        }
        char expected[96], who[32] = "";
        if (failing > 0) snprintf(who, sizeof who, "rank %d: ", failing);
        snprintf(expected, sizeof expected, "%sshard %d ends early", who, failing);
        CHECK_EQ(comm_agree(c, mine), STATUS_MODEL);
        CHECK_STR(fail_text(), expected);
        CHECK_STR(fail_last()->param, "layers.3");
        CHECK_STR(fail_last()->code, "short_file");
        CHECK_EQ(fail_last()->status, STATUS_MODEL);
    }
    /* several fail: the lowest is heard */
    enum status mine = STATUS_OK;
    if (rank >= size / 2) mine = fail(rank % 2 ? STATUS_MEMORY : STATUS_USAGE, "from %d", rank);
    CHECK_EQ(comm_agree(c, mine), size / 2 % 2 ? STATUS_MEMORY : STATUS_USAGE);
    char expected[64];
    snprintf(expected, sizeof expected, size > 1 ? "rank %d: from %d" : "from %d", size / 2,
             size / 2);
    CHECK_STR(fail_text(), expected);
    CHECK_EQ(comm_agree(c, STATUS_OK), STATUS_OK);
}

static void test_agree_equal(void) {
    unsigned char digest[32];
    for (int i = 0; i < 32; i++) digest[i] = (unsigned char)(i + 1);
    CHECK_EQ(comm_agree_equal(c, "the model", digest, sizeof digest), STATUS_OK);
    CHECK_EQ(comm_agree_equal(c, "nothing", digest, 0), STATUS_OK);
    if (size == 1) return;
    const int odd = size - 1;
    if (rank == odd) digest[31] ^= 0xff;
    CHECK_EQ(comm_agree_equal(c, "the model", digest, sizeof digest), STATUS_COMM);
    char expected[64];
    snprintf(expected, sizeof expected, "rank %d has 0102", odd);
    CU_ASSERT(strstr(fail_text(), "ranks differ in the model") != NULL);
    CU_ASSERT(strstr(fail_text(), "rank 0 has 0102030405060708090a0b0c0d0e0f10") != NULL);
    CU_ASSERT(strstr(fail_text(), "1e1f20,") != NULL);
    CU_ASSERT(strstr(fail_text(), expected) != NULL);
    CU_ASSERT(strstr(fail_text(), "1e1fdf:") != NULL);
    /* lengths differ */
    CHECK_EQ(comm_agree_equal(c, "the build", digest, rank == odd ? 4 : 5), STATUS_COMM);
    CU_ASSERT(strstr(fail_text(), "rank 0 brings 5 bytes") != NULL);
    /* a difference far inside long bytes is shown, not their equal beginning */
    unsigned char many[COMM_EQUAL_BYTES_MAX] = {0};
    many[900] = rank == odd ? 0xee : 0xdd;
    CHECK_EQ(comm_agree_equal(c, "options", many, sizeof many), STATUS_COMM);
    CU_ASSERT(strstr(fail_text(), "rank 0 has dd00") != NULL);
    CU_ASSERT(strstr(fail_text(), " has ee00") != NULL);
}

static void test_agree_min(void) {
    CHECK_EQ(comm_agree_min(c, 100 - rank), 100 - (size - 1));
    CHECK_EQ(comm_agree_min(c, rank - 5), -5);
}

static void test_share(void) {
    const size_t n = 3 * 1000 * 1000 + 1;
    unsigned char *bytes = malloc(n);
    for (size_t i = 0; i < n; i++) bytes[i] = rank == 0 ? (unsigned char)(i * 7 + i / 251) : 0;
    comm_share(c, bytes, n);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) wrong += bytes[i] != (unsigned char)(i * 7 + i / 251);
    CHECK_EQ(wrong, 0);
    free(bytes);
    comm_share(c, NULL, 0);
}

static void test_setup_refuses(void) {
    struct comm_config config = {.kind = COMM_NCCL, .slot_floats = 1};
    CHECK_EQ(comm_setup(c, &config), STATUS_USAGE);
    CU_ASSERT(strstr(fail_text(), "--comm nccl needs the CUDA backend") != NULL);
    config.kind = COMM_AUTO;
    config.slot_floats = SIZE_MAX / 8;
    CHECK_EQ(comm_setup(c, &config), STATUS_MEMORY);
    if (size > 1) {
        config.slot_floats = (size_t)1 << 42; /* 16 TB */
        CHECK_EQ(comm_setup(c, &config), STATUS_COMM);
        CU_ASSERT(strstr(fail_text(), "/dev/shm") != NULL);
        config.kind = COMM_MPI;
        config.slot_floats = (size_t)1 << 29; /* 2 GB: more than an MPI count */
        CHECK_EQ(comm_setup(c, &config), STATUS_USAGE);
        config.slot_floats = 64 + (size_t)(rank == size - 1); /* ranks disagree */
        CHECK_EQ(comm_setup(c, &config), STATUS_COMM);
    }
    CHECK_STR(comm_path_name(c), "none");
}

/* ---- all-reduce ---- */

static float sums[2][SLOT_FLOATS];

static void reduce_and_check(uint64_t seed, size_t count, float *sum) {
    float *slot = comm_slot(c);
    for (size_t i = 0; i < count; i++) slot[i] = sample(seed, rank, i);
    comm_all_reduce(c, count, sum);
    size_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        float x[8];
        for (int r = 0; r < size; r++) x[r] = sample(seed, r, i);
        const float expected = tree_reference(x, size);
        wrong += memcmp(&expected, &sum[i], sizeof expected) != 0;
    }
    CHECK_EQ(wrong, 0);
}

/* Around 64 KB (16384 floats) the window path changes its way; sizes that do not divide. */
static void all_reduce_sizes(float *sum) {
    static const size_t counts[] = {0,   1,    2,     3,     15,    16,    17,         63,
                                    896, 1537, 16384, 16385, 16400, 40001, SLOT_FLOATS};
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++)
        reduce_and_check(i, counts[i], sum);
}

static void test_all_reduce_window(void) {
    use_path(COMM_AUTO);
    CHECK_STR(comm_path_name(c), size > 1 ? "window" : "self");
    all_reduce_sizes(sums[0]);
}

static void test_all_reduce_messages(void) {
    use_path(COMM_MPI);
    CHECK_STR(comm_path_name(c), size > 1 ? "mpi" : "self");
    all_reduce_sizes(sums[1]);
    /* the last size is the whole slot, with the same data */
    CU_ASSERT(suite_equal_bytes("window, messages", sums[0], sums[1], sizeof sums[0]));
}

/* Absent partials (-0) of most ranks leave the bits of the one that is present; in place of no
 * rank. */
static void all_reduce_absent(void) {
    enum { COUNT = 20000 };
    for (int present = 0; present < size; present++) {
        float *slot = comm_slot(c);
        for (size_t i = 0; i < COUNT; i++)
            slot[i] = rank == present ? sample(5, present, i) : -0.0f;
        if (rank == present) slot[1] = 0.0f, slot[2] = -0.0f, slot[3] = 1e-45f;
        comm_all_reduce(c, COUNT, sums[0]);
        for (size_t i = 0; i < COUNT; i++) sums[1][i] = sample(5, present, i);
        sums[1][1] = 0.0f, sums[1][2] = -0.0f, sums[1][3] = 1e-45f;
        CU_ASSERT(suite_equal_bytes("present", sums[0], sums[1], COUNT * sizeof(float)));
    }
}

static void test_absent(void) {
    use_path(COMM_AUTO);
    all_reduce_absent();
    use_path(COMM_MPI);
    all_reduce_absent();
}

/* ---- all-gather ---- */

/* Everybody's bytes at every rank, sums in between; the last two sizes are more than one slot. */
static void gathers_and_sums(void) {
    static const size_t sizes[] = {0, 1, 3, 272, 4097, 4 * SLOT_FLOATS + 1, 9 * SLOT_FLOATS};
    static unsigned char mine[9 * SLOT_FLOATS], all[8 * 9 * SLOT_FLOATS];
    for (uint32_t round = 0; round < 3; round++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            const size_t n = sizes[i];
            const uint64_t seed = 900 + round * 10 + i;
            for (size_t j = 0; j < n; j++)
                mine[j] = (unsigned char)suite_random(seed + 100 * (uint64_t)rank, (uint32_t)j);
            nap_randomly(30000 + round * 10 + (uint32_t)i, 500);
            comm_all_gather(c, mine, n, all);
            memset(mine, 0, n); /* brought, not lent */
            size_t wrong = 0;
            for (int r = 0; r < size; r++) {
                for (size_t j = 0; j < n; j++) {
                    wrong += all[(size_t)r * n + j] !=
                             (unsigned char)suite_random(seed + 100 * (uint64_t)r, (uint32_t)j);
                }
            }
            CHECK_EQ(wrong, 0);
            reduce_and_check(seed, 40 + i, sums[0]);
        }
    }
    CU_ASSERT(!comm_capturable(c)); /* host memory */
}

static void test_all_gather(void) {
    use_path(COMM_AUTO);
    gathers_and_sums();
    use_path(COMM_MPI);
    gathers_and_sums();
}

/* ---- plans and records ---- */

static unsigned char plan_byte(uint32_t step, size_t i) {
    return (unsigned char)(step * 31 + i * 7 + i / 256);
}

/* One step of the engine's protocol with sums between; every byte checked. */
static void step(uint32_t number, size_t plan_bytes, size_t record_bytes, size_t count) {
    static unsigned char plan[PLAN_BYTES], record[GATHER_BYTES];
    const void *received = NULL;
    if (rank == 0) {
        for (size_t i = 0; i < plan_bytes; i++) plan[i] = plan_byte(number, i);
    }
    const size_t n = comm_bcast(c, rank == 0 ? plan : NULL, rank == 0 ? plan_bytes : 0, &received);
    CHECK_EQ(n, plan_bytes);
    for (int i = 0; i < 2; i++) {
        float *slot = comm_slot(c);
        for (size_t j = 0; j < count; j++)
            slot[j] = (float)(rank + 1) * (float)(number + j + (size_t)i);
        comm_all_reduce(c, count, sums[0]);
        const float ranks = (float)(size * (size + 1) / 2); /* small integers: exact */
        size_t wrong = 0;
        for (size_t j = 0; j < count; j++)
            wrong += sums[0][j] != ranks * (float)(number + j + (size_t)i);
        CHECK_EQ(wrong, 0);
    }
    for (size_t i = 0; i < record_bytes; i++)
        record[i] = plan_byte(number + 1000u * (uint32_t)rank, i);
    const unsigned char *records = comm_gather(c, record, record_bytes);
    if (size > 1) memset(record, 0, record_bytes); /* brought, not lent */
    CU_ASSERT((records != NULL) == (rank == 0));
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++)
        wrong += ((const unsigned char *)received)[i] != plan_byte(number, i);
    for (int r = 0; rank == 0 && r < size; r++) {
        for (size_t i = 0; i < record_bytes; i++) {
            wrong +=
                records[(size_t)r * record_bytes + i] != plan_byte(number + 1000u * (uint32_t)r, i);
        }
    }
    CHECK_EQ(wrong, 0);
}

static void steps_of_all_sizes(void) {
    static const size_t plans[] = {0, 1, 64, 4087, 4088, 4089, 4096, 50000, PLAN_BYTES};
    static const size_t records[] = {0, 1, 16, 272, 4095, GATHER_BYTES};
    uint32_t number = 0;
    for (size_t i = 0; i < 9; i++) {
        for (size_t j = 0; j < 6; j++) step(number++, plans[i], records[j], 64);
    }
}

static void test_steps(void) {
    use_path(COMM_AUTO);
    steps_of_all_sizes();
    use_path(COMM_MPI);
    steps_of_all_sizes();
}

/* Nothing but plans, nothing but records: each kind is safe on its own, however far a rank runs
 * ahead. */
static void one_kind_only(void) {
    for (uint32_t i = 0; i < 500; i++) {
        const uint32_t mine = i * 3;
        const void *received = NULL;
        nap_randomly(i, 300);
        CHECK_EQ(comm_bcast(c, &mine, rank == 0 ? sizeof mine : 0, &received), sizeof mine);
        nap_randomly(i + 5000, 100);
        CHECK_EQ(memcmp(received, &mine, sizeof mine), 0);
    }
    for (uint32_t i = 0; i < 500; i++) {
        const uint32_t mine = i * 100 + (uint32_t)rank;
        nap_randomly(i + 10000, 300);
        const uint32_t *all = comm_gather(c, &mine, sizeof mine);
        nap_randomly(i + 15000, 100);
        for (int r = 0; rank == 0 && r < size; r++) CHECK_EQ(all[r], i * 100 + (uint32_t)r);
    }
}

static void test_one_kind_only(void) {
    use_path(COMM_AUTO);
    one_kind_only();
    use_path(COMM_MPI);
    one_kind_only();
}

/* Late ranks change no bits and block nothing. */
static void late_steps(void) {
    for (uint32_t i = 0; i < 60; i++) {
        nap_randomly(i + 20000, 5000);
        step(i, 300, 272, i % 10 == 0 ? 20000 : 896);
    }
}

static void test_late_ranks(void) {
    use_path(COMM_AUTO);
    late_steps();
    use_path(COMM_MPI);
    late_steps();
}

/* Many small all-reduces in a row, more ranks than cores included: slots alternate without an exit
 * barrier. */
static void test_many(void) {
    use_path(COMM_AUTO);
    const int rounds = 5000;
    size_t wrong = 0;
    for (int i = 0; i < rounds; i++) {
        float *slot = comm_slot(c);
        for (int j = 0; j < 64; j++) slot[j] = (float)(rank + i + j);
        comm_all_reduce(c, 64, sums[0]);
        for (int j = 0; j < 64; j++) {
            wrong += sums[0][j] != (float)(size * (i + j) + size * (size - 1) / 2);
        }
    }
    CHECK_EQ(wrong, 0);
    struct comm_times times;
    comm_times_get(c, &times);
    CHECK_EQ(times.all_reduce_count, rounds);
    CU_ASSERT(times.wait_seconds >= 0 && times.move_seconds > 0);
}

/* A rank without a plan sleeps: half a second of waiting costs almost no processor time; and it
 * wakes at once (the sleep ends by itself after a second, which would hide a forgotten wake). */
static void idle(const char *path, double share_max) {
    enum { IDLE_US = 500 * 1000 };
    const double wake_max = 0.4;
    struct timespec before, after;
    const void *bytes;
    comm_agree(c, STATUS_OK);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    if (rank == 0) usleep(IDLE_US);
    uint64_t sent_ns = comm_clock_ns();
    comm_bcast(c, &sent_ns, rank == 0 ? sizeof sent_ns : 0, &bytes);
    const uint64_t now_ns = comm_clock_ns();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    if (rank == 0) return;
    memcpy(&sent_ns, bytes, sizeof sent_ns);
    const double wake = 1e-9 * (double)(now_ns - sent_ns);
    const double busy =
        (double)(after.tv_sec - before.tv_sec) + 1e-9 * (double)(after.tv_nsec - before.tv_nsec);
    const double busy_max = share_max * 1e-6 * IDLE_US;
    if (busy > busy_max || wake > wake_max) {
        printf("\n    %s: %.3f s of processor time, %.6f s to wake\n", path, busy, wake);
    }
    CU_ASSERT(busy <= busy_max);
    CU_ASSERT(wake <= wake_max);
}

static void test_idle(void) {
    use_path(COMM_AUTO);
    idle("window", 0.05);
    use_path(COMM_MPI);
    idle("messages", 0.3); /* polls once a millisecond, through Open MPI's progress engine */
}

/* `bench comm`: every row has figures, in the text of a table and as JSON. */
static char *bench_output(bool json) {
    FILE *file = tmpfile();
    fflush(stdout);
    const int saved = dup(STDOUT_FILENO);
    dup2(fileno(file), STDOUT_FILENO);
    CHECK_EQ(comm_bench(c, json), size > 1 ? STATUS_OK : STATUS_USAGE);
    fflush(stdout);
    dup2(saved, STDOUT_FILENO);
    close(saved);
    static char text[20000];
    rewind(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return text;
}

static void test_bench(void) {
    if (c->path) c->path->close(c);
    c->path = NULL;
    const struct comm_config config = {
        .slot_floats = 128, .bcast_bytes_max = 512, .gather_bytes_max = 256, .timeout_seconds = 60};
    CHECK_EQ(comm_setup(c, &config),
             STATUS_OK); /* all-reduce 256, 512; broadcast 256, 512; gather 256 */
    const char *text = bench_output(true);
    if (rank > 0 || size == 1) {
        CHECK_STR(text, "");
        return;
    }
    json_t *root = json_loads(text, 0, NULL);
    const json_t *rows = json_object_get(root, "rows");
    CHECK_EQ(json_integer_value(json_object_get(root, "ranks")), size);
    CHECK_EQ(json_array_size(rows), 5);
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        const double own_us = json_number_value(json_object_get(row, "own_us"));
        const double mpi_us = json_number_value(json_object_get(row, "mpi_us"));
        CU_ASSERT(own_us > 0 && mpi_us > 0);
        CHECK_NEAR(json_number_value(json_object_get(row, "ratio")) * mpi_us, own_us,
                   0.01 * own_us + 0.001 * mpi_us);
    }
    json_decref(root);
}

const struct suite_case suite_cases[] = {
    {"joining: ranks, sizes, hosts", test_join},
    {"agree: the lowest failing rank is heard by all", test_agree},
    {"agree_equal: shows both values", test_agree_equal},
    {"agree_min", test_agree_min},
    {"share: megabytes from rank 0", test_share},
    {"setup: refuses on all ranks alike", test_setup_refuses},
    {"all-reduce, window: the tree, every size", test_all_reduce_window},
    {"all-reduce, messages: the same bits", test_all_reduce_messages},
    {"all-reduce: absent ranks (-0) change nothing", test_absent},
    {"all-gather: every rank's bytes at every rank, between sums", test_all_gather},
    {"plan, sums, records: every size", test_steps},
    {"plans alone, records alone, with delays", test_one_kind_only},
    {"late ranks change nothing", test_late_ranks},
    {"thousands in a row", test_many},
    {"waiting for a plan costs no processor time", test_idle},
    {"bench comm: a figure for every size", test_bench},
    {NULL, NULL},
};
