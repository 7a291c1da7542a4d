"""HunyuanVideo 1 and 1.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, FRAMES, TEXT, TOKENS, TinyModel, noise, randomized, timesteps

_CHANNELS, _POOLED, _VISION = 4, 16, 24
_SMALL: dict[str, Any] = {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "vec_in_dim": None,
    "context_in_dim": TEXT,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}


def _build(conditions: dict[str, Any] | None = None, **changes: Any) -> TinyModel:
    operations = comfyui("ops").disable_weight_init
    model = comfyui("ldm.hunyuan_video.model").HunyuanVideo(**(_SMALL | changes), operations=operations)
    text = noise(BATCH, TOKENS, TEXT, seed=2)
    sigmas = torch.tensor([1.0, 0.5, 0.0])

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        options = {"sigmas": sigmas[:1], "sample_sigmas": sigmas}
        return model(latents, timesteps(timestep), text.clone(), transformer_options=options, **(conditions or {}))

    return TinyModel(randomized(model), noise(BATCH, _CHANNELS, FRAMES, 4, 4), call)


_VERSION_15: dict[str, Any] = {
    "depth_single_blocks": 0,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": _VISION,
}


def _conditions_15() -> dict[str, Any]:
    return {"txt_byt5": noise(BATCH, 2, 1472, seed=3), "clip_fea": noise(BATCH, 3, _VISION, seed=4)}


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "hunyuan": lambda: _build(
        {"y": noise(BATCH, _POOLED, seed=3), "guidance": torch.full((BATCH,), 6.0)},
        vec_in_dim=_POOLED,
        guidance_embed=True,
    ),
    "hunyuan-image": lambda: _build(
        {"y": noise(BATCH, _POOLED, seed=3), "guiding_frame_index": torch.zeros(BATCH)}, vec_in_dim=_POOLED
    ),
    "hunyuan15": lambda: _build(_conditions_15(), **_VERSION_15),
    "hunyuan15-sr": lambda: _build(_conditions_15(), **_VERSION_15, meanflow=True),
}
