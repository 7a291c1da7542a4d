/* AVX2 for 4-bit weights: vpmaddubsw takes the codes as they are and stays exact.
 *
 * One side is a weight in [-8, 7]. As columns it becomes unsigned, [0, 15], against signed codes; as rows it meets
 * unsigned pixels, [0, 255]. A pair sum is at most 2 * 255 * 8 = 4080, and eight of them fit int16. */
#include "gemm_transpose.h"

#include <immintrin.h>
#include <string.h>

enum { ROWS = 6, COLUMNS = 16, GROUP = 4, GROUPS = QVD_CHUNK / GROUP, SAFE_GROUPS = 8 };

/* Panel [chunk][6][64], as the codes are: the kernel broadcasts groups of four. */
QVD_TARGET_AVX2 static void pack_rows(const int8_t *const *views, void *panel, int32_t *sums)
{
    const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
    for (int row = 0; row < ROWS; row++) {
        __m256i sum = _mm256_loadu_si256((const __m256i *)(sums + row * QVD_SUM_LANES));
        for (int k = 0; k < QVD_CHUNK; k += 32) {
            __m256i codes = _mm256_loadu_si256((const __m256i *)(views[row] + k));
            _mm256_storeu_si256((__m256i *)((int8_t *)panel + row * QVD_CHUNK + k), codes);
            __m256i pairs = _mm256_maddubs_epi16(ones, codes);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, wide_ones));
        }
        _mm256_storeu_si256((__m256i *)(sums + row * QVD_SUM_LANES), sum);
    }
}

/* Eight rows of 32 codes -> [8 groups][8 rows][4], that is a transposition of 32-bit units. */
QVD_TARGET_AVX2 QVD_INLINE void transpose_groups(const int8_t *const *views, int k, __m256i offset, uint8_t *panel)
{
    __m256i in[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        in[i] = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)(views[i] + k)), offset);
    qvd_transpose_units(in, panel, COLUMNS * GROUP);
}

/* Panel [chunk][16 groups][16 columns][4], the codes made unsigned by `offset`. */
QVD_TARGET_AVX2 QVD_INLINE void pack_unsigned(const int8_t *const *views, int offset, uint8_t *panel)
{
    for (int k = 0; k < QVD_CHUNK; k += 32)
        for (int half = 0; half < COLUMNS; half += 8)
            transpose_groups(views + half, k, _mm256_set1_epi8((char)offset), panel + k * COLUMNS + half * GROUP);
}

QVD_TARGET_AVX2 static void pack_weights(const int8_t *const *views, void *panel)
{
    pack_unsigned(views, 8, panel);
}

QVD_TARGET_AVX2 static void pack_pixels(const int8_t *const *views, void *panel)
{
    pack_unsigned(views, 128, panel);
}

/* tile += the product of at most SAFE_GROUPS groups, summed in int16. */
QVD_TARGET_AVX2 QVD_INLINE void add_groups(const int rows, const int vectors, const int8_t *row_panel,
                                           const uint8_t *column_panel, int groups, int32_t *tile)
{
    __m256i sums[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int g = 0; g < groups; g++) {
        __m256i columns[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            columns[v] = _mm256_loadu_si256((const __m256i *)(column_panel + (g * COLUMNS + v * 8) * GROUP));
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t group;
            memcpy(&group, row_panel + r * QVD_CHUNK + g * GROUP, sizeof group);
            __m256i codes = _mm256_set1_epi32(group);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sums[r][v] = _mm256_add_epi16(sums[r][v], _mm256_maddubs_epi16(columns[v], codes));
                __asm__("" : "+x"(sums[r][v])); /* else GCC multiplies ahead until the sums no longer fit */
            }
        }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            __m256i *total = (__m256i *)(tile + r * COLUMNS + v * 8);
            __m256i added = _mm256_madd_epi16(sums[r][v], ones);
            _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), added));
        }
}

/* The compiler needs the sizes as constants to keep the sums in registers; and were these functions inlined into the
 * loop that calls them, it would keep the totals there instead. */
#define VARIANT(rows, vectors) \
    QVD_TARGET_AVX2 __attribute__((noinline)) static void add_groups_##rows##_##vectors( \
        const int8_t *row_panel, const uint8_t *column_panel, int groups, int32_t *tile) \
    { \
        add_groups(rows, vectors, row_panel, column_panel, groups, tile); \
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
    typedef void (*variant)(const int8_t *, const uint8_t *, int, int32_t *);
    static const variant variants[3][2] = {{add_groups_2_1, add_groups_2_2},
                                           {add_groups_4_1, add_groups_4_2},
                                           {add_groups_6_1, add_groups_6_2}};
    variant add = variants[(rows - 1) / 2][columns > 8];
    if (!accumulate)
        memset(tile, 0, ROWS * COLUMNS * sizeof(int32_t));
    int64_t groups = (depth + GROUP - 1) / GROUP;
    for (int64_t start = 0; start < groups; start += SAFE_GROUPS) {
        const int8_t *row_chunk = (const int8_t *)row_panel + start / GROUPS * ROWS * QVD_CHUNK;
        const uint8_t *column_groups = (const uint8_t *)column_panel + start * COLUMNS * GROUP;
        int count = groups - start < SAFE_GROUPS ? (int)(groups - start) : SAFE_GROUPS;
        add(row_chunk + start % GROUPS * GROUP, column_groups, count, tile);
    }
}

const qvd_kernel qvd_kernel_nibble_columns = {
    .rows = ROWS,
    .columns = COLUMNS,
    .element = 1,
    .offset = 8,
    .depth = 512,
    .pack_rows = pack_rows,
    .pack_columns = pack_weights,
    .multiply = multiply,
};

const qvd_kernel qvd_kernel_nibble_rows = {
    .rows = ROWS,
    .columns = COLUMNS,
    .element = 1,
    .offset = 128,
    .depth = 512,
    .pack_rows = pack_rows,
    .pack_columns = pack_pixels,
    .multiply = multiply,
};
