/* Codes as planes per channel -> codes as pixels, channels last. */
#include "quantize.h"

#include <emmintrin.h>

enum { SIDE = 16 };

/* A square of 16 planes by 16 pixels, turned in registers: four perfect shuffles. */
static inline void transpose_square(const int8_t *planes, int64_t plane_stride, __m128i square[SIDE])
{
    __m128i shuffled[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++)
        square[i] = _mm_loadu_si128((const __m128i *)(planes + i * plane_stride));
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < SIDE / 2; i++) {
            shuffled[2 * i] = _mm_unpacklo_epi8(square[i], square[i + SIDE / 2]);
            shuffled[2 * i + 1] = _mm_unpackhi_epi8(square[i], square[i + SIDE / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            square[i] = shuffled[i];
    }
}

void qvd_transpose_codes(const int8_t *planes, int64_t plane_stride, int64_t channels, int64_t pixels,
                         const int64_t *offsets, int8_t *codes)
{
    const int64_t whole_channels = channels / SIDE * SIDE, rest = channels - whole_channels;
    for (int64_t first = 0; first < pixels; first += SIDE) {
        const int64_t width = pixels - first < SIDE ? pixels - first : SIDE;
        __m128i square[SIDE];
        for (int64_t channel = 0; channel < whole_channels; channel += SIDE) {
            transpose_square(planes + channel * plane_stride + first, plane_stride, square);
            for (int64_t i = 0; i < width; i++)
                _mm_storeu_si128((__m128i *)(codes + offsets[first + i] + channel), square[i]);
        }
        for (int64_t i = 0; rest && i < width; i++) {
            const int8_t *plane = planes + whole_channels * plane_stride + first + i;
            int8_t *pixel = codes + offsets[first + i] + whole_channels;
            for (int64_t channel = 0; channel < rest; channel++)
                pixel[channel] = plane[channel * plane_stride];
        }
    }
}
