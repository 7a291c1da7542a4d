/* Threads and phases of quantize_images: the largest value of an image, its step, then its codes and borders. */
#include "quantize_images.h"

#include <stddef.h>

/* How an image is cut into units of work: tiles of its runs, then blocks of border lines. */
struct phase {
    int searching;              /* 1: for the largest values, 0: encoding */
    int64_t tile_pixels, tiles; /* of a run */
    int64_t units;              /* of an image */
};

struct images_job {
    const struct quantize_images *call;
    struct quantize_front front;
    int64_t padded[QVD_SPACE];
    int64_t runs, run_pixels; /* of an image: stretches of evenly spaced pixels, whole planes where possible */
    struct phase search, encode;
    const struct phase *phase; /* the one at hand, where all threads are in the same */
    uint32_t border_bits;
    _Atomic int64_t next;
    _Atomic int found_nan;
};

enum { LINES_PER_UNIT = 32, VALUES_PER_THREAD = 1 << 16 };

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static float inverse_step(const struct quantize_images *call, int64_t image)
{
    return 1.0f / (call->static_step ? call->static_step[image * call->step_stride] : call->step[image]);
}

/* While searching, step[image] holds the bits of the largest value so far. */
static void note_largest(struct images_job *job, const struct phase *phase, int64_t image, uint32_t bits)
{
    if (!phase->searching) {
        if (job->call->static_step && bits > QVD_INFINITY_BITS)
            atomic_store_explicit(&job->found_nan, 1, memory_order_relaxed);
        return;
    }
    uint32_t *place = (uint32_t *)(void *)(job->call->step + image);
    uint32_t held = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (bits > held && !__atomic_compare_exchange_n(place, &held, bits, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

/* Where pixels start .. start+n of a run lie in codes. */
static void find_offsets(const struct images_job *job, int64_t image, int64_t run, int64_t start, int64_t n,
                         int64_t *offsets)
{
    const struct quantize_images *call = job->call;
    const int64_t width = call->size[2], lines = job->run_pixels / width;
    const int64_t line = run * lines + start / width;
    int64_t plane = line / call->size[1], y = line % call->size[1], x = start % width;
    for (int64_t i = 0; i < n; i++) {
        const int64_t z = image * job->padded[0] + call->low[0] + plane;
        offsets[i] = ((z * job->padded[1] + call->low[1] + y) * job->padded[2] + call->low[2] + x) * call->channels;
        if (++x == width) {
            x = 0;
            y++;
        }
    }
}

static void do_tile(struct images_job *job, const struct phase *phase, int64_t image, int64_t unit)
{
    const struct quantize_images *call = job->call;
    const int64_t run = unit / phase->tiles, start = unit % phase->tiles * phase->tile_pixels;
    const int64_t line = run * (job->run_pixels / call->size[2]);
    const int64_t first = image * call->image_stride + line / call->size[1] * call->stride[0] +
                          line % call->size[1] * call->stride[1] + start * call->stride[2];
    int64_t offsets[QVD_TILE_PIXELS];
    struct pixel_tile tile = {
        .x = qvd_element(call->x, call->dtype, first),
        .channel_stride = call->channel_stride,
        .pixel_stride = call->stride[2],
        .channels = call->channels,
        .pixels = smaller(phase->tile_pixels, job->run_pixels - start),
        .offsets = offsets,
    };
    if (!phase->searching) {
        find_offsets(job, image, run, start, tile.pixels, offsets);
        tile.codes = call->codes;
        tile.inverse_step = inverse_step(call, image);
    }
    note_largest(job, phase, image, qvd_quantize_tile(&job->front, &tile));
}

/* Encodes the border pixel once and copies it, twice as much every time. */
static void fill_border(const struct images_job *job, int64_t image, int8_t *codes, int64_t pixels)
{
    const int64_t channels = job->call->channels, bytes = pixels * channels;
    if (pixels == 0)
        return;
    job->front.kernels->encode(job->call->border, channels, inverse_step(job->call, image), job->front.limit, codes);
    for (int64_t done = channels; done < bytes; done *= 2)
        memcpy(codes + done, codes, (size_t)smaller(done, bytes - done));
}

static void do_border(const struct images_job *job, int64_t image, int64_t unit)
{
    const struct quantize_images *call = job->call;
    const int64_t width = job->padded[2] * call->channels;
    const int64_t end = smaller((unit + 1) * LINES_PER_UNIT, job->padded[0] * job->padded[1]);
    for (int64_t line = unit * LINES_PER_UNIT; line < end; line++) {
        const int64_t z = line / job->padded[1] - call->low[0], y = line % job->padded[1] - call->low[1];
        int8_t *codes = call->codes + (image * job->padded[0] * job->padded[1] + line) * width;
        if (z < 0 || z >= call->size[0] || y < 0 || y >= call->size[1]) {
            fill_border(job, image, codes, job->padded[2]);
        } else {
            fill_border(job, image, codes, call->low[2]);
            fill_border(job, image, codes + (call->low[2] + call->size[2]) * call->channels, call->high[2]);
        }
    }
}

static void do_unit(struct images_job *job, const struct phase *phase, int64_t image, int64_t unit)
{
    const int64_t tiles = job->runs * phase->tiles;
    if (unit < tiles)
        do_tile(job, phase, image, unit);
    else
        do_border(job, image, unit - tiles);
}

static void start_search(struct images_job *job, int64_t image)
{
    memcpy(job->call->step + image, &job->border_bits, sizeof(float));
}

static void finish_search(struct images_job *job, int64_t image)
{
    uint32_t bits;
    memcpy(&bits, job->call->step + image, sizeof bits);
    job->call->step[image] = qvd_dynamic_step(bits, job->front.limit);
}

/* One phase of all images, every thread taking units of any. */
static void do_phase(void *data)
{
    struct images_job *job = data;
    const struct phase *phase = job->phase;
    for (;;) {
        const int64_t unit = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (unit >= job->call->images * phase->units)
            return;
        do_unit(job, phase, unit / phase->units, unit % phase->units);
    }
}

/* Both phases, every thread taking whole images: an image is encoded while the cache still holds what was searched. */
static void do_images(void *data)
{
    struct images_job *job = data;
    for (;;) {
        const int64_t image = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (image >= job->call->images)
            return;
        start_search(job, image);
        for (int64_t unit = 0; unit < job->search.units; unit++)
            do_unit(job, &job->search, image, unit);
        finish_search(job, image);
        for (int64_t unit = 0; unit < job->encode.units; unit++)
            do_unit(job, &job->encode, image, unit);
    }
}

static void run_phase(struct images_job *job, const struct phase *phase, int threads)
{
    job->phase = phase;
    atomic_store_explicit(&job->next, 0, memory_order_relaxed);
    qvd_run(do_phase, job, (int)smaller(threads, job->call->images * phase->units));
}

static struct phase cut(const struct images_job *job, int searching)
{
    struct phase phase = {.searching = searching};
    phase.tile_pixels = searching && !job->front.rotation ? QVD_SEARCH_PIXELS : QVD_TILE_PIXELS;
    phase.tiles = (job->run_pixels + phase.tile_pixels - 1) / phase.tile_pixels;
    phase.units = job->runs * phase.tiles;
    if (!searching && job->call->border)
        phase.units += (job->padded[0] * job->padded[1] + LINES_PER_UNIT - 1) / LINES_PER_UNIT;
    return phase;
}

static void plan(struct images_job *job)
{
    const struct quantize_images *call = job->call;
    const int64_t *size = call->size, *stride = call->stride;
    for (int i = 0; i < QVD_SPACE; i++)
        job->padded[i] = call->low[i] + size[i] + call->high[i];
    const int planes = size[1] == 1 || stride[1] == size[2] * stride[2]; /* the lines of a plane follow each other */
    job->runs = planes ? size[0] : size[0] * size[1];
    job->run_pixels = planes ? size[1] * size[2] : size[2];
    job->search = cut(job, 1);
    job->encode = cut(job, 0);
}

/* Returns enum qvd_status or QVD_FOUND_NAN. */
QVD_EXPORT int qvd_quantize_images(int isa, int threads, const struct quantize_images *call)
{
    const struct quantize_kernels *kernels = qvd_quantize_kernels(isa);
    if (!kernels || call->rotation > QVD_TILE_CHANNELS)
        return QVD_UNSUPPORTED;
    struct images_job job = {
        .call = call,
        .front = {kernels, call->shift, call->inverse_scale, call->dtype, call->rotation > 1 ? call->rotation : 0,
                  (float)call->limit},
        .border_bits = call->border ? kernels->largest(call->border, call->channels) : 0,
    };
    plan(&job);
    const int64_t values = call->images * call->channels * call->size[0] * call->size[1] * call->size[2];
    threads = qvd_useful_threads(threads, values, VALUES_PER_THREAD);
    if (call->static_step) {
        run_phase(&job, &job.encode, threads);
        return job.found_nan || job.border_bits > QVD_INFINITY_BITS ? QVD_FOUND_NAN : QVD_OK;
    }
    enum { ENOUGH = 4 }; /* images per thread, so that none waits long for another */
    if (call->images % threads == 0 || call->images >= ENOUGH * threads) {
        qvd_run(do_images, &job, threads);
        return QVD_OK;
    }
    for (int64_t image = 0; image < call->images; image++)
        start_search(&job, image);
    run_phase(&job, &job.search, threads);
    for (int64_t image = 0; image < call->images; image++)
        finish_search(&job, image);
    run_phase(&job, &job.encode, threads);
    return QVD_OK;
}
