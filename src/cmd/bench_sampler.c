/* bench_sampler.c: `sfumato bench sampler`, what one row costs after its logits are there.
 *
 * Two parts, timed apart and by turns: `candidates` (entropy statistics and the best K of V logits, on the
 * rank's pool) and `think_step` (filters, policy, stop rules, on rank 0's engine thread) in every mode.
 * Logits are made to look like a language model's: a few peaks over a broad floor. One rank.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/rng.h"
#include "cmd/bench.h"

enum { SAMPLER_K = 32, SAMPLER_SLABS = 8 };

static void make_logits(float *logits, int64_t vocab) {
    for (int64_t i = 0; i < vocab; i++) {
        const rng_block r = rng_draw(7, (uint32_t)i, 0, RNG_CATEGORICAL, 0, 0);
        const float bell =
            rng_uniform(r.word[0]) + rng_uniform(r.word[1]) + rng_uniform(r.word[2]) - 1.5f;
        logits[i] = 4.0f * bell + (r.word[3] % 4096 == 0 ? 9.0f : 0.0f);
    }
}

static struct think_params sampler_params(enum think_mode mode) {
    return (struct think_params){.mode = mode,
                                 .max_topk = 10,
                                 .thinking = {0.6f, 30, 0.95f, 0.001f},
                                 .answer = {0.6f, 30, 0.95f, 0},
                                 .cold_stop = true,
                                 .cold_stop_entropy = 0.01f,
                                 .cold_stop_length = 256,
                                 .budget = INT32_MAX,
                                 .start = START_FIRST_TOKEN,
                                 .gumbel_temperature = 0.5f,
                                 .dirichlet_alpha = 1,
                                 .open_id = -1,
                                 .close_id = -1};
}

/* Microseconds of one think_step on these candidates. */
static double time_think(enum think_mode mode, const struct think_candidates *c) {
    enum { REPEATS = 2000 };
    const struct think_params p = sampler_params(mode);
    struct think_state state;
    struct think_decision d;
    const uint32_t prompt = 0;
    think_state_init(&state, &p, &prompt, 1);
    const double start = progress_clock();
    for (int i = 0; i < REPEATS; i++) {
        if (!think_step(&p, &state, c, &d)) return -1;
    }
    return 1e6 * (progress_clock() - start) / REPEATS;
}

struct sampler_case {
    int64_t vocab, vocab_begin[SAMPLER_SLABS + 1];
    float *logits;
    unsigned char *record;
    struct batch batch;
    struct batch_probe probe;
    int32_t logit_row;
};

static void report(const struct host *h, int64_t vocab, struct bench_summary us,
                   struct bench_summary ratio, const struct think_candidates *c,
                   struct json_writer *w) {
    double think_us[THINK_MODE_COUNT];
    for (int m = 0; m < THINK_MODE_COUNT; m++) think_us[m] = time_think((enum think_mode)m, c);
    printf("V %-7lld  candidates %8.1f us a row (%.1f..%.1f), read/candidates %.2f; think_step",
           (long long)vocab, us.median, us.min, us.max, ratio.median);
    for (int m = 0; m < THINK_MODE_COUNT; m++) {
        printf(" %s %.1f us%s", think_mode_name((enum think_mode)m), think_us[m],
               m + 1 < THINK_MODE_COUNT ? "," : "\n");
    }
    if (!h->params.json) return;
    json_begin(w, '{');
    json_key(w, "vocab");
    json_write_int(w, vocab);
    bench_write_summary(w, "candidates_us", us);
    bench_write_summary(w, "read_ratio", ratio);
    json_key(w, "think_step_us");
    json_begin(w, '{');
    for (int m = 0; m < THINK_MODE_COUNT; m++) {
        json_key(w, think_mode_name((enum think_mode)m));
        json_write_real(w, think_us[m]);
    }
    json_end(w, '}');
    json_end(w, '}');
}

