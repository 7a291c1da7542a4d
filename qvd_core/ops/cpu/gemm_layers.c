/* The exported functions: a linear layer and a convolution, each as a product of two matrices of codes. */
#include "gemm.h"

#include <stdlib.h>

/* gemm.py declares the same structure. */
typedef struct {
    const int8_t *codes;
    const void *weight;
    const float *step, *weight_scale, *bias;
    void *out;
    int64_t images, filters, step_count;
    qvd_geometry geometry;
    int32_t weight_bits, type, isa, threads;
} convolution_arguments;

static const qvd_kernel *choose_kernel(int isa, int weight_bits, const qvd_kernel *nibbles)
{
    if (isa == QVD_ISA_AVX512VNNI)
        return &qvd_kernel_vnni;
    return weight_bits == 4 ? nibbles : &qvd_kernel_avx2;
}

static bool is_supported(int isa, int weight_bits, int64_t depth)
{
    bool known = (isa == QVD_ISA_AVX2 || isa == QVD_ISA_AVX512VNNI) && isa <= qvd_best_isa();
    return known && (weight_bits == 8 || weight_bits == 4) && depth <= QVD_MAXIMUM_DEPTH;
}

QVD_EXPORT int qvd_linear(const linear_arguments *in)
{
    if (!is_supported(in->isa, in->weight_bits, in->depth))
        return QVD_UNSUPPORTED;
    if (in->rows == 0 || in->columns == 0)
        return QVD_OK;
    qvd_epilogue epilogue = {
        .step = in->step,
        .weight_scale = in->weight_scale,
        .bias = in->bias,
        .gate = in->gate,
        .residual = in->residual,
        .out = in->out,
        .step_count = in->step_count,
        .filters = in->columns,
        .rows_per_gate = in->gate ? in->rows / in->gate_count : 1,
        .residual_type = in->residual_type,
        .type = in->type,
    };
    qvd_source codes = qvd_plain_source(in->codes, in->rows, in->depth, false);
    qvd_source weight = qvd_plain_source(in->weight, in->columns, in->depth, in->weight_bits == 4);
    if (in->rows <= QVD_SMALL_ROWS)
        return qvd_small_linear(in->isa, in->codes, in->rows, &weight, &epilogue, in->threads);
    const qvd_kernel *kernel = choose_kernel(in->isa, in->weight_bits, &qvd_kernel_nibble_columns);
    return qvd_product_run(kernel, &codes, &weight, &epilogue, in->threads);
}

/* ---- convolution ---- */

typedef struct {
    const void *weight; /* [filters, channels, taps], or as many 4-bit codes */
    int8_t *out;        /* [filters, taps, channels] */
    int64_t filters, channels, taps;
    bool nibbles;
    int64_t next; /* atomic: the first filter that nobody has taken */
} reordering;

static int8_t nibble_at(const uint8_t *packed, int64_t index)
{
    int nibble = index % 2 ? packed[index / 2] >> 4 : packed[index / 2] & 15;
    return (int8_t)((nibble ^ 8) - 8);
}

static void reorder_filters(void *data)
{
    reordering *work = data;
    int64_t depth = work->channels * work->taps;
    for (;;) {
        int64_t filter = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (filter >= work->filters)
            return;
        int8_t *out = work->out + filter * depth;
        const int8_t *codes = (const int8_t *)work->weight + filter * depth;
        const uint8_t *packed = (const uint8_t *)work->weight + filter * ((depth + 1) / 2);
        for (int64_t tap = 0; tap < work->taps; tap++)
            for (int64_t c = 0; c < work->channels; c++) {
                int64_t index = c * work->taps + tap;
                *out++ = work->nibbles ? nibble_at(packed, index) : codes[index];
            }
    }
}

QVD_EXPORT int qvd_convolution(const convolution_arguments *in)
{
    const qvd_geometry *geometry = &in->geometry;
    qvd_source pixels = qvd_pixel_source(in->codes, in->images, geometry);
    if (!is_supported(in->isa, in->weight_bits, pixels.depth))
        return QVD_UNSUPPORTED;
    if (pixels.count == 0 || in->filters == 0)
        return QVD_OK;
    qvd_epilogue epilogue = {
        .step = in->step,
        .weight_scale = in->weight_scale,
        .bias = in->bias,
        .out = in->out,
        .step_count = in->step_count,
        .filters = in->filters,
        .pixels = geometry->output[0] * geometry->output[1] * geometry->output[2],
        .type = in->type,
    };
    reordering work = {
        .weight = in->weight,
        .filters = in->filters,
        .channels = geometry->channels,
        .taps = geometry->kernel[0] * geometry->kernel[1] * geometry->kernel[2],
        .nibbles = in->weight_bits == 4,
    };
    qvd_source weight = qvd_plain_source(in->weight, in->filters, pixels.depth, work.nibbles);
    if (work.taps > 1 && pixels.depth) { /* the depth has to run over the taps first, as it does in the pixels */
        work.out = malloc((size_t)(in->filters * pixels.depth));
        if (!work.out)
            return QVD_NO_MEMORY;
        qvd_run(reorder_filters, &work, in->threads);
        weight = qvd_plain_source(work.out, in->filters, pixels.depth, false);
    }
    const qvd_kernel *kernel = choose_kernel(in->isa, in->weight_bits, &qvd_kernel_nibble_rows);
    int status = qvd_product_run(kernel, &weight, &pixels, &epilogue, in->threads);
    free(work.out);
    return status;
}
