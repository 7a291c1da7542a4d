"""Kandinsky 5 and 6."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps

_SOUNDS = 6  # audio tokens


def _kandinsky5() -> TinyFamily:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=24,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    text, pooled = noise(BATCH, TOKENS, TEXT), noise(BATCH, 24, seed=2)
    places = [torch.arange(size) for size in (FRAMES, 2, 2)]

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), pooled, places, torch.arange(TOKENS)).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _kandinsky6(**config: bool) -> TinyFamily:
    """The audio latents follow the video's, so that other latents are other sounds too."""
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=24,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_cond=False,
        **config,
    )
    text, pooled = noise(BATCH, TOKENS, TEXT), noise(BATCH, 24, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        sounds = latents[:, 0].reshape(BATCH, -1, 4)[:, :_SOUNDS] * 0.5
        video, audio = model(latents, text, pooled, timesteps(timestep), sounds, return_dict=False)
        return torch.cat((video.flatten(1), audio.flatten(1)), dim=1)

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _kandinsky6_sr() -> TinyFamily:
    model = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=2,
        out_visual_dim=4,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_window=(3, 3, 3),
    )

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep)).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 8, 8, 5), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "kandinsky5": _kandinsky5,
    "kandinsky6": lambda: _kandinsky6(ca_rope=True, cross_gates=True, fix_modulation=True),  # as released
    "kandinsky6-sr": _kandinsky6_sr,
}
