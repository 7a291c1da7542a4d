/* AVX-512 VNNI: vpdpbusd adds four products of unsigned and signed codes to an int32 without saturation. */
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

enum { ROWS = 12, COLUMNS = 32, GROUP = 4, GROUPS = QVD_CHUNK / GROUP };

/* Panel [chunk][12][64], as the codes are: the kernel broadcasts groups of four. */
QVD_TARGET_AVX512 static void pack_rows(const int8_t *const *views, void *panel, int32_t *sums)
{
    const __m512i ones = _mm512_set1_epi8(1);
    for (int row = 0; row < ROWS; row++) {
        __m512i codes = _mm512_loadu_si512(views[row]);
        __m512i sum = _mm512_loadu_si512(sums + row * QVD_SUM_LANES);
        _mm512_storeu_si512((int8_t *)panel + row * QVD_CHUNK, codes);
        _mm512_storeu_si512(sums + row * QVD_SUM_LANES, _mm512_dpbusd_epi32(sum, ones, codes));
    }
}

/* Sixteen rows of 64 codes -> [16 groups][16 rows][4], a transposition of 32-bit units; stored 128 bytes apart. */
QVD_TARGET_AVX512 QVD_INLINE void transpose_groups(const int8_t *const *views, uint8_t *panel)
{
    const __m512i sign = _mm512_set1_epi8(-128); /* code ^ 0x80 is code + 128, unsigned */
    __m512i in[16], pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        in[i] = _mm512_xor_si512(_mm512_loadu_si512(views[i]), sign);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    /* in[4 q + j]: of each 128-bit lane, its group j of the rows 4 q .. 4 q + 3. */
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        in[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        in[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        in[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        in[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(in[j], in[4 + j], 0x88), high = _mm512_shuffle_i32x4(in[j], in[4 + j], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(in[8 + j], in[12 + j], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(in[8 + j], in[12 + j], 0xdd);
        uint8_t *out = panel + j * COLUMNS * GROUP;
        _mm512_storeu_si512(out, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + 4 * COLUMNS * GROUP, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + 8 * COLUMNS * GROUP, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(out + 12 * COLUMNS * GROUP, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

/* Panel [chunk][16 groups][32 columns][4]. */
QVD_TARGET_AVX512 static void pack_columns(const int8_t *const *views, void *panel)
{
    transpose_groups(views, panel);
    transpose_groups(views + 16, (uint8_t *)panel + 16 * GROUP);
}

QVD_TARGET_AVX512 QVD_INLINE void multiply_tile(const int rows, const int vectors, const int8_t *row_panel,
                                       const uint8_t *column_panel, int64_t groups, bool accumulate, int32_t *tile)
{
    __m512i sums[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sums[r][v] = accumulate ? _mm512_loadu_si512(tile + r * COLUMNS + v * 16) : _mm512_setzero_si512();
    while (groups > 0) {
        int64_t end = groups < GROUPS ? groups : GROUPS;
        for (int64_t g = 0; g < end; g++) {
            __m512i columns[2];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                columns[v] = _mm512_loadu_si512(column_panel + g * COLUMNS * GROUP + v * 64);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                int32_t group;
                memcpy(&group, row_panel + r * QVD_CHUNK + g * GROUP, sizeof group);
                __m512i codes = _mm512_set1_epi32(group);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++)
                    sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], columns[v], codes);
            }
        }
        row_panel += ROWS * QVD_CHUNK;
        column_panel += COLUMNS * QVD_CHUNK;
        groups -= GROUPS;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_si512(tile + r * COLUMNS + v * 16, sums[r][v]);
}

/* The compiler needs the sizes as constants to keep the sums in registers. */
#define VARIANT(rows, vectors) \
    QVD_TARGET_AVX512 static void multiply_##rows##_##vectors(const int8_t *row_panel, const uint8_t *column_panel, \
                                                     int64_t groups, bool accumulate, int32_t *tile) { \
        multiply_tile(rows, vectors, row_panel, column_panel, groups, accumulate, tile); \
    }
VARIANT(4, 1)
VARIANT(8, 1)
VARIANT(12, 1)
VARIANT(4, 2)
VARIANT(8, 2)
VARIANT(12, 2)

static void multiply(const void *row_panel, const void *column_panel, int64_t depth, int rows, int columns,
                     bool accumulate, int32_t *tile)
{
    typedef void (*variant)(const int8_t *, const uint8_t *, int64_t, bool, int32_t *);
    static const variant variants[3][2] = {
        {multiply_4_1, multiply_4_2}, {multiply_8_1, multiply_8_2}, {multiply_12_1, multiply_12_2}};
    variants[(rows - 1) / 4][columns > 16](row_panel, column_panel, (depth + GROUP - 1) / GROUP, accumulate, tile);
}

const qvd_kernel qvd_kernel_vnni = {
    .rows = ROWS,
    .columns = COLUMNS,
    .element = 1,
    .offset = 128,
    .depth = 512,
    .pack_rows = pack_rows,
    .pack_columns = pack_columns,
    .multiply = multiply,
};
