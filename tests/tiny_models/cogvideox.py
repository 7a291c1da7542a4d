"""CogVideoX and its successors."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _cogvideox(**config: int) -> TinyFamily:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TOKENS,
        **config,
    )
    text = noise(BATCH, TOKENS, TEXT)
    ofs = torch.full((1,), 2.0) if config.get("ofs_embed_dim") else None

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), ofs=ofs).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "cogvideox": _cogvideox,
    "cogvideox-ofs": lambda: _cogvideox(ofs_embed_dim=16),
}
