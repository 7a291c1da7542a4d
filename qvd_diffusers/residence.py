"""Whether a model's weights are where its layers are: offloading and casting hooks may hold them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qvd_core.errors import QVDError

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
    hook = next((hook for hook in _HOOKS_THAT_MOVE_OR_CAST if _has_hook(model, hook)), None)
    if hook is not None:
        raise QVDError(f"this {name} has {hook.replace('_', ' ')} enabled: quantize it first, then enable that.")


def refuse_to_dequantize(model: nn.Module) -> None:
    """Raise QVDError when the codes are elsewhere or cast, or when an adapter is around the int8 layers."""
    name = type(model).__name__
    away = is_offloaded_to_disk(model) or any(tensor.is_meta for tensor in model.parameters())
    if away or _has_hook(model, "layerwise_casting"):
        raise QVDError(
            f"this {name} is offloaded, or its weights are cast by layers: dequantize it before enabling that."
        )
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            raise QVDError(f"this {name} holds a fused adapter: unfuse it, or unload it, before dequantizing.")


def is_offloaded_to_disk(model: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps weights in files: the tensors in the layers then hold anything."""
    return bool(groups_on_disk(model))


def groups_on_disk(model: nn.Module) -> dict[nn.Module, Any]:
    """By layer, the group of diffusers' group offloading that keeps its weights in a file."""
    groups: dict[nn.Module, Any] = {}
    for hook in _hooks(model, "group_offloading"):
        group = getattr(hook, "group", None)
        if group is not None and group.offload_to_disk_path:
            groups.update((layer, group) for part in group.modules for layer in part.modules())
    return groups


def _has_hook(model: nn.Module, name: str) -> bool:
    return next(_hooks(model, name), None) is not None


def _hooks(model: nn.Module, name: str) -> Iterator[Any]:
    """The hooks of diffusers by this name, in model order."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook(name) if registry is not None else None
        if hook is not None:
            yield hook
