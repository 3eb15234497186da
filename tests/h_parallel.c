/* h_parallel.c: tensor parallelism by byte equality, on the toy models of verification.md §2.
 *
 * Every rank of the job also runs the whole model alone (a communicator of one), on the same batch
 * of hard, soft and prefill rows. For R = 1, 2, 4, 8 its slice of the logits must have the same
 * bits as the whole model's; for other R it must repeat itself and agree to a tolerance. Weights
 * come from a hash of (tensor, row, column), so a sharding error cannot hide in the file.
 */
#include "comm/comm_path.h"
#include "model/model.h"
#include "ranks.h"
#include "support/toy_model.h"

enum { ROWS = 21, SEQS = 4, PAGES = 8, LOGIT_ROWS = 6 };

static comm *job;

int suite_setup(int *argc, char ***argv) {
    const struct comm_config config = {.slot_floats = 1 << 16,
                                       .bcast_bytes_max = 1 << 16,
                                       .gather_bytes_max = 1 << 16,
                                       .timeout_seconds = 100};
    return comm_open(argc, argv, &job) != STATUS_OK || comm_setup(job, &config) != STATUS_OK;
}

unsigned suite_total_failures(unsigned mine) { return ranks_failures(job, mine); }

void suite_teardown(void) { comm_close(job); }

/* A job of this process alone, beside the real one. */
static comm *open_alone(size_t slot_floats) {
    comm *c = calloc(1, sizeof *c);
    if (!c) exit(1);
    *c = (comm){.job = &comm_self_job, .size = 1, .local_size = 1};
    const struct comm_config config = {
        .slot_floats = slot_floats, .bcast_bytes_max = 64, .gather_bytes_max = 64};
    if (comm_setup(c, &config) != STATUS_OK) exit(1);
    return c;
}

/* A model on a communicator, with its own backend and one thread. */
struct instance {
    backend *be;
    model *m;
};

static void instance_open(struct instance *i, source *src, comm *c, enum backend_dtype dtype,
                          int threads) {
    const struct backend_config config = {.rows_max = ROWS,
                                          .logit_rows_max = LOGIT_ROWS,
                                          .probes_max = LOGIT_ROWS,
                                          .threads = threads,
                                          .local_rank = comm_local_rank(job),
                                          .local_ranks = comm_local_size(job)};
    const struct model_options options = {.weight_dtype = dtype,
                                          .kv_dtype = dtype,
                                          .slabs = 8,
                                          .rows_max = ROWS,
                                          .logit_rows_max = LOGIT_ROWS,
                                          .max_positions = 256,
                                          .vocab_count = src->config.vocab_rows - 5};
    enum status s = cpu_open(&config, &i->be);
    if (s == STATUS_OK) s = model_open(src, &options, i->be, c, NULL, NULL, &i->m);
    if (s == STATUS_OK) s = model_kv_new(i->m, PAGES);
    if (s != STATUS_OK) {
        printf("%s\n", fail_text());
        exit(1);
    }
}

static void instance_close(struct instance *i) {
    model_close(i->m);
    i->be->ops->close(i->be);
}

/* Four sequences: a prompt of 10, one of 5 that starts at position 0, one decode row, and a second
 * chunk of the first; mixtures of 1, 3 and 10 entries among the rows. */
struct script {
    struct batch batch;
    struct batch_segment segments[SEQS];
    int32_t mix_begin[ROWS + 1], logit_rows[LOGIT_ROWS];
    uint32_t ids[ROWS * 10];
    float weights[ROWS * 10];
    struct batch_probe probes[LOGIT_ROWS];
};
static const int32_t pages[PAGES] = {5, 1, 7, 0, 2, 6, 3, 4};

