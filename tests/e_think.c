/* e_think.c: scripted sequences: phases, how thinking ends, forced text, presets, names, ranges. */
#include "e_rows.h"

enum { VOCAB = 24, OPEN = 1, CLOSE = 2, EOS = 3, EOS2 = 4, WORD = 10 };
static struct row row;

static struct think_params params(enum think_mode mode) {
    struct think_params p = row_params(mode);
    p.open_id = OPEN;
    p.close_id = CLOSE;
    p.eos_count = 2;
    p.eos_ids[0] = EOS;
    p.eos_ids[1] = EOS2;
    p.answer.temperature = 0;
    return p;
}

/* One step whose most likely id is `top`; gap: how far ahead it is. What the engine does: mask, divide,
 * gather, decide. */
static struct think_decision step_z(const struct think_params *p, struct think_state *s, float *z) {
    if (think_row_masks_eos(p, s))
        for (int i = 0; i < p->eos_count; i++)
            if (p->eos_ids[i] != p->close_id) z[p->eos_ids[i]] = -INFINITY;
    row_build(&row, z, VOCAB, think_row_temperature(p, s));
    const struct think_candidates c = row_list(&row, 0, p->close_id);
    struct think_decision d;
    CU_ASSERT_FATAL(think_step(p, s, &c, &d));
    return d;
}

static struct think_decision step(const struct think_params *p, struct think_state *s, uint32_t top,
                                  float gap) {
    float z[VOCAB];
    for (int i = 0; i < VOCAB; i++) z[i] = -0.25f * (float)(i % 5);
    z[top] = gap;
    return step_z(p, s, z);
}

static const float SURE = 60, UNSURE = 1; /* H = 0 and H about 3 nats */

static void check_one_hot(const struct think_decision *d, uint32_t id) {
    CHECK_EQ(d->trace_id, id);
    CHECK_EQ(d->count, 1);
    CHECK_EQ(d->ids[0], id);
    CU_ASSERT(d->weights[0] == 1.0f);
    CU_ASSERT(!d->soft);
}

static void test_natural_end(void) {
    const struct think_params p = params(THINK_SOFT);
    struct think_state s = row_state(&p);
    float z[VOCAB] = {0};
    z[WORD] = 2;
    z[CLOSE] = 1.9f; /* much mass on the marker, but not the most: thinking goes on */
    struct think_decision d = step_z(&p, &s, z);
    CU_ASSERT(d.soft && d.trace_id == WORD && d.ids[1] == CLOSE && d.end == END_NONE && !d.marker);
    CHECK_EQ(d.phase, PHASE_THINKING);
    d = step(&p, &s, CLOSE, UNSURE);
    check_one_hot(&d, CLOSE);
    CHECK_EQ(d.end, END_MODEL);
    CHECK_EQ(d.phase, PHASE_THINKING); /* the closing step is a thinking step */
    CU_ASSERT(d.marker && d.finish == FINISH_NONE);
    CU_ASSERT(d.p > 0 && d.p < 1);
    CHECK_EQ(s.thinking_steps, 2);
    CHECK_EQ(s.soft_steps, 1);
    d = step(&p, &s, WORD, UNSURE);
    check_one_hot(&d, WORD);
    CHECK_EQ(d.phase, PHASE_ANSWER);
    CHECK_EQ(d.end, END_NONE);
    CHECK_EQ(s.end, END_MODEL);
    CHECK_EQ(s.thinking_steps, 2);
    CHECK_EQ(s.step, 3);
}

/* Steps until thinking ends, at most `limit`; the last decision in *d. */
static int think_until_end(const struct think_params *p, struct think_state *s, float gap,
                           int limit, struct think_decision *d) {
    for (int n = 1; n <= limit; n++) {
        *d = step(p, s, WORD + (uint32_t)n % 7, gap);
        if (d->end != END_NONE) return n;
        CU_ASSERT(d->soft == (p->mode != THINK_OFF));
    }
    return 0;
}

