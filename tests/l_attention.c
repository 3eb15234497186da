/* l_attention.c: the KV pool and the attention of the CUDA kernels, run by the fibre emulation.
 *
 * heads_append must have the CPU's bits: queries directly, cached keys and values by way of a head
 * that gets the same numbers as a query. Attention is judged by a double reference on the very
 * numbers the kernel sees (q and the pool as rounded), bounds of verification.md section 7, and by
 * equality of bits between all the ways of cutting the work up: decode or chunk kernel, splits side
 * by side or in turn, few or many blocks, rows alone or together. Everything that a page holds
 * beyond a sequence's last token is NaN. See l_kernels.c for what the emulation cannot show.
 */
#include "base/fp8.h"
#include "f_backend.h"
#include "kernel_suite.h"

enum { TOKENS = KERNELS_PAGE_TOKENS, ROWS_MAX = 16, TILES_MAX = 8, PAGE_LIST = 16, LAYERS = 2 };

static size_t element_bytes(const struct kernels_kv *kv) {
    return kv->type == KERNELS_KV_FP8 ? 1 : 2;
}

/* A pool full of NaN between guards, pages of LAYERS layers. */
static struct kernels_kv pool_new(enum kernels_kv_type type, int page_count, int G, int hd,
                                  const float *scales) {
    struct kernels_kv kv = {.layers = LAYERS,
                            .page_count = page_count,
                            .kv_heads = G,
                            .head_dim = hd,
                            .type = type,
                            .scales = scales};
    const size_t bytes = kernels_kv_bytes(&kv);
    CHECK_EQ(bytes, (size_t)(LAYERS * page_count * G * 2 * TOKENS * hd) * element_bytes(&kv));
    kv.data = guard_new(bytes);
    memset(kv.data, type == KERNELS_KV_FP8 ? 0x7f : 0xff, bytes);
    return kv;
}
static int pool_free(const struct kernels_kv *kv) {
    return guard_check(kv->data, kernels_kv_bytes(kv));
}

/* Index of an element: [layer][page][G][keys, values][64][hd]. */
static size_t pool_index(const struct kernels_kv *kv, int layer, int page, int head, bool value,
                         int token, int d) {
    const size_t block = (size_t)((layer * kv->page_count + page) * kv->kv_heads + head);
    return ((block * 2 + value) * TOKENS + (size_t)token) * (size_t)kv->head_dim + (size_t)d;
}
static void pool_put(struct kernels_kv *kv, size_t i, float x) {
    if (kv->type == KERNELS_KV_FP8)
        ((fp8 *)kv->data)[i] = fp8_from_float(x);
    else
        ((bf16 *)kv->data)[i] = bf16_from_float(x);
}
static double pool_get(const struct kernels_kv *kv, size_t i) {
    return kv->type == KERNELS_KV_FP8 ? (double)fp8_to_float(((const fp8 *)kv->data)[i])
                                      : (double)bf16_to_float(((const bf16 *)kv->data)[i]);
}

/* ---- heads ---- */

struct heads_case {
    int heads, hd;
    bool bias, norm;
    enum kernels_kv_type type;
};
static const struct heads_case heads_cases[] = {
    {3, 128, true, false, KERNELS_KV_BF16}, {2, 64, false, true, KERNELS_KV_BF16},
    {1, 256, true, true, KERNELS_KV_BF16},  {2, 6, true, true, KERNELS_KV_BF16},
    {3, 128, true, false, KERNELS_KV_FP8},  {2, 80, false, true, KERNELS_KV_FP8},
};

/* As many kv heads as query heads, and keys get the numbers of the queries: what is cached must be
 * q rounded; values are the raw numbers and the bias. */
