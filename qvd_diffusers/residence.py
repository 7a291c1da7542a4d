"""Whether a model's weights are where its layers are: offloading and casting hooks may hold them elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from qvd_core.errors import QVDError
from qvd_diffusers.float_weights import is_offloaded_to_disk

_HOOKS_THAT_MOVE_OR_CAST = ("group_offloading", "layerwise_casting")


def refuse_out_of_reach(model: nn.Module) -> None:
    """Raise QVDError when weights are offloaded, or cast and moved by hooks: quantizing needs them as they are."""
    name = type(model).__name__
    empty = next((key for key, tensor in model.named_parameters() if tensor.is_meta), None)
    if empty is not None:
        raise QVDError(
            f"{empty} of this {name} is not in memory: quantize before enabling offloading, or while loading, with "
            "from_pretrained(..., quantization_config=...)."
        )
    hook = _first_hook(model, _HOOKS_THAT_MOVE_OR_CAST)
    if hook is not None:
        raise QVDError(f"this {name} has {hook.replace('_', ' ')} enabled: quantize it first, then enable that.")


def refuse_to_dequantize(model: nn.Module) -> None:
    """Raise QVDError when the codes are elsewhere or cast, or when an adapter is around the int8 layers."""
    name = type(model).__name__
    away = is_offloaded_to_disk(model) or any(tensor.is_meta for tensor in model.parameters())
    if away or _first_hook(model, ("layerwise_casting",)) is not None:
        raise QVDError(
            f"this {name} is offloaded, or its weights are cast by layers: dequantize it before enabling that."
        )
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            raise QVDError(f"this {name} holds a fused adapter: unfuse it, or unload it, before dequantizing.")


def _first_hook(model: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of these hooks of diffusers that some module has."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = next((name for name in names if registry is not None and registry.get_hook(name)), None)
        if hook is not None:
            return hook
    return None
