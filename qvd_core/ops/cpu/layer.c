/* A linear layer from its floating-point input in one call: for small layers the calls cost more than the work. */
#include "gemm.h"
#include "quantize.h"

#include <math.h>
#include <stdlib.h>

/* gemm.py declares the same structure. */
typedef struct {
    linear_arguments product; /* but for the codes, and for the steps where they are dynamic */
    const void *x;            /* [rows, depth], rows `row_stride` elements apart */
    const float *shift, *scale; /* [depth] or NULL */
    int64_t row_stride;
    int32_t x_type, limit, rotation;
} layer_arguments;

static int quantize_and_multiply(const layer_arguments *in, int8_t *codes, float *step, float *inverse_scale)
{
    linear_arguments product = in->product;
    const float *static_step = product.step;
    const int64_t step_stride = static_step && product.step_count > 1;
    if (inverse_scale)
        for (int64_t channel = 0; channel < product.depth; channel++)
            inverse_scale[channel] = 1.0f / in->scale[channel];
    int status = qvd_quantize_rows(product.isa, product.threads, in->x_type, in->x, product.rows, product.depth,
                                   in->row_stride, in->shift, inverse_scale, in->limit, in->rotation, static_step,
                                   step_stride, codes, step);
    if (status == QVD_FOUND_NAN) { /* a static step and a NaN: it must reach every output */
        step[0] = NAN;
        product.step_count = 1;
    } else if (status != QVD_OK) {
        return status;
    }
    product.codes = codes;
    if (!static_step || status == QVD_FOUND_NAN)
        product.step = step;
    return qvd_linear(&product);
}

/* product.step: static steps, or NULL for a dynamic one per row (step_count = rows). */
QVD_EXPORT int qvd_layer(const layer_arguments *in)
{
    const size_t rows = (size_t)in->product.rows, depth = (size_t)in->product.depth;
    int8_t *codes = malloc(rows * depth + 1);
    float *step = malloc((rows + 1) * sizeof *step);
    float *inverse_scale = in->scale ? malloc(depth * sizeof *inverse_scale) : NULL;
    int status = QVD_NO_MEMORY;
    if (codes && step && (inverse_scale || !in->scale))
        status = quantize_and_multiply(in, codes, step, inverse_scale);
    free(inverse_scale);
    free(step);
    free(codes);
    return status;
}