static void test_cold_stop(void) {
    for (int length = 1; length <= 5; length++) {
        struct think_params p = params(THINK_SOFT);
        p.cold_stop = true;
        p.cold_stop_entropy = 0.01f;
        p.cold_stop_length = length;
        struct think_state s = row_state(&p);
        struct think_decision d;
        CHECK_EQ(think_until_end(&p, &s, SURE, length - 1, &d), 0); /* length - 1: not yet */
        d = step(&p, &s, WORD, UNSURE);                             /* a high step starts over */
        CHECK_EQ(d.end, END_NONE);
        CHECK_EQ(think_until_end(&p, &s, SURE, 10, &d), length);
        CHECK_EQ(d.end, END_COLD_STOP);
        check_one_hot(&d, CLOSE);
        CU_ASSERT(d.marker && d.entropy < 1e-6f);
        CU_ASSERT(d.p < 1e-20f); /* of the marker, not of the word it replaced */
        CHECK_EQ(s.thinking_steps, 2 * length);
        CHECK_EQ(s.soft_steps, 2 * length - 1);
        for (int i = 0; i < 20; i++) { /* never active in the answer */
            d = step(&p, &s, WORD, SURE);
            CU_ASSERT(d.phase == PHASE_ANSWER && d.end == END_NONE && d.finish == FINISH_NONE);
        }
    }
    /* strict: H equal to the threshold does not count */
    struct think_params p = params(THINK_SOFT);
    p.cold_stop = true;
    p.cold_stop_length = 1;
    struct think_state s = row_state(&p);
    p.cold_stop_entropy = step(&p, &s, WORD, 5).entropy;
    s = row_state(&p);
    CHECK_EQ(step(&p, &s, WORD, 5).end, END_NONE);
    p.cold_stop_entropy = nextafterf(p.cold_stop_entropy, 1);
    CHECK_EQ(step(&p, &s, WORD, 5).end, END_COLD_STOP);
    p.cold_stop_entropy = 0; /* nothing is below */
    s = row_state(&p);
    CHECK_EQ(step(&p, &s, WORD, SURE).end, END_NONE);
    /* the control arm: mode off with cold stop */
    p = params(THINK_OFF);
    p.cold_stop = true;
    p.cold_stop_entropy = 0.01f;
    p.cold_stop_length = 3;
    s = row_state(&p);
    struct think_decision d;
    CHECK_EQ(think_until_end(&p, &s, SURE, 10, &d), 3);
    check_one_hot(&d, CLOSE);
    CHECK_EQ(s.soft_steps, 0);
    /* H is that of T = 1 when the temperature acts as 0 */
    p.thinking.temperature = 0;
    s = row_state(&p);
    CU_ASSERT(think_row_temperature(&p, &s) == 1.0f);
    CHECK_NEAR(step(&p, &s, WORD, UNSURE).entropy, 3.0, 0.2);
}

static void test_budget(void) {
    for (int budget = 1; budget <= 4; budget++) {
        for (int steps = budget - 1; steps <= budget + 1; steps++) {
            struct think_params p = params(THINK_SOFT);
            p.budget = budget;
            struct think_state s = row_state(&p);
            struct think_decision d = {0};
            for (int i = 0; i < steps; i++) d = step(&p, &s, WORD, UNSURE);
            CHECK_EQ(s.end, steps < budget ? END_NONE : END_BUDGET);
            CHECK_EQ(s.phase, steps < budget ? PHASE_THINKING : PHASE_ANSWER);
            if (steps == budget) {
                check_one_hot(&d, CLOSE);
                CHECK_EQ(d.end, END_BUDGET);
            }
            CHECK_EQ(s.thinking_steps, steps < budget ? steps : budget);
            think_finish_length(&s); /* max_tokens reached here */
            CHECK_EQ(s.end, steps < budget ? END_LENGTH : END_BUDGET);
        }
    }
    const struct think_params p = params(THINK_OFF);
    struct think_state s = row_state(&p);
    s.phase = PHASE_ANSWER; /* no thinking at all: nothing to end */
    think_finish_length(&s);
    CHECK_EQ(s.end, END_NONE);
}

