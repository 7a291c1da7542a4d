/* Images [B, C, *space] of activations -> padded codes, channels last. */
#ifndef QVD_QUANTIZE_IMAGES_H
#define QVD_QUANTIZE_IMAGES_H

#include "quantize.h"

#include <stdatomic.h>

enum { QVD_SPACE = 3 };

/* What Python passes. Strides are in elements; spatial dimensions from the outermost to the innermost. */
struct quantize_images {
    const void *x;
    const float *shift, *inverse_scale; /* [C] or NULL; inverse_scale is 1 / scale */
    const float *border;                /* [C], a transformed pixel of zeros; NULL without padding */
    const float *static_step;           /* NULL: dynamic */
    int8_t *codes;                      /* [B, *padded, C] */
    float *step;                        /* dynamic: [B], written */
    int64_t images, channels, image_stride, channel_stride;
    int64_t size[QVD_SPACE], stride[QVD_SPACE], low[QVD_SPACE], high[QVD_SPACE];
    int64_t step_stride; /* 0: one static step for all images */
    int32_t dtype, limit, rotation;
};

/* The most pixels and channels encoded at a time. A search for the largest value alone goes plane by plane through as
 * many pixels as the L1 cache holds in float32. */
enum { QVD_TILE_PIXELS = 256, QVD_TILE_CHANNELS = 128, QVD_SEARCH_PIXELS = QVD_RUN };

/* A stretch of pixels of one image, evenly spaced in x: up to QVD_TILE_PIXELS, or QVD_SEARCH_PIXELS without codes and
 * without a rotation. */
struct pixel_tile {
    const void *x;
    int64_t channel_stride, pixel_stride, channels, pixels;
    const int64_t *offsets; /* of the pixels in codes */
    int8_t *codes;          /* NULL: only look for the largest value */
    float inverse_step;
};

/* planes int8, `plane_stride` apart and readable up to a multiple of 16 pixels -> channels-last codes at `offsets`. */
void qvd_transpose_codes(const int8_t *planes, int64_t plane_stride, int64_t channels, int64_t pixels,
                         const int64_t *offsets, int8_t *codes);

/* Transform a tile and encode it unless codes is NULL; returns its largest absolute value, as bits. */
uint32_t qvd_quantize_tile(const struct quantize_front *front, const struct pixel_tile *tile);

#endif
