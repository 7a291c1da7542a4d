/* AVX2: codes widened to int16, then vpmaddwd, whose pair sums are exact in int32.
 * (vpmaddubsw would take the codes as they are, but it saturates its int16 pair sums: wrong, silently.) */
#include "gemm_transpose.h"

#include <immintrin.h>
#include <string.h>

enum { ROWS = 6, COLUMNS = 16, PAIRS = QVD_CHUNK / 2 };

QVD_TARGET_AVX2 QVD_INLINE __m256i widen(const int8_t *codes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
}

/* Panel [chunk][6][64] int16: the kernel broadcasts pairs. */
QVD_TARGET_AVX2 static void pack_rows(const int8_t *const *views, void *panel, int32_t *sums)
{
    (void)sums;
    __m256i *out = panel;
    for (int row = 0; row < ROWS; row++)
        for (int k = 0; k < QVD_CHUNK; k += 16)
            _mm256_storeu_si256(out++, widen(views[row] + k));
}

/* Eight rows of 16 codes -> [8 pairs][8 rows][2] int16, that is a transposition of 32-bit units. */
QVD_TARGET_AVX2 QVD_INLINE void transpose_pairs(const int8_t *const *views, int k, int16_t *panel)
{
    __m256i in[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        in[i] = widen(views[i] + k);
    qvd_transpose_units(in, panel, COLUMNS * 2 * (int)sizeof *panel);
}

/* Panel [chunk][32 pairs][16 columns][2] int16. */
QVD_TARGET_AVX2 static void pack_columns(const int8_t *const *views, void *panel)
{
    for (int k = 0; k < QVD_CHUNK; k += 16)
        for (int half = 0; half < COLUMNS; half += 8)
            transpose_pairs(views + half, k, (int16_t *)panel + k * COLUMNS + half * 2);
}

QVD_TARGET_AVX2 QVD_INLINE void multiply_tile(const int rows, const int vectors, const int16_t *row_panel,
                                       const int16_t *column_panel, int64_t pairs, bool accumulate, int32_t *tile)
{
    __m256i sums[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sums[r][v] = accumulate ? _mm256_loadu_si256((const __m256i *)(tile + r * COLUMNS + v * 8))
                                    : _mm256_setzero_si256();
    while (pairs > 0) {
        int64_t end = pairs < PAIRS ? pairs : PAIRS;
        for (int64_t p = 0; p < end; p++) {
            __m256i columns[2];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                columns[v] = _mm256_loadu_si256((const __m256i *)(column_panel + (p * COLUMNS + v * 8) * 2));
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, row_panel + r * QVD_CHUNK + p * 2, sizeof pair);
                __m256i codes = _mm256_set1_epi32(pair);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++)
                    sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(columns[v], codes));
            }
        }
        row_panel += ROWS * QVD_CHUNK;
        column_panel += COLUMNS * QVD_CHUNK;
        pairs -= PAIRS;
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            _mm256_storeu_si256((__m256i *)(tile + r * COLUMNS + v * 8), sums[r][v]);
}

/* The compiler needs the sizes as constants to keep the sums in registers. */
#define VARIANT(rows, vectors) \
    QVD_TARGET_AVX2 static void multiply_##rows##_##vectors(const int16_t *row_panel, const int16_t *column_panel, \
                                                     int64_t pairs, bool accumulate, int32_t *tile) { \
        multiply_tile(rows, vectors, row_panel, column_panel, pairs, accumulate, tile); \
    }
VARIANT(2, 1)
VARIANT(4, 1)
VARIANT(6, 1)
VARIANT(2, 2)
VARIANT(4, 2)
VARIANT(6, 2)

static void multiply(const void *row_panel, const void *column_panel, int64_t depth, int rows, int columns,
                     bool accumulate, int32_t *tile)
{
    typedef void (*variant)(const int16_t *, const int16_t *, int64_t, bool, int32_t *);
    static const variant variants[3][2] = {
        {multiply_2_1, multiply_2_2}, {multiply_4_1, multiply_4_2}, {multiply_6_1, multiply_6_2}};
    variants[(rows - 1) / 2][columns > 8](row_panel, column_panel, (depth + 1) / 2, accumulate, tile);
}

const qvd_kernel qvd_kernel_avx2 = {
    .rows = ROWS,
    .columns = COLUMNS,
    .element = 2,
    .offset = 0,
    .depth = 256,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .multiply = multiply,
};
