"""The integer layers in C: a linear layer and a convolution, dequantized, through ctypes.

Both return None for what the library does not do (other dtypes, other devices, sums too long, no memory left):
the caller then uses PyTorch. Results equal those of `qvd_core.ops.backend.Backend` bit for bit.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from qvd_core.ops import semantics
from qvd_core.ops.backend import output_size
from qvd_core.ops.cpu import library, quantize

_Triple = ctypes.c_int64 * 3


class _LinearArguments(ctypes.Structure):
    """`linear_arguments` of gemm_layers.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "weight", "step", "weight_scale", "bias", "gate")),
        *((name, ctypes.c_void_p) for name in ("residual", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth", "step_count", "gate_count")),
        *((name, ctypes.c_int32) for name in ("weight_bits", "residual_type", "type", "isa", "threads")),
    )


class _LayerArguments(ctypes.Structure):
    """`layer_arguments` of layer.c."""

    _fields_ = (
        ("product", _LinearArguments),
        *((name, ctypes.c_void_p) for name in ("x", "shift", "scale")),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_type", "limit", "rotation")),
    )


class _ConvolutionArguments(ctypes.Structure):
    """`convolution_arguments` of gemm_layers.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "weight", "step", "weight_scale", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("images", "filters", "step_count", "channels")),
        *((name, _Triple) for name in ("size", "kernel", "stride", "dilation", "output")),
        *((name, ctypes.c_int32) for name in ("weight_bits", "type", "isa", "threads")),
    )


def linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """codes int8 [M, K] x weight int8 [N, K] (uint8 [N, ceil(K / 2)]: 4-bit), dequantized -> `dtype` [M, N].

    step float32 [1] or [M, 1], weight_scale float32 [N, 1]; bias [N], residual [M, N], gate [G, N] (G divides M) or
    None. Returns None where there is no library and for what it does not support.
    """
    kernels = library.load()
    if kernels is None or codes.dim() != 2 or weight.dim() != 2:
        return None
    (rows, depth), columns = codes.shape, len(weight)
    residual_type = dtype if residual is None else residual.dtype
    supported = (
        _are_codes(codes, weight, depth)
        and _are_factors(step, rows, weight_scale, columns, bias)
        and (residual is None or (residual.shape == (rows, columns) and library.is_readable(residual)))
        and (gate is None or (residual is not None and _is_gate(gate, rows, columns)))
        and {dtype, residual_type} <= library.DTYPE_CODES.keys()
    )
    if not supported:
        return None
    out = torch.empty(rows, columns, dtype=dtype, device="cpu")
    held = [
        *(codes.contiguous(), weight.contiguous(), step.contiguous(), weight_scale.contiguous()),
        *(_float(bias), _float(gate), None if residual is None else residual.contiguous(), out),
    ]
    arguments = _LinearArguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        *(rows, columns, depth, step.numel(), 1 if gate is None else len(gate)),
        *(_weight_bits(weight), library.DTYPE_CODES[residual_type], library.DTYPE_CODES[dtype]),
        *(library.isa(kernels), torch.get_num_threads()),
    )
    status: int = kernels.qvd_linear(ctypes.byref(arguments))
    return None if status else out


def quantized_linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """x [M, K], quantized as by `quantize.quantize_rows`, through `linear`, in one call -> `dtype` [M, N].

    None where one of the two would be.
    """
    kernels = library.load()
    if kernels is None or x.dim() != 2 or weight.dim() != 2 or dtype not in library.DTYPE_CODES:
        return None
    (rows, depth), columns = x.shape, weight.shape[0]
    step = weight_scale if static_step is None else static_step
    supported = quantize.is_supported(x, shift, scale, static_step, rotation, rows) and (
        _is_weight(weight, depth) and _are_factors(step, step.numel(), weight_scale, columns, bias)
    )
    if not supported:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, columns, dtype=dtype, device="cpu")
    given = (weight, static_step, weight_scale, _float(bias), shift, scale)
    held = [None if tensor is None else tensor.contiguous() for tensor in given]
    weight_at, step_at, weight_scale_at, bias_at, shift_at, scale_at = (
        None if tensor is None else tensor.data_ptr() for tensor in held
    )
    product = _LinearArguments(
        *(None, weight_at, step_at, weight_scale_at, bias_at, None, None, out.data_ptr()),
        *(rows, columns, depth, rows if static_step is None else static_step.numel(), 1),
        *(_weight_bits(weight), 0, library.DTYPE_CODES[dtype], library.isa(kernels), torch.get_num_threads()),
    )
    arguments = _LayerArguments(
        *(product, x.data_ptr(), shift_at, scale_at, x.stride(0)),
        *(library.DTYPE_CODES[x.dtype], semantics.code_limit(bits), rotation),
    )
    status: int = kernels.qvd_layer(ctypes.byref(arguments))
    return None if status else out


def conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
) -> Tensor | None:
    """codes int8 [B, *space, C] * weight int8 [N, C, *kernel] (uint8 [N, ceil(C taps / 2)]: 4-bit) -> [B, N, *out].

    One to three dimensions of space, padded already. step float32 [1] or [B, 1], weight_scale float32 [N, 1, ...],
    bias [N] or None. Returns None where there is no library and for what it does not support.
    """
    kernels, space = library.load(), list(codes.shape[1:-1])
    if kernels is None or not 1 <= len(space) <= 3 or {len(kernel), len(stride), len(dilation)} != {len(space)}:
        return None
    images, filters, channels = len(codes), len(weight), codes.shape[-1]
    size = output_size(space, kernel, stride, dilation)
    supported = (
        _are_codes(codes, weight, channels * math.prod(kernel), (channels, *kernel))
        and _are_factors(step, images, weight_scale, filters, bias)
        and min(*size, *kernel, *stride, *dilation) > 0
        and dtype in library.DTYPE_CODES
    )
    if not supported:
        return None
    out = torch.empty(images, filters, *size, dtype=dtype, device="cpu")
    held = [
        *(codes.contiguous(), weight.contiguous(), step.contiguous(), weight_scale.contiguous()),
        *(_float(bias), out),
    ]
    missing = [1] * (3 - len(space))
    arguments = _ConvolutionArguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in held),
        *(images, filters, step.numel(), channels),
        *(_Triple(*missing, *extents) for extents in (space, kernel, stride, dilation, size)),
        *(_weight_bits(weight), library.DTYPE_CODES[dtype]),
        *(library.isa(kernels), torch.get_num_threads()),
    )
    status: int = kernels.qvd_convolution(ctypes.byref(arguments))
    return None if status else out


def _are_codes(codes: Tensor, weight: Tensor, depth: int, features: tuple[int, ...] | None = None) -> bool:
    """Is this what the C functions read: sizes that do not fit would let them read past the end."""
    return library.is_readable(codes) and codes.dtype == torch.int8 and _is_weight(weight, depth, features)


def _is_weight(weight: Tensor, depth: int, features: tuple[int, ...] | None = None) -> bool:
    """int8 [N, *features], [N, depth] where there are none, or uint8 with two codes of one row per byte."""
    if not library.is_readable(weight):
        return False
    if weight.dtype == torch.uint8:
        return weight.shape[1:] == ((depth + 1) // 2,)
    return weight.dtype == torch.int8 and weight.shape[1:] == (features or (depth,))


def _are_factors(step: Tensor, rows: int, weight_scale: Tensor, columns: int, bias: Tensor | None) -> bool:
    """One float32 step in all or per row, one scale per output channel, and a bias for each or none."""
    fits = (
        library.is_readable(step)
        and library.is_readable(weight_scale)
        and step.dtype == weight_scale.dtype == torch.float32
    )
    fits = fits and step.numel() in (1, rows) and weight_scale.numel() == columns
    return fits and (bias is None or (library.is_readable(bias) and bias.shape == (columns,)))


def _is_gate(gate: Tensor, rows: int, columns: int) -> bool:
    """A row per equal share of the rows."""
    fits = gate.dim() == 2 and gate.shape[1] == columns and len(gate) > 0 and rows % len(gate) == 0
    return fits and library.is_readable(gate)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _weight_bits(weight: Tensor) -> int:
    return 4 if weight.dtype == torch.uint8 else 8
