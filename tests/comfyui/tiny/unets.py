"""Stable Video Diffusion, and the UNet of Stable Diffusion 1 and XL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, FRAMES, TEXT, TOKENS, TinyModel, noise, randomized

_CHANNELS, _LABELS = 4, 24
_SMALL: dict[str, Any] = {
    "image_size": 8,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "model_channels": 32,  # its group norms have 32 groups
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 0, 0],
    "context_dim": TEXT,
    "legacy": False,
}
_VIDEO: dict[str, Any] = {
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
    "num_classes": "sequential",
    "adm_in_channels": _LABELS,
    "use_linear_in_transformer": True,
}


def _build(conditions: dict[str, Any], context: Tensor, images: int, **changes: Any) -> TinyModel:
    operations = comfyui("ops").disable_weight_init
    unet = comfyui("ldm.modules.diffusionmodules.openaimodel").UNetModel(**(_SMALL | changes), operations=operations)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        steps = latents.new_full((images,), timestep)
        return model(latents, steps, context, transformer_options={}, **conditions)

    return TinyModel(randomized(unet), noise(images, _CHANNELS, 8, 8), call)


def _labels(images: int) -> Tensor:
    return noise(images, _LABELS, seed=3)


def _svd() -> TinyModel:
    """The frames are in the batch, and the one token of the picture is repeated for each."""
    images = BATCH * FRAMES
    picture = noise(BATCH, 1, TEXT, seed=2).repeat_interleave(FRAMES, dim=0)
    conditions = {"y": _labels(images), "num_video_frames": FRAMES}
    return _build(conditions, picture, images, **_VIDEO)


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "svd": _svd,
    "sd15": lambda: _build({}, noise(BATCH, TOKENS, TEXT, seed=2), BATCH),
    "sdxl": lambda: _build(
        {"y": _labels(BATCH)},
        noise(BATCH, TOKENS, TEXT, seed=2),
        BATCH,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=_LABELS,
    ),
}
