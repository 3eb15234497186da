/* e_policies.c: noise, draws and weights of each policy; the golden steps of the Python reference.
 */
#include "e_rows.h"
#include "think/noise.h"

static struct row row;
static float logits[ROW_MAX];

/* Published critical values of chi-square at 1 - 1e-4, 9 degrees of freedom. */
#define CHI_SQUARE_9 33.72

static double chi_square(const int *seen, const double *p, int n, int draws) {
    double x = 0;
    for (int i = 0; i < n; i++) x += pow(seen[i] - draws * p[i], 2) / (draws * p[i]);
    return x;
}

/* Ten ids that survive, the rest far below. Fills p[10] of ids 0..9 in order of likelihood. */
static struct think_candidates ten(double *p) {
    double sum = 0;
    for (int i = 0; i < 200; i++)
        logits[i] = i < 10 ? -0.35f * (float)i : -3.7f - 0.001f * (float)i;
    row_build(&row, logits, 200, 1);
    for (int i = 0; i < 10; i++) sum += p[i] = exp((double)logits[i]);
    for (int i = 0; i < 10; i++) p[i] /= sum;
    return row_list(&row, 32, -1);
}

static void test_functions(void) {
    double worst = 0;
    for (uint32_t i = 0; i < 200000; i++) {
        const double x = (double)rng_uniform(suite_random(3, i)) * (i % 3 ? 1 : 1e6);
        worst = fmax(worst, fabs(noise_log(x) - log(x)) / fmax(fabs(log(x)), 1e-3));
    }
    CHECK_NEAR(worst, 0, 2e-15);
    CHECK_NEAR(noise_log(1), 0, 0);
    CHECK_NEAR(noise_log((double)rng_uniform(0)), log(0x1p-24), 1e-14);
    CHECK_NEAR(noise_log((double)rng_uniform(~0u)), log1p(-0x1p-24), 1e-22);
    CHECK_NEAR(noise_log(1e-300), log(1e-300), 1e-12);
    worst = 0;
    for (int i = 0; i <= 100000; i++)
        worst =
            fmax(worst, fabs(noise_cos_turns(i / 1e5) - cos(2 * 3.14159265358979323846 * i / 1e5)));
    CHECK_NEAR(worst, 0, 2e-15);
    CHECK_NEAR(noise_cos_turns(0.25), 0, 0);
}

/* Mean and variance of Gamma(a): both a. 20,000 draws; bounds at five standard errors. */
static void test_gamma(void) {
    static const double shapes[] = {0.3, 0.9, 1, 3.5, 40};
    for (size_t k = 0; k < 5; k++) {
        const double a = shapes[k];
        double sum = 0, squares = 0;
        for (uint32_t i = 0; i < 20000; i++) {
            const struct noise_source n = {.seed = 11, .step = i, .choice = 0};
            const double x = exp(noise_gamma_log(&n, a, 3));
            sum += x;
            squares += (x - a) * (x - a);
        }
        const double fourth = 3 * a * a + 6 * a; /* central moment */
        CHECK_NEAR(sum / 20000, a, 5 * sqrt(a / 20000));
        CHECK_NEAR(squares / 20000, a, 5 * sqrt((fourth - a * a) / 20000));
    }
    const struct noise_source n = {.seed = 11, .step = 1, .choice = 0};
    CU_ASSERT(noise_gamma_log(&n, 1e-6, 0) < -1000 && isfinite(noise_gamma_log(&n, 1e-60, 0)));
}

/* A draw depends on seed, choice, step and slot, each of them, and the three purposes do not share.
 */
