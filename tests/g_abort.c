/* g_abort.c: a job ends as a whole: whatever happens to one rank, no rank stays, mpirun's exit code
 * says so, and the reason is printed once.
 *
 * The program runs itself under mpirun: without arguments it is the test and starts `mpirun -n R
 * g_abort SCENARIO PATH`; with arguments it is one rank of such a job. All jobs of a case run at
 * once, since nearly all their time is Open MPI's own second of grace. Each rank prints its process
 * number first; afterwards none of them may be alive. The test adopts orphans (subreaper), so that
 * it sees ranks whose mpirun was killed.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "comm/comm.h"
#include "suite.h"

enum { RANKS = 3, GONE_SECONDS = 10 };

/* ---- one rank ---- */

static comm *c;

static void steps(int count) {
    static float sum[64];
    for (int i = 0; i < count; i++) {
        comm_all_reduce(c, 64, sum);
        comm_gather(c, sum, sizeof sum);
    }
}

/* This rank's turn in this scenario? Says so: the time from here until all are gone counts. */
static bool strikes(const char *scenario, const char *name, bool is_my_turn) {
    if (strcmp(scenario, name) != 0 || !is_my_turn) return false;
    printf("fault\n");
    fflush(stdout);
    return true;
}

static _Noreturn void leave(int exit_code) {
    comm_close(c);
    exit(exit_code);
}

static _Noreturn void run_rank(const char *scenario, const char *path) {
    const int rank = comm_rank(c);
    const void *plan;
    printf("pid %d\n", (int)getpid());
    fflush(stdout);
    if (strikes(scenario, "kill-start", rank == 1)) raise(SIGKILL);

    enum status status = STATUS_OK;
    if (strcmp(scenario, "refuse") == 0 && rank > 0)
        status = fail(STATUS_MODEL, "no file %d", rank);
    status = comm_agree(c, status);
    if (status != STATUS_OK) {
        if (rank == 0) log_failure(fail_text());
        leave(status);
    }
    const struct comm_config config = {
        .kind = strcmp(path, "mpi") == 0 ? COMM_MPI : COMM_AUTO,
        .slot_floats = 64,
        .bcast_bytes_max = 64,
        .gather_bytes_max = 256,
        .timeout_seconds = strncmp(scenario, "late", 4) == 0 ? 1 : 20};
    if (comm_setup(c, &config) != STATUS_OK) leave(99);
    steps(10);

    if (strcmp(scenario, "fine") == 0) leave(0);
    if (strikes(scenario, "kill-0", rank == 0)) raise(SIGKILL);
    if (strikes(scenario, "kill-2", rank == 2)) raise(SIGKILL);
    if (strikes(scenario, "segv-1", rank == 1)) raise(SIGSEGV);
    if (strikes(scenario, "exit-1", rank == 1)) _exit(9);
    if (strikes(scenario, "assert-2", rank == 2)) ASSERT_EQ(rank, 3);
    if (strikes(scenario, "abort-1", rank == 1)) comm_abort(c, 42, "the reason");
    if (strikes(scenario, "abort-all", true)) comm_abort(c, 43, "the reason");
    if (strikes(scenario, "late-1", rank == 1)) sleep(60);
    if (strcmp(scenario, "late-0") == 0)
        comm_gather(c, &rank, sizeof rank); /* run ahead, then sum */
    if (strikes(scenario, "late-0", rank == 0)) sleep(60);
    if (strcmp(scenario, "late-plan") == 0 || strcmp(scenario, "idle-kill-1") == 0) {
        if (rank == 0) sleep(3); /* longer than the deadline of late-* */
        if (strikes(scenario, "idle-kill-1", rank == 1)) raise(SIGKILL);
        comm_bcast(c, "go", rank == 0 ? 2 : 0, &plan);
        leave(0);
    }
    if (strcmp(scenario, "idle-orphan") == 0) {
        if (rank == 0) pause();
        comm_bcast(c, "go", rank == 0 ? 2 : 0, &plan);
    }
    steps(1000000);
    leave(98);
}

/* ---- the test ---- */

