"""Wan and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _wan(image: bool) -> TinyFamily:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=16 if image else None,
        added_kv_proj_dim=32 if image else None,
        rope_max_seq_len=32,
    )
    # With an image, this model takes the last 512 tokens for the text.
    text, picture = noise(BATCH, 512 if image else TOKENS, TEXT), noise(BATCH, 3, 16, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, picture if image else None).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "wan": lambda: _wan(image=False),
    "wan-image": lambda: _wan(image=True),
}
