/* Quantization of activations: the loops that exist once per instruction set, and what rows and images share. */
#ifndef QVD_QUANTIZE_H
#define QVD_QUANTIZE_H

#include "parallel.h"

#include <stdint.h>
#include <string.h>

/* Floats worked on at a time, well inside the L1 cache; a multiple of every rotation. */
enum { QVD_RUN = 2048 };

/* Returned beside enum qvd_status: static steps were given and x holds NaN. */
enum { QVD_FOUND_NAN = -1 };

/* Absolute values are compared by their bits: the order is the same, and NaN is above infinity instead of lost. */
#define QVD_INFINITY_BITS 0x7f800000u

/* Everything is float32, rounded after every operation, in the order of semantics.py. */
struct quantize_kernels {
    /* n values, `stride` elements apart, as float. */
    void (*widen)(int dtype, const void *x, int64_t stride, int64_t n, float *out);
    /* (in - shift) * inverse_scale, element by element; either may be NULL. */
    void (*transform)(const float *in, const float *shift, const float *inverse_scale, int64_t n, float *out);
    /* The same with one shift and one scale. */
    void (*transform_plane)(const float *in, float shift, float inverse_scale, int64_t n, float *out);
    /* Rotates each `block` of n neighbours in place; reads and writes up to the next multiple of 8. */
    void (*rotate)(float *values, int64_t n, int block);
    /* Rotates `block` planes of n values, `stride` apart, across the planes; up to the next multiple of 16 of n. */
    void (*rotate_planes)(float *planes, int64_t stride, int64_t n, int block);
    /* The largest absolute value, as bits. */
    uint32_t (*largest)(const float *values, int64_t n);
    /* clamp(rint(value * inverse_step), -limit, limit) */
    void (*encode)(const float *values, int64_t n, float inverse_step, float limit, int8_t *codes);
};

extern const struct quantize_kernels qvd_quantize_avx2, qvd_quantize_avx512;

/* What is done to a run of channels before it is encoded. */
struct quantize_front {
    const struct quantize_kernels *kernels;
    const float *shift, *inverse_scale; /* [channels] or NULL */
    int dtype;
    int rotation; /* 0: none */
    float limit;
};

/* The kernels of an instruction set, NULL for one without. */
static inline const struct quantize_kernels *qvd_quantize_kernels(int isa)
{
    if (isa == QVD_ISA_AVX512VNNI)
        return &qvd_quantize_avx512;
    return isa == QVD_ISA_AVX2 ? &qvd_quantize_avx2 : NULL;
}

static inline const void *qvd_element(const void *x, int dtype, int64_t index)
{
    return (const char *)x + index * (dtype == QVD_FLOAT32 ? 4 : 2);
}

static inline int qvd_is_plain(const struct quantize_front *front)
{
    return front->dtype == QVD_FLOAT32 && !front->shift && !front->inverse_scale && !front->rotation;
}

/* Channels first .. first+n of a row x: where they lie in float32, transformed; `buffer` holds n, rounded up to 8. */
static inline const float *qvd_transformed(const struct quantize_front *front, const void *x, int64_t first, int64_t n,
                                           float *buffer)
{
    const float *values = qvd_element(x, front->dtype, first);
    if (front->dtype != QVD_FLOAT32) {
        front->kernels->widen(front->dtype, values, 1, n, buffer);
        values = buffer;
    }
    if (front->shift || front->inverse_scale) {
        front->kernels->transform(values, front->shift ? front->shift + first : NULL,
                                  front->inverse_scale ? front->inverse_scale + first : NULL, n, buffer);
        values = buffer;
    }
    if (front->rotation) {
        if (values != buffer)
            memcpy(buffer, values, (size_t)n * sizeof *buffer);
        front->kernels->rotate(buffer, n, front->rotation);
        values = buffer;
    }
    return values;
}

/* The dynamic step of a largest absolute value given by its bits; NaN stays NaN. */
static inline float qvd_dynamic_step(uint32_t bits, float limit)
{
    float largest, step;
    memcpy(&largest, &bits, sizeof largest);
    step = largest / limit;
    return step < 1e-20f ? 1e-20f : step; /* semantics.MINIMUM_STEP */
}

/* quantize_rows.c: rows [rows, channels] of x to codes [rows, channels]; step [rows] is written where it is dynamic. */
int qvd_quantize_rows(int isa, int threads, int dtype, const void *x, int64_t rows, int64_t channels,
                      int64_t row_stride, const float *shift, const float *inverse_scale, int limit, int rotation,
                      const float *static_step, int64_t step_stride, int8_t *codes, float *step);

#endif
