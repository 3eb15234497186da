/* e_filters.c: entropy, filters, and the promise that a short list never changes a bit. */
#include "e_rows.h"

static struct row row;
static float logits[ROW_MAX];

static struct think_decision decide(const struct think_params *p,
                                    const struct think_candidates *c) {
    struct think_state s = row_state(p);
    struct think_decision d;
    CU_ASSERT(think_step(p, &s, c, &d));
    return d;
}

/* verification.md §7: absolute 1e-5 or relative 1e-5. */
static double entropy_bound(double h) { return h > 1 ? 1e-5 * h : 1e-5; }

static void test_entropy(void) {
    const struct think_params p = row_params(THINK_SOFT);
    for (int i = 0; i < 1000; i++) logits[i] = 4;
    row_build(&row, logits, 1000, 0.7f);
    struct think_candidates c = row_list(&row, 32, -1);
    CHECK_NEAR(decide(&p, &c).entropy, log(1000), 1e-5 * log(1000));

    logits[77] = 200; /* all others underflow */
    row_build(&row, logits, 1000, 1);
    c = row_list(&row, 32, -1);
    CHECK_NEAR(decide(&p, &c).entropy, 0, 0);

    logits[77] = 4;
    for (int i = 500; i < 1000; i++) logits[i] = -INFINITY; /* masked and padding ids never count */
    row_build(&row, logits, 1000, 1);
    c = row_list(&row, 32, -1);
    CHECK_NEAR(decide(&p, &c).entropy, log(500), 1e-5 * log(500));

    for (uint64_t seed = 0; seed < 300; seed++) {
        const int vocab = 40 + (int)(suite_random(seed, 0) % 1000);
        row_logits(logits, vocab, seed);
        row_build(&row, logits, vocab, 0.6f);
        double s = 0, h = 0;
        for (int i = 0; i < vocab; i++) s += exp((double)row.by_id[i] - (double)row.m);
        for (int i = 0; i < vocab; i++) {
            const double lp = (double)row.by_id[i] - (double)row.m - log(s);
            h -= exp(lp) * lp;
        }
        c = row_list(&row, 32, -1);
        struct think_params strict = p;
        strict.thinking.top_k = 3;
        strict.thinking.min_p = 0.3f;
        const float open = decide(&p, &c).entropy;
        CHECK_NEAR(open, h, entropy_bound(h));
        CU_ASSERT(open == decide(&strict, &c).entropy); /* unchanged by the filters */
    }
    c.s = 0.99999994f; /* a device sum one ulp short */
    c.q = 0;
    CHECK_NEAR(decide(&p, &c).entropy, 0, 0);
}

/* p = 0.4, 0.3, 0.2, 0.1 on ids 5, 2, 7, 0. */
static struct think_candidates four(void) {
    for (int i = 0; i < 8; i++) logits[i] = -INFINITY;
    logits[5] = logf(0.4f);
    logits[2] = logf(0.3f);
    logits[7] = logf(0.2f);
    logits[0] = logf(0.1f);
    row_build(&row, logits, 8, 1);
    return row_list(&row, 0, -1);
}

static void check_token(const struct think_filters *f, int max_topk, int count, const uint32_t *ids,
                        const double *weights) {
    struct think_params p = row_params(THINK_SOFT);
    p.thinking = *f;
    p.max_topk = max_topk;
    const struct think_candidates c = four();
    const struct think_decision d = decide(&p, &c);
    CHECK_EQ(d.count, count);
    for (int i = 0; i < count && i < d.count; i++) {
        CHECK_EQ(d.ids[i], ids[i]);
        CHECK_NEAR(d.weights[i], weights[i], 1e-6);
    }
    CHECK_NEAR(d.p, 0.4, 1e-6); /* before the filters */
}

