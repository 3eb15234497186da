/* selftest.h: what the parts of `sfumato selftest` share: the two backends and the report.
 *
 *   selftest.c         the command: opens backend and communication, runs the parts, prints the end
 *   selftest_verbs.c   every verb of the chosen backend against the scalar CPU code
 *   selftest_comm.c    all-reduce, broadcast and gather: right, alike on all ranks, and how fast
 *   selftest_model.c   a toy model: logits against the whole model on one rank, and decisions
 *
 * A line of the report is one check with its worst error as a multiple of what is allowed: up to 1
 * passes. Allowed is 0 where bits must agree (the CPU's fma class) and otherwise the tolerance of
 * the comparison. Every rank checks its own; the line shows the worst rank. Thread: engine.
 */
#ifndef SFUMATO_CMD_SELFTEST_H
#define SFUMATO_CMD_SELFTEST_H

#include <sched.h>

#include "base/json.h"
#include "cmd/host.h"

struct selftest {
    struct host *h;
    cpu_set_t cores;              /* that this process may use: opening a backend pins the caller */
    bool exact;                   /* the chosen backend must give the reference's bits */
    enum backend_dtype dtypes[2]; /* weights it computes with */
    int dtype_count;
    int passed, failed;
    struct json_writer json; /* rank 0: the checks so far, an open array */
};

/* error / allowed of one element: 0 when equal (NaN equals nothing). */
double selftest_error(double got, double want, double allowed);

/* Collective. worst: this rank's largest selftest_error. detail: "bf16, 8 shapes". */
void selftest_check(struct selftest *t, const char *name, const char *detail, double worst);
/* Collective, of this rank's verdict alone. */
void selftest_check_true(struct selftest *t, const char *name, const char *detail, bool holds);
/* A figure beside a check, no verdict: rank 0's. */
void selftest_note(struct selftest *t, const char *name, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Uniform in (-1, 1), a function of (seed, i). */
float selftest_random(uint64_t seed, int64_t i);
void selftest_fill(uint64_t seed, float *out, int64_t n);
/* Ends the job when a step that must work did not. */
void selftest_must(const struct selftest *t, enum status status);
void *selftest_memory(const struct selftest *t, size_t bytes); /* zeroed, from the host; free() */

void selftest_verbs(struct selftest *t);
void selftest_collectives(struct selftest *t);
void selftest_model(struct selftest *t);
/* Dimensions of the toy model of selftest_model.c, and the options it runs with. */
void selftest_plan(struct host *h, struct model_config *config);

#endif
