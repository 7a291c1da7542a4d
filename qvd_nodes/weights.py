"""The float weights of a MODEL, as they would be sampled with: LoRAs and other patches included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.weight_source import WeightSource
from qvd_nodes._comfy import ModelPatcher, lora, management, utils
from qvd_nodes.layers import quantized_layers

PREFIX = "diffusion_model."


def denoiser(patcher: ModelPatcher) -> nn.Module:
    """The denoiser of a MODEL. Raises QVDError when what is connected is something else."""
    model = getattr(getattr(patcher, "model", None), "diffusion_model", None)
    if not isinstance(model, nn.Module):
        raise QVDError(
            f"a {type(getattr(patcher, 'model', patcher)).__name__} is no diffusion model: connect the MODEL output "
            "of a loader (Load Diffusion Model, Load Checkpoint)."
        )
    return model


def float_denoiser(patcher: ModelPatcher) -> nn.Module:
    """The denoiser of a MODEL that QVD has not quantized yet. Raises QVDError otherwise."""
    model = denoiser(patcher)
    if quantized_layers(model):
        raise QVDError(
            f"this MODEL ({type(model).__name__}) is quantized by QVD already: connect the one from before QVD "
            "Quantize Model, in full precision."
        )
    return model


def unload(patcher: ModelPatcher) -> None:
    """Take the MODEL and all its clones out of the GPU, so that the model holds its own weights and no other's.

    While a clone is loaded, its patches are in the weights that all clones share.
    """
    management.unload_model_and_clones(patcher)


def patched_weights(patcher: ModelPatcher, device: torch.device | None = None) -> WeightSource:
    """Reads one layer's weight and bias, patches applied, onto `device` (default: where ComfyUI computes).

    For a MODEL that is unloaded. Unpatched tensors keep their dtype, patched ones are float32.
    """
    target = management.get_torch_device() if device is None else device

    def read(layer: str) -> tuple[Tensor, Tensor | None]:
        weight = patched_tensor(patcher, f"{layer}.weight", target)
        if weight is None:
            raise QVDError(f"layer {layer} of this MODEL has no weight: another node pack has changed it.")
        return weight, patched_tensor(patcher, f"{layer}.bias", target)

    return read


def patched_tensor(patcher: ModelPatcher, name: str, device: torch.device) -> Tensor | None:
    """One tensor of the denoiser, by its name in it, patches applied; None where there is none."""
    key = PREFIX + name
    kept = patcher.backup.get(key)
    tensor = utils.get_attr(patcher.model, key) if kept is None else kept.weight
    if tensor is None:
        return None
    patches = patcher.patches.get(key)
    if not patches:
        return management.cast_to_device(tensor.detach(), device, None)
    value = management.cast_to_device(tensor.detach(), device, torch.float32, copy=True)
    changed: Tensor = lora.calculate_weight(patches, value, key)
    if changed.shape != tensor.shape:
        raise QVDError(
            f"a patch of this MODEL changes the shape of {name} from {list(tensor.shape)} to {list(changed.shape)}: "
            "such a patch (a control LoRA) has to go behind QVD Quantize Model, with that layer kept in full precision."
        )
    return changed


def without_patches(patcher: ModelPatcher, names: Iterable[str]) -> None:
    """Forget the patches of these tensors of the denoiser: they are in its new weights."""
    for name in names:
        patcher.patches.pop(PREFIX + name, None)
