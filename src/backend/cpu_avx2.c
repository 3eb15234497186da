/* cpu_avx2.c: AVX2 + FMA: vectors of 8 floats for cpu_vector.inc.h. */
#include <immintrin.h>

#include "base/bf16.h"

/* 16 registers: 4 vectors x 2 rows or 2 vectors x 4 rows of accumulators, weights, a broadcast */
enum { W = 8, VECS = 4, FULL_ROWS = 2, TILE_VECS = 2, VALUE_HEADS = 4 };
#define TILE_ROWS_MAX 4

#define VEC static inline __attribute__((always_inline))

typedef __m256 vec;
VEC vec vec_zero(void) { return _mm256_setzero_ps(); }
VEC vec vec_set1(float x) { return _mm256_set1_ps(x); }
VEC vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC void vec_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
VEC vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
VEC vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
VEC vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
VEC vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
/* a b + c */
VEC vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
/* a > b ? a : b, and a < b ? a : b: the second operand when one is NaN */
VEC vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
VEC vec vec_min(vec a, vec b) { return _mm256_min_ps(a, b); }
/* a < b ? 0 : x */
VEC vec vec_zero_below(vec a, vec b, vec x) {
    return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), x);
}
/* 2^n of integral n in [-126, 127] */
VEC vec vec_power2(vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
/* 8 pairs of bf16 at p: the first and the second of each, widened */
VEC vec vec_even(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(p), 16));
}
VEC vec vec_odd(const void *p) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(p), high));
}
/* 8 bf16 at p, widened */
VEC vec vec_bf16(const bf16 *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
/* bit j: a[j] > b[j] */
VEC unsigned vec_above(vec a, vec b) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

#define KERNELS_NAME cpu_kernels_avx2
#define KERNELS_ISA ISA_AVX2
#include "backend/cpu_vector.inc.h"
