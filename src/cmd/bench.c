/* bench.c: see bench.h: the choice of a bench, and the arithmetic of their rounds. */
#include "cmd/bench.h"

#include <stdlib.h>
#include <string.h>

#include "cmd/commands.h"

void bench_add(struct bench_series *s, double value) {
    if (s->count < BENCH_ROUNDS_MAX) s->value[s->count++] = value;
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench_summary bench_summarise(const struct bench_series *s) {
    if (s->count == 0) return (struct bench_summary){0};
    struct bench_series sorted = *s;
    qsort(sorted.value, (size_t)s->count, sizeof *sorted.value, by_value);
    const int mid = s->count / 2;
    return (struct bench_summary){
        .median =
            s->count % 2 ? sorted.value[mid] : (sorted.value[mid - 1] + sorted.value[mid]) / 2,
        .min = sorted.value[0],
        .max = sorted.value[s->count - 1],
    };
}

void bench_write_summary(struct json_writer *w, const char *key, struct bench_summary s) {
    json_key(w, key);
    json_begin(w, '{');
    json_key(w, "median");
    json_write_real(w, s.median);
    json_key(w, "min");
    json_write_real(w, s.min);
    json_key(w, "max");
    json_write_real(w, s.max);
    json_end(w, '}');
}

/* Every bench knows some options, and refuses the others where they are given by hand; what comes from the
 * environment or a file may be meant for other commands. */
static enum status refuse_idle_flags(const struct params *p, const char *bench, const int *known) {
    static const int always[] = {PARAM_json,     PARAM_collective_timeout,
                                 PARAM_config,   PARAM_log_level,
                                 PARAM_log_json, PARAM_quiet,
                                 PARAM_help,     PARAM_NONE};
    for (int id = PARAM_COUNT - 1; id >= 0; id--) {
        bool is_known = false;
        for (const int *k = always; *k != PARAM_NONE; k++) is_known |= *k == id;
        for (const int *k = known; *k != PARAM_NONE; k++) is_known |= *k == id;
        if (!is_known && p->origin[id] == PARAM_COMMAND_LINE) {
            return fail(STATUS_USAGE, "--%s does nothing in bench %s",
                        param_flag((enum param_id)id), bench);
        }
    }
    return STATUS_OK;
}

enum status cmd_bench(struct host *h) {
    static const struct {
        const char *name;
        enum status (*run)(struct host *h);
        int flags[32];
    } benches[] = {{"step",
                    bench_step,
                    {PARAM_dims,
                     PARAM_layers,
                     PARAM_batch,
                     PARAM_context,
                     PARAM_rounds,
                     PARAM_model,
                     PARAM_seed,
                     PARAM_rank_of,
                     PARAM_collective_us,
                     PARAM_compare_hard,
                     PARAM_backend,
                     PARAM_isa,
                     PARAM_gemm,
                     PARAM_numerics,
                     PARAM_comm,
                     PARAM_prefix_cache,
                     PARAM_dtype,
                     PARAM_kv_dtype,
                     PARAM_max_num_batched_tokens,
                     PARAM_run_steps,
                     PARAM_launch_ahead,
                     PARAM_kv_memory,
                     PARAM_threads,
                     PARAM_slabs,
                     PARAM_deterministic,
                     PARAM_chat_template,
                     PARAM_NONE}},
                   {"load",
                    bench_load,
                    {PARAM_rounds, PARAM_model, PARAM_backend, PARAM_isa, PARAM_gemm,
                     PARAM_numerics, PARAM_dtype, PARAM_kv_dtype, PARAM_threads, PARAM_slabs,
                     PARAM_deterministic, PARAM_chat_template, PARAM_NONE}},
                   {"comm", bench_comm, {PARAM_comm, PARAM_NONE}},
                   {"sampler",
                    bench_sampler,
                    {PARAM_rounds, PARAM_backend, PARAM_isa, PARAM_threads, PARAM_NONE}},
                   {"tokenizer", bench_tokenizer, {PARAM_model, PARAM_chat_template, PARAM_NONE}}};
    for (size_t i = 0; h->params.positional && i < sizeof benches / sizeof *benches; i++) {
        if (strcmp(benches[i].name, h->params.positional) != 0) continue;
        TRY(refuse_idle_flags(&h->params, benches[i].name, benches[i].flags));
        return benches[i].run(h);
    }
    return fail(STATUS_USAGE, "bench needs one of: step, load, comm, sampler, tokenizer");
}
