# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernel of the convolution: an implicit GEMM over padded channels-last codes."""

import triton
import triton.language as tl

from qvd_core.ops.triton.gemm_kernels import block_of, dequantize


@triton.jit
def conv_kernel(
    codes_ptr,  # int8 [batch, depth, height, width, channels]
    weight_ptr,  # int8 [columns, taps, channels]
    out_ptr,  # any float [batch, columns, out_depth, out_height, out_width]
    step_ptr,  # float32 [batch], or [1] with step_stride 0
    weight_scale_ptr,  # float32 [columns]
    bias_ptr,  # any float [columns] or None
    batch,
    depth,
    height,
    width,
    channels,
    columns,
    out_depth,
    out_height,
    out_width,
    stride_d,
    stride_h,
    stride_w,
    dilation_d,
    dilation_h,
    dilation_w,
    step_stride,
    TAPS_D: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides channels
):
    """A row of the GEMM is an output pixel; its terms are the channels of one tap after another."""
    pixels = out_depth * out_height * out_width
    rows = batch * pixels
    block_m, block_n = block_of(rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    source = m % rows  # rows beyond the last pixel read one of the pixels again and are not stored
    image, pixel = source // pixels, source % pixels
    d = pixel // (out_height * out_width) * stride_d
    h = pixel // out_width % out_height * stride_h
    w = pixel % out_width * stride_w
    window = ((image.to(tl.int64) * depth + d) * height + h) * width + w
    codes = codes_ptr + (window * channels)[:, None] + k[None, :]
    weight = weight_ptr + ((n % columns) * (TAPS_D * TAPS_H * TAPS_W)).to(tl.int64)[None, :] * channels + k[:, None]

    blocks = tl.cdiv(channels, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for index in range(0, TAPS_D * TAPS_H * TAPS_W * blocks):
        tap, channel = index // blocks, index % blocks * BLOCK_K
        tap_d, tap_h, tap_w = tap // (TAPS_H * TAPS_W), tap // TAPS_W % TAPS_H, tap % TAPS_W
        away = ((tap_d * dilation_d).to(tl.int64) * height + tap_h * dilation_h) * width + tap_w * dilation_w
        if EVEN_K:
            a = tl.load(codes + (away * channels + channel))
            b = tl.load(weight + (tap * channels + channel))
        else:
            inside = channel + k < channels
            a = tl.load(codes + (away * channels + channel), mask=inside[None, :], other=0)
            b = tl.load(weight + (tap * channels + channel), mask=inside[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)

    step = tl.load(step_ptr + image * step_stride)
    y = dequantize(total, step, weight_scale_ptr, bias_ptr, n, columns)
    address = (image.to(tl.int64) * columns * pixels + pixel)[:, None] + n.to(tl.int64)[None, :] * pixels
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + address, y.to(out_ptr.dtype.element_ty), mask=inside)
