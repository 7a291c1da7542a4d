"""LTX-Video and its successors."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _ltx_video() -> TinyFamily:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    text, mask = noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), mask, num_frames=FRAMES, height=4, width=4).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES * 16, 8), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "ltx": _ltx_video,
}
