/* suite.h: a CUnit program in three lines.
 *
 *   static void test_x(void) { CU_ASSERT(...); }
 *   const struct suite_case suite_cases[] = {{"what it proves", test_x}, {NULL, NULL}};
 *
 * suite.c has main(): registers the cases in order, runs them through the Basic interface, and exits
 * non-zero on any failure. Under MPI a suite defines suite_setup/suite_teardown (weak here) to join and
 * leave the job; suite_failed lets it add up failures over ranks.
 */
#ifndef SFUMATO_TESTS_SUITE_H
#define SFUMATO_TESTS_SUITE_H

#include <CUnit/Basic.h>
#include <CUnit/CUnit.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct suite_case {
    const char *name;
    void (*run)(void);
};
extern const struct suite_case suite_cases[];

/* Optional. setup: before the first test; returns 0 when fine. total: failures of this process in, of all
 * processes out. teardown: last. */
int suite_setup(int *argc, char ***argv);
unsigned suite_total_failures(unsigned mine);
void suite_teardown(void);

/* Fails with both operands printed. */
#define CHECK_EQ(a, b)                                                                          \
    do {                                                                                        \
        const long long check_a_ = (long long)(a), check_b_ = (long long)(b);                   \
        if (check_a_ != check_b_)                                                               \
            printf("\n    %s:%d: %s = %lld, %s = %lld\n", __FILE__, __LINE__, #a, check_a_, #b, \
                   check_b_);                                                                   \
        CU_ASSERT(check_a_ == check_b_);                                                        \
    } while (0)
#define CHECK_NEAR(a, b, tolerance)                                                               \
    do {                                                                                          \
        const double check_a_ = (double)(a), check_b_ = (double)(b);                              \
        const int check_near_ = fabs(check_a_ - check_b_) <= (tolerance);                         \
        if (!check_near_)                                                                         \
            printf("\n    %s:%d: %s = %.9g, %s = %.9g, tolerance %.3g\n", __FILE__, __LINE__, #a, \
                   check_a_, #b, check_b_, (double)(tolerance));                                  \
        CU_ASSERT(check_near_);                                                                   \
    } while (0)
#define CHECK_STR(a, b)                                                                         \
    do {                                                                                        \
        const char *check_a_ = (a), *check_b_ = (b);                                            \
        if (strcmp(check_a_, check_b_) != 0)                                                    \
            printf("\n    %s:%d: %s = \"%s\", want \"%s\"\n", __FILE__, __LINE__, #a, check_a_, \
                   check_b_);                                                                   \
        CU_ASSERT(strcmp(check_a_, check_b_) == 0);                                             \
    } while (0)
/* Equal bytes, first difference printed. */
int suite_equal_bytes(const char *what, const void *a, const void *b, size_t n);

/* A path inside the source tree (from SFUMATO_SOURCE_DIR, else the current folder). Static buffer. */
const char *suite_path(const char *relative);
/* A counter-based random word: the same on every machine. */
uint32_t suite_random(uint64_t seed, uint32_t i);
/* Normal-ish float in about [-3, 3]. */
float suite_random_float(uint64_t seed, uint32_t i);

#endif
