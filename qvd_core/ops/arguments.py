"""Checks of what the public operators are given: what does not fit is one clear error, alike on all backends."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops.backend import output_size


def check_quantize(x: Tensor, dims: tuple[int, ...], static_step: Tensor | None, bits: int) -> None:
    """x with as many dimensions as `dims` names, at least one channel; steps [1] or [M, 1]; 2 to 8 bits."""
    _require(x.is_floating_point() and x.dim() in dims, "x", f"float with {dims} dimensions", x)
    _require(x.shape[1] > 0, "x", "[M, K, ...] with K > 0", x)
    if static_step is not None:
        fits = tuple(static_step.shape) in ((1,), (x.shape[0], 1)) and static_step.dtype == torch.float32
        _require(fits, "static_step", f"float32 [1] or [{x.shape[0]}, 1]", static_step)
    if not 2 <= bits <= 8:
        raise QVDError(f"int8 operators: bits is {bits}, expected 2 to 8.")


def check_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    """codes [M, K], weight [N, K] or packed, and all else as long as they are."""
    _require(codes.dtype == torch.int8 and codes.dim() == 2, "codes", "int8 [M, K]", codes)
    rows, terms = codes.shape
    columns = weight.shape[0]
    _check_weight(weight, (terms,))
    _check_factors(step, rows, weight_scale, columns, bias)
    if residual is not None:
        _require(tuple(residual.shape) == (rows, columns), "residual", f"[{rows}, {columns}]", residual)
    if gate is not None:
        fits = gate.dim() == 2 and gate.shape[1] == columns and gate.shape[0] > 0 and rows % gate.shape[0] == 0
        _require(fits, "gate", f"[G, {columns}], G a divisor of {rows}", gate)


def check_conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """codes [B, *space, C], weight [N, C, *kernel] or packed, and a kernel that fits into the image."""
    _require(codes.dtype == torch.int8 and codes.dim() in (4, 5), "codes", "int8 [B, (T,) H, W, C]", codes)
    space, channels = codes.shape[1:-1], codes.shape[-1]
    sizes = {"kernel": kernel, "stride": stride, "dilation": dilation}
    for name, size in sizes.items():
        if len(size) != len(space) or min(size) < 1:
            raise QVDError(f"int8 operators: {name} is {tuple(size)}, expected {len(space)} positive integers.")
    _check_weight(weight, (channels, *kernel))
    _check_factors(step, codes.shape[0], weight_scale, weight.shape[0], bias)
    if min(output_size(space, kernel, stride, dilation)) < 1 or 0 in weight.shape:
        raise QVDError(
            f"int8 operators: a kernel {tuple(kernel)} with dilation {tuple(dilation)} and weight "
            f"{list(weight.shape)} has no output on images of {tuple(space)}."
        )


def _check_weight(weight: Tensor, features: tuple[int, ...]) -> None:
    packed = (prod(features) + 1) // 2
    fits = weight.dtype == torch.int8 and tuple(weight.shape[1:]) == features
    fits = fits or (weight.dtype == torch.uint8 and tuple(weight.shape[1:]) == (packed,))
    _require(fits, "weight", f"int8 [N, {', '.join(map(str, features))}], or 4-bit codes uint8 [N, {packed}]", weight)


def _check_factors(step: Tensor, rows: int, weight_scale: Tensor, columns: int, bias: Tensor | None) -> None:
    fits = tuple(step.shape) in ((1,), (rows, 1)) and step.dtype == torch.float32
    _require(fits, "step", f"float32 [1] or [{rows}, 1]", step)
    fits = weight_scale.dtype == torch.float32 and weight_scale.numel() == columns == weight_scale.shape[0]
    _require(fits, "weight_scale", f"float32 [{columns}, 1, ...]", weight_scale)
    if bias is not None:
        _require(tuple(bias.shape) == (columns,), "bias", f"[{columns}]", bias)


def _require(fits: bool, name: str, expected: str, found: Tensor) -> None:
    if not fits:
        raise QVDError(f"int8 operators: {name} is {found.dtype} {list(found.shape)}, expected {expected}.")
