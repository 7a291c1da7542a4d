"""A second model that shares the weights of a first one: what QVD quantizes, so that the first stays as it is.

Layers of the copy can be replaced without the original's noticing, and ComfyUI moves, offloads and patches either on
its own. Only the memory of the weights is shared, as long as both are where they are.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.clock import SamplingClock
from qvd_core.errors import QVDError
from qvd_nodes._comfy import CallbacksMP, ModelPatcher, QuantizedTensor, patchers, utils
from qvd_nodes.layers import attach_clock, quantized_layers

_RUNTIME = ("_v", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_prefetch", "_known", "comfy_patched_weights")
"""Attributes that loading leaves on a module: places in a GPU's memory, pinned buffers, what was cast last."""
_MODEL_RUNTIME = ("dynamic_vbars", "dynamic_pins", "dynamic_patchers")
"""The same, on the BaseModel; ComfyUI makes them again."""
CALLBACK = "qvd"
_COPIED_PARTS = ("diffusion_model", "model_sampling")


def copy_base_model(model: nn.Module, originals: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of ComfyUI's BaseModel, on the same tensors; `model` has to be unloaded, or loaded without patches.

    originals: weights to take instead of the model's own, by full name: of those that are patched right now.
    Raises QVDError where the model holds something that cannot be copied.
    """
    twin = model.__class__.__new__(model.__class__)
    twin.__dict__.update({name: value for name, value in model.__dict__.items() if name not in _MODEL_RUNTIME})
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(model.__dict__[name])
    for part in _COPIED_PARTS:
        if part in model._modules:
            twin._modules[part] = _copy_tree(getattr(model, part), _below(part, originals or {}))
    twin.__dict__.update(current_patcher=None, model_loaded_weight_memory=0, model_offload_buffer_memory=0)
    twin.__dict__.update(lowvram_patch_counter=0, model_lowvram=False, current_weight_patches_uuid=None)
    attach_clock(twin.diffusion_model)  # type: ignore[arg-type]
    return twin


def patcher_of(model: nn.Module, source: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL `source`, with all its patches and options, around another BaseModel."""
    patcher: ModelPatcher = source.clone(model_override=(model, ({}, {}, {}, set())))
    patcher.parent = None
    patcher.size = 0  # counted again: the clone took over that of the float model
    patcher.patches_uuid = uuid.uuid4()
    patcher.clone_base_uuid = uuid.uuid4()
    adopt(patcher)
    return patcher


def adopt(patcher: ModelPatcher) -> None:
    """Tell ComfyUI how to deal with a MODEL whose layers are QVD's.

    It makes a fresh MODEL of these very weights when it asks for one, as for torch.compile under dynamic VRAM and for
    several GPUs: the way it knows would load the float file again. And the layers get ready when it has loaded them.
    """
    arguments = (patcher.model, patcher.backup, patcher.load_device, patcher.offload_device)
    patcher.cached_patcher_init = (_rebuild, arguments)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_LOAD, CALLBACK)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, CALLBACK, _prepare_layers)


def _prepare_layers(patcher: ModelPatcher, *_: Any) -> None:
    """After ComfyUI has loaded a MODEL: what torch.compile cannot trace is built before it looks."""
    for layer in quantized_layers(patcher.model).values():
        layer.prepare()


def _rebuild(
    model: nn.Module,
    backup: Mapping[str, Any],
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    patcher_class = ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    twin = copy_base_model(model, {key: entry.weight for key, entry in backup.items()})
    patcher: ModelPatcher = patcher_class(twin, load_device=load_device, offload_device=offload_device)
    adopt(patcher)
    return patcher


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _copy_tree(root: nn.Module, originals: Mapping[str, Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for name, parameter in root.named_parameters():
        memo[id(parameter)] = _second_parameter(originals.get(name, parameter))
    for buffer in root.buffers():
        memo[id(buffer)] = buffer  # moving replaces a buffer, it never writes into it
    for value in _runtime_values(root):
        memo[id(value)] = None
    for hook in root._forward_pre_hooks.values():
        clock = getattr(hook, "__self__", None)
        if isinstance(clock, SamplingClock):
            memo[id(clock)] = clock  # `attach_clock` gives the copy one of its own
    try:
        twin = copy.deepcopy(root, memo)
    except Exception as error:
        raise QVDError(
            f"this {type(root).__name__} cannot be copied ({type(error).__name__}: {error}): another node pack has put "
            "something into it. Place QVD Quantize Model right behind the loader."
        ) from error
    for module in twin.modules():
        _clean(module)
    return twin


def _second_parameter(tensor: Tensor) -> nn.Parameter:
    """Another parameter on the same memory: ComfyUI moves each model's parameters in place."""
    shared = tensor._copy_with() if isinstance(tensor, QuantizedTensor) else tensor.detach()
    return nn.Parameter(shared, requires_grad=False)


def _is_runtime(name: str) -> bool:
    return name in _RUNTIME or name.startswith("_pin") or name.endswith("_lowvram_function")


def _runtime_values(root: nn.Module) -> Iterator[Any]:
    """What must not be copied; numbers and the like are one object wherever they occur, and copying them is nothing."""
    for module in root.modules():
        for name, value in module.__dict__.items():
            if _is_runtime(name) and not isinstance(value, (bool, int, float, str, type(None))):
                yield value


def _clean(module: nn.Module) -> None:
    """Bring a module to the state before its first load."""
    own = module.__dict__
    for name in [name for name in own if _is_runtime(name)]:
        del own[name]
    if "prev_comfy_cast_weights" in own:
        own["comfy_cast_weights"] = own.pop("prev_comfy_cast_weights")
    for name in ("weight_function", "bias_function"):
        if name in own:
            own[name] = []


def original_weight(patcher: ModelPatcher, name: str) -> Tensor:
    """The tensor `name` of a MODEL before any patch, wherever it is now."""
    kept = patcher.backup.get(name)
    tensor: Tensor = utils.get_attr(patcher.model, name) if kept is None else kept.weight
    return tensor
