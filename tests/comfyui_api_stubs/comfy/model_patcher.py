"""MODEL: a BaseModel with patches, options and whatever other packs attach; clones share the BaseModel.

Simplified: loading is whole, or it leaves every layer that can cast its weight where it is and patches it in each call
(`lowvram_model_memory` above zero that does not hold the model). No hooks, no injections, no dynamic VRAM.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor, nn


class _Backup(NamedTuple):
    weight: Tensor
    inplace_update: bool


class LowVramPatch:
    """The patches of one weight, as a function that a layer applies to it in every call."""

    is_lowvram_patch = True

    def __init__(
        self,
        key: str,
        patches: Mapping[str, list[tuple[Any, ...]]],
        convert_func: Callable[..., Tensor] | None = None,
        set_func: Callable[..., Tensor | None] | None = None,
    ):
        self.key = key
        self.patches = patches

    def __call__(self, weight: Tensor) -> Tensor:
        return comfy.lora.calculate_weight(self.patches[self.key], weight, self.key, intermediate_dtype=weight.dtype)


def get_key_weight(
    model: nn.Module, key: str
) -> tuple[Any, Callable[..., Tensor | None] | None, Callable[..., Tensor] | None]:
    """A weight, and its layer's own ways to set it and to make it float, where it has any."""
    parent, _, name = key.rpartition(".")
    layer = comfy.utils.get_attr(model, parent) if parent else model
    return getattr(layer, name), getattr(layer, f"set_{name}", None), getattr(layer, f"convert_{name}", None)