static void heads_run(const struct heads_case *c, uint64_t seed) {
    enum { T = 4, PAGES = 5, POSITIONS = 140 };
    const int H = c->heads, hd = c->hd, N = 3 * H * hd, D = 8;
    static const float scales_of[] = {1.0f, 2.0f, 0.5f, 0.25f,  0.03f, 3.0f,
                                      0.7f, 1.0f, 4.0f, 0.125f, 1.5f,  16.0f};
    const float *scales = c->type == KERNELS_KV_FP8 ? scales_of : NULL; /* [LAYERS][H][2] */
    backend *be = level_open(0, 1, T);
    CU_ASSERT_FATAL(be != NULL);
    const struct matrix_spec spec = {
        .kind = MATRIX_COLUMN, .dtype = BACKEND_BF16, .rows = N, .cols = D};
    const struct kv_spec cpu_pool = {
        .layers = 1, .kv_heads = H, .head_dim = hd, .page_count = PAGES, .dtype = BACKEND_BF16};
    CU_ASSERT_FATAL(be->ops->kv_new(be, &cpu_pool) == STATUS_OK);
    struct kernels_kv kv = pool_new(c->type, PAGES, H, hd, scales);

    float *bias = malloc(sizeof(float) * (size_t)N), *norm = malloc(sizeof(float) * (size_t)hd);
    float *cosine = malloc(sizeof(float) * (size_t)(POSITIONS * (hd / 2))),
          *sine = malloc(sizeof(float) * (size_t)(POSITIONS * (hd / 2)));
    awkward_fill(seed, bias, N);
    memcpy(bias + H * hd, bias, sizeof(float) * (size_t)(H * hd));
    awkward_fill(seed + 1, norm, hd);
    for (int p = 0; p < POSITIONS; p++)
        for (int i = 0; i < hd / 2; i++) {
            const double angle = p * pow(10000.0, -2.0 * i / hd);
            cosine[p * (hd / 2) + i] = (float)cos(angle);
            sine[p * (hd / 2) + i] = (float)sin(angle);
        }
    const struct kernels_heads heads = {.heads = H,
                                        .layer = 1,
                                        .bias = c->bias ? bias : NULL,
                                        .q_norm = c->norm ? norm : NULL,
                                        .k_norm = c->norm ? norm : NULL,
                                        .norm_eps = 1e-6f,
                                        .rope_cos = cosine,
                                        .rope_sin = sine};
    /* two sequences: positions 63, 64 and 130, and a row of padding */
    const int32_t pages[] = {4, 2, 0, 1, 3};
    const struct kernels_row rows[T] = {{63, 0}, {64, 0}, {-1, 1 << 28}, {130, 2}};
    const struct batch_segment segments[] = {{0, 2, 63, 0, 2}, {2, 1, 0, 2, 3}, {3, 1, 130, 2, 3}};

    float *raw = malloc(sizeof(float) * (size_t)(T * N)),
          *w = calloc((size_t)(N * D), sizeof(float));
    awkward_fill(seed + 2, raw, T * N);
    bf16 h[T * 8] = {0}; /* unit vectors: column r of the weights is row r of raw, exactly */
    for (int r = 0; r < T; r++) {
        memcpy(raw + r * N + H * hd, raw + r * N, sizeof(float) * (size_t)(H * hd));
        for (int i = 0; i < N; i++) {
            raw[r * N + i] = rounded(raw[r * N + i], BACKEND_BF16) + 0.0f;
            w[i * D + r] = raw[r * N + i];
        }
        h[r * D + r] = 0x3f80;
    }
    matrix *qkv = NULL;
    CU_ASSERT_FATAL(be->ops->matrix_new(be, &spec, &qkv) == STATUS_OK);
    be->ops->matrix_load(be, qkv, 0, 0, N, w);
    int kv_of_head[8];
    for (int i = 0; i < H; i++) kv_of_head[i] = i;
    const struct attention_spec attention = {qkv, heads.bias, heads.q_norm, heads.k_norm, 1e-6f, H,
                                             H,   hd,         kv_of_head,   cosine,       sine,  0};
    const struct batch batch = {
        .row_count = T, .segment_count = 3, .segments = segments, .pages = pages};
    const size_t q_bytes = sizeof(float) * (size_t)(T * H * hd);
    float *q_want = malloc(q_bytes), *q = guard_new(q_bytes);
    be->ops->qkv(be, &batch, &attention, h, q_want);
    memset(q_want + 2 * H * hd, 0, sizeof(float) * (size_t)(H * hd)); /* the row of padding */
    LAUNCH(kernels_heads_append(NULL, T, rows, pages, heads, kv, raw, q));
    CU_ASSERT(suite_equal_bytes("q", q, q_want, q_bytes));

    /* what the pool should hold: NaN, and the three tokens in layer 1 */
    struct kernels_kv want = pool_new(c->type, PAGES, H, hd, scales);
    for (int r = 0; r < T; r++) {
        if (rows[r].position < 0) continue;
        const int page = pages[rows[r].page_begin + rows[r].position / TOKENS],
                  token = rows[r].position % TOKENS;
        for (int g = 0; g < H; g++)
            for (int d = 0; d < hd; d++) {
                const int v = (2 * H + g) * hd + d;
                const float value = c->bias ? raw[r * N + v] + bias[v] : raw[r * N + v];
                const float *scale = scales ? scales + 2 * (H + g) : (const float[]){1.0f, 1.0f};
                pool_put(&want, pool_index(&want, 1, page, g, false, token, d),
                         q_want[(r * H + g) * hd + d] / scale[0]);
                pool_put(&want, pool_index(&want, 1, page, g, true, token, d), value / scale[1]);
            }
    }
    CU_ASSERT(suite_equal_bytes("pool", kv.data, want.data, kernels_kv_bytes(&kv)));
    CU_ASSERT(guard_check(q, q_bytes));
    CU_ASSERT(pool_free(&kv));
    pool_free(&want);
    be->ops->close(be);
    free(bias), free(norm), free(cosine), free(sine), free(raw), free(w), free(q_want);
}

