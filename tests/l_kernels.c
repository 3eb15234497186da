/* l_kernels.c: the CUDA kernels, run on the CPU by the fibre emulation, against the CPU backend.
 *
 * Where a kernel does the CPU's operations in the CPU's order the bits must be equal (mixture,
 * candidates' lists, decisions); elsewhere a double reference
 * and the bounds of verification.md section 7 decide. Outputs have guards around them, the emulated
 * shared memory has its exact size. What this cannot show: a GPU's memory order, blocks that run at
 * once, the tensor core's own rounding, or speed. test_l_kernels_gpu is this very file against the
 * library nvcc made (kernel_suite.h).
 */
#include "f_backend.h"
#include "kernel_suite.h"
#include "think/think.h"

enum { ROWS_MAX = 70, SLABS = 8, WORKSPACE_TILES = 64 };

static void *zeroed(size_t n) {
    void *p = calloc(1, n + 64);
    CU_ASSERT_FATAL(p != NULL);
    return p;
}

/* ---- products ---- */

struct shape {
    int64_t rows, cols;
    int slab_count;
    int64_t border[SLABS + 1];
};
static const struct shape shapes[] = {
    {33, 128, 8, {0, 16, 32, 48, 64, 80, 96, 112, 128}},
    {70, 640, 8, {0, 80, 160, 240, 320, 400, 480, 560, 640}},
    {20, 200, 2, {0, 96, 200}},
    {48, 100, 1, {0, 100}},
    {17, 63, 3, {0, 21, 21, 63}},       /* odd K, odd borders, an empty slab */
    {16, 44, 5, {0, 4, 4, 20, 40, 44}}, /* aligned, slabs that are no multiple of 16 */
    {9, 1, 2, {0, 0, 1}},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static struct kernels_matrix matrix_make(const struct shape *s, enum kernels_kind kind,
                                         const float *a, const float *b) {
    struct kernels_matrix m;
    CU_ASSERT_FATAL(
        kernels_matrix_shape(KERNELS_BF16, kind, s->rows, s->cols, s->slab_count, s->border, &m));
    m.data = zeroed(kernels_matrix_bytes(&m));
    for (int64_t r = 0, n; r < s->rows; r += n) {
        n = s->rows - r < 13 ? s->rows - r : 13;
        LAUNCH(kernels_pack(NULL, &m, 0, r, n, a + r * s->cols));
        if (kind == KERNELS_GATE_UP) LAUNCH(kernels_pack(NULL, &m, 1, r, n, b + r * s->cols));
    }
    return m;
}

static double dot(const float *w, const float *x, int64_t n, double *magnitude) {
    double sum = 0.0;
    *magnitude = 0.0;
    for (int64_t k = 0; k < n; k++) {
        const double term =
            (double)rounded(w[k], BACKEND_BF16) * (double)rounded(x[k], BACKEND_BF16);
        sum += term;
        *magnitude += fabs(term);
    }
    return sum;
}

static void product_check(const struct kernels_matrix *m, const float *a, const float *b,
                          const float *x, int rows, const void *out) {
    int wrong = 0;
    for (int r = 0; r < rows; r++)
        for (int64_t n = 0; n < m->rows; n++) {
            double mag, mag_up;
            const double z = dot(a + n * m->cols, x + r * m->cols, m->cols, &mag);
            const double bound = 8.0 * sqrt((double)m->cols + 8) * unit_roundoff * mag + 1e-37;
            if (m->kind != KERNELS_GATE_UP) {
                wrong += !(fabs((double)((const float *)out)[r * m->rows + n] - z) <= bound);
                continue;
            }
            const double up = dot(b + n * m->cols, x + r * m->cols, m->cols, &mag_up);
            const double want = z / (1.0 + exp(-z)) * up;
            const double got = (double)bf16_to_float(((const bf16 *)out)[r * m->rows + n]);
            const double error = 1.2 * bound * fabs(up) +
                                 8.0 * sqrt((double)m->cols + 8) * unit_roundoff * mag_up * fabs(z);
            wrong += !(fabs(got - want) <= error + fabs(want) * 0x1p-8 + 1e-37);
        }
    CHECK_EQ(wrong, 0);
}

static void test_products(void) {
    static const int counts[] = {1, 2, 3, 4, 5, 9, 17, 33};
    void *workspace = zeroed(kernels_product_workspace_bytes(WORKSPACE_TILES));
    const int sm_count = kernels_sm_count;
    kernels_sm_count = 2;
    for (int i = 0; i < SHAPES; i++) {
        const struct shape *s = &shapes[i];
        float *a = malloc(sizeof(float) * (size_t)(s->rows * s->cols)),
              *b = malloc(sizeof(float) * (size_t)(s->rows * s->cols));
        float *x = malloc(sizeof(float) * (size_t)(ROWS_MAX * s->cols));
        awkward_fill(1 + (uint64_t)i, a, s->rows * s->cols);
        awkward_fill(101 + (uint64_t)i, b, s->rows * s->cols);
        awkward_fill(201 + (uint64_t)i, x, ROWS_MAX * s->cols);
        bf16 *in = activations_new(x, ROWS_MAX * s->cols, BACKEND_BF16);
        for (int kind = KERNELS_COLUMN; kind <= KERNELS_ROW; kind++) {
            struct kernels_matrix m = matrix_make(s, (enum kernels_kind)kind, a, b);
            const size_t size = kind == KERNELS_GATE_UP ? sizeof(bf16) : sizeof(float);
            const size_t bytes = size * (size_t)(ROWS_MAX * s->rows);
            void *whole = guard_new(bytes);
            kernel_product(KERNELS_DETERMINISTIC, ROWS_MAX, &m, in, whole, workspace);
            product_check(&m, a, b, x, ROWS_MAX, whole);
            for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                if (i > 1 && counts[c] != 1 && counts[c] != 3 && counts[c] != 9)
                    continue; /* time */
                const size_t part = size * (size_t)(counts[c] * s->rows);
                void *out = guard_new(part);
                kernel_product(KERNELS_DETERMINISTIC, counts[c], &m, in, out, workspace);
                CU_ASSERT(suite_equal_bytes("rows of a smaller step", out, whole, part));
                if (counts[c] <= 9 ||
                    i == 1) { /* fast mode differs up to 4 rows, and in its pieces */
                    kernel_product(KERNELS_FAST, counts[c], &m, in, out, workspace);
                    product_check(&m, a, b, x, counts[c], out);
                }
                CU_ASSERT(guard_check(out, part));
            }
            CU_ASSERT(guard_check(whole, bytes));
            free(m.data);
        }
        free(a), free(b), free(x), free(in);
    }
    const uint32_t *counters =
        (const uint32_t *)workspace + kernels_product_workspace_bytes(0) / sizeof(uint32_t);
    for (int i = 0; i < WORKSPACE_TILES; i++)
        CHECK_EQ(counters[i], 0); /* ready for the next launch */
    free(workspace);
    kernels_sm_count = sm_count;
}

