/* Rows [M, K] of activations -> int8 codes and one step per row. */
#include "quantize.h"

#include <stdatomic.h>
#include <stddef.h>

/* A transformed row of up to KEPT channels is kept between the search for its largest value and its encoding (64 KiB,
 * inside the L2 cache); a longer one is transformed twice. */
enum { KEPT = 16384, VALUES_PER_UNIT = 16384, VALUES_PER_THREAD = 1 << 17 };

struct rows_job {
    struct quantize_front front;
    const void *x;
    int64_t rows, channels, row_stride, rows_per_unit;
    const float *static_step; /* NULL: dynamic */
    int64_t step_stride;      /* 0: one static step for all rows */
    int8_t *codes;
    float *step;
    _Atomic int64_t next;
    _Atomic int found_nan;
};

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static void encode_row_static(struct rows_job *job, const void *x, int64_t row, float *buffer)
{
    const struct quantize_kernels *kernels = job->front.kernels;
    const float inverse_step = 1.0f / job->static_step[row * job->step_stride];
    uint32_t bits = 0;
    for (int64_t start = 0; start < job->channels; start += QVD_RUN) {
        const int64_t n = smaller(QVD_RUN, job->channels - start);
        const float *values = qvd_transformed(&job->front, x, start, n, buffer);
        const uint32_t found = kernels->largest(values, n);
        bits = found > bits ? found : bits;
        kernels->encode(values, n, inverse_step, job->front.limit, job->codes + row * job->channels + start);
    }
    if (bits > QVD_INFINITY_BITS)
        atomic_store_explicit(&job->found_nan, 1, memory_order_relaxed);
}

static void encode_row_dynamic(struct rows_job *job, const void *x, int64_t row, float *buffer)
{
    const struct quantize_kernels *kernels = job->front.kernels;
    const int kept = !qvd_is_plain(&job->front) && job->channels <= KEPT;
    uint32_t bits = 0;
    for (int64_t start = 0; start < job->channels; start += QVD_RUN) {
        const int64_t n = smaller(QVD_RUN, job->channels - start);
        const float *values = qvd_transformed(&job->front, x, start, n, kept ? buffer + start : buffer);
        const uint32_t found = kernels->largest(values, n);
        bits = found > bits ? found : bits;
    }
    const float step = qvd_dynamic_step(bits, job->front.limit);
    job->step[row] = step;
    for (int64_t start = 0; start < job->channels; start += QVD_RUN) {
        const int64_t n = smaller(QVD_RUN, job->channels - start);
        const float *values = kept ? buffer + start : qvd_transformed(&job->front, x, start, n, buffer);
        kernels->encode(values, n, 1.0f / step, job->front.limit, job->codes + row * job->channels + start);
    }
}

static void encode_rows(void *data)
{
    struct rows_job *job = data;
    _Alignas(64) float buffer[KEPT];
    for (;;) {
        const int64_t first = atomic_fetch_add_explicit(&job->next, job->rows_per_unit, memory_order_relaxed);
        const int64_t end = smaller(job->rows, first + job->rows_per_unit);
        for (int64_t row = first; row < end; row++) {
            const void *x = qvd_element(job->x, job->front.dtype, row * job->row_stride);
            if (job->static_step)
                encode_row_static(job, x, row, buffer);
            else
                encode_row_dynamic(job, x, row, buffer);
        }
        if (first >= job->rows)
            return;
    }
}

/* x [rows, channels] with adjacent channels -> codes int8 [rows, channels]. static_step NULL: step [rows] is written.
 * inverse_scale is 1 / scale. Returns enum qvd_status or QVD_FOUND_NAN. */
QVD_EXPORT int qvd_quantize_rows(int isa, int threads, int dtype, const void *x, int64_t rows, int64_t channels,
                                 int64_t row_stride, const float *shift, const float *inverse_scale, int limit,
                                 int rotation, const float *static_step, int64_t step_stride, int8_t *codes,
                                 float *step)
{
    const struct quantize_kernels *kernels = qvd_quantize_kernels(isa);
    if (!kernels || rotation > 128)
        return QVD_UNSUPPORTED;
    struct rows_job job = {
        .front = {kernels, shift, inverse_scale, dtype, rotation > 1 ? rotation : 0, (float)limit},
        .x = x,
        .rows = rows,
        .channels = channels,
        .row_stride = row_stride,
        .rows_per_unit = channels >= VALUES_PER_UNIT ? 1 : VALUES_PER_UNIT / channels,
        .static_step = static_step,
        .step_stride = step_stride,
        .codes = codes,
        .step = step,
    };
    const int64_t units = (rows + job.rows_per_unit - 1) / job.rows_per_unit;
    threads = qvd_useful_threads(threads, rows * channels, VALUES_PER_THREAD);
    qvd_run(encode_rows, &job, (int)smaller(threads, units));
    return job.found_nan ? QVD_FOUND_NAN : QVD_OK;
}
