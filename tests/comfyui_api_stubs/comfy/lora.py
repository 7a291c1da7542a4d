"""Applying patches to a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import comfy.model_management
import torch
from torch import Tensor


class _Adapter(Protocol):
    """LoRA, LoHa and the like: `weights` are its factors."""

    weights: Any

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor: ...


def calculate_weight(
    patches: Sequence[tuple[Any, ...]],
    weight: Tensor,
    key: str,
    intermediate_dtype: torch.dtype = torch.float32,
    original_weights: Any = None,
) -> Tensor:
    """Apply patches (strength, value, strength of the model, offset, function) to a weight, which may be written to.

    value: an adapter, or ("diff", (difference,)), or (difference,). Other kinds, and parts of a weight, are left out. A
    difference of another shape is not applied, but the weight may be padded to it, as a control LoRA asks.
    """
    for strength, value, strength_model, _offset, function in patches:
        weight = weight * strength_model
        change: Callable[[Tensor], Tensor] = function or (lambda tensor: tensor)
        if hasattr(value, "calculate_weight"):
            adapter: _Adapter = value
            weight = adapter.calculate_weight(weight, key, strength, strength_model, None, change, intermediate_dtype)
            continue
        parts = value[1] if value[0] == "diff" else value
        difference = comfy.model_management.cast_to_device(parts[0], weight.device, weight.dtype)
        if len(parts) > 1 and parts[1]["pad_weight"]:
            weight = _padded(weight, difference.shape)
        if difference.shape == weight.shape:
            weight = weight + change(strength * difference)
    return weight


def _padded(weight: Tensor, shape: torch.Size) -> Tensor:
    padded = weight.new_zeros(shape)
    padded[tuple(slice(size) for size in weight.shape)] = weight
    return padded
