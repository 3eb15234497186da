/* h_golden.c: the forward pass of models/tiny against transformers in float32
 * (tests/reference/make_tiny.py).
 *
 * Inputs are ids and mixtures; compared are the 16 largest logits and the entropies at T = 1 and T
 * = 0.6 of chosen positions, with f32 weights and KV, in one chunk and in chunks of 7. Runs with
 * any number of ranks: every rank checks the candidates it owns, so the union is the whole list.
 */
#include "base/fmath.h"
#include "comm/comm.h"
#include "model/model.h"
#include "ranks.h"
#include "support/vec.h"

enum { ROWS_MAX = 256, PROBES = 2, WIDTH = 32, PAGES = 4 };

static comm *c;
static backend *be;
static model *m;
static source *src;

int suite_setup(int *argc, char ***argv) {
    if (comm_open(argc, argv, &c) != STATUS_OK) return 1;
    const struct backend_config config = {.rows_max = ROWS_MAX,
                                          .logit_rows_max = ROWS_MAX,
                                          .probes_max = PROBES * ROWS_MAX,
                                          .threads = 1,
                                          .local_rank = comm_local_rank(c),
                                          .local_ranks = comm_local_size(c)};
    if (source_open(suite_path("models/tiny"), &src) != STATUS_OK ||
        cpu_open(&config, &be) != STATUS_OK) {
        printf("%s\n", fail_text());
        return 1;
    }
    const struct comm_config comm_config = {
        .slot_floats = (size_t)ROWS_MAX * (size_t)src->config.hidden,
        .bcast_bytes_max = 1 << 16,
        .gather_bytes_max = 1 << 20,
        .timeout_seconds = 60};
    if (comm_setup(c, &comm_config) != STATUS_OK) return 1;
    const struct model_options options = {.weight_dtype = BACKEND_F32,
                                          .kv_dtype = BACKEND_F32,
                                          .slabs = 8,
                                          .rows_max = ROWS_MAX,
                                          .logit_rows_max = ROWS_MAX,
                                          .max_positions = 256,
                                          .vocab_count = src->config.vocab_rows};
    if (model_open(src, &options, be, c, NULL, NULL, &m) != STATUS_OK ||
        model_kv_new(m, PAGES) != STATUS_OK) {
        printf("%s\n", fail_text());
        return 1;
    }
    return 0;
}

unsigned suite_total_failures(unsigned mine) { return ranks_failures(c, mine); }

void suite_teardown(void) {
    model_close(m);
    be->ops->close(be);
    source_close(src);
    comm_close(c);
}

/* One input sequence: CSR, and what is wanted at its positions. */
struct golden_case {
    int count;
    int32_t mix_begin[ROWS_MAX + 1];
    uint32_t ids[ROWS_MAX * 64];
    float weights[ROWS_MAX * 64];
};

static _Alignas(16) unsigned char records[PROBES * ROWS_MAX * (16 + 8 * WIDTH)];

/* Runs positions [begin, end) as one segment, all rows with logits, probes at T = 1 and T = 0.6. */
static void run_chunk(struct golden_case *g, int begin, int end) {
    static const int32_t pages[PAGES] = {2, 0, 3, 1};
    static int32_t logit_rows[ROWS_MAX], mix_begin[ROWS_MAX + 1];
    static struct batch_probe probes[PROBES * ROWS_MAX];
    const int rows = end - begin;
    for (int i = 0; i < rows; i++) {
        logit_rows[i] = i;
        mix_begin[i] = g->mix_begin[begin + i] - g->mix_begin[begin];
        probes[2 * i] = (struct batch_probe){.logit_row = i, .temperature = 1.0f};
        probes[2 * i + 1] = (struct batch_probe){.logit_row = i, .temperature = 0.6f};
    }
    mix_begin[rows] = g->mix_begin[end] - g->mix_begin[begin];
    const struct batch_segment segment = {
        .row_count = rows, .position = begin, .page_count = PAGES};
    const struct batch batch = {.row_count = rows,
                                .segment_count = 1,
                                .logit_row_count = rows,
                                .probe_count = 2 * rows,
                                .candidate_count = WIDTH,
                                .segments = &segment,
                                .pages = pages,
                                .mix_begin = mix_begin,
                                .mix_ids = g->ids + g->mix_begin[begin],
                                .mix_weights = g->weights + g->mix_begin[begin],
                                .logit_rows = logit_rows,
                                .probes = probes};
    model_step(m, &batch, records + 2 * begin * batch_record_bytes(WIDTH, 0));
}

