"""Devices, what is loaded, and the user's interruption. There is the CPU only, and room for every model at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

current_loaded_models: list[LoadedModel] = []


class InterruptProcessingException(BaseException):
    """The user has pressed stop."""


class LoadedModel:
    """A MODEL that is loaded; it is held here, where ComfyUI would let it go with its last user."""

    def __init__(self, model: ModelPatcher):
        self.model = model
        self.device = model.load_device


_interrupted = False


def interrupt_current_processing(value: bool = True) -> None:
    """Ask what is running to stop."""
    global _interrupted
    _interrupted = value


def processing_interrupted() -> bool:
    return _interrupted


def throw_exception_if_processing_interrupted() -> None:
    """What everything that takes long calls now and then."""
    global _interrupted
    if _interrupted:
        _interrupted = False
        raise InterruptProcessingException


def get_torch_device() -> torch.device:
    return torch.device("cpu")


def unet_offload_device() -> torch.device:
    return torch.device("cpu")


def module_size(module: nn.Module) -> int:
    """Bytes of everything in a module's state dict."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def cast_to(
    weight: Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    stream: Any = None,
    r: Tensor | None = None,
) -> Tensor:
    """A tensor elsewhere or in another type; the very same one where nothing is to be done and `copy` is not set."""
    if not copy and device in (None, weight.device) and dtype in (None, weight.dtype):
        return weight
    return weight.to(device=device or weight.device, dtype=dtype or weight.dtype, copy=copy)


def cast_to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None, copy: bool = False) -> Tensor:
    return cast_to(tensor, dtype=dtype, device=device, copy=copy)


def lora_compute_dtype(device: torch.device | None) -> torch.dtype:
    """What patches are applied in; on some GPUs it is float16."""
    return torch.float32


def load_models_gpu(
    models: Iterable[ModelPatcher],
    memory_required: int = 0,
    force_patch_weights: bool = False,
    minimum_memory_required: int | None = None,
    force_full_load: bool = False,
) -> None:
    """Load MODELs: the patches of a clone that is loaded already go out of the shared weights, its own go in."""
    for model in models:
        for loaded in list(current_loaded_models):
            if loaded.model is model or loaded.model.model is model.model:
                current_loaded_models.remove(loaded)
        model.partially_load(model.load_device, extra_memory=2**62, force_patch_weights=force_patch_weights)
        current_loaded_models.insert(0, LoadedModel(model))


def unload_model_and_clones(
    model: ModelPatcher, unload_additional_models: bool = True, all_devices: bool = False
) -> None:
    """Take a MODEL and its clones out of memory: their model holds its own weights again."""
    for loaded in list(current_loaded_models):
        if loaded.model.clone_base_uuid == model.clone_base_uuid:
            loaded.model.detach()
            current_loaded_models.remove(loaded)


def unload_all_models() -> None:
    """What the button for freeing memory does."""
    for loaded in list(current_loaded_models):
        loaded.model.detach()
        current_loaded_models.remove(loaded)


def is_device_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def free_memory(memory_required: float, device: torch.device, keep_loaded: Sequence[Any] = ()) -> list[LoadedModel]:
    """Unload what else is on the device, as far as needed; the stub's only device is the CPU."""
    return []