static void test_heads(void) {
    for (size_t i = 0; i < sizeof heads_cases / sizeof heads_cases[0]; i++)
        heads_run(&heads_cases[i], 1000 * i + 17);
}

/* ---- attention ---- */

/* Sequences of a step: `rows` rows, the last one sees `context` tokens. */
struct sequence {
    int context, rows;
};
struct attention_case {
    int ratio, G, hd;
    struct sequence sequence[5];
};
/* every ratio, every kernel size and dims between them; contexts around pages and splits; runs of
 * rows across both */
static const struct attention_case attention_cases[] = {
    {5, 1, 128, {{1, 1}, {258, 4}, {64, 1}, {511, 1}}},
    {8, 1, 128, {{1000, 1}, {65, 3}}},
    {1, 2, 64, {{256, 2}, {63, 1}, {12, 9}}},
    {2, 1, 96, {{257, 3}, {127, 1}}},
    {3, 2, 64, {{255, 1}, {513, 2}}},
    {4, 1, 256, {{66, 4}, {257, 1}}},
    {6, 1, 32, {{128, 2}, {300, 1}}},
    {7, 2, 64, {{130, 5}}},
    {9, 1, 80, {{259, 4}, {20, 1}}},
    {3, 1, 6, {{70, 7}}},
};
enum { CASES = sizeof attention_cases / sizeof attention_cases[0] };

struct attention_run {
    int H, T, tile_count, context_max;
    struct kernels_kv kv;
    struct kernels_row rows[ROWS_MAX];
    int32_t pages[5 * PAGE_LIST];
    struct kernels_tile tiles[TILES_MAX];
    float *q; /* [T][H][hd], heads of one kv head side by side */
    size_t o_count;
};

/* Pages at random places of the pool; every token a sequence has is filled, all else stays NaN. */
static void run_begin(struct attention_run *run, const struct attention_case *c,
                      enum kernels_kv_type type, const float *scales, uint64_t seed) {
    enum { POOL_PAGES = 37 };
    const int hd = c->hd;
    *run = (struct attention_run){.H = c->ratio * c->G};
    run->kv = pool_new(type, POOL_PAGES, c->G, hd, scales);
    int used = 0;
    for (int s = 0; s < 5 && c->sequence[s].rows > 0; s++) {
        const struct sequence *sequence = &c->sequence[s];
        const int32_t page_begin = s * PAGE_LIST;
        for (int p = 0; p * TOKENS < sequence->context; p++)
            run->pages[page_begin + p] = (5 + 11 * used++) % POOL_PAGES;
        for (int token = 0; token < sequence->context; token++)
            for (int g = 0; g < c->G; g++)
                for (int d = 0; d < 2 * hd; d++) {
                    const int page = run->pages[page_begin + token / TOKENS];
                    const size_t i =
                        pool_index(&run->kv, 1, page, g, d >= hd, token % TOKENS, d % hd);
                    pool_put(&run->kv, i,
                             suite_random_float(seed + (uint64_t)s,
                                                (uint32_t)((token * c->G + g) * 2 * hd + d)));
                }
        for (int i = 0; i < sequence->rows; i++)
            run->rows[run->T++] =
                (struct kernels_row){sequence->context - sequence->rows + i, page_begin};
        if (sequence->context > run->context_max) run->context_max = sequence->context;
        if (s == 0) run->rows[run->T++] = (struct kernels_row){-1, 1 << 28};
    }
    CU_ASSERT_FATAL(used <= POOL_PAGES && run->T <= ROWS_MAX);
    for (int h = 0; h < run->H; h++) {
        struct kernels_tile *tile = run->tile_count ? &run->tiles[run->tile_count - 1] : NULL;
        if (tile && tile->kv_head == h / c->ratio && tile->head_count < KERNELS_HEADS_TILE)
            tile->head_count++;
        else
            run->tiles[run->tile_count++] = (struct kernels_tile){h, 1, h / c->ratio};
    }
    run->o_count = (size_t)(run->T * run->H * hd);
    run->q = malloc(sizeof(float) * run->o_count);
    for (size_t i = 0; i < run->o_count; i++)
        run->q[i] = 3.0f * suite_random_float(seed + 9, (uint32_t)i);
}

