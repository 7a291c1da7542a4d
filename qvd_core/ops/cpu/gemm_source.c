/* Where the codes of a matrix product come from: plain rows, 4-bit rows, pixels of a convolution. */
#include "gemm.h"

#include <immintrin.h>
#include <string.h>

qvd_source qvd_plain_source(const void *data, int64_t count, int64_t depth, bool nibbles)
{
    return (qvd_source){
        .data = data,
        .count = count,
        .depth = depth,
        .run = depth,
        .stride = nibbles ? (depth + 1) / 2 : depth,
        .nibbles = nibbles,
    };
}

/* Taps along the last dimension lie side by side in channels-last codes unless they are dilated. */
static bool taps_touch(const qvd_geometry *geometry)
{
    return geometry->dilation[2] == 1 || geometry->kernel[2] == 1;
}

qvd_source qvd_pixel_source(const int8_t *codes, int64_t images, const qvd_geometry *geometry)
{
    const int64_t *kernel = geometry->kernel, *output = geometry->output;
    return (qvd_source){
        .data = codes,
        .count = images * output[0] * output[1] * output[2],
        .depth = kernel[0] * kernel[1] * kernel[2] * geometry->channels,
        .run = taps_touch(geometry) ? kernel[2] * geometry->channels : geometry->channels,
        .geometry = geometry,
    };
}

static void pixel_starts(const qvd_source *source, int64_t first, int wanted, const int8_t **starts)
{
    const qvd_geometry *g = source->geometry;
    int64_t x = first % g->output[2], y = first / g->output[2] % g->output[1];
    int64_t z = first / (g->output[2] * g->output[1]) % g->output[0];
    int64_t image = first / (g->output[2] * g->output[1] * g->output[0]);
    int64_t last = source->count - 1 - first;
    for (int i = 0; i < wanted; i++) {
        if (i > last) {
            starts[i] = starts[last];
            continue;
        }
        int64_t plane = image * g->size[0] + z * g->stride[0];
        int64_t line = plane * g->size[1] + y * g->stride[1];
        starts[i] = source->data + (line * g->size[2] + x * g->stride[2]) * g->channels;
        if (++x < g->output[2])
            continue;
        x = 0;
        if (++y < g->output[1])
            continue;
        y = 0;
        if (++z < g->output[0])
            continue;
        z = 0;
        image++;
    }
}

void qvd_source_starts(const qvd_source *source, int64_t first, int wanted, const int8_t **starts)
{
    if (source->geometry) {
        pixel_starts(source, first, wanted, starts);
        return;
    }
    for (int i = 0; i < wanted; i++) {
        int64_t row = first + i < source->count ? first + i : source->count - 1;
        starts[i] = source->data + row * source->stride;
    }
}

/* Bytes from a row's start to its code at depth k. */
static int64_t depth_offset(const qvd_source *source, int64_t k)
{
    const qvd_geometry *g = source->geometry;
    if (!g)
        return k;
    int64_t run = k / source->run, within = k % source->run, x = 0;
    if (!taps_touch(g)) {
        x = run % g->kernel[2] * g->dilation[2];
        run /= g->kernel[2];
    }
    int64_t y = run % g->kernel[1] * g->dilation[1], z = run / g->kernel[1] * g->dilation[0];
    return ((z * g->size[1] + y) * g->size[2] + x) * g->channels + within;
}

QVD_TARGET_AVX2 QVD_INLINE void unpack_chunk(const uint8_t *packed, int8_t *codes)
{
    const __m256i low_half = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(8);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
    __m256i even = _mm256_and_si256(bytes, low_half), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    even = _mm256_sub_epi8(_mm256_xor_si256(even, sign), sign); /* sign extension of a nibble */
    odd = _mm256_sub_epi8(_mm256_xor_si256(odd, sign), sign);
    __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
    _mm256_storeu_si256((__m256i *)codes, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)(codes + 32), _mm256_permute2x128_si256(low, high, 0x31));
}

QVD_TARGET_AVX2 void qvd_unpack_nibbles(const uint8_t *packed, int64_t count, int8_t *codes)
{
    int64_t k = 0;
    for (; k + QVD_CHUNK <= count; k += QVD_CHUNK)
        unpack_chunk(packed + k / 2, codes + k);
    for (; k < count; k++) {
        int nibble = k % 2 ? packed[k / 2] >> 4 : packed[k / 2] & 15;
        codes[k] = (int8_t)((nibble ^ 8) - 8);
    }
}

static void stage_nibbles(const int8_t *const *starts, int wanted, int64_t k, int64_t valid, const int8_t **views,
                          int8_t *stage)
{
    for (int i = 0; i < wanted; i++) {
        int8_t *row = stage + i * QVD_CHUNK;
        if (valid < QVD_CHUNK)
            memset(row, 0, QVD_CHUNK);
        qvd_unpack_nibbles((const uint8_t *)starts[i] + k / 2, valid, row);
        views[i] = row;
    }
}

static void stage_runs(const qvd_source *source, const int8_t *const *starts, int wanted, int64_t k, int64_t valid,
                       const int8_t **views, int8_t *stage)
{
    memset(stage, 0, (size_t)wanted * QVD_CHUNK);
    for (int i = 0; i < wanted; i++)
        views[i] = stage + i * QVD_CHUNK;
    for (int64_t done = 0; done < valid;) {
        int64_t length = source->run - (k + done) % source->run, offset = depth_offset(source, k + done);
        length = length < valid - done ? length : valid - done;
        for (int i = 0; i < wanted; i++)
            memcpy(stage + i * QVD_CHUNK + done, starts[i] + offset, (size_t)length);
        done += length;
    }
}

void qvd_source_chunk(const qvd_source *source, const int8_t *const *starts, int wanted, int64_t k,
                      const int8_t **views, int8_t *stage)
{
    int64_t valid = source->depth - k < QVD_CHUNK ? source->depth - k : QVD_CHUNK;
    if (source->nibbles) {
        stage_nibbles(starts, wanted, k, valid, views, stage);
    } else if (valid < QVD_CHUNK || k % source->run + valid > source->run) {
        stage_runs(source, starts, wanted, k, valid, views, stage);
    } else {
        int64_t offset = depth_offset(source, k);
        for (int i = 0; i < wanted; i++)
            views[i] = starts[i] + offset;
    }
}
