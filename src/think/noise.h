/* noise.h: the random variates of the noise policies, the same bits on host and device.
 *
 * Built on Philox words (rng.h) with the counter of soft-thinking.md §6 and on elementary functions
 * of our own in double: fixed sequences of +, -, *, / and sqrt, which IEEE 754 rounds the same way
 * everywhere (compile with -ffp-contract=off, CUDA with --fmad=false). Errors are near 1e-15.
 * Gamma variates stay in logarithms: a tiny shape gives values like e^-100000, and only ratios
 * count, so nothing underflows before the weights are formed.
 */
#ifndef SFUMATO_THINK_NOISE_H
#define SFUMATO_THINK_NOISE_H

#include "base/fmath.h"
#include "base/rng.h"

/* Who draws: everything of the counter but purpose, slot and attempt. */
struct noise_source {
    uint64_t seed;
    uint32_t step, choice;
};

/* As rng_draw; the bits of a slot past 65,535 (a Dirichlet over a whole vocabulary) go into the
 * purpose word, because above slot 16 bits the last word holds the attempt. */
static inline SFUMATO_DEVICE rng_block noise_draw(const struct noise_source *n,
                                                  enum rng_purpose purpose, uint32_t slot,
                                                  uint32_t attempt) {
    rng_block counter;
    counter.word[0] = n->step;
    counter.word[1] = n->choice;
    counter.word[2] = (uint32_t)purpose | slot >> 16 << 8;
    counter.word[3] = (slot & 0xffffu) | attempt << 16;
    return rng_philox(counter, (uint32_t)n->seed, (uint32_t)(n->seed >> 32));
}

/* ln x of a normal double x > 0: as fmath_log with two more terms of the series and no last
 * rounding. */
static inline SFUMATO_DEVICE double noise_log(double x) {
    int exponent;
    const double s = fmath_log_split(x, &exponent), t = s * s; /* t^11 / 23 < 2^-60 */
    double sum = 1.0 / 21;
    sum = sum * t + 1.0 / 19;
    sum = sum * t + 1.0 / 17;
    sum = sum * t + 1.0 / 15;
    sum = sum * t + 1.0 / 13;
    sum = sum * t + 1.0 / 11;
    sum = sum * t + 1.0 / 9;
    sum = sum * t + 1.0 / 7;
    sum = sum * t + 1.0 / 5;
    sum = sum * t + 1.0 / 3;
    sum = sum * t + 1.0;
    return 2.0 * s * sum + exponent * FMATH_LN2;
}

/* cos(2 pi t), t in [0, 1]: folded to an eighth of a turn, then the Taylor series. */
static inline SFUMATO_DEVICE double noise_cos_turns(double t) {
    double sign = 1.0;
    if (t > 0.5) t = 1.0 - t;
    if (t > 0.25) {
        t = 0.5 - t;
        sign = -1.0;
    }
    const bool sine = t > 0.125; /* cos a = sin(pi/2 - a) */
    const double a = 6.283185307179586477 * (sine ? 0.25 - t : t), a2 = a * a;
    /* cos: 1 - a2/(1 2) (1 - a2/(3 4) (...)), sin/a: 1 - a2/(2 3) (1 - a2/(4 5) (...)); a^18/18! < 2^-58 */
    double sum = 1.0;
    if (sine) {
        sum = 1.0 - a2 * (1.0 / 272) * sum;
        sum = 1.0 - a2 * (1.0 / 210) * sum;
        sum = 1.0 - a2 * (1.0 / 156) * sum;
        sum = 1.0 - a2 * (1.0 / 110) * sum;
        sum = 1.0 - a2 * (1.0 / 72) * sum;
        sum = 1.0 - a2 * (1.0 / 42) * sum;
        sum = 1.0 - a2 * (1.0 / 20) * sum;
        sum = 1.0 - a2 * (1.0 / 6) * sum;
    } else {
        sum = 1.0 - a2 * (1.0 / 240) * sum;
        sum = 1.0 - a2 * (1.0 / 182) * sum;
        sum = 1.0 - a2 * (1.0 / 132) * sum;
        sum = 1.0 - a2 * (1.0 / 90) * sum;
        sum = 1.0 - a2 * (1.0 / 56) * sum;
        sum = 1.0 - a2 * (1.0 / 30) * sum;
        sum = 1.0 - a2 * (1.0 / 12) * sum;
        sum = 1.0 - a2 * (1.0 / 2) * sum;
    }
    return sign * (sine ? a * sum : sum);
}

static inline SFUMATO_DEVICE double noise_gumbel(const struct noise_source *n, uint32_t slot) {
    const double u = (double)rng_uniform(noise_draw(n, RNG_GUMBEL, slot, 0).word[0]);
    return -noise_log(-noise_log(u));
}

/* ln of a Gamma(shape, 1) variate, shape > 0: Marsaglia and Tsang, "A simple method for generating
 * gamma variables" (2000). Attempt t uses words 0, 1 for the normal (Box-Muller) and 2 for the
 * accept test; word 3 of attempt 0 is the boost u^(1/shape) of a shape below 1. */
static inline SFUMATO_DEVICE double noise_gamma_log(const struct noise_source *n, double shape,
                                                    uint32_t slot) {
    double boost = 0;
    if (shape < 1.0) {
        boost =
            noise_log((double)rng_uniform(noise_draw(n, RNG_DIRICHLET, slot, 0).word[3])) / shape;
        shape += 1.0;
    }
    const double d = shape - 1.0 / 3, c = 1.0 / sqrt(9.0 * d);
    for (uint32_t attempt = 0; attempt < 65536; attempt++) {
        const rng_block b = noise_draw(n, RNG_DIRICHLET, slot, attempt);
        const double radius = sqrt(-2.0 * noise_log((double)rng_uniform(b.word[0])));
        const double x = radius * noise_cos_turns((double)rng_uniform(b.word[1]));
        const double root = 1.0 + c * x, v = root * root * root;
        if (!(v > 0.0)) continue;
        const double accept = 0.5 * x * x + d * (1.0 - v + noise_log(v));
        if (accept > noise_log((double)rng_uniform(b.word[2]))) return noise_log(d * v) + boost;
    }
    return noise_log(d) + boost; /* each attempt is accepted with p > 0.95: never reached */
}

#endif
