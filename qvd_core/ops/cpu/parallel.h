/* What all files of this library share: exported names, instruction sets, data types and threads. */
#ifndef QVD_PARALLEL_H
#define QVD_PARALLEL_H

#include <stdint.h>

#define QVD_EXPORT __attribute__((visibility("default")))

/* One library serves every machine: functions of a newer instruction set are only called where the CPU has it. */
#define QVD_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define QVD_TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

enum qvd_isa { QVD_ISA_NONE = 0, QVD_ISA_AVX2 = 1, QVD_ISA_AVX512VNNI = 2 };

enum qvd_dtype { QVD_FLOAT32 = 0, QVD_BFLOAT16 = 1, QVD_FLOAT16 = 2 };

/* What a compute function returns; Python falls back to PyTorch for everything but QVD_OK. */
enum qvd_status { QVD_OK = 0, QVD_NO_MEMORY = 1, QVD_UNSUPPORTED = 2 };

/* The best instruction set that CPU and operating system support, as enum qvd_isa. */
int qvd_best_isa(void);

typedef void (*qvd_body)(void *data);

/* Runs body(data) on up to `threads` threads at once and returns when all are done. Every call takes its share of the
 * work by an atomic counter inside `data`, so that any number of calls, one included, does all of it. */
void qvd_run(qvd_body body, void *data, int threads);

/* At most `threads`, and no more than find `share` of the work each: waking one takes some microseconds. */
static inline int qvd_useful_threads(int threads, int64_t work, int64_t share)
{
    int64_t useful = 1 + work / share;
    return useful < threads ? (int)useful : threads;
}

#endif