/* One way of doing it: rows [begin, begin + count). room: workspace for that many rows. */
static void run_attention(const struct attention_run *run, int begin, int count, int run_max,
                          int multiprocessors, int room, bf16 *o) {
    const int stride = run->H * run->kv.head_dim, sm_count = kernels_sm_count;
    const struct kernels_attention spec = {.layer = 1,
                                           .heads = run->H,
                                           .tile_count = run->tile_count,
                                           .tile_heads_max = run->tiles[0].head_count,
                                           .tiles = run->tiles,
                                           .context_max = run->context_max,
                                           .run_max = run_max};
    /* the chunk kernel's triples are wider: 8 times the columns */
    const size_t bytes = kernels_attention_workspace_bytes(8 * room, run->tile_count,
                                                           run->kv.head_dim, run->context_max);
    const size_t counters =
        kernels_attention_workspace_bytes(0, run->tile_count, run->kv.head_dim, 1);
    unsigned char *workspace = guard_new(bytes);
    memset(workspace, 0, counters);
    memset(workspace + counters, 0xff, bytes - counters);
    kernels_sm_count = multiprocessors;
    LAUNCH(kernels_attention(NULL, count, run->rows + begin, run->pages, spec, run->kv,
                             run->q + begin * stride, o, workspace, bytes));
    kernels_sm_count = sm_count;
    int counting = 0;
    for (size_t i = 0; i < counters; i++) counting += workspace[i] != 0;
    CHECK_EQ(counting, 0);
    CU_ASSERT(guard_check(workspace, bytes));
}

/* o[T][H][hd] in double, on the pool's numbers. */
static void run_reference(const struct attention_run *run, int ratio, double *o) {
    const struct kernels_kv *kv = &run->kv;
    const int hd = kv->head_dim;
    double *p = malloc(sizeof(double) * (size_t)(run->context_max + 1));
    for (int r = 0; r < run->T; r++)
        for (int h = 0; h < run->H; h++) {
            double *out = o + (r * run->H + h) * hd, most = -INFINITY, sum = 0.0;
            const float *q = run->q + (r * run->H + h) * hd;
            const int g = h / ratio, tokens = run->rows[r].position + 1;
            const float *scale =
                kv->scales ? kv->scales + 2 * (kv->kv_heads + g) : (const float[]){1.0f, 1.0f};
            memset(out, 0, sizeof(double) * (size_t)hd);
            for (int token = 0; token < tokens; token++) {
                const int page = run->pages[run->rows[r].page_begin + token / TOKENS];
                double dot = 0.0;
                for (int d = 0; d < hd; d++)
                    dot += (double)rounded(q[d], BACKEND_BF16) *
                           pool_get(kv, pool_index(kv, 1, page, g, false, token % TOKENS, d));
                p[token] = dot * (double)scale[0] / sqrt((double)hd);
                if (p[token] > most) most = p[token];
            }
            for (int token = 0; token < tokens; token++) sum += p[token] = exp(p[token] - most);
            for (int token = 0; token < tokens; token++) {
                const int page = run->pages[run->rows[r].page_begin + token / TOKENS];
                for (int d = 0; d < hd; d++)
                    out[d] += p[token] / sum * (double)scale[1] *
                              pool_get(kv, pool_index(kv, 1, page, g, true, token % TOKENS, d));
            }
        }
    free(p);
}