/* All four at once, the step that fulfils several: model, then eos, cold stop, budget. */
static void test_order_of_ends(void) {
    struct think_params p = params(THINK_SOFT);
    p.cold_stop = true;
    p.cold_stop_entropy = 0.01f;
    p.cold_stop_length = 1;
    p.budget = 1;
    p.watchdog_repeats = 2;
    struct think_state s = row_state(&p);
    CHECK_EQ(step(&p, &s, CLOSE, SURE).end, END_MODEL);
    s = row_state(&p);
    CHECK_EQ(step(&p, &s, EOS, SURE).end, END_EOS);
    s = row_state(&p);
    CHECK_EQ(step(&p, &s, WORD, SURE).end, END_COLD_STOP);
    s = row_state(&p);
    CHECK_EQ(step(&p, &s, WORD, UNSURE).end, END_BUDGET);
    p.eos_ids[1] = CLOSE; /* a close marker listed as end of sequence is a close marker */
    p.on_eos = ON_EOS_FINISH;
    s = row_state(&p);
    const struct think_decision d = step(&p, &s, CLOSE, SURE);
    CU_ASSERT(d.end == END_MODEL && d.finish == FINISH_NONE && d.marker);
}

static void test_on_eos(void) {
    struct think_params p = params(THINK_SOFT);
    struct think_state s = row_state(&p);
    CU_ASSERT(!think_row_masks_eos(&p, &s));
    struct think_decision d = step(&p, &s, EOS2, UNSURE);
    check_one_hot(&d, CLOSE); /* close */
    CU_ASSERT(d.end == END_EOS && d.finish == FINISH_NONE && d.marker && s.phase == PHASE_ANSWER);
    d = step(&p, &s, EOS2, UNSURE); /* in the answer it finishes */
    CU_ASSERT(d.finish == FINISH_EOS && d.trace_id == EOS2 && !d.marker && d.end == END_NONE);

    p.on_eos = ON_EOS_FINISH;
    s = row_state(&p);
    d = step(&p, &s, EOS, UNSURE);
    check_one_hot(&d, EOS);
    CU_ASSERT(d.end == END_EOS && d.finish == FINISH_EOS && !d.marker);
    CHECK_EQ(s.thinking_steps, 1);

    p.on_eos = ON_EOS_MASK; /* H and weights know nothing of the masked ids */
    s = row_state(&p);
    CU_ASSERT(think_row_masks_eos(&p, &s));
    float z[VOCAB];
    for (int i = 0; i < VOCAB; i++) z[i] = -INFINITY;
    z[EOS] = 5;
    z[WORD] = z[WORD + 1] = 1;
    d = step_z(&p, &s, z);
    CU_ASSERT(d.soft && d.trace_id == WORD && d.count == 2 && d.end == END_NONE);
    CHECK_NEAR(d.entropy, log(2), 1e-6);
    CHECK_NEAR(d.weights[0], 0.5, 0);
    s.phase = PHASE_ANSWER;
    CU_ASSERT(!think_row_masks_eos(&p, &s));

    for (int on_eos = 0; on_eos < 3; on_eos++) { /* ignore_eos: ordinary ids in both phases */
        p.on_eos = (enum think_on_eos)on_eos;
        p.ignore_eos = true;
        s = row_state(&p);
        CU_ASSERT(!think_row_masks_eos(&p, &s));
        d = step(&p, &s, EOS, UNSURE);
        CU_ASSERT(d.soft && d.trace_id == EOS && d.end == END_NONE && d.finish == FINISH_NONE);
        step(&p, &s, CLOSE, UNSURE);
        d = step(&p, &s, EOS, UNSURE);
        CU_ASSERT(d.phase == PHASE_ANSWER && d.trace_id == EOS && d.finish == FINISH_NONE);
    }
}

