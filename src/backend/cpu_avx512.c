/* cpu_avx512.c: AVX-512 F/BW/VL/DQ without BF16: the fma class in vectors of 16. */
#include "backend/cpu_avx512.inc.h"

#define KERNELS_NAME cpu_kernels_avx512
#define KERNELS_ISA ISA_AVX512
#include "backend/cpu_vector.inc.h"