static void script_fill(struct script *s, uint64_t seed, int vocab, int step) {
    static const int rows_of[SEQS] = {10, 5, 1, 5};
    int n = 0;
    memset(s, 0, sizeof *s);
    for (int q = 0, row = 0; q < SEQS; row += rows_of[q], q++) {
        s->segments[q] = (struct batch_segment){.row_begin = row,
                                                .row_count = rows_of[q],
                                                .position = step * rows_of[q],
                                                .page_begin = 2 * q,
                                                .page_count = 2};
    }
    for (int row = 0; row < ROWS; row++) {
        static const int widths[] = {1, 3, 10, 1};
        const int width = widths[suite_random(seed, (uint32_t)row) % 4];
        float left = 1.0f;
        s->mix_begin[row] = n;
        for (int k = 0; k < width; k++, n++) {
            s->ids[n] =
                (suite_random(seed + 1, (uint32_t)row) + (uint32_t)(k * 97)) % (uint32_t)vocab;
            s->weights[n] = k + 1 < width ? left * 0.5f : left;
            left -= s->weights[n];
        }
    }
    s->mix_begin[ROWS] = n;
    for (int i = 0; i < LOGIT_ROWS; i++) {
        s->logit_rows[i] = i < 4 ? (int[]){9, 14, 15, 20}[i] - (i == 0 ? 3 : 0) : 0;
        s->probes[i] = (struct batch_probe){.logit_row = i, .temperature = 1.0f};
    }
    s->batch = (struct batch){.row_count = ROWS,
                              .segment_count = SEQS,
                              .logit_row_count = 4,
                              .probe_count = 4,
                              .candidate_count = 32,
                              .segments = s->segments,
                              .pages = pages,
                              .mix_begin = s->mix_begin,
                              .mix_ids = s->ids,
                              .mix_weights = s->weights,
                              .logit_rows = s->logit_rows,
                              .probes = s->probes};
}

static void compare(const char *name, enum backend_dtype dtype) {
    static struct script s;
    static _Alignas(16) unsigned char records[2][LOGIT_ROWS * (16 + 8 * 32)];
    struct model_config config;
    source *src;
    CU_ASSERT_FATAL(toy_config(name, &config));
    CU_ASSERT_FATAL(synthetic_open(&config, 1, &src) == STATUS_OK);
    comm *solo = open_alone((size_t)ROWS * (size_t)config.hidden);

    struct instance whole, part;
    instance_open(&whole, src, solo, dtype, 2);
    instance_open(&part, src, job, dtype, 1);
    const shard_map *shard = model_get_shard(part.m);
    const int64_t local = shard_vocab_count(shard), all = config.vocab_rows;
    float *got = malloc((size_t)local * sizeof *got), *want = malloc((size_t)all * sizeof *want);
    const bool exact = (comm_size(job) & (comm_size(job) - 1)) == 0;
    double worst = 0, scale = 0;
    for (int step = 0; step < 3; step++) {
        script_fill(&s, 100 + (uint64_t)step, config.vocab_rows - 5, step);
        model_step(whole.m, &s.batch, records[0]);
        model_step(part.m, &s.batch, records[1]);
        for (int p = 0; p < s.batch.probe_count; p++) {
            model_fetch(whole.m, &s.batch, p, want);
            model_fetch(part.m, &s.batch, p, got);
            const float *slice = want + shard->vocab_begin[0];
            if (exact) CU_ASSERT(suite_equal_bytes(name, got, slice, (size_t)local * sizeof *got));
            for (int64_t i = 0; i < local; i++) {
                if (!isfinite(slice[i])) continue; /* padding ids */
                worst = fmax(worst, fabs((double)got[i] - (double)slice[i]));
                scale = fmax(scale, fabs((double)slice[i]));
            }
        }
    }
    CU_ASSERT(scale > 0.5 && worst <= 0.02 * scale);
    if (comm_rank(job) == 0) printf("(%s: worst %.1e of %.1f) ", name, worst, scale);
    free(got);
    free(want);
    instance_close(&part);
    instance_close(&whole);
    comm_close(solo);
    source_close(src);
}

static const char *const toys[] = {"toy_mha8", "toy_gqa3", "toy_gqa2",
                                   "toy_gqa5", "toy_qk",   "toy_kv10"};

static void test_bf16(void) {
    for (size_t t = 0; t < sizeof toys / sizeof toys[0]; t++) compare(toys[t], BACKEND_BF16);
}
static void test_f32(void) {
    compare("toy_gqa3", BACKEND_F32);
    compare("toy_qk", BACKEND_F32);
}

const struct suite_case suite_cases[] = {
    {"bf16: R ranks = the whole model, bit for bit", test_bf16},
    {"f32: R ranks = the whole model, bit for bit", test_f32},
    {NULL, NULL}};
