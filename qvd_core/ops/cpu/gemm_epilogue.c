/* From integer sums to outputs: dequantization, bias, gate, residual and the output dtype, eight values at a time. */
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

enum { LANES = 8 };

static int type_bytes(int type)
{
    return type == QVD_FLOAT32 ? 4 : 2;
}

QVD_TARGET_AVX2 QVD_INLINE __m256 load_values(const char *values, int type)
{
    if (type == QVD_FLOAT32)
        return _mm256_loadu_ps((const float *)values);
    __m128i halves = _mm_loadu_si128((const __m128i *)values);
    if (type == QVD_FLOAT16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Round to nearest even; NaN keeps its sign and becomes quiet (rounding up could make it infinite or -0). */
QVD_TARGET_AVX2 QVD_INLINE __m128i to_bfloat16(__m256 values)
{
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    return _mm256_castsi256_si128(packed);
}

QVD_TARGET_AVX2 QVD_INLINE void store_values(char *out, int type, __m256 values)
{
    if (type == QVD_FLOAT32)
        _mm256_storeu_ps((float *)out, values);
    else if (type == QVD_FLOAT16)
        _mm_storeu_si128((__m128i *)out, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    else
        _mm_storeu_si128((__m128i *)out, to_bfloat16(values));
}

/* One row of a linear layer's tile, each pointer at its first column. */
typedef struct {
    const int32_t *sums;
    const float *weight_scale, *bias, *gate;
    const char *residual;
    char *out;
} linear_row;

QVD_TARGET_AVX2 QVD_INLINE void store_lanes(const linear_row *at, int32_t offset, float step, int residual_type,
                                            int type)
{
    __m256i total = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)at->sums), _mm256_set1_epi32(offset));
    __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(step));
    values = _mm256_mul_ps(values, _mm256_loadu_ps(at->weight_scale));
    if (at->bias)
        values = _mm256_add_ps(values, _mm256_loadu_ps(at->bias));
    if (at->gate)
        values = _mm256_mul_ps(values, _mm256_loadu_ps(at->gate));
    if (at->residual)
        values = _mm256_add_ps(load_values(at->residual, residual_type), values);
    store_values(at->out, type, values);
}

/* The last columns, through buffers: the vectors must not reach past the ends of the caller's arrays. */
QVD_TARGET_AVX2 static void store_last(const linear_row *at, int columns, int32_t offset, float step,
                                       int residual_type, int type)
{
    float weight_scale[LANES] = {0}, bias[LANES] = {0}, gate[LANES] = {0};
    char residual[LANES * 4] = {0}, out[LANES * 4];
    int32_t sums[LANES] = {0};
    size_t bytes = (size_t)columns * sizeof(float);
    memcpy(sums, at->sums, bytes);
    memcpy(weight_scale, at->weight_scale, bytes);
    if (at->bias)
        memcpy(bias, at->bias, bytes);
    if (at->gate)
        memcpy(gate, at->gate, bytes);
    if (at->residual)
        memcpy(residual, at->residual, (size_t)(columns * type_bytes(residual_type)));
    linear_row copy = {
        .sums = sums,
        .weight_scale = weight_scale,
        .bias = at->bias ? bias : NULL,
        .gate = at->gate ? gate : NULL,
        .residual = at->residual ? residual : NULL,
        .out = out,
    };
    store_lanes(&copy, offset, step, residual_type, type);
    memcpy(at->out, out, (size_t)(columns * type_bytes(type)));
}

QVD_TARGET_AVX2 QVD_INLINE void store_row(linear_row at, int columns, int32_t offset, float step, int residual_type,
                                          int type)
{
    for (; columns >= LANES; columns -= LANES) {
        store_lanes(&at, offset, step, residual_type, type);
        at.sums += LANES;
        at.weight_scale += LANES;
        at.bias = at.bias ? at.bias + LANES : NULL;
        at.gate = at.gate ? at.gate + LANES : NULL;
        at.residual = at.residual ? at.residual + LANES * type_bytes(residual_type) : NULL;
        at.out += LANES * type_bytes(type);
    }
    if (columns)
        store_last(&at, columns, offset, step, residual_type, type);
}

