"""Mochi."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _mochi() -> TinyFamily:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        max_sequence_length=TOKENS,
    )
    text, mask = noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), mask).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "mochi": _mochi,
}
