/* The quantization loops for AVX2. */
#include "parallel.h"

#define QVD_TARGET QVD_TARGET_AVX2
#define QVD_KERNELS qvd_quantize_avx2
#include "quantize_kernels.h"