QVD_TARGET_AVX2 void qvd_store_linear(const qvd_epilogue *epilogue, const int32_t *tile, int stride,
                                      const int32_t *offsets, int64_t row, int rows, int64_t column, int columns)
{
    for (int r = 0; r < rows; r++) {
        int64_t m = row + r, first = m * epilogue->filters + column;
        const float *gate = epilogue->gate;
        linear_row at = {
            .sums = tile + r * stride,
            .weight_scale = epilogue->weight_scale + column,
            .bias = epilogue->bias ? epilogue->bias + column : NULL,
            .gate = gate ? gate + m / epilogue->rows_per_gate * epilogue->filters + column : NULL,
            .out = (char *)epilogue->out + first * type_bytes(epilogue->type),
        };
        if (epilogue->residual)
            at.residual = (const char *)epilogue->residual + first * type_bytes(epilogue->residual_type);
        float step = epilogue->step[epilogue->step_count == 1 ? 0 : m];
        /* Constant types let the compiler drop the other conversions from the loop. */
        if (epilogue->type == QVD_FLOAT32 && epilogue->residual_type == QVD_FLOAT32)
            store_row(at, columns, offsets[r], step, QVD_FLOAT32, QVD_FLOAT32);
        else if (epilogue->type == QVD_BFLOAT16 && epilogue->residual_type == QVD_BFLOAT16)
            store_row(at, columns, offsets[r], step, QVD_BFLOAT16, QVD_BFLOAT16);
        else
            store_row(at, columns, offsets[r], step, epilogue->residual_type, epilogue->type);
    }
}

/* What the pixels of one filter share. */
typedef struct {
    float step, weight_scale, bias;
    bool has_bias; /* adding a bias of 0 would turn -0 into 0 */
    int32_t offset;
} filter_values;

QVD_TARGET_AVX2 QVD_INLINE __m256 filter_lanes(const int32_t *sums, const filter_values *filter)
{
    __m256i total = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)sums), _mm256_set1_epi32(filter->offset));
    __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(filter->step));
    values = _mm256_mul_ps(values, _mm256_set1_ps(filter->weight_scale));
    return filter->has_bias ? _mm256_add_ps(values, _mm256_set1_ps(filter->bias)) : values;
}

/* The filter comes by value: stores to `out` could otherwise change it, as far as the compiler knows. */
QVD_TARGET_AVX2 QVD_INLINE void store_pixels(const int32_t *sums, int count, const filter_values filter, char *out,
                                             int type)
{
    int bytes = type_bytes(type);
    for (; count >= LANES; count -= LANES, sums += LANES, out += LANES * bytes)
        store_values(out, type, filter_lanes(sums, &filter));
    if (count) {
        int32_t last[LANES] = {0};
        char buffer[LANES * 4];
        memcpy(last, sums, (size_t)count * sizeof(int32_t));
        store_values(buffer, type, filter_lanes(last, &filter));
        memcpy(out, buffer, (size_t)(count * bytes));
    }
}

/* Rows are filters, columns pixels of all images; a tile may reach over the border of two images. */
QVD_TARGET_AVX2 void qvd_store_convolution(const qvd_epilogue *epilogue, const int32_t *tile, int stride,
                                           const int32_t *offsets, int64_t row, int rows, int64_t column, int columns)
{
    int64_t pixels = epilogue->pixels;
    for (int done = 0; done < columns;) {
        int64_t image = (column + done) / pixels, pixel = (column + done) % pixels;
        int count = columns - done < pixels - pixel ? columns - done : (int)(pixels - pixel);
        for (int r = 0; r < rows; r++) {
            int64_t filter = row + r;
            filter_values values = {
                .step = epilogue->step[epilogue->step_count == 1 ? 0 : image],
                .weight_scale = epilogue->weight_scale[filter],
                .bias = epilogue->bias ? epilogue->bias[filter] : 0,
                .has_bias = epilogue->bias != NULL,
                .offset = offsets[r],
            };
            int64_t first = (image * epilogue->filters + filter) * pixels + pixel;
            char *out = (char *)epilogue->out + first * type_bytes(epilogue->type);
            if (epilogue->type == QVD_FLOAT32)
                store_pixels(tile + r * stride + done, count, values, out, QVD_FLOAT32);
            else
                store_pixels(tile + r * stride + done, count, values, out, epilogue->type);
        }
        done += count;
    }
}