/* A rank with no slab gives -0.0f; ranks added along the tree give the bits of one rank. */
static void test_tensor_parallel(void) {
    const struct shape *s = &shapes[1];
    enum { ROWS = 5 };
    float *a = malloc(sizeof(float) * (size_t)(s->rows * s->cols)),
          *x = malloc(sizeof(float) * (size_t)(ROWS * s->cols));
    awkward_fill(7, a, s->rows * s->cols);
    awkward_fill(8, x, ROWS * s->cols);
    const size_t n = (size_t)(ROWS * s->rows);
    float *want = malloc(sizeof(float) * n), *sum = malloc(sizeof(float) * n),
          *parts = malloc(sizeof(float) * n * SLABS);
    for (int ranks = 1; ranks <= 8; ranks *= 2) {
        for (int r = 0; r < ranks; r++) {
            const int first = r * SLABS / ranks, count = SLABS / ranks;
            struct shape mine = {s->rows, s->border[first + count] - s->border[first], count, {0}};
            for (int i = 0; i <= count; i++) mine.border[i] = s->border[first + i];
            float *w = malloc(sizeof(float) * (size_t)(mine.rows * mine.cols));
            bf16 *in = malloc(sizeof(bf16) * (size_t)(ROWS * mine.cols));
            for (int64_t i = 0; i < mine.rows; i++)
                memcpy(w + i * mine.cols, a + i * s->cols + mine.border[0],
                       sizeof(float) * (size_t)mine.cols);
            for (int64_t i = 0; i < ROWS; i++)
                for (int64_t k = 0; k < mine.cols; k++)
                    in[i * mine.cols + k] = bf16_from_float(x[i * s->cols + mine.border[0] + k]);
            struct kernels_matrix m = matrix_make(&mine, KERNELS_ROW, w, NULL);
            kernel_product(KERNELS_DETERMINISTIC, ROWS, &m, in, parts + (size_t)r * n, NULL);
            free(m.data), free(w), free(in);
        }
        LAUNCH(kernels_rank_tree(NULL, (int64_t)n, ranks, parts, sum));
        if (ranks == 1) memcpy(want, sum, sizeof(float) * n);
        CU_ASSERT(
            suite_equal_bytes("partials of ranks along the tree", sum, want, sizeof(float) * n));
    }
    const struct shape none = {8, 0, 2, {0, 0, 0}};
    struct kernels_matrix m = matrix_make(&none, KERNELS_ROW, a, NULL);
    float out[8];
    kernel_product(KERNELS_FAST, 1, &m, (const bf16 *)x, out, NULL);
    for (int i = 0; i < 8; i++) CU_ASSERT(out[i] == 0.0f && signbit(out[i]));
    free(m.data), free(a), free(x), free(want), free(sum), free(parts);
}

