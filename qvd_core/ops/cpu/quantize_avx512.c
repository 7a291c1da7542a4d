/* The quantization loops for AVX-512: wider vectors, and twice as many of them. */
#include "parallel.h"

#define QVD_TARGET QVD_TARGET_AVX512
#define QVD_KERNELS qvd_quantize_avx512
#include "quantize_kernels.h"
