/* selftest_model.c: a small synthetic model on the chosen backend and all ranks, beside the same model
 * whole, on the scalar code, on rank 0 alone.
 *
 *   logits      teacher-forced: one prompt of hard and mixed inputs, then single rows; every rank
 *               compares its own vocabulary with its part of the whole model's
 *   decisions   the engine itself: soft thinking of four sequences, and the hash of all decisions, made on
 *               the host and, where the backend can, on the device
 *
 * The toy has what the large models have: 5 query heads a kv head, QKV bias, QK norm, an uneven
 * vocabulary, and llama3's scaled RoPE. Weights are a hash of their place (load/synthetic.c). With the
 * CPU's fma class and 1, 2, 4 or 8 ranks the bits and the hash must be the same; otherwise squared
 * error over squared value may be 1e-9 (f32) or 1e-4 (bf16), and the hash is shown.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cmd/selftest.h"

enum {
    ROWS = 64,
    SEQS = 4,
    PROMPT = 24,
    LENGTH = 128,
    PAGES = 12,
    STEPS = 16,
    RUN_STEPS = 8,
    VOCAB = 603
};

void selftest_plan(struct host *h, struct model_config *config) {
    config_init(config);
    config->arch = ARCH_QWEN3;
    snprintf(config->arch_name, sizeof config->arch_name, "selftest");
    config->layers = 2;
    config->hidden = 320;
    config->ffn = 544;
    config->heads = 40;
    config->kv_heads = 8;
    config->head_dim = 32;
    config->vocab_rows = VOCAB;
    config->qkv_bias = config->qk_norm = true;
    config->rope = ROPE_LLAMA3;
    config->rope_factor = 8;
    config->rope_low_freq_factor = 1;
    config->rope_high_freq_factor = 4;
    config->rope_original_positions = 64;
    config->max_positions = 4096;
    h->engine_options = (struct engine_options){.max_seqs = SEQS,
                                                .max_batched_tokens = ROWS,
                                                .max_model_len = LENGTH,
                                                .page_count = PAGES,
                                                .prefix_cache = true,
                                                .vocab_count = VOCAB - 3,
                                                .run_steps = RUN_STEPS,
                                                .launch_ahead = 2};
    h->model_options =
        (struct model_options){.weight_dtype = BACKEND_BF16,
                               .kv_dtype = BACKEND_BF16,
                               .slabs = shard_default_slabs(h->ranks),
                               .rows_max = ROWS,
                               .logit_rows_max = engine_logit_rows_max(&h->engine_options),
                               .max_positions = LENGTH,
                               .vocab_count = VOCAB - 3};
}

/* The whole model on this rank alone. */
struct whole {
    comm *c;
    backend *be;
    model *m;
};

static void open_whole(struct selftest *t, source *src, struct whole *w) {
    struct backend_config config = t->h->backend_config;
    config.isa = ISA_SCALAR;
    config.numerics = NUMERICS_FMA;
    config.threads = 1;
    struct comm_config sizes = {.slot_floats = (size_t)ROWS * (size_t)src->config.hidden};
    engine_comm_needs(&t->h->engine_options, &sizes.bcast_bytes_max, &sizes.gather_bytes_max,
                      VOCAB);
    selftest_must(t, comm_open_alone(&w->c));
    selftest_must(t, comm_setup(w->c, &sizes));
    selftest_must(t, cpu_open(&config, &w->be));
    selftest_must(t, model_open(src, &t->h->model_options, w->be, w->c, NULL, NULL, &w->m));
    selftest_must(t, model_kv_new(w->m, PAGES));
}

static void close_whole(struct whole *w) {
    model_close(w->m);
    comm_close(w->c);
    w->be->ops->close(w->be);
}

/* ---- logits ---- */

struct forced {
    struct batch batch;
    struct batch_segment segment;
    struct batch_probe probe;
    int32_t pages[2], mix_begin[PROMPT + 1], logit_row;
    uint32_t ids[PROMPT * 4];
    float weights[PROMPT * 4];
};

