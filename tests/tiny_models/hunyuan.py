"""HunyuanVideo and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _hunyuan_video(condition: str | None = None) -> TinyFamily:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    )
    text, pooled, mask = noise(BATCH, TOKENS, TEXT), noise(BATCH, 8, seed=2), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, mask, pooled, guidance=torch.full((BATCH,), 6.0)).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "hunyuan": _hunyuan_video,
    "hunyuan-image": lambda: _hunyuan_video("token_replace"),
}