/* Computed by hand from p = 0.4, 0.3, 0.2, 0.1. */
static void test_filters_by_hand(void) {
    const uint32_t ids[] = {5, 2, 7, 0};
    check_token(&(struct think_filters){1, 0, 1, 0}, 64, 4, ids, (double[]){0.4, 0.3, 0.2, 0.1});
    check_token(&(struct think_filters){1, 3, 1, 0}, 64, 3, ids,
                (double[]){4 / 9., 3 / 9., 2 / 9.});
    check_token(&(struct think_filters){1, 100, 1, 0}, 64, 4, ids, (double[]){0.4, 0.3, 0.2, 0.1});
    /* the crossing token stays: 0.4 + 0.3 >= 0.65 */
    check_token(&(struct think_filters){1, 0, 0.65f, 0}, 64, 2, ids, (double[]){4 / 7., 3 / 7.});
    check_token(&(struct think_filters){1, 0, 0.75f, 0}, 64, 3, ids,
                (double[]){4 / 9., 3 / 9., 2 / 9.});
    check_token(&(struct think_filters){1, 0, 1e-6f, 0}, 64, 1, ids, (double[]){1});
    /* top_p after renormalising by top_k: of 4/7, 3/7 the first alone is enough for 0.55 */
    check_token(&(struct think_filters){1, 2, 0.55f, 0}, 64, 1, ids, (double[]){1});
    check_token(&(struct think_filters){1, 0, 0.55f, 0}, 64, 2, ids, (double[]){4 / 7., 3 / 7.});
    /* min_p against p_max: 0.2 < 0.6 * 0.4 <= 0.3 */
    check_token(&(struct think_filters){1, 0, 1, 0.6f}, 64, 2, ids, (double[]){4 / 7., 3 / 7.});
    check_token(&(struct think_filters){1, 0, 1, 0.99f}, 64, 1, ids, (double[]){1});
    check_token(&(struct think_filters){1, 3, 0.95f, 0.4f}, 2, 2, ids, (double[]){4 / 7., 3 / 7.});
    check_token(&(struct think_filters){1, 0, 1, 0}, 1, 1, ids, (double[]){1});
    /* below 1e-3 the temperature acts as 0 (the caller then divides by 1) */
    check_token(&(struct think_filters){0, 0, 1, 0}, 64, 1, ids, (double[]){1});
    check_token(&(struct think_filters){0.0009f, 0, 1, 0}, 64, 1, ids, (double[]){1});
}

/* Reaching top_p exactly is enough: of two equal ids the first alone has 0.5. */
static void test_top_p_is_reached_exactly(void) {
    struct think_params p = row_params(THINK_SOFT);
    const float z[] = {1, 1};
    row_build(&row, z, 2, 1);
    const struct think_candidates c = row_list(&row, 0, -1);
    p.thinking.top_p = 0.5f;
    CHECK_EQ(decide(&p, &c).count, 1);
    p.thinking.top_p = nextafterf(0.5f, 1);
    CHECK_EQ(decide(&p, &c).count, 2);
}

static void test_ties_go_to_the_lower_id(void) {
    struct think_params p = row_params(THINK_SOFT);
    p.max_topk = 5;
    for (int i = 0; i < 100; i++) logits[i] = 1;
    logits[40] = 3;
    row_build(&row, logits, 100, 1);
    struct think_candidates c = row_list(&row, 32, -1);
    struct think_decision d = decide(&p, &c);
    const uint32_t want[] = {40, 0, 1, 2, 3};
    CHECK_EQ(d.count, 5);
    CU_ASSERT(suite_equal_bytes("ids", d.ids, want, sizeof want));
    /* different logits whose masses round to the same weight: the lower id first, still */
    for (int i = 0; i < 100; i++) logits[i] = -50;
    logits[3] = 0.0f;
    logits[8] = 1e-9f;
    row_build(&row, logits, 100, 1);
    c = row_list(&row, 32, -1);
    CHECK_EQ(row.id[0], 8);
    d = decide(&p, &c);
    CHECK_EQ(d.ids[0], 3);
    p.thinking.temperature = 0; /* argmax knows no weights */
    CHECK_EQ(decide(&p, &c).ids[0], 8);
}