static void test_rank_tree(void) {
    enum { N = 5, R = 8 };
    float in[R * N], sum[N];
    awkward_fill(3, in, R * N);
    for (int ranks = 1; ranks <= R; ranks++) {
        LAUNCH(kernels_rank_tree(NULL, N, ranks, in, sum));
        for (int i = 0; i < N; i++) {
            float level[R];
            for (int r = 0; r < ranks; r++) level[r] = in[r * N + i];
            for (int n = ranks; n > 1; n = (n + 1) / 2) {
                for (int j = 0; j < n / 2; j++) level[j] = level[2 * j] + level[2 * j + 1];
                if (n % 2) level[n / 2] = level[n - 1];
            }
            CU_ASSERT(memcmp(&sum[i], &level[0], sizeof sum[i]) == 0);
        }
    }
}

/* ---- rows ---- */

static void test_embed_mix(void) {
    enum { V = 70, D = 100, T = 6 };
    static const int64_t borders[] = {1000, 1009, 1009, 1040, 1041, 1050, 1066, 1068, 1070};
    static const uint32_t ids[] = {1003, 1069, 1041, 1008, 1010, 1005, 17,
                                   1068, 1000, 5000, 1066, 1067, 1040, 1005};
    static const int32_t begin[T + 1] = {0, 1, 5, 7, 7, 9, 14};
    float rows[V * D], weights[14];
    awkward_fill(5, rows, V * D);
    for (int i = 0; i < 14; i++) weights[i] = i == 0 ? 1.0f : 0.05f + 0.05f * (float)i;
    struct kernels_matrix m =
        matrix_make(&(struct shape){V, D, 1, {0, D}}, KERNELS_COLUMN, rows, NULL);
    backend *be = level_open(0, 1, T);
    CU_ASSERT_FATAL(be != NULL);
    const struct matrix_spec spec = {
        .kind = MATRIX_COLUMN, .dtype = BACKEND_BF16, .rows = V, .cols = D};
    matrix *reference = NULL;
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &reference) == STATUS_OK);
    be->ops->matrix_load(be, reference, 0, 0, V, rows);
    const struct batch batch = {
        .row_count = T, .mix_begin = begin, .mix_ids = ids, .mix_weights = weights};
    struct kernels_borders vocab = {.count = 8};
    memcpy(vocab.begin, borders, sizeof borders);
    float want[T * D], *got = guard_new(sizeof want);
    be->ops->embed_mix(be, &batch, reference, 8, borders, want);
    LAUNCH(kernels_embed_mix(NULL, T, begin, ids, weights, &m, vocab, got));
    CU_ASSERT(suite_equal_bytes("mixture", got, want, sizeof want));
    for (int i = 0; i < D; i++)
        CU_ASSERT(got[i] == rounded(rows[3 * D + i], BACKEND_BF16)); /* one-hot = E[id] */
    CU_ASSERT(guard_check(got, sizeof want));
    be->ops->close(be);
    free(m.data);
}