static const struct batch_record *record_at(int position, int probe) {
    return (const void *)(records + (2 * position + probe) * batch_record_bytes(WIDTH, 0));
}

/* H over all ranks, merged in double: what is tested is the forward pass, not the merge (engine).
 */
static double entropy_at(int position, int probe) {
    const struct batch_record mine = *record_at(position, probe);
    static struct batch_record all[SHARD_RANKS_MAX];
    const void *got = comm_gather(c, &mine, sizeof mine);
    if (!got) return NAN;
    memcpy(all, got, sizeof mine * (size_t)comm_size(c));
    double top = -INFINITY, s = 0, q = 0;
    for (int r = 0; r < comm_size(c); r++) top = fmax(top, (double)all[r].m);
    for (int r = 0; r < comm_size(c); r++) {
        const double shift = (double)all[r].m - top;
        s += exp(shift) * (double)all[r].s;
        q += exp(shift) * ((double)all[r].q + shift * (double)all[r].s);
    }
    return log(s) - q / s;
}

static void check_position(const struct vec_file *v, int position, double *worst) {
    const double h1 = entropy_at(position, 0), h06 = entropy_at(position, 1);
    if (comm_rank(c) == 0) {
        CHECK_NEAR(h1, vec_value_float(v, "H1"), 1e-4);
        CHECK_NEAR(h06, vec_value_float(v, "H06"), 1e-4);
    }
    const struct batch_record *r = record_at(position, 0);
    const struct batch_pair *pairs = (const void *)(r + 1);
    const shard_map *shard = model_get_shard(m);
    int next = 0;
    for (int w = 4; w < v->word_count; w++) {
        uint32_t id;
        float logit;
        vec_pair(v->words[w], &id, &logit);
        if ((int64_t)id < shard->vocab_begin[0] ||
            (int64_t)id >= shard->vocab_begin[shard->slab_count])
            continue;
        /* my list holds my share of the 16 best in the same order, unless two are closer than the
         * error */
        int at = next;
        while (at < r->count && pairs[at].id != id) at++;
        CU_ASSERT_FATAL(at < r->count);
        if (at == next) next++;
        const double error = fabs((double)pairs[at].z - (double)logit);
        if (error > *worst) *worst = error;
        CHECK_NEAR(pairs[at].z, logit, 2e-4 * fmax(1.0, fabs((double)logit)));
    }
}

static void run_all(int chunk) {
    static struct golden_case g;
    struct vec_file v;
    double worst = 0;
    int positions = 0;
    bool ran = false;
    vec_open(&v, "tiny_logits.vec");
    while (vec_next(&v)) {
        if (vec_is(&v, "case")) {
            g.count = 0;
            ran = false;
        } else if (vec_is(&v, "in")) {
            int n = g.mix_begin[g.count];
            for (int w = 1; w < v.word_count; w++, n++)
                vec_pair(v.words[w], &g.ids[n], &g.weights[n]);
            g.mix_begin[++g.count] = n;
            CU_ASSERT_FATAL(g.count <= ROWS_MAX);
        } else if (vec_is(&v, "at")) {
            for (int p = 0; !ran && p < g.count; p += chunk)
                run_chunk(&g, p, p + chunk < g.count ? p + chunk : g.count);
            ran = true;
            check_position(&v, atoi(v.words[1]), &worst);
            positions++;
        }
    }
    vec_close(&v);
    if (comm_rank(c) == 0) printf("(%d positions, worst |logit error| %.1e) ", positions, worst);
    CU_ASSERT(positions > 20);
}

static void test_whole(void) { run_all(ROWS_MAX); }
static void test_chunks(void) { run_all(7); }

const struct suite_case suite_cases[] = {{"golden logits, prompt in one chunk", test_whole},
                                         {"golden logits, prompt in chunks of 7", test_chunks},
                                         {NULL, NULL}};
