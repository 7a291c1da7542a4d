"""The `torch.library` definitions: schemas, implementations over the backends, shape functions, and calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops.backend import output_size
from qvd_core.ops.dispatch import backend as backend_named
from qvd_core.ops.fronts import checked_front

_library = torch.library.Library("qvd", "DEF")  # type: ignore[no-untyped-call]
for _signature in (
    "quantize_activation(Tensor x, Tensor? shift, Tensor? scale, Tensor? static_step, int bits, int rotation, "
    "str backend) -> (Tensor, Tensor)",
    "quantize_fused(Tensor x, str front, Tensor? gain, Tensor? offset, float eps, Tensor? shift, Tensor? scale, "
    "Tensor? static_step, int bits, int rotation, str backend) -> (Tensor, Tensor)",
    "quantize_image(Tensor x, Tensor? shift, Tensor? scale, Tensor? static_step, int bits, int rotation, "
    "SymInt[] padding, str backend) -> (Tensor, Tensor)",
    "int8_linear(Tensor codes, Tensor step, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, "
    "Tensor? gate, ScalarType dtype, str backend) -> Tensor",
    "int8_conv(Tensor codes, Tensor step, Tensor weight, Tensor weight_scale, Tensor? bias, int[] kernel, "
    "int[] stride, int[] dilation, ScalarType dtype, str backend) -> Tensor",
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype, str backend) "
    "-> Tensor",
):
    _library.define(_signature)  # type: ignore[no-untyped-call]


def _implement(name: str, method: str) -> None:
    """Let the op run a method of the backend that its last argument names."""

    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        return getattr(backend_named(backend), method)(*inputs)

    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


_implement("quantize_activation", "quantize_rows")
_implement("quantize_fused", "quantize_fused")
_implement("quantize_image", "quantize_images")
_implement("int8_linear", "linear")
_implement("int8_conv", "conv")
_implement("weight_only_linear", "weight_only_linear")


@torch.library.register_fake("qvd::quantize_activation", lib=_library)
def _(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), _fake_step(x, static_step)


@torch.library.register_fake("qvd::quantize_fused", lib=_library)
def _(
    x: Tensor,
    front: str,
    gain: Tensor | None,
    offset: Tensor | None,
    eps: float,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1] // 2 if checked_front(x, front, gain, offset).gated else x.shape[1]
    return x.new_empty((x.shape[0], channels), dtype=torch.int8), _fake_step(x, static_step)


@torch.library.register_fake("qvd::quantize_image", lib=_library)
def _(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    padding: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    ends = zip(reversed(padding[0::2]), reversed(padding[1::2]), strict=True)  # as F.pad: the last dimension first
    space = [extent + low + high for extent, (low, high) in zip(x.shape[2:], ends, strict=True)]
    return x.new_empty((x.shape[0], *space, x.shape[1]), dtype=torch.int8), _fake_step(x, static_step)


def _fake_step(x: Tensor, static_step: Tensor | None) -> Tensor:
    shape = (x.shape[0], 1) if static_step is None else static_step.shape
    return x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("qvd::int8_linear", lib=_library)
def _(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("qvd::int8_conv", lib=_library)
def _(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    size = output_size(codes.shape[1:-1], kernel, stride, dilation)
    return codes.new_empty((codes.shape[0], weight.shape[0], *size), dtype=dtype)


@torch.library.register_fake("qvd::weight_only_linear", lib=_library)
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


def quantize_activation(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`qvd::quantize_activation` on the backend of that name."""
    if _unwatched(x):
        return backend_named(backend).quantize_rows(x, shift, scale, static_step, bits, rotation)
    codes, step = torch.ops.qvd.quantize_activation(x, shift, scale, static_step, bits, rotation, backend)
    return codes, step


def quantize_image(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    static_step: Tensor | None,
    bits: int,
    rotation: int,
    padding: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`qvd::quantize_image` on the backend of that name."""
    if _unwatched(x):
        return backend_named(backend).quantize_images(x, shift, scale, static_step, bits, rotation, padding)
    codes, step = torch.ops.qvd.quantize_image(x, shift, scale, static_step, bits, rotation, padding, backend)
    return codes, step


def int8_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """`qvd::int8_linear` on the backend of that name."""
    _refuse_meta(codes, weight)
    if _unwatched(codes):
        return backend_named(backend).linear(codes, step, weight, weight_scale, bias, residual, gate, dtype)
    out: Tensor = torch.ops.qvd.int8_linear(codes, step, weight, weight_scale, bias, residual, gate, dtype, backend)
    return out


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
    backend: str,
) -> Tensor:
    """`qvd::quantize_activation` and `qvd::int8_linear`, in one call where nobody is looking."""
    _refuse_meta(x, weight)
    factors = (weight, weight_scale, bias)
    if _unwatched(x):
        arguments = (x, shift, scale, static_step, bits, rotation, *factors, dtype)
        return backend_named(backend).quantized_linear(*arguments)
    codes, step = quantize_activation(x, shift, scale, static_step, bits, rotation, backend)
    return int8_linear(codes, step, *factors, None, None, dtype, backend)


def int8_conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """`qvd::int8_conv` on the backend of that name."""
    _refuse_meta(codes, weight)
    arguments = (codes, step, weight, weight_scale, bias, kernel, stride, dilation, dtype)
    if _unwatched(codes):
        return backend_named(backend).conv(*arguments)
    out: Tensor = torch.ops.qvd.int8_conv(*arguments, backend)
    return out


def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """`qvd::weight_only_linear` on the backend of that name."""
    out: Tensor = torch.ops.qvd.weight_only_linear(x, weight, weight_scale, bias, dtype, backend)
    return out


def _refuse_meta(x: Tensor, weight: Tensor) -> None:
    """PyTorch multiplies with a weight that was never loaded, and returns whatever lies in memory."""
    if weight.is_meta and not x.is_meta:
        raise QVDError(
            "an int8 weight is still on the meta device: load the checkpoint into the model before running it, or "
            "let the offloading hook that holds the weight bring it back."
        )


def _unwatched(x: Tensor) -> bool:
    """Whether nothing but the result of an operator on x is asked for: no compiler, tracer, mode, profiler or gradient.

    Then the backend can be called as it is. The dispatcher's ten microseconds would be half the time of a small layer.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and not torch._C._autograd._profiler_enabled()
        and not (x.requires_grad and torch.is_grad_enabled())
    )
