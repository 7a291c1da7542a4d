"""LTX-Video and its successors."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps

LTX2_CONFIG = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": TEXT,
}
_SOUNDS = 6  # audio tokens


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


def _ltx2(**config: bool) -> TinyFamily:
    """The audio latents follow the video's, so that other latents are other sounds too."""
    model = diffusers.LTX2VideoTransformer3DModel(**LTX2_CONFIG, **config)
    text, sound_text = noise(BATCH, TOKENS, TEXT), noise(BATCH, TOKENS, TEXT, seed=2)
    mask = torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        video, audio = model(
            latents,
            latents[:, :_SOUNDS] * 0.5,
            text,
            sound_text,
            timesteps(timestep),
            sigma=timesteps(
                500.0
            ),  # LTX-2.3 modulates the prompt by it: held still, the prompt is what moves its range
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=FRAMES,
            height=4,
            width=4,
            audio_num_frames=_SOUNDS,
            return_dict=False,
        )
        return torch.cat((video.flatten(1), audio.flatten(1)), dim=1)

    return TinyFamily(randomized(model), noise(BATCH, FRAMES * 16, 8), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "ltx": _ltx_video,
    "ltx2": _ltx2,
    "ltx2-gated": lambda: _ltx2(
        gated_attn=True, cross_attn_mod=True, audio_gated_attn=True, audio_cross_attn_mod=True, perturbed_attn=True
    ),
}