static enum think_phase first_phase(const struct think_params *p, const uint32_t *ids, int n) {
    struct think_state s;
    think_state_init(&s, p, ids, n);
    return s.phase;
}

static void test_start(void) {
    struct think_params p = params(THINK_SOFT);
    p.start = START_AUTO;
    const uint32_t open[] = {7, OPEN, 8}, closed[] = {OPEN, 8, CLOSE, 9},
                   again[] = {OPEN, CLOSE, 9, OPEN}, none[] = {7, 8};
    CHECK_EQ(first_phase(&p, open, 3), PHASE_THINKING);
    CHECK_EQ(first_phase(&p, closed, 4), PHASE_ANSWER);
    CHECK_EQ(first_phase(&p, again, 4), PHASE_THINKING);
    CHECK_EQ(first_phase(&p, none, 2), PHASE_ANSWER);
    p.start = START_FIRST_TOKEN;
    CHECK_EQ(first_phase(&p, closed, 4), PHASE_THINKING);
    p.start = START_AUTO;
    p.compat = COMPAT_OFFICIAL_2026_01;
    CHECK_EQ(first_phase(&p, closed, 4), PHASE_THINKING);
    p.compat = COMPAT_NONE;
    p.open_id = p.close_id = -1; /* ids past INT_MAX are not markers */
    CHECK_EQ(first_phase(&p, (const uint32_t[]){0xffffffffu}, 1), PHASE_ANSWER);

    /* auto, the model opens the thinking itself; a closed block in the prompt does not forbid it */
    p = params(THINK_SOFT);
    p.start = START_AUTO;
    struct think_state s;
    think_state_init(&s, &p, closed, 4);
    struct think_decision d = step(&p, &s, WORD, UNSURE);
    CU_ASSERT(d.phase == PHASE_ANSWER && d.trace_id == WORD && !d.marker);
    d = step(&p, &s, CLOSE, UNSURE); /* closes nothing */
    CU_ASSERT(d.phase == PHASE_ANSWER && !d.marker && d.end == END_NONE);
    d = step(&p, &s, OPEN, UNSURE);
    CU_ASSERT(d.phase == PHASE_ANSWER && d.marker && !d.soft);
    d = step(&p, &s, WORD, UNSURE);
    CU_ASSERT(d.phase == PHASE_THINKING && d.soft);
    d = step(&p, &s, OPEN, UNSURE); /* the model repeats it */
    CU_ASSERT(d.phase == PHASE_THINKING && d.soft && d.marker);
    d = step(&p, &s, CLOSE, UNSURE);
    CHECK_EQ(d.end, END_MODEL);
    d = step(&p, &s, OPEN, UNSURE); /* no second thinking in one reply */
    CU_ASSERT(d.phase == PHASE_ANSWER && !d.marker);
    d = step(&p, &s, WORD, UNSURE);
    CHECK_EQ(d.phase, PHASE_ANSWER);
    CHECK_EQ(s.thinking_steps, 3);
}