/* The definition, word by word: renormalise after every filter. Returns the smallest gap of a
 * decision. */
static double textbook(const struct row *r, const struct think_params *p, int *count, double *w) {
    static double x[ROW_MAX];
    int n = 0;
    double sum = 0, gap = 1;
    for (int i = 0; i < r->vocab && r->z[i] > -INFINITY; i++) {
        x[n++] = exp((double)r->z[i] - (double)r->m);
        sum += x[n - 1];
    }
    for (int i = 0; i < n; i++) x[i] /= sum;
    if (p->thinking.top_k > 0 && p->thinking.top_k < n) n = p->thinking.top_k;
    for (int pass = 0; pass < 3; pass++) { /* renormalise; then top_p, min_p, max_topk */
        sum = 0;
        for (int i = 0; i < n; i++) sum += x[i];
        for (int i = 0; i < n; i++) x[i] /= sum;
        if (pass == 0 && p->thinking.top_p < 1) {
            double cumulative = 0;
            for (int i = 0; i < n; i++) {
                cumulative += x[i];
                gap = fmin(gap, fabs(cumulative - (double)p->thinking.top_p));
                if (cumulative >= (double)p->thinking.top_p) n = i + 1;
            }
        }
        if (pass == 1)
            for (int i = n - 1; i > 0; i--) {
                gap = fmin(gap, fabs(x[i] / x[0] - (double)p->thinking.min_p));
                if (x[i] < (double)p->thinking.min_p * x[0]) n = i;
            }
        if (pass == 1 && n > p->max_topk) n = p->max_topk;
    }
    *count = n;
    memcpy(w, x, (size_t)n * sizeof *w);
    return gap;
}

static void random_params(struct think_params *p, uint64_t seed) {
    static const int top_k[] = {30, 30, 0, 1, 5, 32, 33, 64, 200, 100000};
    static const float top_p[] = {0.95f, 0.95f, 1, 0.5f, 0.05f, 0.999f};
    static const float min_p[] = {0.001f, 0, 0.05f, 0.3f, 0.99f};
    static const int max_topk[] = {1, 2, 5, 10, 15, 30, 64};
    static const float temperature[] = {0.6f, 1, 0.3f, 0.05f, 5, 0};
    p->thinking.top_k = top_k[suite_random(seed, 1) % 10];
    p->thinking.top_p = top_p[suite_random(seed, 2) % 6];
    p->thinking.min_p = min_p[suite_random(seed, 3) % 5];
    p->max_topk = max_topk[suite_random(seed, 4) % 7];
    p->thinking.temperature = temperature[suite_random(seed, 5) % 6];
    p->seed = seed * 0x9E3779B97F4A7C15ULL;
}

static void test_against_the_textbook(void) {
    int compared = 0;
    for (uint64_t seed = 0; seed < 2000; seed++) {
        struct think_params p = row_params(THINK_SOFT);
        random_params(&p, seed);
        if (p.thinking.temperature == 0) continue;
        const int vocab = 33 + (int)(suite_random(seed, 6) % 400);
        row_logits(logits, vocab, seed);
        row_build(&row, logits, vocab, p.thinking.temperature);
        const struct think_candidates c = row_list(&row, 0, -1);
        const struct think_decision d = decide(&p, &c);
        static double w[ROW_MAX];
        int count;
        if (textbook(&row, &p, &count, w) < 1e-5) continue; /* a near-tie says nothing */
        while (count > 0 && w[count - 1] < 1e-36) count--;  /* dropped: fp32 cannot hold them */
        if (d.count != count)
            printf("\n    seed %llu: %d, want %d", (unsigned long long)seed, d.count, count);
        CU_ASSERT(d.count == count);
        for (int i = 0; i < d.count && i < count; i++) {
            CHECK_NEAR(d.weights[i], w[i], 1e-30 + 2e-5 * w[i]); /* exp of differences up to 87 */
        }
        compared++;
    }
    CU_ASSERT(compared > 1200);
}

