/* main.c: the table of sub-commands, and the life of a process around one of them.
 *
 *   main ─► host_join (comm, options) ─► command->run ─► host_leave (tear down, message, exit code)
 *
 * The same program runs alone (one rank) or R times under mpirun. Everything a command needs from the job
 * and the model is in cmd/host.h; what it does is in its own file under cmd/.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "cmd/commands.h"

static const struct command commands[] = {
    {"generate", PARAMS_GENERATE, "-p TEXT\n--input IN.jsonl --output OUT.jsonl",
     "Soft Thinking generation: one prompt to the terminal, or a batch of JSON lines.",
     cmd_generate, NULL},
    {"score", PARAMS_SCORE, "--input IN.jsonl --output OUT.jsonl",
     "Entropy and log-probabilities of given ids, texts or concept tokens.", cmd_score, NULL},
    {"tokenize", PARAMS_TOKENIZE, "--input IN.jsonl --output OUT.jsonl",
     "Text to ids, ids to text (--decode), messages to prompts (--chat); loads no weights.",
     cmd_tokenize, NULL},
    {"inspect", PARAMS_INSPECT, "",
     "What a model is, which rank counts fit, and what each rank would hold.", cmd_inspect, NULL},
    {"serve", PARAMS_SERVE, "[--host ADDRESS] [--port N]",
     "The service: an OpenAI-compatible HTTP API with Soft Thinking.", cmd_serve, cmd_serve_before},
    {"bench", PARAMS_BENCH, "step|load|comm|sampler|tokenizer",
     "Speed, as ratios against what this machine can do.", cmd_bench, NULL},
    {"selftest", PARAMS_SELFTEST, "[verbs|comm|model] [--backend NAME] [--comm PATH]",
     "Is this machine right? Every computation and exchange against slower code; needs no model.",
     cmd_selftest, NULL},
};
enum { COMMAND_COUNT = sizeof commands / sizeof *commands };

static void print_usage(FILE *out) {
    fprintf(out,
            "sfumato %s: Soft Thinking inference, tensor-parallel over MPI\n\n"
            "usage: sfumato COMMAND [options]\n"
            "       mpirun --bind-to none -n RANKS sfumato COMMAND [options]\n\n",
            SFUMATO_VERSION);
    for (int i = 0; i < COMMAND_COUNT; i++) {
        fprintf(out, "  %-10s%s\n", commands[i].name, commands[i].about);
    }
    fprintf(out, "\nsfumato COMMAND --help lists its options.\n");
}

/* Joins the job first, so that under mpirun one rank speaks and none is waited for. */
static int no_such_command(int argc, char **argv, const char *name) {
    struct host host = {0};
    char known[128] = "";
    if (comm_open(&argc, &argv, &host.comm) == STATUS_OK) host.rank = comm_rank(host.comm);
    for (int i = 0; i < COMMAND_COUNT; i++) {
        const size_t n = strlen(known);
        snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", commands[i].name);
    }
    if (*name) {
        fail(STATUS_USAGE, "%s: no such command; there are %s", name, known);
    } else {
        fail(STATUS_USAGE, "a command is needed: %s", known);
    }
    return host_leave(&host, STATUS_USAGE);
}

/* Standard streams that were closed must not become the number of a socket that is opened later: what
 * stands in for them fails when it is used. */
static void hold_streams(void) {
    for (int i = STDIN_FILENO; i <= STDERR_FILENO; i++) {
        if (fcntl(i, F_GETFD) >= 0) continue;
        if (open("/dev/null", i == STDIN_FILENO ? O_WRONLY : O_RDONLY) != i) _exit(STATUS_USAGE);
    }
}

/* A full disk must not look like success. */
static enum status output_check(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return STATUS_OK;
    return fail(STATUS_USAGE, "the output cannot be written: %s", strerror(errno));
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    hold_streams();
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        if (host_launched_rank() == 0) print_usage(stdout);
        return 0;
    }
    if (strcmp(name, "--version") == 0) {
        if (host_launched_rank() == 0) printf("sfumato %s\n", SFUMATO_VERSION);
        return 0;
    }
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(commands[i].name, name) != 0) continue;
        struct host host = {0};
        if (commands[i].before) commands[i].before();
        enum status status = host_join(&host, &commands[i], argc - 1, argv + 1);
        if (status == STATUS_OK) {
            status = commands[i].run(&host);
            if (status == STATUS_OK) status = output_check();
        }
        return host_leave(&host, status);
    }
    return no_such_command(argc, argv, name);
}
