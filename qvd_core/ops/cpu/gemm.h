/* The exact int8 matrix product of the CPU backend: what its files share.
 *
 * tile[row, column] = sum over depth of rows[row, k] * columns[column, k], int32, wrapping around.
 * The rows are the side that a kernel broadcasts, the columns the side that fills its vectors:
 *   linear       rows = activation codes, columns = weights         -> stores [M, N] along N
 *   convolution  rows = weights, columns = output pixels            -> stores [B, N, pixels] along the pixels
 * Both sides are packed on the fly into panels that fit the caches, so no packed copy of a weight is ever kept.
 */
#ifndef QVD_GEMM_H
#define QVD_GEMM_H

#include "parallel.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QVD_INLINE static inline __attribute__((always_inline))

enum {
    QVD_CHUNK = 64,           /* codes of one row that are packed at once: a cache line */
    QVD_MAXIMUM_ROWS = 12,    /* of a panel */
    QVD_MAXIMUM_COLUMNS = 32, /* of a panel */
    QVD_SUM_LANES = 16,       /* partial sums of a row that packing leaves */
    QVD_SMALL_ROWS = 4,       /* up to here `qvd_small_linear` reads the weight once without packing */
    QVD_MAXIMUM_DEPTH = (1 << 17) - 1
};

/* ---- where codes come from (gemm_source.c) ---- */

/* Output pixels of a convolution over channels-last codes; a 2-D one has a leading dimension of 1. */
typedef struct {
    int64_t channels;
    int64_t size[3], kernel[3], stride[3], dilation[3], output[3];
} qvd_geometry;

/* A matrix of codes [count, depth]. Along the depth a row is made of runs of consecutive bytes: one run for a plain
 * matrix; for a convolution the channels of one tap, or of all taps along the last dimension where they touch. */
typedef struct {
    const int8_t *data;
    int64_t count, depth, run;
    int64_t stride;               /* bytes from row to row of a plain matrix */
    const qvd_geometry *geometry; /* NULL for a plain matrix */
    bool nibbles;                 /* two 4-bit codes per byte, the even index in the low half */
} qvd_source;

qvd_source qvd_plain_source(const void *data, int64_t count, int64_t depth, bool nibbles);
qvd_source qvd_pixel_source(const int8_t *codes, int64_t images, const qvd_geometry *geometry);
/* starts[0, wanted) of the rows from `first` on; rows past the end repeat the last one: nobody reads their results. */
void qvd_source_starts(const qvd_source *source, int64_t first, int wanted, const int8_t **starts);
/* views[0, wanted): QVD_CHUNK codes of every row from depth k on, zero past the end; copied to `stage` [wanted,
 * QVD_CHUNK] where they are not contiguous. */
void qvd_source_chunk(const qvd_source *source, const int8_t *const *starts, int wanted, int64_t k,
                      const int8_t **views, int8_t *stage);
void qvd_unpack_nibbles(const uint8_t *packed, int64_t count, int8_t *codes);

/* ---- kernels (gemm_avx2.c, gemm_nibbles.c, gemm_vnni.c) ---- */

typedef struct {
    int rows, columns; /* of a panel, and so of a tile */
    int element;       /* bytes per packed code */
    int offset;        /* added to the column codes to make them unsigned: offset * sum(row) has to be taken away */
    int depth;         /* codes per cache block, a multiple of QVD_CHUNK */
    /* One chunk of `rows` rows; adds to sums [rows, QVD_SUM_LANES] where the kernel has an offset. */
    void (*pack_rows)(const int8_t *const *views, void *panel, int32_t *sums);
    void (*pack_columns)(const int8_t *const *views, void *panel);
    /* tile [rows, columns] = (or +=) the product of two panels of `depth` codes; only the first `rows`, rounded up by
     * the kernel, and `columns` are computed. */
    void (*multiply)(const void *row_panel, const void *column_panel, int64_t depth, int rows, int columns,
                     bool accumulate, int32_t *tile);
} qvd_kernel;

/* The kernels of gemm_nibbles.c want one side in [-8, 7]: the columns or the rows. */
extern const qvd_kernel qvd_kernel_avx2, qvd_kernel_nibble_columns, qvd_kernel_nibble_rows, qvd_kernel_vnni;

/* ---- from sums to outputs (gemm_epilogue.c) ---- */

/* out = ((total * step) * weight_scale + bias) * gate + residual, each operation rounded to float32. */
typedef struct {
    const float *step, *weight_scale, *bias, *gate; /* bias and gate may be NULL */
    const void *residual;                           /* or NULL */
    void *out;
    int64_t step_count;      /* 1, or one per row (linear) or image (convolution) */
    int64_t filters;         /* N */
    int64_t rows_per_gate;   /* linear: rows that share a gate row */
    int64_t pixels;          /* convolution: output pixels of an image; 0 for a linear layer */
    int residual_type, type; /* dtype codes */
} qvd_epilogue;

/* tile [rows, stride] of sums that begins at (row, column); offsets[rows] are subtracted first. */
void qvd_store_linear(const qvd_epilogue *epilogue, const int32_t *tile, int stride, const int32_t *offsets,
                      int64_t row, int rows, int64_t column, int columns);
void qvd_store_convolution(const qvd_epilogue *epilogue, const int32_t *tile, int stride, const int32_t *offsets,
                           int64_t row, int rows, int64_t column, int columns);

/* ---- drivers ---- */

/* gemm.c: rows x columns on up to `threads` threads. */
int qvd_product_run(const qvd_kernel *kernel, const qvd_source *rows, const qvd_source *columns,
                    const qvd_epilogue *epilogue, int threads);
/* gemm_small.c: linear with at most QVD_SMALL_ROWS rows of codes. */
int qvd_small_linear(int isa, const int8_t *codes, int64_t rows, const qvd_source *weight,
                     const qvd_epilogue *epilogue, int threads);

/* ---- layers (gemm_layers.c) ---- */

/* gemm.py declares the same structure. */
typedef struct {
    const int8_t *codes;
    const void *weight;
    const float *step, *weight_scale, *bias, *gate;
    const void *residual;
    void *out;
    int64_t rows, columns, depth, step_count, gate_count;
    int32_t weight_bits, residual_type, type, isa, threads;
} linear_arguments;

int qvd_linear(const linear_arguments *in);

#endif