static int bf16_near(bf16 a, bf16 b) { /* at most one step of the grid apart */
    const int x = a & 0x8000 ? -(a & 0x7fff) : a, y = b & 0x8000 ? -(b & 0x7fff) : b;
    return abs(x - y) <= 1;
}

static void test_norms(void) {
    static const int widths[] = {1, 30, 64, 576, 2052};
    enum { T = 3, D_MAX = 2052 };
    static const int32_t chosen[] = {2, 0};
    float *sum = malloc(sizeof(float) * T * D_MAX), *x = malloc(sizeof(float) * T * D_MAX);
    float *weight = malloc(sizeof(float) * D_MAX);
    backend *be = level_open(0, 1, T);
    CU_ASSERT_FATAL(be != NULL);
    const struct matrix_spec spec = {
        .kind = MATRIX_COLUMN, .dtype = BACKEND_BF16, .rows = 1, .cols = D_MAX};
    matrix *wide = NULL; /* makes the CPU's row scratch as wide as D */
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &wide) == STATUS_OK);
    awkward_fill(11, sum, T * D_MAX);
    awkward_fill(12, weight, D_MAX);
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++)
        for (int first = 0; first < 2; first++) {
            const int n = widths[i], all = T * n;
            awkward_fill(13, x, all);
            float *x_want = malloc(sizeof(float) * (size_t)all),
                  *x_got = guard_new(sizeof(float) * (size_t)all);
            bf16 *want = malloc(sizeof(bf16) * (size_t)all),
                 *got = guard_new(sizeof(bf16) * (size_t)all);
            memcpy(x_want, x, sizeof(float) * (size_t)all);
            memcpy(x_got, x, sizeof(float) * (size_t)all);
            be->ops->add_norm(be, T, n, first, 1.5f, sum, x_want, weight, 1e-6f, BACKEND_BF16,
                              want);
            LAUNCH(kernels_add_norm(NULL, T, n, first, 1.5f, sum, x_got, weight, 1e-6f, got));
            CU_ASSERT(suite_equal_bytes("residual", x_got, x_want, sizeof(float) * (size_t)all));
            int far = 0;
            for (int k = 0; k < all; k++) far += !bf16_near(got[k], want[k]);
            be->ops->add_norm_rows(be, chosen, 2, n, sum, x, weight, 1e-6f, BACKEND_BF16, want);
            LAUNCH(kernels_add_norm_rows(NULL, chosen, 2, n, sum, x, weight, 1e-6f, got));
            for (int k = 0; k < 2 * n; k++) far += !bf16_near(got[k], want[k]);
            CHECK_EQ(far, 0);
            CU_ASSERT(guard_check(x_got, sizeof(float) * (size_t)all));
            CU_ASSERT(guard_check(got, sizeof(bf16) * (size_t)all));
            free(x_want), free(want);
        }
    be->ops->close(be);
    free(sum), free(x), free(weight);
}

/* ---- statistics and candidates ---- */

enum { VOCAB = 3000, PROBES = 5, WATCH = 3 };

/* Rows with equal values, NaN, both infinities, a spread of 60 and a flat one. */
static void logits_fill(float *z, int64_t width, int rows) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i++) {
            float *v = &z[r * width + i];
            *v = r == 1 ? 0.25f : 12.0f * suite_random_float(900 + (uint64_t)r, (uint32_t)i);
            if (r == 2 && i % 7) *v = -INFINITY;
            if (r == 0 && i % 500 == 3) *v = NAN;
            if (r == 0 && i % 900 == 4) *v = INFINITY;
            if (r == 0 && i % 11 == 5) *v = floorf(*v);
        }
}

