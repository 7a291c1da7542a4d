/* One tile of pixels of an image: plane by plane and then turned, or pixel by pixel where channels are adjacent. */
#include "quantize_images.h"

#include <stddef.h>

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Planes are far apart, too many for the prefetchers of a CPU: ask for one that is needed soon. */
static void prefetch_plane(const struct quantize_front *front, const struct pixel_tile *tile, int64_t channel)
{
    enum { LINE = 64 };
    if (channel >= tile->channels || tile->pixel_stride != 1)
        return;
    const char *start = qvd_element(tile->x, front->dtype, channel * tile->channel_stride);
    const char *end = qvd_element(start, front->dtype, tile->pixels);
    for (const char *place = start; place < end; place += LINE)
        __builtin_prefetch(place, 0, 2); /* into the L2 cache, which can wait for more lines at once */
}

/* The pixels of one channel, transformed but not rotated: where they lie in float32. */
static const float *transformed_plane(const struct quantize_front *front, const struct pixel_tile *tile,
                                      int64_t channel, float *buffer)
{
    const float *values = qvd_element(tile->x, front->dtype, channel * tile->channel_stride);
    if (front->dtype != QVD_FLOAT32 || tile->pixel_stride != 1) {
        front->kernels->widen(front->dtype, values, tile->pixel_stride, tile->pixels, buffer);
        values = buffer;
    }
    if (front->shift || front->inverse_scale) {
        front->kernels->transform_plane(values, front->shift ? front->shift[channel] : 0.0f,
                                        front->inverse_scale ? front->inverse_scale[channel] : 1.0f, tile->pixels,
                                        buffer);
        values = buffer;
    }
    return values;
}

/* Encodes `channels` channels from `first` on into `codes`; returns their largest absolute value. */
static uint32_t encode_planes(const struct quantize_front *front, const struct pixel_tile *tile, int64_t first,
                              int64_t channels, int8_t codes[][QVD_TILE_PIXELS])
{
    enum { AHEAD = 4 }; /* planes; measured */
    _Alignas(64) float buffer[QVD_TILE_PIXELS];
    uint32_t bits = 0;
    for (int64_t i = 0; i < channels; i++) {
        prefetch_plane(front, tile, first + i + AHEAD);
        const float *values = transformed_plane(front, tile, first + i, buffer);
        bits = larger(bits, front->kernels->largest(values, tile->pixels));
        front->kernels->encode(values, tile->pixels, tile->inverse_step, front->limit, codes[i]);
    }
    return bits;
}

/* The same with a rotation, which needs the planes of a block together; codes NULL: only the largest value. */
static uint32_t encode_rotated(const struct quantize_front *front, const struct pixel_tile *tile, int64_t first,
                               int64_t channels, int8_t codes[][QVD_TILE_PIXELS])
{
    /* Planes a power of two apart would share a few sets of the L1 cache. */
    enum { STRIDE = QVD_TILE_PIXELS + 16 };
    _Alignas(64) float planes[QVD_TILE_CHANNELS][STRIDE];
    const size_t bytes = (size_t)tile->pixels * sizeof(float);
    uint32_t bits = 0;
    for (int64_t block = 0; block < channels; block += front->rotation) {
        for (int64_t i = 0; i < front->rotation; i++) {
            const float *values = transformed_plane(front, tile, first + block + i, planes[i]);
            if (values != planes[i])
                memcpy(planes[i], values, bytes);
        }
        front->kernels->rotate_planes(planes[0], STRIDE, tile->pixels, front->rotation);
        for (int64_t i = 0; i < front->rotation; i++) {
            bits = larger(bits, front->kernels->largest(planes[i], tile->pixels));
            if (codes)
                front->kernels->encode(planes[i], tile->pixels, tile->inverse_step, front->limit, codes[block + i]);
        }
    }
    return bits;
}

static uint32_t search_planes(const struct quantize_front *front, const struct pixel_tile *tile)
{
    _Alignas(64) float buffer[QVD_SEARCH_PIXELS];
    uint32_t bits = 0;
    for (int64_t channel = 0; channel < tile->channels; channel++) {
        const float *values = transformed_plane(front, tile, channel, buffer);
        bits = larger(bits, front->kernels->largest(values, tile->pixels));
    }
    return bits;
}

static uint32_t quantize_planes(const struct quantize_front *front, const struct pixel_tile *tile)
{
    enum { FEWER = 64 }; /* channels, where no rotation needs a whole block of them: their codes stay in the L1 cache */
    const int64_t together = front->rotation ? QVD_TILE_CHANNELS : FEWER;
    _Alignas(64) int8_t codes[QVD_TILE_CHANNELS][QVD_TILE_PIXELS];
    uint32_t bits = 0;
    for (int64_t first = 0; first < tile->channels; first += together) {
        const int64_t channels = smaller(together, tile->channels - first);
        if (front->rotation)
            bits = larger(bits, encode_rotated(front, tile, first, channels, tile->codes ? codes : NULL));
        else
            bits = larger(bits, encode_planes(front, tile, first, channels, codes));
        if (tile->codes)
            qvd_transpose_codes(codes[0], QVD_TILE_PIXELS, channels, tile->pixels, tile->offsets, tile->codes + first);
    }
    return bits;
}

static uint32_t quantize_pixels(const struct quantize_front *front, const struct pixel_tile *tile)
{
    _Alignas(64) float buffer[QVD_RUN];
    uint32_t bits = 0;
    for (int64_t pixel = 0; pixel < tile->pixels; pixel++) {
        const void *x = qvd_element(tile->x, front->dtype, pixel * tile->pixel_stride);
        for (int64_t first = 0; first < tile->channels; first += QVD_RUN) {
            const int64_t n = smaller(QVD_RUN, tile->channels - first);
            const float *values = qvd_transformed(front, x, first, n, buffer);
            bits = larger(bits, front->kernels->largest(values, n));
            if (tile->codes)
                front->kernels->encode(values, n, tile->inverse_step, front->limit,
                                       tile->codes + tile->offsets[pixel] + first);
        }
    }
    return bits;
}

uint32_t qvd_quantize_tile(const struct quantize_front *front, const struct pixel_tile *tile)
{
    enum { FEW_CHANNELS = 16 }; /* a loop over fewer would cost more than planes read with gaps */
    if (tile->channel_stride == 1 && tile->channels >= FEW_CHANNELS)
        return quantize_pixels(front, tile);
    return tile->codes || front->rotation ? quantize_planes(front, tile) : search_planes(front, tile);
}
