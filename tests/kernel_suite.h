/* kernel_suite.h: what every suite over kernels.h needs (l_*.c): set-up, and launches that are over when
 * they return. Emulated ones always are; on a device (test_l_*_gpu) they are waited for. "Device"
 * pointers are ordinary memory in both, which a driver with heterogeneous memory management allows;
 * else the suite is skipped. Defines suite_setup: one file a program includes it.
 */
#ifndef SFUMATO_TESTS_KERNEL_SUITE_H
#define SFUMATO_TESTS_KERNEL_SUITE_H

#include "kernels/kernels.h"
#include "suite.h"

extern int kernels_sm_count; /* few multiprocessors: a block then works on several items */

#define LAUNCH(call)                     \
    do {                                 \
        CHECK_EQ((call), 0);             \
        CHECK_EQ(kernels_wait(NULL), 0); \
    } while (0)

int suite_setup(int *argc, char ***argv) {
    enum { SKIPPED = 77 }; /* an exit status that ctest knows */
    (void)argc, (void)argv;
    const int error = kernels_setup();
    if (error == 0 && kernels_reads_host_memory()) return 0;
    printf("skipped: %s\n",
           error ? kernels_error_text(error) : "the device cannot read ordinary memory (no HMM)");
    exit(SKIPPED);
}

/* in[rows][K] times m by the entry that its kind has; out: fp32, GATE_UP: bf16. */
static inline void kernel_product(enum kernels_mode mode, int rows, const struct kernels_matrix *m,
                                  const uint16_t *in, void *out, void *workspace) {
    if (m->kind == KERNELS_GATE_UP)
        LAUNCH(kernels_gate_up(NULL, mode, rows, m, in, out, workspace));
    else
        LAUNCH(kernels_product(NULL, mode, rows, m, in, out, workspace));
}

#endif