static void test_close_text(void) {
    for (int by_budget = 0; by_budget < 2; by_budget++) {
        struct think_params p = params(THINK_GUMBEL);
        p.budget = by_budget ? 2 : 0;
        p.cold_stop = !by_budget;
        p.cold_stop_entropy = 20;
        p.cold_stop_length = 2;
        p.close_text_count = 3;
        p.close_text[0] = 20;
        p.close_text[1] = EOS; /* text like any other */
        p.close_text[2] = OPEN;
        struct think_state s = row_state(&p);
        step(&p, &s, WORD, UNSURE);
        CHECK_EQ(step(&p, &s, WORD, UNSURE).end, by_budget ? END_BUDGET : END_COLD_STOP);
        for (int i = 0; i < 3; i++) {
            const struct think_decision d = step(&p, &s, WORD, UNSURE);
            check_one_hot(&d, (uint32_t)p.close_text[i]);
            CU_ASSERT(d.forced && isnan(d.p) && d.entropy > 2 && d.finish == FINISH_NONE &&
                      !d.marker);
            CHECK_EQ(d.phase, PHASE_ANSWER);
        }
        const struct think_decision d = step(&p, &s, WORD, UNSURE);
        CU_ASSERT(!d.forced && d.trace_id == WORD && d.phase == PHASE_ANSWER);
        CHECK_EQ(s.step, 6);
    }
    struct think_params p = params(THINK_SOFT); /* not after the model's own end, nor after eos */
    p.close_text_count = 1;
    for (uint32_t id = CLOSE; id <= EOS; id++) {
        struct think_state s = row_state(&p);
        step(&p, &s, id, UNSURE);
        CU_ASSERT(!step(&p, &s, WORD, UNSURE).forced);
    }
}

static void test_no_close_marker(void) {
    struct think_params p = params(THINK_SOFT);
    p.open_id = p.close_id = -1;
    p.budget = 2;
    p.close_text_count = 1;
    p.close_text[0] = 21;
    struct think_state s = row_state(&p);
    CU_ASSERT(step(&p, &s, WORD, UNSURE).soft);
    struct think_decision d = step(&p, &s, WORD + 1, UNSURE);
    check_one_hot(&d, WORD + 1); /* its own id */
    CU_ASSERT(d.end == END_BUDGET && !d.marker && d.phase == PHASE_THINKING && d.p > 0);
    d = step(&p, &s, WORD, UNSURE);
    CU_ASSERT(d.forced && d.trace_id == 21 && d.phase == PHASE_ANSWER);
    d = step(&p, &s, WORD, UNSURE);
    CU_ASSERT(!d.forced && d.phase == PHASE_ANSWER);
    s = row_state(&p); /* nothing could stand in for the end of sequence: it finishes */
    d = step(&p, &s, EOS, UNSURE);
    check_one_hot(&d, EOS);
    CU_ASSERT(d.end == END_EOS && d.finish == FINISH_EOS);
    p.on_eos = ON_EOS_MASK;
    s = row_state(&p);
    CU_ASSERT(think_row_masks_eos(&p, &s));
}

static void test_compat(void) {
    for (int preset = COMPAT_OFFICIAL_2025_05; preset <= COMPAT_OFFICIAL_2026_01; preset++) {
        struct think_params p = params(THINK_SOFT);
        p.compat = (enum think_compat)preset;
        p.start = START_AUTO;
        p.thinking.temperature = 0.5f;
        p.answer.temperature = 2;
        p.cold_stop = true;
        p.cold_stop_entropy = 0.5f;
        p.cold_stop_length = 3;
        struct think_state s = row_state(&p);
        struct think_decision d = step(&p, &s, EOS, UNSURE);
        CU_ASSERT(d.phase == PHASE_THINKING && d.end == END_EOS && d.finish == FINISH_EOS);
        s = row_state(&p);
        CHECK_EQ(step(&p, &s, CLOSE, UNSURE).end, END_MODEL);
        const bool argmax = preset == COMPAT_OFFICIAL_2025_05;
        CU_ASSERT(think_row_temperature(&p, &s) == (argmax ? 1.0f : 0.5f));
        int other = 0;
        for (int i = 0; i < 50; i++) other += step(&p, &s, WORD, UNSURE).trace_id != WORD;
        CU_ASSERT(argmax ? other == 0 : other > 10);
        step(&p, &s, WORD, SURE);
        step(&p, &s, WORD, SURE);
        CHECK_EQ(step(&p, &s, WORD, UNSURE).finish, FINISH_NONE); /* starts over */
        step(&p, &s, WORD, SURE);
        step(&p, &s, WORD, SURE);
        d = step(&p, &s, WORD, SURE);
        CU_ASSERT(d.finish == FINISH_LOOP_BREAK && d.loop_break && d.trace_id == WORD);
        CHECK_EQ(s.end, END_MODEL);
    }
}