static char program[4096];

int suite_setup(int *argc, char ***argv) {
    if (*argc == 3) {
        if (comm_open(argc, argv, &c) != STATUS_OK) return 1;
        run_rank((*argv)[1], (*argv)[2]);
    }
    const ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
    setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    return n > 0 ? 0 : 1;
}

struct job {
    const char *scenario, *path;
    int exit_code;    /* wanted; -1: any but 0 */
    const char *text; /* wanted exactly once in the output; NULL: nothing said by us */
    bool kill_mpirun;
    pid_t mpirun;
    FILE *output;
    char *said;
    double begin, fault, end; /* when; fault: 0 when none was met */
    int status;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void start(struct job *job) {
    job->output = tmpfile();
    job->begin = now();
    job->mpirun = fork();
    if (job->mpirun != 0) return;
    char ranks[16];
    snprintf(ranks, sizeof ranks, "%d", RANKS);
    dup2(fileno(job->output), STDOUT_FILENO);
    dup2(fileno(job->output), STDERR_FILENO);
    dup2(open("/dev/null", O_RDONLY), STDIN_FILENO);
    execlp("mpirun", "mpirun", "-n", ranks, program, job->scenario, job->path, (char *)NULL);
    _exit(127);
}

static void read_output(struct job *job) {
    const off_t size = lseek(fileno(job->output), 0, SEEK_END);
    free(job->said);
    job->said = calloc(1, (size_t)size + 1);
    if (pread(fileno(job->output), job->said, (size_t)size, 0) != size) job->said[0] = '\0';
}

static int count_in(const char *text, const char *word) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, word)); p++) n++;
    return n;
}

/* Exists and is not merely waiting to be reaped by whoever adopted it. */
static bool is_alive(pid_t pid) {
    char path[64], line[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f) return false;
    const bool got = fgets(line, sizeof line, f) != NULL;
    fclose(f);
    const char *state = got ? strrchr(line, ')') : NULL;
    return state && state[2] != 'Z' && state[2] != 'X';
}

static int alive_ranks(const struct job *job) {
    int alive = 0;
    for (const char *p = job->said; (p = strstr(p, "pid ")); p++)
        alive += is_alive((pid_t)atoi(p + 4));
    return alive;
}

static void finish(struct job *jobs, int count) {
    const double give_up = now() + 100;
    for (int left = count; left > 0 && now() < give_up; usleep(20000)) {
        for (int i = 0; i < count; i++) {
            struct job *job = &jobs[i];
            if (job->end > 0) continue;
            read_output(job);
            if (job->kill_mpirun && count_in(job->said, "pid ") == RANKS &&
                now() - job->begin > 2) {
                kill(job->mpirun, SIGKILL);
                job->kill_mpirun = false;
                job->fault = now();
            }
            if (job->fault == 0 && strstr(job->said, "fault\n")) job->fault = now();
            if (waitpid(job->mpirun, &job->status, WNOHANG) != job->mpirun) continue;
            left--;
            for (;;) { /* mpirun is gone; the ranks must be, too */
                read_output(job);
                job->end = now();
                if (alive_ranks(job) == 0 || job->end - job->begin > 30) break;
                usleep(10000);
            }
        }
    }
}

static void check(struct job *job) {
    const int code =
        WIFEXITED(job->status) ? WEXITSTATUS(job->status) : 128 + WTERMSIG(job->status);
    const bool code_fits = job->exit_code < 0 ? code != 0 : code == job->exit_code;
    const double since = job->end - job->fault; /* a good job may take its time */
    const bool gone =
        job->end > 0 && (job->fault == 0 || since < GONE_SECONDS) && alive_ranks(job) == 0;
    const int times = job->text ? count_in(job->said, job->text) : count_in(job->said, "sfumato:");
    const bool said_fits = times == (job->text ? 1 : 0);
    CHECK_EQ(count_in(job->said, "pid "), RANKS);
    CU_ASSERT(code_fits);
    CU_ASSERT(gone);
    CU_ASSERT(said_fits);
    if (!code_fits || !gone || !said_fits) {
        printf(
            "\n    %s %s: exit code %d (want %d), %d ranks alive after %.1f s, \"%s\" %d "
            "times:\n%s\n",
            job->scenario, job->path, code, job->exit_code, alive_ranks(job), since,
            job->text ? job->text : "sfumato:", times, job->said);
    }
    if (job->end == 0) kill(job->mpirun, SIGKILL); /* leave nothing behind */
    for (char *p = job->said; (p = strstr(p, "pid ")); p++) {
        if (is_alive((pid_t)atoi(p + 4))) kill((pid_t)atoi(p + 4), SIGKILL);
    }
    fclose(job->output);
    free(job->said);
}