/* `rows` inputs from `position` on: every second one a mixture of four ids. */
static void force(struct forced *f, int position, int rows) {
    int n = 0;
    memset(f, 0, sizeof *f);
    for (int r = 0; r < rows; r++) {
        const int width = r % 2 ? 4 : 1;
        f->mix_begin[r] = n;
        for (int k = 0; k < width; k++, n++) {
            f->ids[n] = (uint32_t)(position + r) * 131u % (VOCAB - 300) + 77u * (uint32_t)k;
            f->weights[n] = width == 1 ? 1.0f : 0.4f - 0.1f * (float)k;
        }
    }
    f->mix_begin[rows] = n;
    f->pages[0] = 7;
    f->pages[1] = 2;
    f->logit_row = rows - 1;
    f->segment = (struct batch_segment){
        .row_count = rows, .position = position, .page_begin = 0, .page_count = 2};
    f->probe = (struct batch_probe){.temperature = 1.0f};
    f->batch = (struct batch){.row_count = rows,
                              .segment_count = 1,
                              .logit_row_count = 1,
                              .probe_count = 1,
                              .candidate_count = 32,
                              .segments = &f->segment,
                              .pages = f->pages,
                              .mix_begin = f->mix_begin,
                              .mix_ids = f->ids,
                              .mix_weights = f->weights,
                              .logit_rows = &f->logit_row,
                              .probes = &f->probe};
}

/* This rank's share of the logits beside the whole model's. */
static double compare_logits(struct selftest *t, model *m, model *whole, bool exact) {
    static struct forced f;
    const shard_map *shard = model_get_shard(m);
    const int64_t begin = shard->vocab_begin[0], count = shard_vocab_count(shard);
    float *got = selftest_memory(t, sizeof *got * VOCAB),
          *want = selftest_memory(t, sizeof *want * VOCAB);
    void *records = selftest_memory(t, (size_t)batch_record_bytes(32, 0));
    double error = 0, power = 0;
    for (int position = 0; position < 80; position += position == 0 ? PROMPT : 7) {
        force(&f, position, position == 0 ? PROMPT : position % 3 ? 1 : 7);
        model_step(m, &f.batch, records);
        model_fetch(m, &f.batch, 0, got);
        model_step(whole, &f.batch, records);
        model_fetch(whole, &f.batch, 0, want);
        for (int64_t i = 0; i < count && begin + i < VOCAB - 3; i++) {
            const double d = (double)got[i] - want[begin + i];
            error += d * d;
            power += (double)want[begin + i] * want[begin + i];
        }
    }
    free(got), free(want), free(records);
    const double allowed = exact                                             ? 0
                           : t->h->model_options.weight_dtype == BACKEND_F32 ? 1e-9
                                                                             : 1e-4;
    return selftest_error(error / (power > 0 ? power : 1), 0, allowed);
}

/* ---- decisions ---- */

static void on_event(void *user, const struct engine_event *e) {
    int64_t *steps = user;
    if (e->kind == ENGINE_STEP) ++*steps;
}

static struct request request_of(int i, const uint32_t *ids) {
    return (struct request){.id = (uint64_t)i,
                            .prompt = {.count = PROMPT, .ids = ids},
                            .choices = 1,
                            .max_tokens = STEPS,
                            .repetition_penalty = 1,
                            .think = {.mode = (enum think_mode)(i % 4),
                                      .max_topk = 3 + 4 * i,
                                      .thinking = {0.8f, 30, 0.95f, 0.001f},
                                      .answer = {0.8f, 30, 0.95f, 0},
                                      .budget = STEPS / 2,
                                      .start = START_FIRST_TOKEN,
                                      .ignore_eos = true,
                                      .gumbel_temperature = 0.5f,
                                      .dirichlet_alpha = 1,
                                      .seed = 11 + (uint64_t)i,
                                      .open_id = -1,
                                      .close_id = 5}};
}