/* Its own temperature and filters; hard ids only. */
static void test_answer_phase(void) {
    struct think_params p = params(THINK_SOFT);
    p.thinking.temperature = 0;
    p.answer = (struct think_filters){.temperature = 1.5f, .top_k = 2, .top_p = 1, .min_p = 0};
    struct think_state s = row_state(&p);
    CU_ASSERT(think_row_temperature(&p, &s) == 1.0f);
    struct think_decision d = step(&p, &s, WORD, UNSURE);
    CU_ASSERT(d.soft && d.count == 1); /* a soft step whatever its size */
    step(&p, &s, CLOSE, UNSURE);
    CU_ASSERT(think_row_temperature(&p, &s) == 1.5f);
    int seen[VOCAB] = {0};
    for (int i = 0; i < 200; i++) {
        d = step(&p, &s, WORD, UNSURE);
        check_one_hot(&d, d.trace_id);
        seen[d.trace_id]++;
    }
    CU_ASSERT(seen[WORD] > 100 && seen[0] > 20 &&
              seen[WORD] + seen[0] == 200); /* top_k 2; ties: id 0 */
    CHECK_EQ(s.soft_steps, 1);
}

/* (soft, K = 1) walks the same ids as (off, T = 0). */
static void test_greedy_thinking(void) {
    struct think_params one = params(THINK_SOFT), off = params(THINK_OFF);
    one.max_topk = 1;
    off.thinking.temperature = 0;
    struct think_state a = row_state(&one), b = row_state(&off);
    for (uint32_t i = 0; i < 500; i++) {
        float z[VOCAB];
        for (uint32_t k = 0; k < VOCAB; k++) z[k] = suite_random_float(i, k);
        z[CLOSE] = z[EOS] = z[EOS2] = -9;
        const struct think_decision x = step_z(&one, &a, z), y = step_z(&off, &b, z);
        CHECK_EQ(x.trace_id, y.trace_id);
        CHECK_EQ(x.count, 1);
        CU_ASSERT(x.weights[0] == 1.0f && x.soft && !y.soft);
    }
}

static void test_probability(void) {
    const struct think_params p = params(THINK_SOFT);
    float z[VOCAB] = {0};
    z[WORD] = 3;
    const double sum = exp(3) + VOCAB - 1;
    row_build(&row, z, VOCAB, 1);
    struct think_candidates c = row_list(&row, 2, CLOSE); /* WORD, 0: the marker is not listed */
    struct think_params one = p;
    one.max_topk = 2;
    one.budget = 1;
    struct think_state s = row_state(&one);
    struct think_decision d;
    CU_ASSERT(think_step(&one, &s, &c, &d));
    CU_ASSERT(d.end == END_BUDGET && d.trace_id == CLOSE);
    CHECK_NEAR(d.p, 1 / sum, 1e-7);
    one.budget = 0;
    s = row_state(&one);
    CU_ASSERT(think_step(&one, &s, &c, &d));
    CHECK_NEAR(d.p, exp(3) / sum, 1e-6);
    CHECK_NEAR(s.entropy_sum, d.entropy, 0);
    c.close_z = -INFINITY; /* masked: it cannot come */
    one.budget = 1;
    s = row_state(&one);
    CU_ASSERT(think_step(&one, &s, &c, &d));
    CHECK_NEAR(d.p, 0, 0);
}

static int watched(int repeats, const uint32_t *ids, int n) {
    struct think_params p = params(THINK_SOFT);
    p.watchdog_repeats = repeats;
    struct think_state s = row_state(&p);
    for (int i = 0; i < n; i++) {
        const struct think_decision d = step(&p, &s, ids[i], UNSURE);
        if (d.end == END_WATCHDOG) {
            check_one_hot(&d, CLOSE);
            return i + 1;
        }
    }
    return 0;
}

