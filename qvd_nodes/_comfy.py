"""Everything QVD uses of ComfyUI, in one place; `tests/comfyui_api_stubs` stands in for it where there is none."""

from __future__ import annotations

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy.sample import fix_empty_latent_channels, prepare_noise, sample, sample_custom
from comfy_api.latest import ComfyExtension, io
from comfy_kitchen.tensor.base import BaseLayoutParams
from server import PromptServer

ops = comfy.ops
lora = comfy.lora
detection = comfy.model_detection
management = comfy.model_management
patchers = comfy.model_patcher
samplers = comfy.samplers
loading = comfy.sd
utils = comfy.utils

__all__ = [
    "BaseLayoutParams",
    "CallbacksMP",
    "ComfyExtension",
    "ModelPatcher",
    "PromptServer",
    "QuantizedLayout",
    "QuantizedTensor",
    "WrappersMP",
    "detection",
    "fix_empty_latent_channels",
    "folder_paths",
    "io",
    "latent_preview",
    "loading",
    "lora",
    "management",
    "ops",
    "patchers",
    "prepare_noise",
    "register_layout_class",
    "sample",
    "sample_custom",
    "samplers",
    "utils",
]