static void test_counters(void) {
    const struct noise_source a = {.seed = 5, .step = 6, .choice = 7};
    rng_block seen[8] = {
        noise_draw(&a, RNG_GUMBEL, 8, 0),        noise_draw(&a, RNG_GUMBEL, 9, 0),
        noise_draw(&a, RNG_DIRICHLET, 8, 0),     noise_draw(&a, RNG_DIRICHLET, 8, 1),
        noise_draw(&a, RNG_CATEGORICAL, 8, 0),   noise_draw(&a, RNG_DIRICHLET, 65544, 0),
        noise_draw(&a, RNG_DIRICHLET, 65544, 1), {{0}}};
    const rng_block plain = rng_draw(5, 6, 7, RNG_GUMBEL, 8, 0);
    CU_ASSERT(suite_equal_bytes("rng_draw's counter", &plain, &seen[0], sizeof plain));
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < i; j++) CU_ASSERT(memcmp(&seen[i], &seen[j], sizeof plain) != 0);

    double p[10];
    const struct think_candidates c = ten(p);
    struct think_params params = row_params(THINK_GUMBEL);
    struct think_decision base, d;
    struct think_state s = row_state(&params);
    CU_ASSERT(think_step(&params, &s, &c, &base));
    s = row_state(&params);
    CU_ASSERT(think_step(&params, &s, &c, &d));
    CU_ASSERT(suite_equal_bytes("the same seed", &d, &base, sizeof d));
    CU_ASSERT(think_step(&params, &s, &c, &d)); /* the next step */
    CU_ASSERT(memcmp(d.weights, base.weights, sizeof d.weights) != 0);
    params.choice = 1;
    s = row_state(&params);
    CU_ASSERT(think_step(&params, &s, &c, &d));
    CU_ASSERT(memcmp(d.weights, base.weights, sizeof d.weights) != 0);
    params.choice = 0;
    params.seed = 1 + (1ULL << 32); /* the high word counts */
    s = row_state(&params);
    CU_ASSERT(think_step(&params, &s, &c, &d));
    CU_ASSERT(memcmp(d.weights, base.weights, sizeof d.weights) != 0);
}

/* 20,000 draws: the trace id is an exact sample of the truncated p, whatever the mode draws with.
 */
static void check_frequencies(enum think_mode mode, float tau) {
    double p[10];
    const struct think_candidates c = ten(p);
    int seen[10] = {0};
    struct think_params params = row_params(mode);
    params.thinking.top_k = 10;
    params.gumbel_temperature = tau;
    params.seed = 20250515;
    for (uint32_t i = 0; i < 20000; i++) {
        struct think_state s = row_state(&params);
        struct think_decision d;
        s.step = i;
        CU_ASSERT_FATAL(think_step(&params, &s, &c, &d) && d.trace_id < 10);
        seen[d.trace_id]++;
    }
    CHECK_NEAR(chi_square(seen, p, 10, 20000), CHI_SQUARE_9 / 2, CHI_SQUARE_9 / 2);
}

static void test_frequencies(void) {
    check_frequencies(THINK_GUMBEL, 0.5f);
    check_frequencies(THINK_GUMBEL, 0.01f);
    check_frequencies(THINK_GUMBEL, 100.0f);
    check_frequencies(THINK_OFF, 1.0f);
}

/* tau -> 0: one-hot on argmax (ln w + g), the noise recomputed here from the generator's words. */
static void test_gumbel_cold(void) {
    int compared = 0;
    for (uint64_t seed = 0; seed < 2000; seed++) {
        row_logits(logits, 100, seed);
        row_build(&row, logits, 100, 1);
        const struct think_candidates c = row_list(&row, 32, -1);
        struct think_params p = row_params(THINK_SOFT);
        p.seed = seed;
        struct think_state s = row_state(&p);
        struct think_decision soft, d;
        CU_ASSERT(think_step(&p, &s, &c, &soft));
        double best = -INFINITY, second = -INFINITY;
        uint32_t id = 0;
        for (int i = 0; i < soft.count; i++) {
            const rng_block b = rng_draw(seed, 0, 0, RNG_GUMBEL, (uint32_t)i, 0);
            const double u = ((double)(b.word[0] >> 9) + 0.5) * 0x1p-23;
            const double y = log((double)soft.weights[i]) - log(-log(u));
            second = fmax(second, fmin(y, best));
            if (y > best) {
                best = y;
                id = soft.ids[i];
            }
        }
        if (best - second < 2e-4) continue;
        p.mode = THINK_GUMBEL;
        p.gumbel_temperature = 1e-6f;
        s = row_state(&p);
        CU_ASSERT(think_step(&p, &s, &c, &d));
        CHECK_EQ(d.trace_id, id);
        CHECK_EQ(d.count, 1); /* the others underflowed */
        CU_ASSERT(d.soft);
        compared++;
    }
    CU_ASSERT(compared > 1900);
}