class ModelPatcher:
    """See the module; `backup`, of the weights that are patched right now, is shared by all clones."""

    def __init__(
        self,
        model: Any,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ):
        self.model = model
        self.load_device = load_device
        self.offload_device = offload_device
        self.size = size
        self.weight_inplace_update = weight_inplace_update
        self.patches: dict[str, list[tuple[Any, ...]]] = {}
        self.patches_uuid = uuid.uuid4()
        self.clone_base_uuid = uuid.uuid4()
        self.backup: dict[str, Any] = {}
        self.backup_buffers: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.pinned: set[str] = set()
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.attachments: dict[str, Any] = {}
        self.callbacks: dict[str, dict[str | None, list[Callable[..., Any]]]] = {}
        self.wrappers: dict[str, dict[str | None, list[Callable[..., Any]]]] = {}
        self.parent: ModelPatcher | None = None
        self.cached_patcher_init: tuple[Any, ...] | None = None
        for name, value in (
            ("model_loaded_weight_memory", 0),
            ("model_offload_buffer_memory", 0),
            ("lowvram_patch_counter", 0),
            ("model_lowvram", False),
            ("current_weight_patches_uuid", None),
        ):
            if not hasattr(model, name):
                setattr(model, name, value)

    def is_dynamic(self) -> bool:
        return False

    def model_size(self) -> int:
        self.size = self.size or comfy.model_management.module_size(self.model)
        return self.size

    def loaded_size(self) -> int:
        size: int = self.model.model_loaded_weight_memory
        return size

    def get_clone_model_override(self) -> tuple[Any, tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]]:
        return self.model, (self.backup, self.backup_buffers, self.object_patches_backup, self.pinned)

    def clone(
        self, disable_dynamic: bool = False, model_override: Any = None, force_deepcopy: bool = False
    ) -> ModelPatcher:
        """A MODEL with the same patches and options, on the same BaseModel or on the one of `model_override`.

        force_deepcopy: on a fresh one, made as `cached_patcher_init` says.
        """
        if model_override is None and force_deepcopy:
            if self.cached_patcher_init is None:
                raise RuntimeError("cached_patcher_init is not set: this MODEL cannot be made again")
            make, arguments = self.cached_patcher_init[:2]
            model_override = make(*arguments, disable_dynamic=True).get_clone_model_override()
        model, shared = model_override or self.get_clone_model_override()
        twin = type(self)(model, self.load_device, self.offload_device, self.model_size(), self.weight_inplace_update)
        twin.patches = {key: list(patches) for key, patches in self.patches.items()}
        twin.patches_uuid = self.patches_uuid
        twin.clone_base_uuid = self.clone_base_uuid
        twin.object_patches = dict(self.object_patches)
        twin.model_options = comfy.utils.deepcopy_list_dict(self.model_options)
        twin.parent = self
        twin.backup, twin.backup_buffers, twin.object_patches_backup, twin.pinned = shared
        for key, attachment in self.attachments.items():
            on_clone = getattr(attachment, "on_model_patcher_clone", None)
            twin.attachments[key] = attachment if on_clone is None else on_clone()
        twin.callbacks = comfy.utils.deepcopy_list_dict(self.callbacks)
        twin.wrappers = comfy.utils.deepcopy_list_dict(self.wrappers)
        twin.cached_patcher_init = self.cached_patcher_init
        for callback in self.get_all_callbacks(CallbacksMP.ON_CLONE):
            callback(self, twin)
        return twin

    def add_patches(
        self, patches: Mapping[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        """Add the patches of the weights that the model has; returns their names. Parts of a weight are left out."""
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches.setdefault(key, []).append((strength_patch, patches[key], strength_model, None, None))
        self.patches_uuid = uuid.uuid4()
        return known

    def add_object_patch(self, name: str, obj: Any) -> None:
        self.object_patches[name] = obj

    def get_model_object(self, name: str) -> Any:
        for objects in (self.object_patches, self.object_patches_backup):
            if name in objects:
                return objects[name]
        return comfy.utils.get_attr(self.model, name)

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:
        """Merge the patches of one weight into it, or return what it would be. Rounds to the nearest."""
        weight, set_weight, convert_weight = get_key_weight(self.model, key)
        if key not in self.patches:
            return weight
        if key not in self.backup and not return_weight:
            self.backup[key] = _Backup(weight.to(device=self.offload_device), False)
        device = device_to or weight.device
        dtype = comfy.model_management.lora_compute_dtype(device)
        value = comfy.model_management.cast_to_device(weight, device, dtype, copy=True)
        if convert_weight is not None:
            value = convert_weight(value, inplace=True)
        value = comfy.lora.calculate_weight(self.patches[key], value, key)
        if set_weight is not None:
            seed = comfy.utils.string_to_seed(key)
            return set_weight(value, inplace_update=inplace_update, seed=seed, return_weight=return_weight)
        value = value.to(weight.dtype)
        if return_weight:
            return value
        comfy.utils.set_attr_param(self.model, key, value)
        return None

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Bring the weights, patches merged, to a device; or leave them, each layer to cast and patch its own."""
        for name, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            offload = not full_load and hasattr(module, "comfy_cast_weights")
            if hasattr(module, "comfy_cast_weights"):
                module.weight_function, module.bias_function = [], []
            for parameter in own:
                key = f"{name}.{parameter}" if name else parameter
                if offload and key in self.patches:
                    getattr(module, f"{parameter}_function").append(LowVramPatch(key, self.patches))
                elif not offload:
                    self.patch_weight_to_device(key, device_to=device_to)
            if offload:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
            elif own:
                module.comfy_patched_weights = True
        self.model.model_lowvram = not full_load
        if full_load:
            self.model.to(device_to)
        self.model.model_loaded_weight_memory = self.model_size() if full_load else 1
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

    def patch_model(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: int = 0,
        load_weights: bool = True,
        force_patch_weights: bool = False,
    ) -> Any:
        """Put the patched objects in their places, and load; lowvram_model_memory: bytes to use, 0 for all."""
        for name, value in self.object_patches.items():
            before = comfy.utils.set_attr(self.model, name, value)
            self.object_patches_backup.setdefault(name, before)
        if load_weights:
            self.load(device_to, lowvram_model_memory, force_patch_weights, full_load=lowvram_model_memory == 0)
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """Put everything back as it was before `patch_model`."""
        if unpatch_weights:
            for module in self.model.modules():
                if hasattr(module, "prev_comfy_cast_weights"):
                    module.comfy_cast_weights = module.prev_comfy_cast_weights
                    del module.prev_comfy_cast_weights
                    module.weight_function, module.bias_function = [], []
                if hasattr(module, "comfy_patched_weights"):
                    del module.comfy_patched_weights
            for key, kept in self.backup.items():
                comfy.utils.set_attr_param(self.model, key, kept.weight)
            self.backup.clear()
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.model.to(device_to)
            self.model.model_loaded_weight_memory = 0
            self.model.model_lowvram = False
        for name, value in self.object_patches_backup.items():
            comfy.utils.set_attr(self.model, name, value)
        self.object_patches_backup.clear()

    def partially_load(self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
        """Load with at most so many bytes more; does nothing where these very weights are loaded already."""
        current = self.model.current_weight_patches_uuid
        changed = current is not None and (current != self.patches_uuid or force_patch_weights)
        self.unpatch_model(self.offload_device, unpatch_weights=changed)
        self.patch_model(load_weights=False)
        if self.model.model_loaded_weight_memory and not self.model.model_lowvram:
            return 0
        self.load(device_to, extra_memory, force_patch_weights, full_load=extra_memory > self.model_size())
        return self.loaded_size()

    def detach(self, unpatch_all: bool = True) -> Any:
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        for callback in self.get_all_callbacks(CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def add_callback_with_key(self, call_type: str, key: str | None, callback: Callable[..., Any]) -> None:
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type: str, key: str | None) -> None:
        self.callbacks.get(call_type, {}).pop(key, None)

    def get_all_callbacks(self, call_type: str) -> list[Callable[..., Any]]:
        return [callback for callbacks in self.callbacks.get(call_type, {}).values() for callback in callbacks]

    def add_wrapper_with_key(self, wrapper_type: str, key: str | None, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, wrapper_type: str, key: str | None) -> list[Any]:
        found: list[Any] = self.wrappers.get(wrapper_type, {}).get(key, [])
        return found

    def remove_wrappers_with_key(self, wrapper_type: str, key: str | None) -> None:
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)


CoreModelPatcher = ModelPatcher
"""What loaders make; on NVIDIA's GPUs it is one that loads weights as they are used."""
