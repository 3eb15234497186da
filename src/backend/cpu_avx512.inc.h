/* cpu_avx512.inc.h: vectors of 16 floats for cpu_vector.inc.h; included by both AVX-512 levels. */
#include <immintrin.h>

#include "base/bf16.h"

/* 2 vectors x 12 rows: 24 accumulators, 2 weights, and a broadcast straight from memory */
enum { W = 16, VECS = 2, FULL_ROWS = 12, TILE_VECS = 2, VALUE_HEADS = 4 };
#define TILE_ROWS_MAX 12

#define VEC static inline __attribute__((always_inline))

typedef __m512 vec;
VEC vec vec_zero(void) { return _mm512_setzero_ps(); }
VEC vec vec_set1(float x) { return _mm512_set1_ps(x); }
VEC vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC void vec_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
VEC vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
VEC vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
VEC vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
VEC vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
/* a b + c */
VEC vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
/* a > b ? a : b, and a < b ? a : b: the second operand when one is NaN */
VEC vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
VEC vec vec_min(vec a, vec b) { return _mm512_min_ps(a, b); }
/* a < b ? 0 : x */
VEC vec vec_zero_below(vec a, vec b, vec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}
/* 2^n of integral n in [-126, 127] */
VEC vec vec_power2(vec n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
/* 16 pairs of bf16 at p: the first and the second of each, widened */
VEC vec vec_even(const void *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
VEC vec vec_odd(const void *p) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
}
/* 16 bf16 at p, widened */
VEC vec vec_bf16(const bf16 *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* bit j: a[j] > b[j] */
VEC unsigned vec_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
