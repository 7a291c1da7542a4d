"""What a kind of model is: how to recognize it, how to build it, how its files name things."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_base import BaseModel, ModelType


class BASE:
    """unet_config: arguments of the denoiser's class. required_keys: entries that a file of this kind has."""

    unet_config: dict[str, Any] = {}  # noqa: RUF012 - as in ComfyUI
    required_keys: dict[str, Any] = {}  # noqa: RUF012 - as in ComfyUI
    sampling_settings: dict[str, Any] = {}  # noqa: RUF012 - as in ComfyUI
    latent_format: Any = LatentFormat
    manual_cast_dtype: torch.dtype | None = None
    custom_operations: Any = None
    quant_config: Any = None

    def __init__(self, unet_config: dict[str, Any]):
        self.unet_config = unet_config.copy()
        self.sampling_settings = self.sampling_settings.copy()
        self.latent_format = self.latent_format()

    @classmethod
    def matches(cls, unet_config: dict[str, Any], state_dict: dict[str, Any] | None = None) -> bool:
        """By the names of the entries alone; ComfyUI also finds the sizes."""
        return all(key.format("") in (state_dict or {}) for key in cls.required_keys)

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> ModelType:
        return ModelType.FLOW

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: torch.device | None = None) -> BaseModel:
        return BaseModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def process_unet_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return comfy.utils.state_dict_prefix_replace(state_dict, {"": "model.diffusion_model."})

    def set_inference_dtype(self, dtype: torch.dtype, manual_cast_dtype: torch.dtype | None) -> None:
        self.unet_config["dtype"] = dtype
        self.manual_cast_dtype = manual_cast_dtype

    def __getattr__(self, name: str) -> Any:
        """None for everything unknown, special methods included: `copy.copy` of such an object fails."""
        return None
