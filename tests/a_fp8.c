/* a_fp8.c: e4m3 against its definition, in double, by brute force over every value there is. */
#include <float.h>
#include <math.h>

#include "base/bf16.h"
#include "base/fp8.h"
#include "suite.h"

/* The format's definition, in double. */
static double value_of(unsigned code) {
    const int exponent = (int)(code >> 3 & 15), mantissa = (int)(code & 7);
    if ((code & 0x7f) == 0x7f) return NAN;
    const double magnitude =
        exponent == 0 ? ldexp(mantissa, -9) : ldexp(1.0 + mantissa / 8.0, exponent - 7);
    return code & 0x80 ? -magnitude : magnitude;
}

/* The nearest of the 127 magnitudes, the even code of two equally near ones. */
static unsigned nearest(double x) {
    unsigned best = 0;
    if (isnan(x)) return 0x7f;
    for (unsigned code = 1; code < 0x7f; code++) {
        const double now = fabs(value_of(code) - fabs(x)), before = fabs(value_of(best) - fabs(x));
        if (now < before || (now == before && code % 2 == 0)) best = code;
    }
    return best;
}

static int check_encode(float x) {
    const unsigned want = nearest((double)x) | (signbit(x) ? 0x80u : 0u);
    return fp8_from_float(x) != want;
}

static void test_decode(void) {
    for (unsigned code = 0; code < 256; code++) {
        const float got = fp8_to_float((fp8)code);
        if ((code & 0x7f) == 0x7f) {
            CU_ASSERT(isnan(got));
            continue;
        }
        CHECK_NEAR(got, value_of(code), 0.0);
        CHECK_EQ(signbit(got) != 0, code >> 7);
        CHECK_EQ(fp8_from_float(got), code);
        CHECK_NEAR(bf16_to_float(bf16_from_float(got)), got, 0.0); /* exact in bf16 */
    }
    CHECK_NEAR(fp8_to_float(0x7e), 448.0, 0.0);
    CHECK_NEAR(fp8_to_float(0x01), 0x1p-9, 0.0);
    CHECK_NEAR(fp8_to_float(0x38), 1.0, 0.0);
}

static void test_encode(void) {
    int wrong = 0;
    for (unsigned high = 0; high < 0x10000; high++)
        wrong += check_encode(bf16_to_float((bf16)high));
    CHECK_EQ(wrong, 0);
    for (unsigned code = 0; code < 0x7e; code++) { /* both sides of every border, and the border */
        const float border = (float)((value_of(code) + value_of(code + 1)) / 2);
        for (int sign = -1; sign <= 1; sign += 2) {
            wrong += check_encode((float)sign * border);
            wrong += check_encode((float)sign * nextafterf(border, 1000.0f));
            wrong += check_encode((float)sign * nextafterf(border, 0.0f));
        }
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(fp8_from_float(INFINITY), 0x7e);
    CHECK_EQ(fp8_from_float(-FLT_MAX), 0xfe);
    CHECK_EQ(fp8_from_float(465.0f), 0x7e);
    CHECK_EQ(fp8_from_float(FLT_TRUE_MIN), 0);
}

/* Dividing q * scale, rounded, by the scale gives q again: a checkpoint keeps its bytes. */
static void test_requantise(void) {
    int wrong = 0;
    for (unsigned i = 0; i < 4000; i++) {
        const float scale =
            ldexpf(1.0f + (float)(i * 2654435761u >> 9) * 0x1p-23f, (int)(i % 60) - 45);
        for (unsigned code = 0; code < 0x7f; code++)
            wrong += fp8_quantise(fp8_to_float((fp8)code) * scale, scale) != code;
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(fp8_quantise(fp8_scale(3.0f) * 448.0f, fp8_scale(3.0f)), 0x7e);
    CHECK_EQ(fp8_quantise(1.0f, 0.0f), 0);
    CHECK_EQ(fp8_quantise(0.0f, fp8_scale(0.0f)), 0);
}

const struct suite_case suite_cases[] = {
    {"every code is its definition's value, and comes back", test_decode},
    {"every bf16 number and both sides of every border go to the nearest", test_encode},
    {"a block in its own scale keeps its codes", test_requantise},
    {NULL, NULL},
};