/* Whenever think_step says true for a short list, the decision and the state are those of the full
 * row. */
static void test_short_lists_are_exact(void) {
    static const int sizes[] = {2, 10, 32, 64};
    int shown[THINK_MODE_COUNT][2] = {{0}};
    for (uint64_t seed = 0; seed < 6000; seed++) {
        struct think_params p = row_params((enum think_mode)(seed % THINK_MODE_COUNT));
        random_params(&p, seed);
        const int vocab = 20 + (int)(suite_random(seed, 6) % 500);
        row_logits(logits, vocab, seed);
        for (uint32_t k = 0; k < suite_random(seed, 8) % 4; k++)
            logits[suite_random(seed, 9 + k) % vocab] = -INFINITY;
        row_build(&row, logits, vocab, p.thinking.temperature > 0 ? p.thinking.temperature : 1);
        struct think_state full = row_state(&p);
        struct think_decision want;
        const struct think_candidates all = row_list(&row, 0, -1);
        CU_ASSERT_FATAL(think_step(&p, &full, &all, &want)); /* a complete list always suffices */
        for (size_t k = 0; k < 4; k++) {
            const struct think_candidates c = row_list(&row, sizes[k], -1);
            struct think_state s = row_state(&p);
            const struct think_state before = s;
            struct think_decision d;
            const bool ok = think_step(&p, &s, &c, &d);
            if (sizes[k] == 32) shown[p.mode][ok]++;
            if (ok) {
                CU_ASSERT(suite_equal_bytes("decision", &d, &want, sizeof d));
                CU_ASSERT(suite_equal_bytes("state", &s, &full, sizeof s));
            } else {
                CU_ASSERT(suite_equal_bytes("untouched state", &s, &before, sizeof s));
            }
            /* the engine's usual case never needs more than 32: it would cost a fetch every step */
            if (p.thinking.top_k > 0 && p.thinking.top_k <= c.count) CU_ASSERT(ok);
        }
    }
    for (int mode = 0; mode < THINK_MODE_COUNT; mode++)
        CU_ASSERT(shown[mode][0] > 50 && shown[mode][1] > 500);
}

static void test_too_short_is_said(void) {
    for (int i = 0; i < 1000; i++) logits[i] = 0.001f * (float)(i % 7);
    row_build(&row, logits, 1000, 1);
    const struct think_candidates c = row_list(&row, 32, -1), all = row_list(&row, 0, -1);
    static const struct {
        enum think_mode mode;
        struct think_filters f;
        int max_topk;
        bool ok;
    } cases[] = {
        {THINK_SOFT, {1, 0, 1, 0}, 32, true}, /* nothing past max_topk can matter */
        {THINK_SOFT, {1, 0, 1, 0}, 33, false},
        {THINK_SOFT, {1, 0, 0.95f, 0}, 10, true},   /* top_p crosses far behind */
        {THINK_SOFT, {1, 0, 0.01f, 0}, 64, true},   /* and here inside the list */
        {THINK_SOFT, {1, 33, 0.95f, 0}, 10, false}, /* top_p of an unknown sum */
        {THINK_SOFT, {1, 33, 1, 0.5f}, 10, true},
        {THINK_SOFT, {1, 32, 0.95f, 0}, 64, true},
        {THINK_GUMBEL, {1, 0, 1, 0}, 32, true},
        {THINK_DIRICHLET, {1, 0, 1, 0}, 10, false}, /* every survivor may become large */
        {THINK_DIRICHLET, {1, 30, 1, 0}, 10, true},
        {THINK_OFF, {1, 0, 0.95f, 0}, 10, false},
        {THINK_OFF, {1, 0, 1, 0.5f}, 10, false},
        {THINK_OFF, {0, 0, 1, 0}, 10, true}, /* argmax */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct think_params p = row_params(cases[i].mode);
        p.thinking = cases[i].f;
        p.max_topk = cases[i].max_topk;
        struct think_state s = row_state(&p);
        struct think_decision d;
        const bool ok = think_step(&p, &s, &c, &d);
        if (ok != cases[i].ok) printf("\n    case %zu", i);
        CU_ASSERT(ok == cases[i].ok);
        CU_ASSERT(think_step(&p, &s, &all, &d));
    }
}

