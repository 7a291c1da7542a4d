/* Linear layers with a few rows of codes: the weight is read once, as it is stored, at the speed of memory. */
#include "gemm.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 32, STEP = 64 /* weight bytes */, CODES_PER_THREAD = 1 << 18 };

/* The rows of codes, padded with zeros to whole steps of the weight. For 4-bit weights `low` holds the codes of even
 * and `high` those of odd index, as the halves of the weight's bytes do. */
typedef struct {
    int rows;
    int64_t stride; /* bytes of a row of `low` and of `high` */
    int8_t *low, *high;
} prepared_codes;

/* Adds the products of `steps` steps of GROUP weight rows with all rows of codes to sums [rows, BLOCK]. */
typedef void (*dot_function)(const int8_t *const *weights, int64_t steps, const prepared_codes *codes, int64_t start,
                             int32_t *sums);

/* The sums of unsigned codes may pass 2^31 before the offset is subtracted. */
static void add_wrapping(int32_t *sum, int32_t added)
{
    *sum = (int32_t)((uint32_t)*sum + (uint32_t)added);
}

/* ---- AVX-512 VNNI, four weight rows at a time ---- */

QVD_TARGET_AVX512 QVD_INLINE void dot_vnni(const int rows, const bool nibbles, const int8_t *const *weights,
                                           int64_t steps, const prepared_codes *codes, int64_t start, int32_t *sums)
{
    const __m512i flip = _mm512_set1_epi8(nibbles ? 8 : -128), half = _mm512_set1_epi8(15);
    __m512i totals[QVD_SMALL_ROWS][4];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++)
            totals[m][n] = _mm512_setzero_si512();
    for (int64_t at = 0; at < steps * STEP; at += STEP) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            __m512i bytes = _mm512_loadu_si512(weights[n] + at), high = bytes;
            if (nibbles) { /* (nibble ^ 8) is the code + 8, unsigned */
                high = _mm512_xor_si512(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), half), flip);
                bytes = _mm512_and_si512(bytes, half);
            }
            bytes = _mm512_xor_si512(bytes, flip);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                int64_t k = m * codes->stride + start + at;
                totals[m][n] = _mm512_dpbusd_epi32(totals[m][n], bytes, _mm512_loadu_si512(codes->low + k));
                if (nibbles)
                    totals[m][n] = _mm512_dpbusd_epi32(totals[m][n], high, _mm512_loadu_si512(codes->high + k));
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++)
            add_wrapping(sums + m * BLOCK + n, _mm512_reduce_add_epi32(totals[m][n]));
}

/* ---- AVX2, two weight rows at a time ---- */

QVD_TARGET_AVX2 QVD_INLINE int32_t add_lanes(__m256i values)
{
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

QVD_TARGET_AVX2 QVD_INLINE __m256i widen(const int8_t *codes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
}

/* 32 bytes of 4-bit weights by 64 codes: as int32 sums. vpmaddubsw cannot saturate here: 2 * 2 * 15 * 128 < 2^15. */
QVD_TARGET_AVX2 QVD_INLINE __m256i multiply_nibbles(__m256i bytes, const int8_t *low, const int8_t *high)
{
    const __m256i flip = _mm256_set1_epi8(8), half = _mm256_set1_epi8(15);
    __m256i even = _mm256_xor_si256(_mm256_and_si256(bytes, half), flip);
    __m256i odd = _mm256_xor_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), half), flip);
    even = _mm256_maddubs_epi16(even, _mm256_loadu_si256((const __m256i *)low));
    odd = _mm256_maddubs_epi16(odd, _mm256_loadu_si256((const __m256i *)high));
    return _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(1));
}

QVD_TARGET_AVX2 QVD_INLINE void dot_avx2(const int rows, const bool nibbles, const int8_t *const *weights,
                                         int64_t steps, const prepared_codes *codes, int64_t start, int32_t *sums)
{
    __m256i totals[QVD_SMALL_ROWS][2];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
        totals[m][0] = totals[m][1] = _mm256_setzero_si256();
    const int step = nibbles ? 32 : 16;
    for (int64_t at = 0; at < steps * STEP; at += step) {
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            __m256i weight = nibbles ? _mm256_loadu_si256((const __m256i *)(weights[n] + at)) : widen(weights[n] + at);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                int64_t k = m * codes->stride + start + at;
                __m256i product = nibbles ? multiply_nibbles(weight, codes->low + k, codes->high + k)
                                          : _mm256_madd_epi16(weight, widen(codes->low + k));
                totals[m][n] = _mm256_add_epi32(totals[m][n], product);
            }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++)
            add_wrapping(sums + m * BLOCK + n, add_lanes(totals[m][n]));
}

#define VARIANT(isa, target, rows) \
    target static void dot_##isa##_##rows(const int8_t *const *weights, int64_t steps, const prepared_codes *codes, \
                                          int64_t start, int32_t *sums) \
    { \
        dot_##isa(rows, false, weights, steps, codes, start, sums); \
    } \
    target static void dot_##isa##_nibbles_##rows(const int8_t *const *weights, int64_t steps, \
                                                  const prepared_codes *codes, int64_t start, int32_t *sums) \
    { \
        dot_##isa(rows, true, weights, steps, codes, start, sums); \
    }