static void candidates_run(int slabs, const int64_t *borders, int64_t vocab_count, int k) {
    const int64_t width = borders[slabs] - borders[0];
    const struct batch_edit edits[] = {{5, 1.5f, 0.0f},
                                       {6, 1.0f, -INFINITY},
                                       {1700, 1.0f, 30.0f},
                                       {2999, 1.0f, 40.0f},
                                       {44, 2.0f, 0.5f}};
    const uint32_t watch[] = {5, 2999, 1700, 6};
    const struct batch_probe probes[PROBES] = {{0, 1.0f, 0, 0, 0, 0},
                                               {0, 0.6f, 0, 5, 0, 3},
                                               {1, 1.0f, 0, 2, 3, 1},
                                               {2, 0.7f, 0, 0, 1, 2},
                                               {3, 1e-3f, 2, 3, 0, 1}};
    const struct batch batch = {.probe_count = PROBES,
                                .candidate_count = k,
                                .watch_max = WATCH,
                                .probes = probes,
                                .edits = edits,
                                .watch_ids = watch,
                                .logit_row_count = 4};
    const struct kernels_probes on = {PROBES, k, WATCH, probes, edits, watch};
    struct kernels_borders vocab = {.count = slabs};
    memcpy(vocab.begin, borders, sizeof(int64_t) * (size_t)(slabs + 1));
    backend *be = level_open(0, 1, 4);
    CU_ASSERT_FATAL(be != NULL);
    const struct matrix_spec spec = {
        .kind = MATRIX_COLUMN, .dtype = BACKEND_BF16, .rows = width, .cols = 1};
    matrix *head = NULL; /* makes the CPU's row scratch as wide as V */
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &head) == STATUS_OK);
    float *z = malloc(sizeof(float) * 4 * (size_t)width);
    logits_fill(z, width, 4);
    const size_t stride = (size_t)batch_record_bytes(k, WATCH), bytes = stride * PROBES;
    unsigned char *want = malloc(bytes), *got = guard_new(bytes);
    const size_t workspace_bytes = kernels_candidates_workspace_bytes(PROBES, width);
    void *workspace = guard_new(workspace_bytes);
    memset(workspace, 0, workspace_bytes);
    be->ops->candidates(be, &batch, z, slabs, borders, vocab_count, want);
    for (int repeat = 0; repeat < 2; repeat++) { /* twice: the counters are where they were */
        LAUNCH(kernels_candidates(NULL, on, z, vocab, vocab_count, got, workspace));
        for (int p = 0; p < PROBES; p++) {
            const struct batch_record *a =
                (const struct batch_record *)(const void *)(got + stride * (size_t)p);
            const struct batch_record *b =
                (const struct batch_record *)(const void *)(want + stride * (size_t)p);
            CU_ASSERT(memcmp(&a->m, &b->m, sizeof a->m) == 0);
            CHECK_EQ(a->count, b->count);
            CHECK_NEAR(a->s, b->s, 2e-6 * (double)b->s);
            CHECK_NEAR(a->q, b->q, 1e-5 * fabs((double)b->q) + 1e-30);
            CU_ASSERT(
                suite_equal_bytes("candidates and watched ids", a + 1, b + 1, stride - sizeof *a));
        }
    }
    float *z_want = malloc(sizeof(float) * (size_t)width),
          *z_got = guard_new(sizeof(float) * (size_t)width);
    be->ops->probe_logits(be, &batch, 1, z, slabs, borders, vocab_count, z_want);
    LAUNCH(kernels_probe_logits(NULL, on, 1, z, vocab, vocab_count, z_got));
    CU_ASSERT(suite_equal_bytes("z' of a row", z_got, z_want, sizeof(float) * (size_t)width));
    CU_ASSERT(guard_check(z_got, sizeof(float) * (size_t)width));
    CU_ASSERT(guard_check(got, bytes));
    CU_ASSERT(guard_check(workspace, workspace_bytes));
    be->ops->close(be);
    free(z), free(want), free(z_want);
}

static void test_candidates(void) {
    static const int64_t all[] = {0, 375, 750, 1125, 1500, 1875, 2250, 2625, 3000};
    static const int64_t some[] = {1690, 1690, 1701, 2300, 3000};
    static const int64_t one[] = {0, 20};
    candidates_run(8, all, VOCAB, 32);
    candidates_run(8, all, 2600, 64);
    candidates_run(4, some, 2999, 32);
    candidates_run(1, one, 20, 64);    /* fewer ids than K */
    candidates_run(2, some, 1690, 32); /* padding only: no id at all */
}

/* ---- the thinking step ---- */

static int pair_order(const void *a, const void *b) {
    const struct batch_pair *x = a, *y = b;
    return x->z > y->z ? -1 : x->z < y->z ? 1 : x->id < y->id ? -1 : x->id > y->id;
}

