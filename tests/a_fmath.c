/* a_fmath.c: own exp and log against libm in double (verification.md §7). */
#include "base/fmath.h"
#include "suite.h"

static double ulps(float got, double want) {
    const float w = (float)want;
    const float step = nextafterf(fabsf(w), INFINITY) - fabsf(w);
    return fabs((double)got - want) / (double)step;
}

static void test_exp(void) {
    double worst = 0;
    float before = 0;
    for (int i = 0; i <= 870000; i++) {
        const float x = -87.0f + (float)i * 1e-4f;
        const float y = fmath_exp(x);
        const double u = ulps(y, exp((double)x));
        if (u > worst) worst = u;
        CU_ASSERT(y >= before);
        before = y;
    }
    printf("(worst %.3f ulp) ", worst);
    CU_ASSERT(worst <= 2.0);
    CU_ASSERT(fmath_exp(0.0f) == 1.0f);
    CU_ASSERT(fmath_exp(-0.0f) == 1.0f);
    CU_ASSERT(fmath_exp(-88.0f) == 0.0f && fmath_exp(-INFINITY) == 0.0f);
    CU_ASSERT(isfinite(fmath_exp(1000.0f)) && isnan(fmath_exp(NAN)));
}

static void test_log(void) {
    double worst = 0;
    for (uint32_t i = 0; i < 400000; i++) {
        const uint32_t bits = 1 + i * 5354u; /* subnormals to the largest float */
        float x;
        memcpy(&x, &bits, sizeof x);
        if (!isfinite(x)) break;
        const double want = log((double)x);
        if (want == 0) continue;
        const double u = ulps(fmath_log(x), want);
        if (u > worst) worst = u;
    }
    printf("(worst %.3f ulp) ", worst);
    CU_ASSERT(worst <= 1.0);
    CU_ASSERT(fmath_log(1.0f) == 0.0f);
    CU_ASSERT(fmath_log(0.0f) == -INFINITY && isnan(fmath_log(-1.0f)));
}

const struct suite_case suite_cases[] = {
    {"exp: 2 ulp, monotone, exact at 0", test_exp}, {"log: 1 ulp", test_log}, {NULL, NULL}};