VARIANT(vnni, QVD_TARGET_AVX512, 1)
VARIANT(vnni, QVD_TARGET_AVX512, 2)
VARIANT(vnni, QVD_TARGET_AVX512, 3)
VARIANT(vnni, QVD_TARGET_AVX512, 4)
VARIANT(avx2, QVD_TARGET_AVX2, 1)
VARIANT(avx2, QVD_TARGET_AVX2, 2)
VARIANT(avx2, QVD_TARGET_AVX2, 3)
VARIANT(avx2, QVD_TARGET_AVX2, 4)

static dot_function choose_dot(bool vnni, bool nibbles, int rows)
{
    static const dot_function functions[2][2][QVD_SMALL_ROWS] = {
        {{dot_avx2_1, dot_avx2_2, dot_avx2_3, dot_avx2_4},
         {dot_avx2_nibbles_1, dot_avx2_nibbles_2, dot_avx2_nibbles_3, dot_avx2_nibbles_4}},
        {{dot_vnni_1, dot_vnni_2, dot_vnni_3, dot_vnni_4},
         {dot_vnni_nibbles_1, dot_vnni_nibbles_2, dot_vnni_nibbles_3, dot_vnni_nibbles_4}},
    };
    return functions[vnni][nibbles][rows - 1];
}

/* ---- the layer ---- */

typedef struct {
    const qvd_source *weight;
    const qvd_epilogue *epilogue;
    prepared_codes codes;
    dot_function dot;
    int group;                       /* weight rows per call of `dot` */
    int32_t offsets[QVD_SMALL_ROWS]; /* what making the weight's codes unsigned has added to every sum */
    int64_t next;                    /* atomic: the first weight row that nobody has taken */
} small_product;

static bool prepare_codes(prepared_codes *prepared, const int8_t *codes, int64_t depth, bool nibbles)
{
    int64_t bytes = nibbles ? (depth + 1) / 2 : depth, rows = prepared->rows;
    prepared->stride = (bytes + STEP - 1) / STEP * STEP;
    prepared->low = calloc((size_t)(2 * rows * prepared->stride + 1), 1);
    if (!prepared->low)
        return false;
    prepared->high = prepared->low + rows * prepared->stride;
    for (int64_t m = 0; m < rows; m++) {
        const int8_t *row = codes + m * depth;
        int8_t *low = prepared->low + m * prepared->stride, *high = prepared->high + m * prepared->stride;
        if (!nibbles) {
            memcpy(low, row, (size_t)depth);
            continue;
        }
        for (int64_t k = 0; k < depth; k++)
            (k % 2 ? high : low)[k / 2] = row[k];
    }
    return true;
}

/* Sums of the weight rows [first, first + BLOCK) into sums [rows, BLOCK]. */
static void sum_block(const small_product *work, int64_t first, int32_t *sums)
{
    const qvd_source *weight = work->weight;
    int64_t steps = weight->stride / STEP, rest = weight->stride % STEP;
    const int8_t *starts[BLOCK], *views[4];
    int8_t stage[4 * STEP] = {0}; /* the last bytes of rows: a whole step would reach past the weight's end */
    qvd_source_starts(weight, first, BLOCK, starts);
    memset(sums, 0, QVD_SMALL_ROWS * BLOCK * sizeof(int32_t));
    int64_t wanted = weight->count - first < BLOCK ? weight->count - first : BLOCK;
    for (int64_t n = 0; n < wanted; n += work->group) {
        work->dot(starts + n, steps, &work->codes, 0, sums + n);
        if (!rest)
            continue;
        for (int i = 0; i < work->group; i++) {
            views[i] = stage + i * STEP;
            memcpy(stage + i * STEP, starts[n + i] + steps * STEP, (size_t)rest);
        }
        work->dot(views, 1, &work->codes, steps * STEP, sums + n);
    }
}

static void work_on_blocks(void *data)
{
    small_product *work = data;
    int32_t sums[QVD_SMALL_ROWS * BLOCK] __attribute__((aligned(64)));
    for (;;) {
        int64_t first = __atomic_fetch_add(&work->next, BLOCK, __ATOMIC_RELAXED);
        if (first >= work->weight->count)
            return;
        int64_t columns = work->weight->count - first;
        sum_block(work, first, sums);
        qvd_store_linear(work->epilogue, sums, BLOCK, work->offsets, 0, work->codes.rows, first,
                         columns < BLOCK ? (int)columns : BLOCK);
    }
}

int qvd_small_linear(int isa, const int8_t *codes, int64_t rows, const qvd_source *weight,
                     const qvd_epilogue *epilogue, int threads)
{
    bool vnni = isa == QVD_ISA_AVX512VNNI;
    small_product work = {
        .weight = weight,
        .epilogue = epilogue,
        .codes = {.rows = (int)rows},
        .dot = choose_dot(vnni, weight->nibbles, (int)rows),
        .group = vnni ? 4 : 2,
    };
    int32_t offset = weight->nibbles ? 8 : vnni ? 128 : 0;
    if (!prepare_codes(&work.codes, codes, weight->depth, weight->nibbles))
        return QVD_NO_MEMORY;
    for (int64_t m = 0; m < rows; m++) {
        uint32_t sum = 0; /* unsigned: it may wrap around, as the product did */
        for (int64_t k = 0; k < weight->depth; k++)
            sum += (uint32_t)codes[m * weight->depth + k];
        work.offsets[m] = (int32_t)(sum * (uint32_t)offset);
    }
    int64_t blocks = (weight->count + BLOCK - 1) / BLOCK;
    threads = qvd_useful_threads(threads, weight->count * weight->depth, CODES_PER_THREAD);
    qvd_run(work_on_blocks, &work, (int)(blocks < threads ? blocks : threads));
    free(work.codes.low);
    return QVD_OK;
}
