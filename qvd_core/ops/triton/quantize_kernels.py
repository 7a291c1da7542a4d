# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels that quantize: rows (with a front fused or not) and images.

Codes and steps are bit-equal to `semantics.py`: every operation rounds once, quotients are `div_rn`, and the launcher
switches the contraction of products and sums off. Only the fronts may differ, in the last place of a transcendental.

Largest magnitudes are compared as integers: the bits of non-negative floats are ordered as the floats are, with NaN
above infinity, so that an integer maximum carries NaN along for nothing and needs no second reduction.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: adding it leaves a float's integer part, rounded half to even, in the lowest bits of its representation.
ROUNDER = tl.constexpr(12582912.0)
INFINITY_BITS = tl.constexpr(0x7F800000)
MINIMUM_STEP = tl.constexpr(1e-20)  # semantics.MINIMUM_STEP


@triton.jit
def _reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _rotate(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ROOT: tl.constexpr):
    """Hadamard rotation of blocks of 2^STAGES columns, with the additions of `rotation.hadamard` in its order."""
    if STAGES > 0:
        for stage in tl.static_range(STAGES):
            pairs = tl.reshape(x, (ROWS * COLUMNS // (2 << stage), 2, 1 << stage))
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            pairs = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
            x = tl.reshape(pairs, (ROWS, COLUMNS))
        x = tl.div_rn(x, tl.full((ROWS, COLUMNS), ROOT, tl.float32))
    return x


@triton.jit
def _transform(x, shift_ptr, inverse_ptr, column, columns):
    """(x - shift) * (1 / scale) of a tile [rows, columns]; inverse holds the reciprocals of scale."""
    inside = column < columns
    if shift_ptr is not None:
        x = x - tl.load(shift_ptr + column, mask=inside, other=0.0)[None, :]
    if inverse_ptr is not None:
        x = x * tl.load(inverse_ptr + column, mask=inside, other=0.0)[None, :]
    return x


@triton.jit
def _magnitude_bits(x):
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _step(bits, LIMIT: tl.constexpr):
    """Dynamic steps from the bits of the largest magnitudes; NaN stays NaN."""
    step = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, LIMIT, tl.float32))
    return tl.where(step < MINIMUM_STEP, MINIMUM_STEP, step)


