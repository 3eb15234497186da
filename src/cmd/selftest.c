/* selftest.c: `sfumato selftest`, the first thing to run on a new machine or cluster.
 *
 * Needs no model. Opens the chosen backend and the chosen communication exactly as the other commands
 * do, checks them against slower code that is known to be right, and prints a report to paste into a
 * bug report. Exit status: 0 all passed, 1 something is wrong, the usual codes when it cannot start.
 *
 *   verbs ─► collectives and their latency ─► a toy model: logits, decisions
 */
#include "cmd/selftest.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/log.h"
#include "base/rng.h"
#include "cmd/commands.h"

/* ---- numbers ---- */

double selftest_error(double got, double want, double allowed) {
    if (got == want) return 0.0;
    const double error = fabs(got - want);
    return error <= INFINITY && allowed > 0 ? error / allowed : INFINITY;
}

float selftest_random(uint64_t seed, int64_t i) {
    const rng_block r = rng_draw(seed, (uint32_t)i, (uint32_t)(i >> 32), RNG_CATEGORICAL, 0, 0);
    return 2.0f * rng_uniform(r.word[0]) - 1.0f;
}

void selftest_fill(uint64_t seed, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = selftest_random(seed, i);
}

void selftest_must(const struct selftest *t, enum status status) {
    if (status != STATUS_OK) comm_abort(t->h->comm, (int)status, fail_text());
}

void *selftest_memory(const struct selftest *t, size_t bytes) {
    void *out = calloc(1, bytes ? bytes : 1);
    if (!out) selftest_must(t, fail(STATUS_MEMORY, "no memory for the self-test"));
    return out;
}

/* ---- the report ---- */

static void add_check(struct selftest *t, const char *name, const char *detail, bool passes,
                      double worst) {
    *(passes ? &t->passed : &t->failed) += 1;
    if (t->h->rank != 0) return;
    if (!t->h->params.json) {
        printf("  %-4s  %-22s  %-44s", passes ? "ok" : "FAIL", name, detail);
        if (worst == 0) {
            printf("  equal\n");
        } else if (worst < INFINITY) {
            printf("  %.3f of what is allowed\n", worst);
        } else {
            printf("  differs\n");
        }
        fflush(stdout);
    }
    json_begin(&t->json, '{');
    json_key(&t->json, "check");
    json_write_text(&t->json, name);
    json_key(&t->json, "detail");
    json_write_text(&t->json, detail);
    json_key(&t->json, "passed");
    json_write_bool(&t->json, passes);
    json_key(&t->json, "worst");
    json_write_real(&t->json, worst);
    json_end(&t->json, '}');
}

void selftest_check(struct selftest *t, const char *name, const char *detail, double worst) {
    enum { MILLI_MAX = 2000000000 };
    double milli = ceil(1000 * worst); /* any error at all is at least 1 */
    if (!(milli < MILLI_MAX)) milli = MILLI_MAX;
    const int all = -comm_agree_min(t->h->comm, -(int)milli);
    add_check(t, name, detail, all <= 1000, all == MILLI_MAX ? INFINITY : 1e-3 * all);
}

void selftest_check_true(struct selftest *t, const char *name, const char *detail, bool holds) {
    const bool all = comm_agree_min(t->h->comm, holds) == 1;
    add_check(t, name, detail, all, all ? 0 : INFINITY);
}

void selftest_note(struct selftest *t, const char *name, const char *format, ...) {
    char text[256];
    va_list args;
    if (t->h->rank != 0) return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!t->h->params.json) printf("        %-22s  %s\n", name, text);
    json_begin(&t->json, '{');
    json_key(&t->json, "note");
    json_write_text(&t->json, name);
    json_key(&t->json, "detail");
    json_write_text(&t->json, text);
    json_end(&t->json, '}');
}

static void print_head(const struct selftest *t) {
    const struct host *h = t->h;
    struct utsname system = {0};
    uname(&system);
    if (h->rank != 0 || h->params.json) return;
    printf("sfumato %s selftest: %d rank%s, backend %s (%s, numeric class %s), communication %s\n",
           SFUMATO_VERSION, h->ranks, h->ranks == 1 ? "" : "s", h->backend->ops->name,
           backend_isa_name(h->backend->isa), backend_numerics_name(h->backend->numerics),
           comm_path_name(h->comm));
    printf("  on %s %s %s, %ld processors; built by %s\n\n", system.sysname, system.release,
           system.machine, sysconf(_SC_NPROCESSORS_ONLN), __VERSION__);
}