/* Four sequences in the engine, in runs of so many steps where the backend has them; 0 on other ranks
 * than the first. */
static uint64_t decide(struct selftest *t, model *m, comm *c, int run_steps, int64_t *steps) {
    struct engine_options own = t->h->engine_options;
    const struct engine_options *options = &own;
    own.run_steps = run_steps;
    struct engine_counters counters;
    engine *e = NULL;
    *steps = 0;
    if (comm_rank(c) != 0) {
        engine_follow(m, c, options);
        return 0;
    }
    selftest_must(t, engine_new(m, c, options, on_event, steps, &e));
    for (int i = 0; i < SEQS; i++) {
        uint32_t ids[PROMPT];
        for (int k = 0; k < PROMPT; k++) ids[k] = (uint32_t)(i * 211 + k * 37) % (VOCAB - 3);
        const struct request r = request_of(i, ids);
        selftest_must(t, engine_submit(e, &r));
    }
    while (engine_tick(e)) continue;
    engine_stop(e);
    engine_counters_get(e, &counters);
    engine_free(e);
    return counters.decision_hash;
}

void selftest_model(struct selftest *t) {
    struct host *h = t->h;
    struct model_config config;
    struct whole whole;
    int64_t steps = 0, whole_steps = 0;
    uint64_t want = 0;
    selftest_plan(h, &config);
    selftest_must(t, synthetic_open(&config, 1, &h->source));
    h->model_options.weight_dtype = h->model_options.kv_dtype = t->dtypes[0];
    selftest_must(
        t, model_open(h->source, &h->model_options, h->backend, h->comm, NULL, NULL, &h->model));
    selftest_must(t, model_kv_new(h->model, PAGES));
    open_whole(t, h->source, &whole);

    const bool f32 = h->model_options.weight_dtype == BACKEND_F32;
    const bool cpu = h->backend->numerics != NUMERICS_CUDA;
    const bool exact = (t->exact || (cpu && f32)) && (h->ranks & (h->ranks - 1)) == 0;
    char detail[64];
    snprintf(detail, sizeof detail, "%s, %d ranks against one, scalar", f32 ? "f32" : "bf16",
             h->ranks);
    selftest_check(t, "toy model: logits", detail, compare_logits(t, h->model, whole.m, exact));

    const uint64_t hash = decide(t, h->model, h->comm, 0, &steps);
    const uint64_t again = decide(t, h->model, h->comm, 0, &steps);
    selftest_check_true(t, "decisions, repeated", "the same hash from a second run", hash == again);
    if (h->backend->run_rows > 0) {
        const uint64_t device = decide(t, h->model, h->comm, RUN_STEPS, &steps);
        if (h->params.deterministic) {
            selftest_check_true(t, "decisions, device", "the hash of those on the host",
                                device == hash);
        } else if (h->rank == 0) {
            selftest_note(t, "decisions, device", "%016llx; on the host: %016llx",
                          (unsigned long long)device, (unsigned long long)hash);
        }
    }
    if (h->rank == 0) {
        want = decide(t, whole.m, whole.c, 0, &whole_steps);
        snprintf(detail, sizeof detail, "%016llx after %lld steps", (unsigned long long)hash,
                 (long long)steps);
        selftest_note(t, "decision hash", "%s; one rank, scalar: %016llx", detail,
                      (unsigned long long)want);
    }
    if (exact) {
        selftest_check_true(t, "decisions", "the hash of one rank, scalar",
                            h->rank != 0 || hash == want);
    }
    const int64_t wanted = (int64_t)SEQS * STEPS;
    selftest_check_true(t, "decisions, steps", "every sequence ran to its end",
                        h->rank != 0 || (steps == wanted && whole_steps == wanted));
    close_whole(&whole);
}
