/* The blocked product: tiles of the output by an atomic counter, panels packed into memory of the thread. */
#include "gemm.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum {
    TILE_ROWS = 264, /* a multiple of every kernel's rows, just above the common multiples of 256 */
    TILE_COLUMNS = 256,
    TILES_PER_THREAD = 3, /* enough that the last ones even out */
    SMALLEST_SIDE = 48,   /* below, packing costs more than the threads bring */
    PRODUCTS_PER_THREAD = 1 << 22, /* tens of microseconds */
};

typedef struct {
    const qvd_kernel *kernel;
    const qvd_source *rows, *columns;
    const qvd_epilogue *epilogue;
    int64_t tile_rows, tile_columns, row_tiles, column_tiles, depth_block, depth_blocks;
    int64_t next; /* atomic: the first tile that nobody has taken */
    int failed;   /* atomic */
} product;

typedef struct {
    char *rows, *columns; /* panels of one block of the depth */
    int32_t *sums;        /* [tile rows, QVD_SUM_LANES] */
    int32_t *offsets;     /* [tile rows] */
    int32_t *tiles;       /* sums of all small tiles, where the depth has several blocks */
    int64_t packed;       /* the column tile that `columns` holds, -1 for none */
} workspace;

static int64_t round_up(int64_t value, int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

static int64_t divide_up(int64_t value, int64_t divisor)
{
    return (value + divisor - 1) / divisor;
}

/* ---- memory: one block per thread, kept until the thread ends (bounded by the largest tile, below 1 MiB) ---- */

typedef struct {
    size_t bytes;
    void *memory;
} kept_block;

static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static bool kept_ready = false;

static void free_kept(void *pointer)
{
    kept_block *kept = pointer;
    free(kept->memory);
    free(kept);
}

static void create_key(void)
{
    kept_ready = pthread_key_create(&kept_key, free_kept) == 0;
}

static void *thread_memory(size_t bytes)
{
    pthread_once(&kept_once, create_key);
    kept_block *kept = kept_ready ? pthread_getspecific(kept_key) : NULL;
    if (!kept_ready)
        return NULL;
    if (!kept) {
        kept = calloc(1, sizeof *kept);
        if (!kept)
            return NULL;
        if (pthread_setspecific(kept_key, kept)) {
            free(kept);
            return NULL;
        }
    }
    if (kept->bytes < bytes) {
        free(kept->memory);
        kept->memory = aligned_alloc(64, (size_t)round_up((int64_t)bytes, 64));
        kept->bytes = kept->memory ? bytes : 0;
    }
    return kept->memory;
}

static bool open_workspace(const product *work, workspace *space)
{
    int64_t element = work->kernel->element;
    int64_t row_bytes = work->tile_rows * work->depth_block * element;
    int64_t column_bytes = work->tile_columns * work->depth_block * element;
    int64_t lanes_bytes = work->tile_rows * QVD_SUM_LANES * 4, offset_bytes = round_up(work->tile_rows * 4, 64);
    int64_t tiles_bytes = work->depth_blocks > 1 ? work->tile_rows * work->tile_columns * 4 : 0;
    char *memory = thread_memory((size_t)(row_bytes + column_bytes + lanes_bytes + offset_bytes + tiles_bytes));
    if (!memory)
        return false;
    space->rows = memory;
    space->columns = space->rows + row_bytes;
    space->sums = (int32_t *)(space->columns + column_bytes);
    space->offsets = (int32_t *)((char *)space->sums + lanes_bytes);
    space->tiles = (int32_t *)((char *)space->offsets + offset_bytes);
    space->packed = -1;
    return true;
}

/* ---- one tile ---- */

/* Packs depth [start, start + length) of rows [first, first + count), panel after panel. */
static void pack_rows(const product *work, int64_t first, int64_t count, int64_t start, int64_t length,
                      workspace *space)
{
    const qvd_kernel *kernel = work->kernel;
    const int8_t *starts[QVD_MAXIMUM_ROWS], *views[QVD_MAXIMUM_ROWS];
    int8_t stage[QVD_MAXIMUM_ROWS * QVD_CHUNK];
    char *panel = space->rows;
    for (int64_t row = 0; row < count; row += kernel->rows) {
        qvd_source_starts(work->rows, first + row, kernel->rows, starts);
        for (int64_t k = 0; k < length; k += QVD_CHUNK, panel += kernel->rows * QVD_CHUNK * kernel->element) {
            qvd_source_chunk(work->rows, starts, kernel->rows, start + k, views, stage);
            kernel->pack_rows(views, panel, space->sums + row * QVD_SUM_LANES);
        }
    }
}

static void pack_columns(const product *work, int64_t first, int64_t count, int64_t start, int64_t length,
                         workspace *space)
{
    const qvd_kernel *kernel = work->kernel;
    const int8_t *starts[QVD_MAXIMUM_COLUMNS], *views[QVD_MAXIMUM_COLUMNS];
    int8_t stage[QVD_MAXIMUM_COLUMNS * QVD_CHUNK];
    char *panel = space->columns;
    for (int64_t column = 0; column < count; column += kernel->columns) {
        qvd_source_starts(work->columns, first + column, kernel->columns, starts);
        for (int64_t k = 0; k < length; k += QVD_CHUNK, panel += kernel->columns * QVD_CHUNK * kernel->element) {
            qvd_source_chunk(work->columns, starts, kernel->columns, start + k, views, stage);
            kernel->pack_columns(views, panel);
        }
    }
}

static void sum_offsets(const product *work, int64_t rows, workspace *space)
{
    for (int64_t row = 0; row < rows; row++) {
        uint32_t sum = 0; /* unsigned: it may wrap around, as the product did */
        for (int lane = 0; lane < QVD_SUM_LANES; lane++)
            sum += (uint32_t)space->sums[row * QVD_SUM_LANES + lane];
        space->offsets[row] = (int32_t)(sum * (uint32_t)work->kernel->offset);
    }
}

static void store(const product *work, const int32_t *tile, const int32_t *offsets, int64_t row, int rows,
                  int64_t column, int columns)
{
    if (work->epilogue->pixels)
        qvd_store_convolution(work->epilogue, tile, work->kernel->columns, offsets, row, rows, column, columns);
    else
        qvd_store_linear(work->epilogue, tile, work->kernel->columns, offsets, row, rows, column, columns);
}

/* Multiplies the packed panels; a panel of rows stays in the first cache while the panels of columns pass by, so that
 * the outputs of a row are written one after the other. */
static void multiply_block(const product *work, workspace *space, int64_t row, int64_t rows, int64_t column,
                           int64_t columns, int64_t length, bool first, bool last)
{
    const qvd_kernel *kernel = work->kernel;
    int64_t padded = round_up(length, QVD_CHUNK) * kernel->element;
    int32_t local[QVD_MAXIMUM_ROWS * QVD_MAXIMUM_COLUMNS] __attribute__((aligned(64)));
    int32_t *tile = work->depth_blocks > 1 ? space->tiles : local;
    for (int64_t i = 0; i < rows; i += kernel->rows) {
        int high = (int)(rows - i < kernel->rows ? rows - i : kernel->rows);
        for (int64_t j = 0; j < columns; j += kernel->columns) {
            int wide = (int)(columns - j < kernel->columns ? columns - j : kernel->columns);
            kernel->multiply(space->rows + i * padded, space->columns + j * padded, length, high, wide, !first, tile);
            if (last)
                store(work, tile, space->offsets + i, row + i, high, column + j, wide);
            if (work->depth_blocks > 1)
                tile += kernel->rows * kernel->columns;
        }
    }
}

static void compute_tile(const product *work, int64_t index, workspace *space)
{
    int64_t column_tile = index / work->row_tiles;
    int64_t row = index % work->row_tiles * work->tile_rows, column = column_tile * work->tile_columns;
    int64_t rows = work->rows->count - row < work->tile_rows ? work->rows->count - row : work->tile_rows;
    int64_t columns = work->columns->count - column;
    columns = columns < work->tile_columns ? columns : work->tile_columns;
    memset(space->sums, 0, (size_t)(work->tile_rows * QVD_SUM_LANES) * sizeof(int32_t));
    for (int64_t block = 0; block < work->depth_blocks; block++) {
        int64_t start = block * work->depth_block, length = work->rows->depth - start;
        length = length < work->depth_block ? length : work->depth_block;
        bool last = block + 1 == work->depth_blocks;
        pack_rows(work, row, rows, start, length, space);
        if (work->depth_blocks > 1 || space->packed != column_tile)
            pack_columns(work, column, columns, start, length, space);
        space->packed = column_tile;
        if (last)
            sum_offsets(work, rows, space);
        multiply_block(work, space, row, rows, column, columns, length, block == 0, last);
    }
}

static void work_on_tiles(void *data)
{
    product *work = data;
    workspace space;
    if (!open_workspace(work, &space)) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    int64_t tiles = work->row_tiles * work->column_tiles;
    for (;;) {
        int64_t index = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (index >= tiles)
            return;
        compute_tile(work, index, &space);
    }
}

/* ---- the whole product ---- */

/* Equal tiles, as large as the caches hold, and smaller where some threads would have none. */
static void choose_tiles(product *work, int threads)
{
    int64_t rows = work->rows->count, columns = work->columns->count;
    int64_t row_tiles = divide_up(rows, TILE_ROWS), column_tiles = divide_up(columns, TILE_COLUMNS);
    int64_t wanted = threads > 1 ? (int64_t)threads * TILES_PER_THREAD : 1;
    while (row_tiles * column_tiles < wanted) {
        int64_t high = rows / (row_tiles + 1), wide = columns / (column_tiles + 1);
        if (wide >= high && wide >= SMALLEST_SIDE)
            column_tiles++;
        else if (high >= SMALLEST_SIDE)
            row_tiles++;
        else
            break;
    }
    work->tile_rows = round_up(divide_up(rows, row_tiles), work->kernel->rows);
    work->tile_columns = round_up(divide_up(columns, column_tiles), work->kernel->columns);
    work->row_tiles = divide_up(rows, work->tile_rows);
    work->column_tiles = divide_up(columns, work->tile_columns);
}

int qvd_product_run(const qvd_kernel *kernel, const qvd_source *rows, const qvd_source *columns,
                    const qvd_epilogue *epilogue, int threads)
{
    product work = {.kernel = kernel, .rows = rows, .columns = columns, .epilogue = epilogue};
    if (rows->count == 0 || columns->count == 0)
        return QVD_OK;
    threads = qvd_useful_threads(threads, rows->count * columns->count * rows->depth, PRODUCTS_PER_THREAD);
    choose_tiles(&work, threads);
    work.depth_blocks = rows->depth ? divide_up(rows->depth, kernel->depth) : 1;
    work.depth_block = round_up(divide_up(rows->depth, work.depth_blocks), QVD_CHUNK);
    int64_t tiles = work.row_tiles * work.column_tiles;
    qvd_run(work_on_tiles, &work, (int)(tiles < threads ? tiles : threads));
    return work.failed ? QVD_NO_MEMORY : QVD_OK;
}
