"""The int8 operators, as `torch.library` ops with shape functions, over exchangeable backends.

    quantize_activation(x, shift, scale, static_step, bits, rotation)         -> codes int8, step float32
    quantize_fused(x, front, gain, offset, eps, shift, scale, ...)            -> the same of gelu(x), norm(x), ...
    quantize_image(x, shift, scale, static_step, bits, rotation, padding)     -> codes int8 (channels last), step
    int8_linear(codes, step, weight, weight_scale, bias, dtype)               -> y
    int8_conv(codes, step, weight, weight_scale, bias, kernel, ..., dtype)    -> y
    weight_only_linear(x, weight, weight_scale, bias, dtype)                  -> y, from an input in full precision

`semantics.py` says what they compute, `dispatch.py` which backend runs. `QVD_BACKEND` in the environment overrides the
backend of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops import library
from qvd_core.ops.arguments import check_conv, check_linear, check_quantize
from qvd_core.ops.dispatch import (
    KITCHEN,
    WEIGHT_ONLY,
    available_backends,
    explain_backend,
    integer_backend,
    resolve_backend,
)

__all__ = [
    "KITCHEN",
    "WEIGHT_ONLY",
    "available_backends",
    "explain_backend",
    "int8_conv",
    "int8_linear",
    "integer_backend",
    "quantize_activation",
    "quantize_fused",
    "quantize_image",
    "resolve_backend",
    "weight_only_linear",
]


def quantize_activation(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Shift, scale, rotate and quantize the rows of x.

    x [M, K], any float dtype. shift, scale float32 [K] or None (SCRI). static_step float32 [1] or one per row [M, 1],
    or None for one dynamic step per row. rotation: channels per Hadamard block, 0 for none.
    Returns codes int8 [M, K] and step float32 [M, 1] (or [1]); a NaN in x makes its step NaN.
    """
    check_quantize(x, (2,), static_step, bits)
    backend = integer_backend(backend, x.device)
    return library.quantize_activation(x, shift, scale, static_step, bits, rotation, backend)


def quantize_fused(
    x: Tensor,
    front: str,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`quantize_activation` of what an activation or a norm makes of x, in one kernel where the backend has it. [O]

    front: a name of `fronts.FRONTS`: "gelu", "gelu_tanh", "silu", these with "_mul" (x [M, 2 K] is hidden and gate), or
    "layer_norm", "rms_norm". gain, offset [G, K] or None: norm(x) * gain + offset, a row for each of G equal runs of
    rows; adaLN's gain is 1 + scale. Codes of a fused kernel differ by one at most from those of the two steps.
    Returns codes int8 [M, K] and step as `quantize_activation`. Raises QVDError for a front or shapes that do not fit.
    """
    backend = integer_backend(backend, x.device)
    arguments = (x, front, gain, offset, eps, shift, scale, static_step, bits, rotation, backend)
    codes, step = torch.ops.qvd.quantize_fused(*arguments)
    return codes, step


def quantize_image(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int = 0,
    padding: Sequence[int] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pad images with zeros, then shift, scale, rotate and quantize their pixels, channels last.

    x [B, C, H, W] or [B, C, T, H, W], any float dtype and strides. shift, scale float32 [C] or None. static_step
    float32 [1] or one per image [B, 1], or None for one dynamic step per image. padding: low and high of each dimension
    of space, the last one first, as `F.pad` takes it.
    Returns codes int8 [B, *padded space, C] and step float32 [B, 1] (or [1]). The border holds the code of zero, which
    a shift moves: that keeps a convolution's bias fold exact at the edges.
    """
    check_quantize(x, (4, 5), static_step, bits)
    padding = list(padding) or [0] * (2 * (x.dim() - 2))
    if len(padding) != 2 * (x.dim() - 2):
        raise QVDError(f"int8 operators: padding is {padding}, expected low and high of {x.dim() - 2} dimensions.")
    backend = integer_backend(backend, x.device)
    return library.quantize_image(x, shift, scale, static_step, bits, rotation, padding, backend)


def int8_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """codes int8 [M, K] x weight [N, K], dequantized; the integer sum is exact on every backend.

    step float32 [M, 1] or [1]; weight int8 [N, K], or uint8 [N, ceil(K / 2)] with two 4-bit codes per byte;
    weight_scale float32 [N, 1]; bias [N] or None. residual [M, N] or None: what the product is added to; gate [G, N] or
    None: what it is multiplied with before, one row for each of G equal runs of rows. Returns `dtype` [M, N].
    """
    check_linear(codes, step, weight, weight_scale, bias, residual, gate)
    backend = integer_backend(backend, codes.device)
    return library.int8_linear(codes, step, weight, weight_scale, bias, residual, gate, dtype, backend)


def int8_conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """codes int8 [B, *space, C], padded already, * weight [N, C, *kernel], dequantized; 2 or 3 dimensions of space.

    step float32 [B, 1] or [1]; weight int8, or uint8 [N, ceil(C taps / 2)] with two 4-bit codes per byte; weight_scale
    float32 [N, 1, ...]; bias [N] or None. Returns `dtype` [B, N, *out], contiguous.
    """
    backend = integer_backend(backend, codes.device)
    check_conv(codes, step, weight, weight_scale, bias, kernel, stride, dilation)
    sizes = (list(kernel), list(stride), list(dilation))
    return library.int8_conv(codes, step, weight, weight_scale, bias, *sizes, dtype, backend)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """x [M, K], shifted and scaled but not quantized, x decoded weight [N, K], in `dtype` -> `dtype` [M, N].

    For few rows, and for devices whose int8 units are slower than their 16-bit ones.
    """
    backend = integer_backend(backend, x.device)
    return library.weight_only_linear(x, weight, weight_scale, bias, dtype, backend)
