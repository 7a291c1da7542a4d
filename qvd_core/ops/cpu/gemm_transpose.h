/* Packing on AVX2: rows of eight 32-bit units become columns. */
#ifndef QVD_GEMM_TRANSPOSE_H
#define QVD_GEMM_TRANSPOSE_H

#include "gemm.h"

#include <immintrin.h>

/* in [8 rows][8 units] -> out [8 units][8 rows], `stride` bytes from unit to unit; `in` is used up. */
QVD_TARGET_AVX2 QVD_INLINE void qvd_transpose_units(__m256i *in, void *out, int stride)
{
    char *panel = out;
    __m256i pairs[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        in[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        in[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        in[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        in[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m256i low = _mm256_permute2x128_si256(in[j], in[4 + j], 0x20);
        __m256i high = _mm256_permute2x128_si256(in[j], in[4 + j], 0x31);
        _mm256_storeu_si256((__m256i *)(panel + j * stride), low);
        _mm256_storeu_si256((__m256i *)(panel + (4 + j) * stride), high);
    }
}

#endif