static void test_watchdog(void) {
    uint32_t ids[100];
    for (int i = 0; i < 100; i++) ids[i] = 10;
    CHECK_EQ(watched(0, ids, 100), 0);
    CHECK_EQ(watched(4, ids, 100), 4);
    CHECK_EQ(watched(32, ids, 100), 32);
    for (int i = 0; i < 100; i++) ids[i] = 10 + (uint32_t)i % 3; /* a trigram */
    CHECK_EQ(watched(4, ids, 100), 12);
    for (int i = 0; i < 50; i++) ids[i] = 10 + suite_random(9, (uint32_t)i) % 12;
    for (int i = 50; i < 100; i++) ids[i] = i % 2 ? 11 : 12; /* after 50 others: the ring wraps */
    CHECK_EQ(watched(10, ids, 100), 70);
    for (int i = 0; i < 100; i++) ids[i] = 10 + (uint32_t)i % 9; /* longer than 32 / 4 */
    CHECK_EQ(watched(4, ids, 100), 0);
}

static void test_names(void) {
    static const char *const modes[] = {"off", "soft", "gumbel", "dirichlet"};
    CHECK_EQ(THINK_MODE_COUNT, 4);
    for (int m = 0; m < THINK_MODE_COUNT; m++) {
        enum think_mode back = THINK_OFF;
        CHECK_STR(think_mode_name((enum think_mode)m), modes[m]);
        CU_ASSERT(think_mode_parse(modes[m], &back) && back == (enum think_mode)m);
        CU_ASSERT(think_mode_is_soft((enum think_mode)m) == (m != THINK_OFF));
        CU_ASSERT(strlen(think_mode_help((enum think_mode)m)) > 10);
    }
    static const char *const ends[] = {"none", "model",  "cold_stop", "budget",
                                       "eos",  "length", "watchdog"};
    for (int e = 0; e < 7; e++) CHECK_STR(think_end_name((enum think_end)e), ends[e]);
    CHECK_STR(think_phase_name(PHASE_THINKING), "thinking");
    CHECK_STR(think_phase_name(PHASE_ANSWER), "answer");
    enum think_mode mode;
    enum think_on_eos on_eos;
    enum think_start start;
    enum think_compat compat;
    CU_ASSERT(think_on_eos_parse("mask", &on_eos) && on_eos == ON_EOS_MASK);
    CU_ASSERT(think_start_parse("first_token", &start) && start == START_FIRST_TOKEN);
    CU_ASSERT(think_compat_parse("official-2026-01", &compat) && compat == COMPAT_OFFICIAL_2026_01);
    CU_ASSERT(think_compat_parse("none", &compat) && compat == COMPAT_NONE);
    CU_ASSERT(!think_mode_parse("Soft", &mode) && !think_mode_parse("", &mode));
    CU_ASSERT(!think_on_eos_parse("stop", &on_eos) && !think_start_parse("first", &start));
    CU_ASSERT(!think_compat_parse("official", &compat));
}

static void refused(const struct think_params *p, const char *param) {
    CHECK_EQ(think_params_check(p, VOCAB), STATUS_REQUEST);
    CHECK_STR(fail_last()->param, param);
    CU_ASSERT(strstr(fail_text(), param) != NULL);
}