static void time_vocab(struct host *h, struct sampler_case *s, struct json_writer *w) {
    struct bench_series row_us = {0}, ratio = {0};
    backend *b = h->backend;
    s->probe = (struct batch_probe){.logit_row = 0, .temperature = 0.6f};
    s->batch = (struct batch){.row_count = 1,
                              .logit_row_count = 1,
                              .probe_count = 1,
                              .candidate_count = SAMPLER_K,
                              .logit_rows = &s->logit_row,
                              .probes = &s->probe};
    for (int i = 0; i <= SAMPLER_SLABS; i++)
        s->vocab_begin[i] = shard_slab_begin(i, s->vocab, SAMPLER_SLABS);
    volatile float sink = 0;
    for (int round = 0; round < (int)h->params.rounds + 1; round++) {
        double start = progress_clock();
        float sum = 0;
        for (int64_t i = 0; i < s->vocab; i += 16)
            sum += s->logits[i]; /* the floor: one touch a line */
        sink = sum;
        const double floor = progress_clock() - start;
        start = progress_clock();
        b->ops->candidates(b, &s->batch, s->logits, SAMPLER_SLABS, s->vocab_begin, s->vocab,
                           s->record);
        const double seconds = progress_clock() - start;
        if (round == 0) continue; /* warm-up */
        bench_add(&row_us, 1e6 * seconds);
        bench_add(&ratio, floor / seconds);
    }
    (void)sink;
    struct batch_record header;
    struct batch_pair pairs[SAMPLER_K];
    float z[SAMPLER_K];
    uint32_t ids[SAMPLER_K];
    memcpy(&header, s->record, sizeof header);
    memcpy(pairs, s->record + sizeof header, sizeof pairs);
    for (int i = 0; i < header.count; i++) {
        z[i] = pairs[i].z;
        ids[i] = pairs[i].id;
    }
    const struct think_candidates c = {.m = header.m,
                                       .s = header.s,
                                       .q = header.q,
                                       .count = header.count,
                                       .z = z,
                                       .id = ids,
                                       .close_z = -1e30f};
    report(h, s->vocab, bench_summarise(&row_us), bench_summarise(&ratio), &c, w);
}

static enum status run(struct host *h) {
    static const int64_t vocabs[] = {768, 32000, 49152, 128256, 151936, 262144};
    TRY(host_check_machine(h));
    if (h->params.backend == BACKEND_IS_CUDA)
        return fail(STATUS_USAGE, "bench sampler is of the CPU: leave --backend cuda out");
    h->backend_config = (struct backend_config){.isa = h->params.backend == BACKEND_IS_SCALAR
                                                           ? ISA_SCALAR
                                                           : (enum backend_isa)h->params.isa,
                                                .threads = (int)h->params.threads,
                                                .local_ranks = 1,
                                                .rows_max = 1,
                                                .logit_rows_max = 1,
                                                .probes_max = 1};
    TRY(cpu_open(&h->backend_config, &h->backend));
    /* Scratch grows while matrices are made; this one is as wide as the widest vocabulary. */
    const int64_t widest = vocabs[sizeof vocabs / sizeof *vocabs - 1];
    const struct matrix_spec spec = {
        .kind = MATRIX_COLUMN, .dtype = BACKEND_BF16, .rows = widest, .cols = 32};
    matrix *unused;
    TRY(h->backend->ops->matrix_new(h->backend, &spec, &unused));
    printf("%s, %d threads, K = %d\n", backend_isa_name(h->backend->isa), h->backend->threads,
           SAMPLER_K);
    struct sampler_case s = {0};
    s.logits = h->backend->ops->alloc(h->backend, (size_t)widest * sizeof(float), "logits");
    s.record =
        h->backend->ops->alloc(h->backend, (size_t)batch_record_bytes(SAMPLER_K, 0), "a record");
    if (!s.logits || !s.record) return STATUS_MEMORY;
    make_logits(s.logits, widest);
    struct json_writer w;
    json_writer_init(&w);
    json_begin(&w, '[');
    for (size_t i = 0; i < sizeof vocabs / sizeof *vocabs; i++) {
        s.vocab = vocabs[i];
        time_vocab(h, &s, &w);
    }
    json_end(&w, ']');
    if (h->params.json) printf("%.*s\n", (int)w.n, w.bytes);
    json_writer_fini(&w);
    return STATUS_OK;
}

enum status bench_sampler(struct host *h) { return h->rank == 0 ? run(h) : STATUS_OK; }