/* Without filters the total is S: a draw needs the full row only when it falls past the list. */
static void test_unfiltered_draws_from_a_list(void) {
    for (int i = 0; i < 2000; i++) logits[i] = i < 20 ? 5 : 0;
    row_build(&row, logits, 2000, 1);
    const double listed = (20 * exp(5) + 12) / (20 * exp(5) + 1980);
    const struct think_candidates c = row_list(&row, 32, -1);
    int ok = 0;
    struct think_params p = row_params(THINK_OFF);
    for (uint32_t i = 0; i < 4000; i++) {
        struct think_state s = row_state(&p);
        struct think_decision d;
        s.step = i;
        ok += think_step(&p, &s, &c, &d);
    }
    CHECK_NEAR(ok / 4000., listed, 5 * sqrt(listed * (1 - listed) / 4000));
    /* S rounded up: mass that no id has goes to the most likely id, not to the least likely */
    struct think_candidates all = row_list(&row, 0, -1);
    all.s *= 1000;
    int first = 0;
    for (uint32_t i = 0; i < 100; i++) {
        struct think_state s = row_state(&p);
        struct think_decision d;
        s.step = i;
        CU_ASSERT(think_step(&p, &s, &all, &d));
        first += d.trace_id == 0;
    }
    CU_ASSERT(first > 90);
}

static void test_normalisation(void) {
    for (uint64_t seed = 0; seed < 3000; seed++) {
        struct think_params p = row_params((enum think_mode)(seed % THINK_MODE_COUNT));
        random_params(&p, seed);
        p.gumbel_temperature = seed % 3 ? 0.5f : 0.01f;
        p.dirichlet_alpha = seed % 5 ? 1.0f : 0.01f;
        const int vocab = 20 + (int)(suite_random(seed, 6) % 300);
        row_logits(logits, vocab, seed);
        row_build(&row, logits, vocab, p.thinking.temperature > 0 ? p.thinking.temperature : 1);
        const struct think_candidates c = row_list(&row, 0, -1);
        const struct think_decision d = decide(&p, &c);
        double sum = 0;
        CU_ASSERT(d.count >= 1 && d.count <= p.max_topk);
        CU_ASSERT(d.ids[0] == d.trace_id);
        for (int i = 0; i < d.count; i++) {
            sum += (double)d.weights[i];
            CU_ASSERT(d.weights[i] > 0);
            if (i == 0) continue;
            CU_ASSERT(d.weights[i] < d.weights[i - 1] ||
                      (d.weights[i] == d.weights[i - 1] && d.ids[i] > d.ids[i - 1]));
            for (int j = 0; j < i; j++) CU_ASSERT(d.ids[i] != d.ids[j]);
        }
        CHECK_NEAR(sum, 1, d.count * 0x1p-24);
        if (p.mode == THINK_OFF || p.thinking.temperature == 0) CHECK_EQ(d.count, 1);
    }
}

const struct suite_case suite_cases[] = {
    {"entropy: known values, a double reference, unchanged by filters", test_entropy},
    {"filters: cases computed by hand", test_filters_by_hand},
    {"top_p reached exactly", test_top_p_is_reached_exactly},
    {"ties go to the lower id", test_ties_go_to_the_lower_id},
    {"filters: the definition word by word, random rows", test_against_the_textbook},
    {"a short list gives the full row's bits or says it is too short", test_short_lists_are_exact},
    {"which lists are too short", test_too_short_is_said},
    {"unfiltered draws use S as their total", test_unfiltered_draws_from_a_list},
    {"concept tokens: positive, sorted, distinct, sum 1", test_normalisation},
    {NULL, NULL}};
