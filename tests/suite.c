/* suite.c: see suite.h. The main() of every test program. */
#include "suite.h"

#include "base/rng.h"

__attribute__((weak)) int suite_setup(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    return 0;
}
__attribute__((weak)) unsigned suite_total_failures(unsigned mine) { return mine; }
__attribute__((weak)) void suite_teardown(void) {}

int suite_equal_bytes(const char *what, const void *a, const void *b, size_t n) {
    if (memcmp(a, b, n) == 0) return 1;
    const unsigned char *x = a, *y = b;
    size_t i = 0;
    while (x[i] == y[i]) i++;
    printf("\n    %s: first difference at byte %zu of %zu: %02x, %02x\n", what, i, n, x[i], y[i]);
    return 0;
}

const char *suite_path(const char *relative) {
    static char path[4][2048];
    static int turn;
    const char *root = getenv("SFUMATO_SOURCE_DIR");
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", root ? root : ".", relative);
    return path[turn];
}

uint32_t suite_random(uint64_t seed, uint32_t i) {
    return rng_draw(seed, i, 0, RNG_CATEGORICAL, 0, 0).word[0];
}

float suite_random_float(uint64_t seed, uint32_t i) {
    const rng_block b = rng_draw(seed, i, 1, RNG_CATEGORICAL, 0, 0);
    return rng_uniform(b.word[0]) + rng_uniform(b.word[1]) + rng_uniform(b.word[2]) +
           rng_uniform(b.word[3]) - 2.0f;
}

int main(int argc, char **argv) {
    if (suite_setup(&argc, &argv) != 0) return 1;
    if (CU_initialize_registry() != CUE_SUCCESS) return 1;
    CU_pSuite suite = CU_add_suite(argv[0], NULL, NULL);
    if (!suite) return 1;
    for (const struct suite_case *c = suite_cases; c->name; c++) {
        if (!CU_add_test(suite, c->name, c->run)) return 1;
    }
    CU_basic_set_mode(CU_BRM_NORMAL);
    CU_basic_run_tests();
    const unsigned failed = suite_total_failures(CU_get_number_of_failures());
    CU_cleanup_registry();
    suite_teardown();
    return failed ? 1 : 0;
}