static void test_ranges(void) {
    struct think_params ok = params(THINK_SOFT);
    ok.cold_stop = true;
    ok.cold_stop_entropy = 0.01f;
    ok.cold_stop_length = 256;
    CHECK_EQ(think_params_check(&ok, VOCAB), STATUS_OK);
#define REFUSED(member, value, param)        \
    do {                                     \
        struct think_params p = ok;          \
        p.member = value;                    \
        refused(&p, "soft_thinking." param); \
    } while (0)
#define ACCEPTED(member, value)                             \
    do {                                                    \
        struct think_params p = ok;                         \
        p.member = value;                                   \
        CHECK_EQ(think_params_check(&p, VOCAB), STATUS_OK); \
    } while (0)
    REFUSED(mode, (enum think_mode)4, "mode");
    REFUSED(max_topk, 0, "max_topk");
    REFUSED(max_topk, 65, "max_topk");
    ACCEPTED(max_topk, 64);
    REFUSED(thinking.temperature, -0.1f, "temperature");
    REFUSED(thinking.temperature, 5.1f, "temperature");
    REFUSED(thinking.temperature, NAN, "temperature");
    ACCEPTED(thinking.temperature, 5);
    ACCEPTED(thinking.temperature, 0);
    REFUSED(thinking.top_k, -2, "top_k");
    REFUSED(thinking.top_k, VOCAB + 1, "top_k");
    ACCEPTED(thinking.top_k, VOCAB);
    REFUSED(thinking.top_p, 0, "top_p");
    REFUSED(thinking.top_p, 1.01f, "top_p");
    REFUSED(thinking.min_p, 1, "min_p");
    REFUSED(thinking.min_p, -0.01f, "min_p");
    REFUSED(answer.temperature, INFINITY, "answer.temperature");
    REFUSED(answer.top_p, NAN, "answer.top_p");
    REFUSED(cold_stop_entropy, 20.1f, "cold_stop.entropy");
    REFUSED(cold_stop_entropy, NAN, "cold_stop.entropy");
    REFUSED(cold_stop_length, 0, "cold_stop.length");
    REFUSED(cold_stop_length, 1000001, "cold_stop.length");
    REFUSED(budget, -1, "budget");
    REFUSED(budget, 1LL << 31, "budget");
    ACCEPTED(budget, INT32_MAX);
    REFUSED(gumbel_temperature, 0, "gumbel_temperature");
    REFUSED(gumbel_temperature, 100.5f, "gumbel_temperature");
    REFUSED(dirichlet_alpha, 0, "dirichlet_alpha");
    REFUSED(dirichlet_alpha, 2e6f, "dirichlet_alpha");
    REFUSED(watchdog_repeats, 1, "watchdog_repeats");
    REFUSED(watchdog_repeats, 33, "watchdog_repeats");
    REFUSED(close_text_count, THINK_CLOSE_TEXT_MAX + 1, "close_text");
    REFUSED(close_id, -1, "budget"); /* a soft mode without a close marker needs one */
    struct think_params p = ok;
    p.close_id = -1;
    p.budget = 7;
    CHECK_EQ(think_params_check(&p, VOCAB), STATUS_OK);
    p.budget = 0;
    p.mode = THINK_OFF;
    CHECK_EQ(think_params_check(&p, VOCAB), STATUS_OK);
}

const struct suite_case suite_cases[] = {
    {"natural end: the top id is the close marker", test_natural_end},
    {"cold stop: boundary, reset, strictness, control arm", test_cold_stop},
    {"budget: b-1, b, b+1 steps; out of tokens", test_budget},
    {"order of ends: model, eos, cold stop, budget", test_order_of_ends},
    {"end of sequence while thinking: close, finish, mask, ignored", test_on_eos},
    {"start: auto, first_token, generated marker, no re-entry", test_start},
    {"close_text is forced after cold stop and budget", test_close_text},
    {"a model without a close marker", test_no_close_marker},
    {"compat presets", test_compat},
    {"the answer has its own filters and hard ids", test_answer_phase},
    {"soft with K = 1 walks like off with T = 0", test_greedy_thinking},
    {"p of the trace id", test_probability},
    {"watchdog: repeated n-grams", test_watchdog},
    {"names of modes, ends, phases, options", test_names},
    {"ranges name their field", test_ranges},
    {NULL, NULL}};