static void run_jobs(struct job *jobs, int count) {
    for (int i = 0; i < count; i++) start(&jobs[i]);
    finish(jobs, count);
    for (int i = 0; i < count; i++) check(&jobs[i]);
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}
#define RUN(jobs) run_jobs(jobs, (int)(sizeof(jobs) / sizeof(jobs)[0]))

static void test_fine(void) {
    struct job jobs[] = {
        {.scenario = "fine", .path = "auto"},
        {.scenario = "fine", .path = "mpi"},
        {.scenario = "late-plan", .path = "auto"}, /* waiting for a plan has no deadline */
        {.scenario = "late-plan", .path = "mpi"}};
    RUN(jobs);
}

static void test_death(void) {
    struct job jobs[] = {{.scenario = "kill-start", .path = "auto", .exit_code = 137},
                         {.scenario = "kill-0", .path = "auto", .exit_code = -1},
                         {.scenario = "kill-2", .path = "mpi", .exit_code = -1},
                         {.scenario = "idle-kill-1", .path = "auto", .exit_code = 137},
                         {.scenario = "segv-1", .path = "auto", .exit_code = -1},
                         {.scenario = "exit-1", .path = "auto", .exit_code = 9}};
    RUN(jobs);
}

static void test_abort(void) {
    struct job jobs[] = {
        {.scenario = "abort-1", .path = "auto", .exit_code = 42, .text = "sfumato: the reason\n"},
        {.scenario = "abort-1", .path = "mpi", .exit_code = 42, .text = "sfumato: the reason\n"},
        {.scenario = "abort-all", .path = "auto", .exit_code = 43, .text = "sfumato: the reason\n"},
        {.scenario = "assert-2", .path = "auto", .exit_code = 7, .text = "sfumato: bug on rank 2"},
        {.scenario = "refuse",
         .path = "auto",
         .exit_code = 3,
         .text = "sfumato: rank 1: no file 1\n"}};
    RUN(jobs);
}

static void test_deadline(void) {
    struct job jobs[] = {{.scenario = "late-1",
                          .path = "auto",
                          .exit_code = 6,
                          .text = "all-reduce 11 for rank 1 on "},
                         {.scenario = "late-1",
                          .path = "mpi",
                          .exit_code = 6,
                          .text = "all-reduce 11 for rank 1 on "},
                         {.scenario = "late-0",
                          .path = "auto",
                          .exit_code = 6,
                          .text = "all-reduce 11 for rank 0 on "}};
    RUN(jobs);
}

static void test_orphans(void) {
    /* Open MPI's message segments in /dev/shm outlive a killed mpirun: do without them here */
    setenv("OMPI_MCA_btl", "^vader", 1);
    struct job jobs[] = {
        {.scenario = "idle-orphan", .path = "auto", .exit_code = 137, .kill_mpirun = true},
        {.scenario = "idle-orphan", .path = "mpi", .exit_code = 137, .kill_mpirun = true}};
    RUN(jobs);
    unsetenv("OMPI_MCA_btl");
}

const struct suite_case suite_cases[] = {
    {"a good job ends with 0, however long it idles", test_fine},
    {"a rank that dies takes the job with it", test_death},
    {"comm_abort, a bug, a refused start: their code, said once", test_abort},
    {"a late rank is named", test_deadline},
    {"mpirun killed: no orphans", test_orphans},
    {NULL, NULL},
};
