/* think_bench.c: see think_bench.h. */
#include "think/think_bench.h"

#include <time.h>

#include "base/fmath.h"

enum { BENCH_ROWS = 16, BENCH_ROUNDS = 9 };

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Zipf-like rows: logits fall with ln(rank), a little differently in each row. S and Q add a tail of a
 * tenth of the mass, so that top_p = 0.95 keeps about everything listed. */
static void bench_rows(float z[BENCH_ROWS][THINK_TOPK_MAX], struct think_candidates *rows,
                       const uint32_t *ids, int count) {
    for (int r = 0; r < BENCH_ROWS; r++) {
        double s = 0, q = 0;
        for (int i = 0; i < count; i++) {
            z[r][i] = -(0.8f + 0.05f * (float)r) * fmath_log((float)(i + 1));
            s += (double)fmath_exp(z[r][i]);
            q += (double)z[r][i] * (double)fmath_exp(z[r][i]);
        }
        struct think_candidates *c = &rows[r];
        c->m = 0;
        c->s = (float)(1.1 * s);
        c->q = (float)(1.1 * q - 0.5 * s);
        c->count = count;
        c->complete = false;
        c->z = z[r];
        c->id = ids;
        c->close_z = -20.0f;
    }
}

double think_bench_step_ns(enum think_mode mode, int max_topk, double seconds) {
    ASSERT(max_topk >= 1 && max_topk <= THINK_TOPK_MAX);
    float z[BENCH_ROWS][THINK_TOPK_MAX];
    uint32_t ids[THINK_TOPK_MAX];
    struct think_candidates rows[BENCH_ROWS];
    for (int i = 0; i < THINK_TOPK_MAX; i++) ids[i] = 1000u + 37u * (uint32_t)i;
    bench_rows(z, rows, ids, max_topk);

    const struct think_params params = {
        .mode = mode,
        .max_topk = max_topk,
        .thinking = {.temperature = 0.6f, .top_k = max_topk, .top_p = 0.95f, .min_p = 0.001f},
        .answer = {.temperature = 0.6f, .top_k = max_topk, .top_p = 0.95f, .min_p = 0.001f},
        .cold_stop = true,
        .cold_stop_entropy = 0.01f,
        .cold_stop_length = 256,
        .start = START_FIRST_TOKEN,
        .gumbel_temperature = 0.5f,
        .dirichlet_alpha = 1.0f,
        .seed = 1,
        .open_id = 1,
        .close_id = 2,
        .eos_count = 1,
        .eos_ids = {3},
    };
    struct think_state state;
    struct think_decision decision;
    think_state_init(&state, &params, NULL, 0);
    double rounds[BENCH_ROUNDS];
    for (int round = 0; round < BENCH_ROUNDS; round++) {
        const double begin = now_seconds(), end = begin + seconds / BENCH_ROUNDS;
        double now;
        int64_t steps = 0;
        do {
            for (int r = 0; r < BENCH_ROWS; r++)
                ASSERT(think_step(&params, &state, &rows[r], &decision));
            steps += BENCH_ROWS;
            now = now_seconds();
        } while (now < end);
        const double ns = 1e9 * (now - begin) / (double)steps;
        int i = round; /* kept sorted: the median is in the middle */
        for (; i > 0 && rounds[i - 1] > ns; i--) rounds[i] = rounds[i - 1];
        rounds[i] = ns;
    }
    return rounds[BENCH_ROUNDS / 2];
}
