/* Threads, borrowed from the OpenMP runtime that PyTorch has loaded, and what the library says about itself. */
#include "parallel.h"

#include <stddef.h>

#ifndef QVD_ABI
#error "compile with build.py, which passes the fingerprint of the sources as QVD_ABI"
#endif

/* The entry point that GCC's `#pragma omp parallel` compiles to; libgomp, libiomp5 and LLVM's libomp all have it.
 * A second runtime, or threads of our own, would fight with PyTorch's for the cores. */
typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

static parallel_region region = NULL;

/* Gives the address of GOMP_parallel; without it everything runs on the calling thread. */
QVD_EXPORT void qvd_set_parallel(void *gomp_parallel)
{
    region = (parallel_region)gomp_parallel;
}

void qvd_run(qvd_body body, void *data, int threads)
{
    if (threads <= 1 || region == NULL)
        body(data);
    else
        region(body, data, (unsigned)threads, 0);
}

/* Fingerprint of the sources this library was compiled from. */
QVD_EXPORT unsigned qvd_abi(void)
{
    return QVD_ABI;
}

/* The best instruction set that CPU and operating system support, as enum qvd_isa. */
QVD_EXPORT int qvd_best_isa(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return QVD_ISA_NONE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return QVD_ISA_AVX512VNNI;
    return QVD_ISA_AVX2;
}
