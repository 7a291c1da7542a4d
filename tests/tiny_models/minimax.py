"""MiniMax-H3."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized

VIDEO, AUDIO = FRAMES * 4, 2  # tokens


def _minimax_h3() -> TinyFamily:
    """Text, then audio, then video in one sequence; the output is both predictions, one after the other."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=8,
        text_dim=TEXT,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    text, audio = noise(BATCH, TOKENS, TEXT), noise(BATCH, AUDIO, 8, seed=2)
    rows = torch.arange(TOKENS + AUDIO + VIDEO)
    text_rows, audio_rows, video_rows = torch.split(rows, [TOKENS, AUDIO, VIDEO])
    tags = torch.tensor([1] * TOKENS + [2] * AUDIO + [0] * VIDEO)
    places = torch.stack([rows, rows // 2, rows % 2], dim=1)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        output = model(
            latents,
            audio,
            text,
            torch.tensor([float(timestep)]),
            timestep_indices=torch.zeros_like(rows),
            token_tags=tags,
            position_ids=places,
            video_indices=video_rows,
            audio_indices=audio_rows,
            text_indices=text_rows,
        )
        return torch.cat([output.sample.flatten(1), output.audio_sample.flatten(1)], dim=1)

    return TinyFamily(randomized(model), noise(BATCH, VIDEO, 16), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "minimax": _minimax_h3,
}