static void print_end(struct selftest *t) {
    const struct host *h = t->h;
    if (h->rank != 0) return;
    json_end(&t->json, ']');
    if (!h->params.json) {
        printf("\n%s: %d checks passed, %d failed\n", t->failed ? "FAILED" : "passed", t->passed,
               t->failed);
        return;
    }
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '{');
    json_key(&w, "version");
    json_write_text(&w, SFUMATO_VERSION);
    json_key(&w, "backend");
    json_write_text(&w, h->backend->ops->name);
    json_key(&w, "isa");
    json_write_text(&w, backend_isa_name(h->backend->isa));
    json_key(&w, "numerics");
    json_write_text(&w, backend_numerics_name(h->backend->numerics));
    json_key(&w, "communication");
    json_write_text(&w, comm_path_name(h->comm));
    json_key(&w, "ranks");
    json_write_int(&w, h->ranks);
    json_key(&w, "passed");
    json_write_int(&w, t->passed);
    json_key(&w, "failed");
    json_write_int(&w, t->failed);
    json_key(&w, "checks");
    json_write_raw(&w, t->json.bytes, t->json.n);
    json_end(&w, '}');
    json_write_bytes(&w, "\n", 1);
    fwrite(w.bytes, 1, w.n, stdout);
    json_writer_fini(&w);
}

/* ---- the command ---- */

static enum status open_machine(struct selftest *t) {
    static const enum comm_kind kinds[] = {COMM_AUTO, COMM_MPI, COMM_NCCL, COMM_FUSED};
    struct host *h = t->h;
    struct model_config config;
    selftest_plan(h, &config);
    host_plan_backend(h);
    TRY(comm_agree(h->comm, host_new_backend(h, &h->backend)));
    t->exact = h->backend->numerics == NUMERICS_FMA;
    if (!h->backend->ops->free_bytes) t->dtypes[t->dtype_count++] = BACKEND_F32;
    t->dtypes[t->dtype_count++] = BACKEND_BF16;

    struct comm_config comm_config = {.kind = kinds[h->params.comm],
                                      .slot_floats = 1 << 18,
                                      .timeout_seconds = h->params.collective_timeout,
                                      .device = h->backend->ops->free_bytes ? h->backend : NULL,
                                      .tree_sums = h->params.deterministic};
    engine_comm_needs(&h->engine_options, &comm_config.bcast_bytes_max,
                      &comm_config.gather_bytes_max, config.vocab_rows);
    if (comm_config.bcast_bytes_max < 1 << 20) comm_config.bcast_bytes_max = 1 << 20;
    if (comm_config.gather_bytes_max < 1 << 20) comm_config.gather_bytes_max = 1 << 20;
    return comm_setup(h->comm, &comm_config);
}

enum status cmd_selftest(struct host *h) {
    static const struct {
        const char *name;
        void (*run)(struct selftest *t);
    } parts[] = {
        {"verbs", selftest_verbs}, {"comm", selftest_collectives}, {"model", selftest_model}};
    enum { PARTS = sizeof parts / sizeof *parts };
    const char *only = h->params.positional;
    struct selftest t = {.h = h};
    bool known = !only;
    for (int i = 0; i < PARTS; i++) known |= only && strcmp(only, parts[i].name) == 0;
    if (!known) {
        return fail(STATUS_USAGE,
                    "%s: selftest has the parts verbs, comm and model; none named = all", only);
    }
    TRY(host_check_machine(h));
    if (sched_getaffinity(0, sizeof t.cores, &t.cores) != 0) memset(&t.cores, 0xff, sizeof t.cores);
    TRY(open_machine(&t));
    json_writer_init(&t.json);
    json_begin(&t.json, '[');
    print_head(&t);
    for (int i = 0; i < PARTS; i++) {
        if (!only || strcmp(only, parts[i].name) == 0) parts[i].run(&t);
    }
    print_end(&t);
    json_writer_fini(&t.json);
    return t.failed == 0
               ? STATUS_OK
               : fail(STATUS_PARTIAL,
                      "the self-test failed: %d of %d checks: the report above says which",
                      t.failed, t.passed + t.failed);
}
