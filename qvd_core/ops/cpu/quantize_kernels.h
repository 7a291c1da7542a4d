/* The loops of struct quantize_kernels; included once per instruction set, with QVD_TARGET and QVD_KERNELS defined.
 * Plain C wherever the compiler vectorizes it well. */
#include "quantize.h"

#include <immintrin.h>

static inline QVD_TARGET float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline QVD_TARGET uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static QVD_TARGET void widen_float16(const uint16_t *x, int64_t n, float *restrict out)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < n; i++)
        out[i] = _cvtsh_ss(x[i]);
}

static QVD_TARGET void widen(int dtype, const void *x, int64_t stride, int64_t n, float *restrict out)
{
    const float *single = x;
    const uint16_t *half = x;
    if (dtype == QVD_FLOAT16 && stride == 1)
        widen_float16(half, n, out);
    else if (dtype == QVD_FLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = _cvtsh_ss(half[i * stride]);
    else if (dtype == QVD_BFLOAT16 && stride == 1)
        for (int64_t i = 0; i < n; i++)
            out[i] = float_of_bits((uint32_t)half[i] << 16);
    else if (dtype == QVD_BFLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = float_of_bits((uint32_t)half[i * stride] << 16);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = single[i * stride];
}

/* `in` and `out` may be the same. */
static QVD_TARGET void transform(const float *in, const float *shift, const float *inverse_scale, int64_t n, float *out)
{
    if (shift && inverse_scale)
        for (int64_t i = 0; i < n; i++)
            out[i] = (in[i] - shift[i]) * inverse_scale[i];
    else if (shift)
        for (int64_t i = 0; i < n; i++)
            out[i] = in[i] - shift[i];
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = in[i] * inverse_scale[i];
}

/* x - 0 and x * 1 are x, bit for bit: an absent shift is 0, an absent scale 1. */
static QVD_TARGET void transform_plane(const float *in, float shift, float inverse_scale, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (in[i] - shift) * inverse_scale;
}

/* One stage inside a vector: each lane gets its partner plus itself, or, as the second of a pair, partner minus itself.
 * `minus` has the sign bit set in the lanes of the second; a + (-b) is a - b, bit for bit. */
#define QVD_STAGE(value, partner, minus) _mm256_add_ps(partner, _mm256_xor_ps(value, minus))

static inline QVD_TARGET __m256 rotate_lanes(__m256 value, int block)
{
    const __m256 first = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 second = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 third = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    value = QVD_STAGE(value, _mm256_permute_ps(value, 0xb1), first);
    if (block >= 4)
        value = QVD_STAGE(value, _mm256_permute_ps(value, 0x4e), second);
    if (block >= 8)
        value = QVD_STAGE(value, _mm256_permute2f128_ps(value, value, 1), third);
    return value;
}

/* `block` is a constant at every call, so that the vectors of a block stay in registers as far as there are enough. */
static inline __attribute__((always_inline)) QVD_TARGET void rotate_blocks(float *values, int64_t n, const int block)
{
    const int vectors = block <= 8 ? 1 : block / 8;
    const __m256 norm = _mm256_sqrt_ps(_mm256_set1_ps((float)block));
    for (int64_t start = 0; start < n; start += 8 * vectors) {
        __m256 held[16];
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++)
            held[i] = rotate_lanes(_mm256_loadu_ps(values + start + 8 * i), block);
#pragma GCC unroll 4
        for (int distance = 1; distance < vectors; distance *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < vectors; i++)
                if (!(i & distance)) {
                    const __m256 first = held[i], second = held[i + distance];
                    held[i] = _mm256_add_ps(first, second);
                    held[i + distance] = _mm256_sub_ps(first, second);
                }
#pragma GCC unroll 16
        for (int i = 0; i < vectors; i++)
            _mm256_storeu_ps(values + start + 8 * i, _mm256_div_ps(held[i], norm));
    }
}

static QVD_TARGET void rotate(float *values, int64_t n, int block)
{
    for (int64_t i = n; i % 8; i++)
        values[i] = 0.0f; /* blocks of 2 and 4 may end inside a vector */
    switch (block) {
    case 2: rotate_blocks(values, n, 2); break;
    case 4: rotate_blocks(values, n, 4); break;
    case 8: rotate_blocks(values, n, 8); break;
    case 16: rotate_blocks(values, n, 16); break;
    case 32: rotate_blocks(values, n, 32); break;
    case 64: rotate_blocks(values, n, 64); break;
    default: rotate_blocks(values, n, 128); break;
    }
}

/* Values per plane worked on at a time: all planes of a strip stay in the L1 cache. */
enum { STRIP = 16 };

/* One stage across the planes of a strip. */
static inline QVD_TARGET void rotate_strip(float *strip, int64_t stride, int distance, int block)
{
    for (int start = 0; start < block; start += 2 * distance)
        for (int plane = start; plane < start + distance; plane++)
            for (int i = 0; i < STRIP; i += 8) {
                float *first = strip + plane * stride + i, *second = first + distance * stride;
                const __m256 a = _mm256_loadu_ps(first), b = _mm256_loadu_ps(second);
                _mm256_storeu_ps(first, _mm256_add_ps(a, b));
                _mm256_storeu_ps(second, _mm256_sub_ps(a, b));
            }
}

static QVD_TARGET void rotate_planes(float *planes, int64_t stride, int64_t n, int block)
{
    const __m256 norm = _mm256_sqrt_ps(_mm256_set1_ps((float)block));
    for (int64_t start = 0; start < n; start += STRIP) {
        for (int distance = 1; distance < block; distance *= 2)
            rotate_strip(planes + start, stride, distance, block);
        for (int plane = 0; plane < block; plane++)
            for (int i = 0; i < STRIP; i += 8) {
                float *values = planes + plane * stride + start + i;
                _mm256_storeu_ps(values, _mm256_div_ps(_mm256_loadu_ps(values), norm));
            }
    }
}

static QVD_TARGET uint32_t largest(const float *values, int64_t n)
{
    int32_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t bits = (int32_t)(bits_of_float(values[i]) & 0x7fffffffu);
        found = bits > found ? bits : found;
    }
    return (uint32_t)found;
}

/* Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even, and its low byte is the code. */
static QVD_TARGET void encode(const float *restrict values, int64_t n, float inverse_step, float limit,
                              int8_t *restrict codes)
{
    for (int64_t i = 0; i < n; i++) {
        float value = values[i] * inverse_step;
        value = value > -limit ? value : -limit; /* NaN becomes a code */
        value = value < limit ? value : limit;
        codes[i] = (int8_t)bits_of_float(value + 12582912.0f);
    }
}

const struct quantize_kernels QVD_KERNELS = {widen, transform, transform_plane, rotate, rotate_planes, largest, encode};