/* Three ranks' records of made-up rows; the host decides from the complete sorted row, cut to K. */
static void test_think(void) {
    enum { R = 3, V = 90, K = 32, N = 6, STEPS = 60 };
    const size_t stride = (size_t)batch_record_bytes(K, 1);
    unsigned char *gathered = zeroed(stride * R * N);
    struct think_params *params = zeroed(sizeof *params * N);
    struct think_state states[N], want_states[N];
    static struct think_decision decisions[N], want;
    struct kernels_thinker thinkers[N];
    int32_t status[N];
    int refused = 0, soft = 0, closed = 0;
    for (int i = 0; i < N; i++) {
        struct think_params *p = &params[i];
        p->mode = (enum think_mode)(i % THINK_MODE_COUNT);
        p->max_topk = 5 + i;
        p->thinking = (struct think_filters){0.6f, i == 4 ? 50 : 20, 0.95f, i == 2 ? 0.02f : 0.0f};
        p->answer = (struct think_filters){i == 1 ? 0.0f : 0.8f, 0, 0.9f, 0.0f};
        p->cold_stop = i % 2;
        p->cold_stop_entropy = 1.0f;
        p->cold_stop_length = 3;
        p->budget = 40;
        p->gumbel_temperature = 0.5f;
        p->dirichlet_alpha = 2.0f;
        p->seed = 99 + (uint64_t)i;
        p->open_id = 1;
        p->close_id = 2;
        p->eos_count = 1;
        p->eos_ids[0] = 3;
        p->close_text_count = 2;
        p->close_text[0] = 10;
        p->close_text[1] = 11;
        p->watchdog_repeats = 6;
        think_state_init(&states[i], p, (const uint32_t[]){1}, 1);
        thinkers[i] = (struct kernels_thinker){(i * 5) % N, 0, i};
    }
    const struct kernels_probes probes = {N, K, 1, NULL, NULL, NULL};
    for (int step = 0; step < STEPS; step++) {
        struct think_candidates rows[N];
        static struct batch_pair all[N][V];
        static float z[N][V];
        static uint32_t ids[N][V];
        for (int i = 0; i < N; i++) {
            const int probe = thinkers[i].probe;
            const float spread = step % 5 == 4 ? 9.0f : 1.0f + 2.0f * (float)(step % 4);
            for (int v = 0; v < V; v++)
                all[i][v] = (struct batch_pair){
                    spread * suite_random_float((uint64_t)(step * N + i), (uint32_t)v),
                    (uint32_t)v};
            float m[R], s[R], q[R];
            const float close_z = all[i][2].z;
            for (int r = 0; r < R; r++) {
                struct batch_record *record =
                    (struct batch_record *)(void *)(gathered + stride * (size_t)(r * N + probe));
                struct batch_pair *pairs = (struct batch_pair *)(record + 1), own[V / R];
                memcpy(own, &all[i][r * V / R], sizeof own);
                qsort(own, V / R, sizeof own[0], pair_order);
                m[r] = own[0].z;
                s[r] = q[r] = 0.0f;
                for (int v = 0; v < V / R; v++) {
                    s[r] += fmath_exp(own[v].z - m[r]);
                    q[r] += (own[v].z - m[r]) * fmath_exp(own[v].z - m[r]);
                }
                *record = (struct batch_record){m[r], s[r], q[r], V / R};
                memcpy(pairs, own, sizeof own);
                pairs[K] = (struct batch_pair){r == 0 ? close_z : -INFINITY, 2};
            }
            batch_stats_join(&m[0], &s[0], &q[0], m[1], s[1], q[1]);
            batch_stats_join(&m[0], &s[0], &q[0], m[2], s[2], q[2]);
            qsort(all[i], V, sizeof all[i][0], pair_order);
            for (int v = 0; v < V; v++) {
                z[i][v] = all[i][v].z;
                ids[i][v] = all[i][v].id;
            }
            rows[i] = (struct think_candidates){m[0], s[0], q[0], K, false, z[i], ids[i], close_z};
        }
        memcpy(want_states, states, sizeof states);
        LAUNCH(kernels_think(NULL, N, thinkers, probes, R, gathered, stride * N, params, states,
                             decisions, status));
        for (int i = 0; i < N; i++) {
            const bool decided = think_step(&params[i], &want_states[i], &rows[i], &want);
            CHECK_EQ(status[i], decided);
            CU_ASSERT(suite_equal_bytes("state", &states[i], &want_states[i], sizeof states[i]));
            refused += !decided;
            if (!decided) continue;
            CU_ASSERT(suite_equal_bytes("decision", &decisions[i], &want, sizeof want));
            soft += want.soft && want.count > 1;
            closed += want.end != END_NONE;
        }
    }
    CU_ASSERT(refused > 0 && soft > 20 && closed > 1); /* the rows are worth deciding */
    const struct think_state before = states[0];
    for (int fault = 0; fault < 9; fault++) { /* the last is none */
        struct batch_record *r1 =
            (struct batch_record *)(void *)(gathered + stride * (size_t)(N + thinkers[0].probe));
        struct batch_pair *pairs = (struct batch_pair *)(r1 + 1);
        unsigned char kept[2048];
        memcpy(kept, r1, stride);
        if (fault == 0) r1->count = K + 1;
        if (fault == 1) r1->count = INT32_MIN;
        if (fault == 2) r1->m = NAN;
        if (fault == 3) r1->m += 0.5f; /* is not the best candidate's */
        if (fault == 4) r1->s = 0.75f;
        if (fault == 5) r1->q = 0.125f;
        if (fault == 6) pairs[7].z = pairs[6].z + 1; /* not sorted */
        if (fault == 7) pairs[K].z = INFINITY;       /* watched */
        CHECK_EQ(kernels_think(NULL, 1, thinkers, probes, R, gathered, stride * N, params, states,
                               decisions, status),
                 0);
        CU_ASSERT(fault == 8 ? status[0] >= 0 : status[0] == KERNELS_IMPOSSIBLE - 1);
        if (fault < 8) CU_ASSERT(suite_equal_bytes("state", &states[0], &before, sizeof before));
        memcpy(r1, kept, stride);
    }
    struct batch_record *record =
        (struct batch_record *)(void *)(gathered + stride * (size_t)thinkers[0].probe);
    for (int r = 0; r < R; r++)
        *(struct batch_record *)(void *)((unsigned char *)record + stride * (size_t)(r * N)) =
            (struct batch_record){-INFINITY, 0, 0, 0};
    CHECK_EQ(kernels_think(NULL, 1, thinkers, probes, R, gathered, stride * N, params, states,
                           decisions, status),
             0);
    CHECK_EQ(status[0], -1);
    thinkers[0].probe = -1; /* rests: touches nothing */
    status[0] = 77;
    CHECK_EQ(kernels_think(NULL, 1, thinkers, probes, R, NULL, 0, NULL, NULL, NULL, status), 0);
    CHECK_EQ(status[0], 77);
    free(gathered), free(params);
}