static void test_dirichlet(void) {
    double p[10], sum[10] = {0}, squares[10] = {0};
    const struct think_candidates c = ten(p);
    struct think_params params = row_params(THINK_DIRICHLET);
    params.thinking.top_k = 10;
    params.max_topk = 64;
    params.dirichlet_alpha = 4;
    for (uint32_t i = 0; i < 20000; i++) {
        struct think_state s = row_state(&params);
        struct think_decision d;
        s.step = i;
        CU_ASSERT_FATAL(think_step(&params, &s, &c, &d));
        for (int k = 0; k < d.count; k++) {
            CU_ASSERT_FATAL(d.ids[k] < 10); /* filtered ids stay out */
            sum[d.ids[k]] += (double)d.weights[k];
            squares[d.ids[k]] += pow((double)d.weights[k] - p[d.ids[k]], 2);
        }
    }
    for (int i = 0; i < 10; i++) { /* mean p, variance p (1 - p) / (alpha + 1) */
        const double variance = p[i] * (1 - p[i]) / 5;
        CHECK_NEAR(sum[i] / 20000, p[i], 5 * sqrt(variance / 20000));
        CHECK_NEAR(squares[i] / 20000 / variance, 1, 0.1);
    }
    params.dirichlet_alpha = 1e6f;
    struct think_state s = row_state(&params);
    struct think_decision d;
    CU_ASSERT(think_step(&params, &s, &c, &d));
    for (int k = 0; k < d.count; k++) CHECK_NEAR(d.weights[k], p[d.ids[k]], 0.005);
    params.dirichlet_alpha =
        1e-7f; /* shapes so small that every variate underflows but in logarithms */
    int seen[10] = {0};
    for (uint32_t i = 0; i < 20000; i++) {
        s = row_state(&params);
        s.step = i;
        CU_ASSERT(think_step(&params, &s, &c, &d));
        CHECK_EQ(d.count, 1);
        seen[d.trace_id]++;
    }
    CHECK_NEAR(chi_square(seen, p, 10, 20000), CHI_SQUARE_9 / 2, CHI_SQUARE_9 / 2);
    /* max_topk cuts after the noise, not before it */
    params.dirichlet_alpha = 1;
    params.max_topk = 2;
    memset(seen, 0, sizeof seen);
    for (uint32_t i = 0; i < 500; i++) {
        s = row_state(&params);
        s.step = i;
        CU_ASSERT(think_step(&params, &s, &c, &d));
        for (int k = 0; k < d.count; k++) seen[d.ids[k]]++;
    }
    CU_ASSERT(seen[2] > 50 && seen[9] > 0);
}

/* ------------------------------------------------------------------------------------------------
 * tests/data/golden/think_steps.vec; its head says the format. */

