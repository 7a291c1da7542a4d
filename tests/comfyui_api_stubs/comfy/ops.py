"""Layers that hold their weight wherever and in whatever type, and cast it for a call.

Simplified: no streams and no pinned memory. Dynamic VRAM, which needs a GPU, is there as far as a layer can notice it:
`weight_lowvram_function`, the patch of a weight that is not in place yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn


def run_every_op() -> None:
    """What every layer calls first, so that the user can interrupt between any two of them."""
    if not torch.compiler.is_compiling():
        comfy.model_management.throw_exception_if_processing_interrupted()


def cast_bias_weight(
    s: Any,
    input: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    bias_dtype: torch.dtype | None = None,
    offloadable: bool = False,
    compute_dtype: torch.dtype | None = None,
    want_requant: bool = False,
) -> tuple[Any, ...]:
    """The weight and bias of layer `s` on `device` in `dtype`, with the patches that are not in them yet.

    A quantized weight stays as it is unless its type changes or it has functions. want_requant: one that is patched on
    its way to the device (`weight_lowvram_function`) is quantized again. offloadable: a third value goes with them,
    for `uncast_bias_weight`.
    """
    if input is not None:
        dtype = dtype or input.dtype
        device = device or input.device
        bias_dtype = bias_dtype or dtype
    assert dtype is not None and device is not None
    weight = _cast(s, "weight", dtype, device, compute_dtype, want_requant)
    bias = None if s.bias is None else _cast(s, "bias", bias_dtype or dtype, device, compute_dtype, want_requant)
    return (weight, bias, (None, weight, bias)) if offloadable else (weight, bias)


def _cast(
    s: Any, name: str, dtype: torch.dtype, device: torch.device, compute_dtype: torch.dtype | None, requantize: bool
) -> Tensor:
    functions = getattr(s, f"{name}_function")
    stored = comfy.model_management.cast_to(getattr(s, name), None, device, copy=bool(functions))
    cast: Tensor = stored
    on_its_way = getattr(s, f"{name}_lowvram_function", None)
    if on_its_way is not None:
        cast = on_its_way(_plain(stored, compute_dtype or dtype))
        if requantize and not functions and isinstance(stored, QuantizedTensor):
            seed = comfy.utils.string_to_seed(s.seed_key)
            return stored.requantize_from_float(cast, scale="recalculate", stochastic_rounding=seed)
    if functions or cast.dtype != dtype:
        cast = _plain(cast, dtype)
    for function in functions:
        cast = function(cast)
    return cast


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to(dtype)
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def uncast_bias_weight(s: Any, weight: Tensor, bias: Tensor | None, offload_stream: Any) -> None:
    """Give the room of a cast weight back, once it is used for the last time."""


class CastWeightBiasOp:
    """What layers that cast have; the lists are a class's own until loading gives a layer its own."""

    comfy_cast_weights = False
    weight_function: list[Callable[[Tensor], Tensor]] = []  # noqa: RUF012 - as in ComfyUI
    bias_function: list[Callable[[Tensor], Tensor]] = []  # noqa: RUF012 - as in ComfyUI

    weight: Any
    bias: Any

    def _is_plain(self) -> bool:
        return not (self.comfy_cast_weights or self.weight_function or self.bias_function)


class disable_weight_init:
    """Layers whose memory is not filled when they are made: it is loaded afterwards."""

    class Linear(nn.Linear, CastWeightBiasOp):
        def reset_parameters(self) -> None:
            return None

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            run_every_op()
            return super().forward(*args, **kwargs) if self._is_plain() else self.forward_comfy_cast_weights(*args)

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight, bias, stream = cast_bias_weight(self, input, offloadable=True)
            out = nn.functional.linear(input, weight, bias)
            uncast_bias_weight(self, weight, bias, stream)
            return out

    class Conv2d(nn.Conv2d, CastWeightBiasOp):
        def reset_parameters(self) -> None:
            return None

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            run_every_op()
            return super().forward(*args, **kwargs) if self._is_plain() else self.forward_comfy_cast_weights(*args)

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight, bias, stream = cast_bias_weight(self, input, offloadable=True)
            out = self._conv_forward(input, weight, bias)
            uncast_bias_weight(self, weight, bias, stream)
            return out

    class Conv3d(nn.Conv3d, CastWeightBiasOp):
        def reset_parameters(self) -> None:
            return None

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            run_every_op()
            return super().forward(*args, **kwargs) if self._is_plain() else self.forward_comfy_cast_weights(*args)

        def forward_comfy_cast_weights(self, input: Tensor, autopad: str | None = None) -> Tensor:
            weight, bias, stream = cast_bias_weight(self, input, offloadable=True)
            out = self._conv_forward(input, weight, bias)
            uncast_bias_weight(self, weight, bias, stream)
            return out

    class LayerNorm(nn.LayerNorm, CastWeightBiasOp):
        def reset_parameters(self) -> None:
            return None

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            run_every_op()
            return super().forward(*args, **kwargs) if self._is_plain() else self.forward_comfy_cast_weights(*args)

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight, bias = None, None
            if self.weight is not None:
                weight, bias, _ = cast_bias_weight(self, input, offloadable=True)
            return nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class manual_cast(disable_weight_init):
    """The same, cast to the type of their input in every call."""

    class Linear(disable_weight_init.Linear):
        comfy_cast_weights = True

    class Conv2d(disable_weight_init.Conv2d):
        comfy_cast_weights = True

    class Conv3d(disable_weight_init.Conv3d):
        comfy_cast_weights = True

    class LayerNorm(disable_weight_init.LayerNorm):
        comfy_cast_weights = True