/* They do nothing one could see; they must not touch what they must not. */
static void test_bench(void) {
    const int sm_count = kernels_sm_count;
    kernels_sm_count = 1;
    unsigned char *memory = guard_new(70000);
    uint32_t sink = 7;
    float sink_float = 7.0f;
    double flops = 0.0;
    LAUNCH(kernels_sweep(NULL, memory, 70000, &sink));
    LAUNCH(kernels_peak(NULL, 1, &sink_float, &flops));
    CHECK_NEAR(flops, 4.0 * 8 * 8 * 4096, 0.0);
    CU_ASSERT(guard_check(memory, 70000));
    kernels_sm_count = sm_count;
}

const struct suite_case suite_cases[] = {
    {"products: every shape and step size against double, rows equal in every step size",
     test_products},
    {"row products: the ranks' partials along the tree are the bits of one rank",
     test_tensor_parallel},
    {"the tree over ranks: adjacent pairs, an odd one out moves up", test_rank_tree},
    {"the mixture has the CPU's bits, absent slabs and rows included", test_embed_mix},
    {"norms: the residual exactly, h within one bf16 step", test_norms},
    {"candidates: lists, maxima and watched ids exactly, sums within bounds; z' of a row",
     test_candidates},
    {"the thinking step on merged records: state and decision of the host, byte for byte",
     test_think},
    {"bandwidth and peak", test_bench},
    {NULL, NULL},
};
