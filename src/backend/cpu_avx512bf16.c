/* cpu_avx512bf16.c: AVX-512 with vdpbf16ps: adds the dpbf16 class, half the instructions of fma. */
#include "backend/cpu_avx512.inc.h"

/* sum[j] += w[j][0] x[0] + w[j][1] x[1]: 16 pairs at w, one pair at x broadcast from memory. The
 * instruction's own order and its flushing of subnormals are what makes this class different
 * (cpu.md §3.2). */
#define VEC_DPBF16
VEC vec vec_dpbf16(vec sum, const unsigned char *w, const unsigned char *x) {
    int pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w),
                            (__m512bh)_mm512_set1_epi32(pair));
}

#define KERNELS_NAME cpu_kernels_avx512bf16
#define KERNELS_ISA ISA_AVX512BF16
#include "backend/cpu_vector.inc.h"
