"""HunyuanVideo and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps

_SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT,
    "rope_axes_dim": (4, 6, 6),
}
_HUNYUAN = _SMALL | {"num_single_layers": 2, "num_refiner_layers": 1, "pooled_projection_dim": 8}


def _mask() -> Tensor:
    mask = torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0
    return mask


def _latents(frames: int = FRAMES, seed: int = 1) -> Tensor:
    return noise(BATCH, 4, frames, 4, 4, seed=seed)


def _hunyuan_video(condition: str | None = None) -> TinyFamily:
    model = diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN, image_condition_type=condition)
    text, pooled, mask = noise(BATCH, TOKENS, TEXT), noise(BATCH, 8, seed=2), _mask()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, mask, pooled, guidance=torch.full((BATCH,), 6.0)).sample

    return TinyFamily(randomized(model), _latents(), call)


def _framepack() -> TinyFamily:
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **_HUNYUAN, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    text, pooled, mask = noise(BATCH, TOKENS, TEXT), noise(BATCH, 8, seed=2), _mask()
    conditions = {
        "image_embeds": noise(BATCH, 3, 16, seed=3),
        "indices_latents": torch.arange(7, 7 + FRAMES),
        "guidance": torch.full((BATCH,), 6.0),
        "latents_clean": _latents(1, seed=4),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": _latents(2, seed=5),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": _latents(4, seed=6),
        "indices_latents_history_4x": torch.arange(0, 4),
    }

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, mask, pooled, **conditions).sample

    return TinyFamily(randomized(model), _latents(), call)


def _hunyuan_video_15(meanflow: bool = False) -> TinyFamily:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        **_SMALL, num_refiner_layers=1, text_embed_2_dim=16, image_embed_dim=16, use_meanflow=meanflow
    )
    conditions = {
        "encoder_hidden_states": noise(BATCH, TOKENS, TEXT),
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_2": noise(BATCH, 4, 16, seed=2),
        "encoder_attention_mask_2": torch.ones(BATCH, 4),
        "image_embeds": noise(BATCH, 3, 16, seed=3),
    }

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        end = timesteps(timestep - 100.0) if meanflow else None
        return model(latents, timesteps(timestep), timestep_r=end, **conditions).sample

    return TinyFamily(randomized(model), _latents(), call)


def _motif() -> TinyFamily:
    """With an image before the text, attention to the text in all blocks that have it, and one decoder block."""
    model = diffusers.MotifVideoTransformer3DModel(
        **_SMALL,
        num_single_layers=2,
        num_decoder_layers=1,
        image_embed_dim=16,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    text, mask, picture = noise(BATCH, TOKENS, TEXT), _mask(), noise(BATCH, 3, 16, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, mask, picture).sample

    return TinyFamily(randomized(model), _latents(), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "hunyuan": _hunyuan_video,
    "hunyuan-image": lambda: _hunyuan_video("token_replace"),
    "framepack": _framepack,
    "hunyuan15": _hunyuan_video_15,
    "hunyuan15-meanflow": lambda: _hunyuan_video_15(meanflow=True),
    "motif": _motif,
}
