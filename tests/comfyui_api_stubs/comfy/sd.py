"""Loading a diffusion model."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor


def load_diffusion_model_state_dict(
    sd: dict[str, Any],
    model_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
    metadata: dict[str, str] | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher | None:
    """A MODEL from the entries of a file, which are taken out of `sd`; None for a model of no known kind.

    The denoiser's type is that of most of its float weights; ComfyUI also asks what the device can compute in.
    """
    prefix = "model.diffusion_model."
    if any(name.startswith(prefix) for name in sd):
        sd = comfy.utils.state_dict_prefix_replace(sd, {prefix: ""}, filter_keys=True)
    kind = next((kind for kind in comfy.supported_models.models if kind.matches({}, sd)), None)
    if kind is None:
        return None
    config = kind(kind.unet_config)
    config.set_inference_dtype(model_options.get("dtype") or _weight_dtype(sd), None)
    config.custom_operations = model_options.get("custom_operations")
    model = config.get_model(sd, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    model.load_model_weights(sd, "", assign=patcher.is_dynamic())
    return patcher


def load_diffusion_model(
    unet_path: str,
    model_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from a file; it remembers how it was loaded."""
    sd, metadata = comfy.utils.load_torch_file(unet_path, return_metadata=True)
    patcher = load_diffusion_model_state_dict(sd, model_options, metadata, disable_dynamic)
    if patcher is None:
        raise RuntimeError(f"no known kind of model: {unet_path}")
    patcher.cached_patcher_init = (load_diffusion_model, (unet_path, model_options))
    return patcher


def _weight_dtype(sd: dict[str, Any]) -> torch.dtype:
    dtypes = [t.dtype for t in sd.values() if t.is_floating_point() or isinstance(t, QuantizedTensor)]
    return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32