static float hex_float(const char *text) {
    char word[9] = {0};
    memcpy(word, text, 8);
    const uint32_t bits = (uint32_t)strtoul(word, NULL, 16);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static const char *field(const char *line, const char *name) {
    const char *at = strstr(line, name);
    CU_ASSERT_FATAL(at != NULL);
    return at + strlen(name);
}

static void golden_out(const char *line, const struct think_params *p, int number) {
    const float t = p->thinking.temperature;
    row_build(&row, logits, row.vocab, t < THINK_TEMPERATURE_MIN ? 1 : t);
    const struct think_candidates c = row_list(&row, 0, -1);
    struct think_state s = row_state(p);
    s.step = (uint32_t)p->budget; /* carried there by golden_case */
    struct think_params params = *p;
    params.budget = 0;
    struct think_decision d;
    CU_ASSERT_FATAL(think_step(&params, &s, &c, &d));
    const double h = (double)hex_float(field(line, "H="));
    CHECK_NEAR(d.entropy, h, h > 1 ? 1e-5 * h : 1e-5);
    CHECK_NEAR(d.p, hex_float(field(line, " p=")), 2e-5 * (double)d.p);
    const char *at = strchr(field(line, " p="), ' ');
    int n = 0;
    for (char *end; at && *at == ' '; n++, at = strchr(at + 1, ' ')) {
        const unsigned long id = strtoul(at, &end, 10);
        const double w = (double)hex_float(end + 1);
        if (n >= d.count || d.ids[n] != id) {
            printf("\n    case %d entry %d: id %u, want %lu", number, n, n < d.count ? d.ids[n] : 0,
                   id);
            CU_FAIL("golden id");
            return;
        }
        /* z' up to 1200 carries 2^-24 of itself into e^z'; the noise exponent is divided by tau */
        CHECK_NEAR(d.weights[n], w, 3e-5 * w / (double)fminf(p->gumbel_temperature, 1) + 1e-37);
    }
    CHECK_EQ(d.count, n);
}

static void test_golden(void) {
    FILE *f = fopen(suite_path("tests/data/golden/think_steps.vec"), "r");
    CU_ASSERT_FATAL(f != NULL);
    char *line = NULL;
    size_t capacity = 0;
    struct think_params p = row_params(THINK_SOFT);
    int number = -1, cases = 0;
    static bool masked[ROW_MAX];
    static float bias[ROW_MAX];
    while (getline(&line, &capacity, f) > 0) {
        line[strcspn(line, "\n")] = 0;
        if (strncmp(line, "case ", 5) == 0) {
            char mode[16] = {0};
            sscanf(field(line, "mode="), "%15[a-z]", mode);
            number = atoi(line + 5);
            p = row_params(THINK_SOFT);
            CU_ASSERT(think_mode_parse(mode, &p.mode));
            row.vocab = atoi(field(line, " V="));
            p.thinking.temperature = hex_float(field(line, "temperature="));
            p.thinking.top_k = atoi(field(line, "top_k="));
            p.thinking.top_p = hex_float(field(line, "top_p="));
            p.thinking.min_p = hex_float(field(line, "min_p="));
            p.max_topk = atoi(field(line, "max_topk="));
            p.gumbel_temperature = hex_float(field(line, "tau="));
            p.dirichlet_alpha = hex_float(field(line, "alpha="));
            p.seed = strtoull(field(line, "seed="), NULL, 10);
            p.choice = (uint32_t)atoi(field(line, "choice="));
            p.budget = atoi(field(line, " step="));
            memset(masked, 0, sizeof masked);
            memset(bias, 0, sizeof bias);
        } else if (strncmp(line, "bias ", 5) == 0) {
            char *end;
            for (const char *at = line + 4; at && *at == ' '; at = strchr(at + 1, ' ')) {
                const unsigned long id = strtoul(at, &end, 10);
                bias[id] = hex_float(end + 1);
            }
        } else if (strncmp(line, "mask ", 5) == 0) {
            for (const char *at = line + 4; at && *at == ' '; at = strchr(at + 1, ' '))
                masked[strtoul(at, NULL, 10)] = true;
        } else if (strncmp(line, "z ", 2) == 0) {
            CU_ASSERT_FATAL(strlen(line) == 2 + 8 * (size_t)row.vocab && row.vocab <= ROW_MAX);
            for (int i = 0; i < row.vocab; i++)
                logits[i] = masked[i] ? -INFINITY : hex_float(line + 2 + 8 * i) + bias[i];
        } else if (strncmp(line, "out ", 4) == 0) {
            golden_out(line, &p, number);
            cases++;
        }
    }
    free(line);
    fclose(f);
    CHECK_EQ(cases, 210);
}

const struct suite_case suite_cases[] = {
    {"log and cosine against libm", test_functions},
    {"gamma variates: mean and variance", test_gamma},
    {"draws depend on seed, choice, step, purpose, slot, attempt", test_counters},
    {"trace ids are samples of p: chi-square, 20,000 draws", test_frequencies},
    {"gumbel at tau -> 0 is the categorical sample of the same noise", test_gumbel_cold},
    {"dirichlet: mean, variance, limits, order of cut and noise", test_dirichlet},
    {"golden steps of the Python reference", test_golden},
    {NULL, NULL}};
