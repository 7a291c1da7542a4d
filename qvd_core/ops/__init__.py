"""The int8 operators, as `torch.library` ops with shape functions, over exchangeable backends.

    quantize_activation(x, shift, scale, static_step, bits, rotation)  -> codes int8, step float32
    int8_linear(codes, step, weight, weight_scale, bias, dtype)    -> y
    int8_conv2d(codes, step, weight, weight_scale, bias, ...)      -> y

`semantics.py` says what they compute. `QVD_BACKEND` in the environment overrides the backend of every layer.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops import emulated, reference, semantics

_BACKENDS: dict[str, ModuleType] = {"emulated": emulated, "reference": reference}

_library = torch.library.Library("qvd", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "quantize_activation(Tensor x, Tensor? shift, Tensor? scale, Tensor? static_step, int bits, int rotation) "
    "-> (Tensor, Tensor)",
    "int8_linear(Tensor codes, Tensor step, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "ScalarType dtype, str backend) -> Tensor",
    "int8_conv2d(Tensor codes, Tensor step, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "int[] stride, int[] dilation, ScalarType dtype, str backend) -> Tensor",
):
    _library.define(_signature)  # type: ignore[no-untyped-call]


def resolve_backend(name: str = "auto") -> str:
    """The backend that will run: `QVD_BACKEND` if set, else `name`, where "auto" is the fastest exact one.

    Raises QVDError for an unknown name.
    """
    name = os.environ.get("QVD_BACKEND") or name
    if name == "auto":
        return "emulated"
    if name not in _BACKENDS:
        raise QVDError(f"unknown int8 backend {name!r} (`backend` or QVD_BACKEND): use auto, {' or '.join(_BACKENDS)}.")
    return name


def _quantize_activation(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, bits: int, rotation: int
) -> tuple[Tensor, Tensor]:
    x = semantics.transform(x, shift, scale, rotation)
    step = semantics.token_step(x, bits) if static_step is None else semantics.checked_step(x, static_step)
    return semantics.encode(x, step, bits), step


def _int8_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    with torch.autocast(codes.device.type, enabled=False):  # it would round the sums to 16 bits
        total = _BACKENDS[backend].integer_linear(codes, weight)
    return semantics.epilogue(total, step, weight_scale.view(1, -1), bias).to(dtype)


def _int8_conv2d(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    with torch.autocast(codes.device.type, enabled=False):
        total = _BACKENDS[backend].integer_conv2d(codes, weight, stride, dilation)
    per_channel = (1, -1, 1, 1)
    bias = None if bias is None else bias.view(per_channel)
    return semantics.epilogue(total, step, weight_scale.view(per_channel), bias).to(dtype)


for _name, _function in (
    ("quantize_activation", _quantize_activation),
    ("int8_linear", _int8_linear),
    ("int8_conv2d", _int8_conv2d),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("qvd::quantize_activation", lib=_library)
def _(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, bits: int, rotation: int
) -> tuple[Tensor, Tensor]:
    step = (
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if static_step is None else torch.empty_like(static_step)
    )
    return torch.empty_like(x, dtype=torch.int8), step


@torch.library.register_fake("qvd::int8_linear", lib=_library)
def _(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("qvd::int8_conv2d", lib=_library)
def _(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    size = [
        (extent - gap * (kernel - 1) - 1) // hop + 1
        for extent, kernel, hop, gap in zip(codes.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    return codes.new_empty((codes.shape[0], weight.shape[0], *size), dtype=dtype)


def quantize_activation(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, static_step: Tensor | None, bits: int, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """Shift, scale, rotate and quantize the rows of x.

    x [M, K], any float dtype. shift, scale float32 [K] or None (SCRI). static_step float32 [1] or one per row [M, 1],
    or None for one dynamic step per row. rotation: channels per Hadamard block, 0 for none.
    Returns codes int8 [M, K] and step float32 [M, 1] (or [1]); a NaN in x makes its step NaN.
    """
    codes, step = torch.ops.qvd.quantize_activation(x, shift, scale, static_step, bits, rotation)
    return codes, step


def int8_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """codes int8 [M, K] x weight int8 [N, K], dequantized; the integer sum is exact on every backend.

    step float32 [M, 1] or [1], weight_scale float32 [N, 1], bias [N] or None. Returns `dtype` [M, N].
    """
    out: Tensor = torch.ops.qvd.int8_linear(codes, step, weight, weight_scale, bias, dtype, resolve_backend(backend))
    return out


def int8_conv2d(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """codes int8 [B, C, H, W] (padded already) * weight int8 [N, C, kh, kw], dequantized.

    step float32 [B, 1, 1, 1] or [1], weight_scale float32 [N, 1, 1, 1], bias [N] or None.
    Returns `dtype` [B, N, H', W'].
    """
    out: Tensor = torch.ops.qvd.int8_conv2d(
        codes, step, weight, weight_scale, bias, list(stride), list(dilation), dtype, resolve_backend(backend)
    )
    return out