/* Against double, and all ways against one another. */
static void attention_run_case(const struct attention_case *c, enum kernels_kv_type type,
                               const float *scales, uint64_t seed) {
    struct attention_run run;
    run_begin(&run, c, type, scales, seed);
    const size_t bytes = sizeof(bf16) * run.o_count;
    bf16 *o = guard_new(bytes), *other = guard_new(bytes);
    double *want = malloc(sizeof(double) * run.o_count);
    run_reference(&run, c->ratio, want);

    run_attention(&run, 0, run.T, 1, 2, run.T, o);
    double wrong = 0.0, all = 0.0;
    for (size_t i = 0; i < run.o_count; i++) {
        const double b = (double)bf16_to_float(bf16_from_float((float)want[i]));
        const double a = (double)bf16_to_float(o[i]);
        wrong += (a - b) * (a - b);
        all += b * b;
    }
    CHECK_NEAR(wrong / all, 0.0, 1e-6);
    for (int i = 0; i < run.H * c->hd; i++) /* the row of padding */
        CHECK_EQ(o[c->sequence[0].rows * run.H * c->hd + i], 0);

    memset(other, 0xff, bytes);
    run_attention(&run, 0, run.T, 1, 1, 0, other);
    CU_ASSERT(suite_equal_bytes("decode: no room for triples", other, o, bytes));
    memset(other, 0xff, bytes);
    run_attention(&run, 0, run.T, 9, 3, run.T, other);
    CU_ASSERT(suite_equal_bytes("rows together: splits side by side", other, o, bytes));
    memset(other, 0xff, bytes);
    run_attention(&run, 0, run.T, 9, 1, 0, other);
    CU_ASSERT(suite_equal_bytes("rows together: splits in turn", other, o, bytes));
    memset(other, 0xff, bytes);
    const int one = run.T - 1; /* a row alone, and the step without its first row */
    run_attention(&run, one, 1, 1, 132, 1, other + (size_t)(one * run.H * c->hd));
    CU_ASSERT(suite_equal_bytes("a row alone", other + (size_t)(one * run.H * c->hd),
                                o + (size_t)(one * run.H * c->hd), bytes / (size_t)run.T));
    run_attention(&run, 1, run.T - 1, 9, 2, run.T, other + (size_t)(run.H * c->hd));
    CU_ASSERT(suite_equal_bytes("other groups", other + (size_t)(run.H * c->hd),
                                o + (size_t)(run.H * c->hd), bytes - bytes / (size_t)run.T));
    CU_ASSERT(guard_check(o, bytes));
    CU_ASSERT(guard_check(other, bytes));
    CU_ASSERT(pool_free(&run.kv));
    free(want), free(run.q);
}

static void test_attention(void) {
    for (size_t i = 0; i < CASES; i++)
        attention_run_case(&attention_cases[i], KERNELS_KV_BF16, NULL, 100 * i + 1);
}

static void test_attention_fp8(void) {
    static const float scales[] = {1, 1, 1, 1, 0.5f, 2.0f, 1.25f, 0.75f}; /* [LAYERS][2][2] */
    static const size_t cases[] = {0, 2, 3, 5, 8};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct attention_case *c = &attention_cases[cases[i]];
        attention_run_case(c, KERNELS_KV_FP8, c->G == 2 ? scales : NULL, 100 * i + 7);
    }
}

/* The same keys and values in both types. */
static void test_fp8_error(void) {
    const struct attention_case *c = &attention_cases[0];
    struct attention_run run[2];
    double wrong = 0.0, all = 0.0;
    bf16 *o[2];
    for (int type = 0; type < 2; type++) {
        run_begin(&run[type], c, (enum kernels_kv_type)type, NULL, 5);
        o[type] = malloc(sizeof(bf16) * run[type].o_count);
        run_attention(&run[type], 0, run[type].T, 1, 2, run[type].T, o[type]);
    }
    for (size_t i = 0; i < run[0].o_count; i++) {
        const double a = (double)bf16_to_float(o[1][i]), b = (double)bf16_to_float(o[0][i]);
        wrong += (a - b) * (a - b);
        all += b * b;
    }
    CHECK_NEAR(wrong / all, 0.0, 1e-3);
    CU_ASSERT(wrong > 0.0);
    for (int type = 0; type < 2; type++) {
        CU_ASSERT(pool_free(&run[type].kv));
        free(run[type].q), free(o[type]);
    }
}

const struct suite_case suite_cases[] = {
    {"heads: the CPU's queries; cached keys and values rounded once, nothing else written",
     test_heads},
    {"attention: double within bounds, equal bits for every way of cutting the work up",
     test_attention},
    {"attention over fp8 pages: the same, with scales", test_attention_fp8},
    {"fp8 pages against bf16 pages", test_fp8_error},
    {NULL, NULL},
};