@triton.jit
def _encode(x, reciprocal, LIMIT: tl.constexpr):
    scaled = tl.minimum(tl.maximum(x * reciprocal, -LIMIT), LIMIT)
    return (scaled + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _spoil(step_ptr, steps, bits):
    """All steps become NaN if the bits of a largest magnitude are NaN's; any number of programs may do so at once."""
    if bits > INFINITY_BITS:
        for start in range(0, steps, 1024):
            index = start + tl.arange(0, 1024)
            tl.store(step_ptr + index, tl.full((1024,), float("nan"), tl.float32), mask=index < steps)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def _inside(row, start, rows, columns, WIDTH: tl.constexpr):
    return (row < rows)[:, None] & (start + tl.arange(0, WIDTH) < columns)[None, :]


@triton.jit
def _load(
    x_ptr, row, start, rows, columns, x_stride, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """A tile [rows, WIDTH] of the front's input, activated; 0 outside the matrix."""
    inside = _inside(row, start, rows, columns, WIDTH)
    address = x_ptr + row[:, None] * x_stride + (start + tl.arange(0, WIDTH))[None, :]
    x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        x = x * _activate(tl.load(address + columns, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    elif ACTIVATION != "":
        x = _activate(x, ACTIVATION)
    return x


@triton.jit
def _modulate(x, factor, gain_ptr, offset_ptr, row, start, rows, columns, rows_per_group, WIDTH: tl.constexpr):
    """x * factor * gain + offset, the end of a norm."""
    inside = _inside(row, start, rows, columns, WIDTH)
    address = (row // rows_per_group * columns)[:, None] + (start + tl.arange(0, WIDTH))[None, :]
    x = x * factor[:, None]
    if gain_ptr is not None:
        x = x * tl.load(gain_ptr + address, mask=inside, other=0.0).to(tl.float32)
    if offset_ptr is not None:
        x = x + tl.load(offset_ptr + address, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _channels(
    x, shift_ptr, inverse_ptr, row, start, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """The transformed input x~ of a tile, 0 outside the matrix."""
    x = _transform(x, shift_ptr, inverse_ptr, start + tl.arange(0, WIDTH), columns)
    x = tl.where(_inside(row, start, rows, columns, WIDTH), x, 0.0)
    return _rotate(x, ROWS, WIDTH, STAGES, ROOT)


@triton.jit
def _store(codes_ptr, x, reciprocal, row, start, rows, columns, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    address = codes_ptr + row[:, None] * columns + (start + tl.arange(0, WIDTH))[None, :]
    tl.store(address, _encode(x, reciprocal, LIMIT), mask=_inside(row, start, rows, columns, WIDTH))


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # [rows, x_stride], any float; [hidden, gate] side by side where GATED
    codes_ptr,  # int8 [rows, columns]
    step_ptr,  # float32, written: [rows] where dynamic, a copy of the static steps where not
    static_ptr,  # float32 [steps] or None
    shift_ptr,  # float32 [columns] or None
    inverse_ptr,  # float32 [columns], reciprocals of the scale, or None
    gain_ptr,  # [groups, columns] or None
    offset_ptr,  # [groups, columns] or None
    rows,
    columns,
    x_stride,
    static_stride,  # 0: one step for all rows
    steps,
    rows_per_group,
    eps,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LIMIT: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
):
    """Whole rows in registers: x is read once.

    A row is two parts, FIRST and SECOND wide (0: none): lengths of a tile are powers of two, channels rarely are.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x = _load(x_ptr, row, 0, rows, columns, x_stride, FIRST, ACTIVATION, GATED)
    if SECOND > 0:
        y = _load(x_ptr, row, FIRST, rows, columns, x_stride, SECOND, ACTIVATION, GATED)
    if NORM == "layer":
        mean = tl.sum(x, 1)
        if SECOND > 0:
            mean += tl.sum(y, 1)
            y = tl.where(_inside(row, FIRST, rows, columns, SECOND), y - (mean / columns)[:, None], 0.0)
        x = tl.where(_inside(row, 0, rows, columns, FIRST), x - (mean / columns)[:, None], 0.0)
    if NORM != "":
        square = tl.sum(x * x, 1)
        if SECOND > 0:
            square += tl.sum(y * y, 1)
        factor = 1.0 / tl.sqrt_rn(square / columns + eps)
        x = _modulate(x, factor, gain_ptr, offset_ptr, row, 0, rows, columns, rows_per_group, FIRST)
        if SECOND > 0:
            y = _modulate(y, factor, gain_ptr, offset_ptr, row, FIRST, rows, columns, rows_per_group, SECOND)
    x = _channels(x, shift_ptr, inverse_ptr, row, 0, rows, columns, ROWS, FIRST, STAGES, ROOT)
    bits = tl.max(_magnitude_bits(x), 1)
    if SECOND > 0:
        y = _channels(y, shift_ptr, inverse_ptr, row, FIRST, rows, columns, ROWS, SECOND, STAGES, ROOT)
        bits = tl.maximum(bits, tl.max(_magnitude_bits(y), 1))
    if static_ptr is None:
        step = _step(bits, LIMIT)
        tl.store(step_ptr + row, step, mask=row < rows)
    else:
        step = tl.load(static_ptr + row * static_stride, mask=row < rows, other=1.0)
        _spoil(step_ptr, steps, tl.max(bits, 0))
    reciprocal = _reciprocal(step)[:, None]
    _store(codes_ptr, x, reciprocal, row, 0, rows, columns, FIRST, LIMIT)
    if SECOND > 0:
        _store(codes_ptr, y, reciprocal, row, FIRST, rows, columns, SECOND, LIMIT)


@triton.jit
def quantize_long_rows_kernel(
    x_ptr,
    codes_ptr,
    step_ptr,
    static_ptr,
    shift_ptr,
    inverse_ptr,
    rows,
    columns,
    x_stride,
    static_stride,
    steps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LIMIT: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """`quantize_rows_kernel` for rows that registers cannot hold: they are read again, from the cache, to be coded."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bits = tl.zeros((ROWS,), tl.int32)
    if static_ptr is None:
        for start in range(0, columns, WIDTH):
            x = _load(x_ptr, row, start, rows, columns, x_stride, WIDTH, ACTIVATION, GATED)
            x = _channels(x, shift_ptr, inverse_ptr, row, start, rows, columns, ROWS, WIDTH, STAGES, ROOT)
            bits = tl.maximum(bits, tl.max(_magnitude_bits(x), 1))
        step = _step(bits, LIMIT)
        tl.store(step_ptr + row, step, mask=row < rows)
    else:
        step = tl.load(static_ptr + row * static_stride, mask=row < rows, other=1.0)
    reciprocal = _reciprocal(step)[:, None]
    for start in range(0, columns, WIDTH):
        x = _load(x_ptr, row, start, rows, columns, x_stride, WIDTH, ACTIVATION, GATED)
        x = _channels(x, shift_ptr, inverse_ptr, row, start, rows, columns, ROWS, WIDTH, STAGES, ROOT)
        _store(codes_ptr, x, reciprocal, row, start, rows, columns, WIDTH, LIMIT)
        if static_ptr is not None:
            bits = tl.maximum(bits, tl.max(_magnitude_bits(x), 1))
    if static_ptr is not None:
        _spoil(step_ptr, steps, tl.max(bits, 0))


@triton.jit
def quantize_images_kernel(
    x_ptr,  # [batch, channels, depth, height, width] by strides, any float
    codes_ptr,  # int8 [batch, padded depth, padded height, padded width, channels]
    step_ptr,  # float32, written: [batch] where dynamic, a copy of the static steps where not
    bits_ptr,  # int32 [batch]: bits of the largest magnitude of each image; None where static
    static_ptr,  # float32 [steps] or None
    shift_ptr,  # float32 [channels] or None
    inverse_ptr,  # float32 [channels], reciprocals of the scale, or None
    channels,
    depth,
    height,
    width,
    padded_depth,
    padded_height,
    padded_width,
    low_depth,
    low_height,
    low_width,
    stride_batch,
    stride_channel,
    stride_depth,
    stride_height,
    stride_width,
    static_stride,
    steps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MEASURE: tl.constexpr,  # the first of the two passes of dynamic steps: only the largest magnitudes
    LIMIT: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
):
    """One program: PIXELS neighbours of one padded line, CHANNELS channels of each."""
    blocks = tl.cdiv(padded_width, PIXELS)
    line = tl.program_id(0) // blocks  # of all lines of all padded images
    d = line // padded_height % padded_depth
    image = line // padded_height // padded_depth
    h = line % padded_height
    w = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)

    source_d, source_h, source_w = d - low_depth, h - low_height, w - low_width
    on_image = (source_d >= 0) & (source_d < depth) & (source_h >= 0) & (source_h < height)
    on_image = on_image & (source_w >= 0) & (source_w < width)
    start = image.to(tl.int64) * stride_batch + source_d.to(tl.int64) * stride_depth
    start += source_h.to(tl.int64) * stride_height
    offset = channel.to(tl.int64)[None, :] * stride_channel + source_w.to(tl.int64)[:, None] * stride_width
    x = tl.load(x_ptr + start + offset, mask=on_image[:, None] & (channel < channels)[None, :], other=0.0)
    x = _transform(x.to(tl.float32), shift_ptr, inverse_ptr, channel, channels)
    x = _rotate(x, PIXELS, CHANNELS, STAGES, ROOT)

    inside = (w < padded_width)[:, None] & (channel < channels)[None, :]
    if MEASURE:
        tl.atomic_max(bits_ptr + image, tl.max(tl.max(tl.where(inside, _magnitude_bits(x), 0), 1), 0))
    else:
        if static_ptr is None:
            step = _step(tl.load(bits_ptr + image + tl.zeros((1,), tl.int32)), LIMIT)
            first = (line % (padded_height * padded_depth) == 0) & (tl.program_id(0) % blocks == 0)
            tl.store(step_ptr + image + tl.zeros((1,), tl.int32), step, mask=first & (tl.program_id(1) == 0))
        else:
            step = tl.load(static_ptr + image * static_stride + tl.zeros((1,), tl.int32))
            _spoil(step_ptr, steps, tl.max(tl.max(tl.where(inside, _magnitude_bits(x), 0), 1), 0))
        codes = _encode(x, _reciprocal(step)[:, None], LIMIT)
        pixel = (line.to(tl.int64) * padded_width + w)[:, None]
        tl.store(codes_ptr + pixel * channels + channel[None, :], codes, mask=inside)
