"""Sana-Video and SANA-WM."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps
from tests.tiny_models.ltx import LTX2_CONFIG


def _sana_video(guidance: bool) -> TinyFamily:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        mlp_ratio=2.0,
        rope_max_seq_len=16,
        guidance_embeds=guidance,
    )
    text, mask = noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0
    strength = torch.full((BATCH,), 4.5) if guidance else None

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), guidance=strength, encoder_attention_mask=mask).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


def _cameras() -> Tensor:
    """[BATCH, FRAMES, 20]: camera to world, one step aside per frame, then focal lengths and centre."""
    cameras = torch.zeros(BATCH, FRAMES, 20)
    pose = torch.eye(4).repeat(FRAMES, 1, 1)
    pose[:, 0, 3] = torch.arange(FRAMES) * 0.1
    cameras[..., :16] = pose.flatten(1)
    cameras[..., 16:] = torch.tensor([4.0, 4.0, 2.0, 2.0])
    return cameras


def _sana_wm() -> TinyFamily:
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,  # the second block
        linear_head_dim=16,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=TEXT,
        mlp_ratio=2.0,
    )
    text, mask = noise(BATCH, 1, TOKENS, TEXT), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0
    cameras, rays = _cameras(), noise(BATCH, 6, FRAMES, 4, 4, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        times = torch.full((BATCH, 1, FRAMES), float(timestep))
        return model(
            latents, times, text, encoder_attention_mask=mask, camera_conditions=cameras, chunk_plucker=rays
        ).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


def _refiner() -> TinyFamily:
    """The second stage of SANA-WM: LTX-2's layers, of which it runs those of the video."""
    model = diffusers.SanaWMLTX2RefinerTransformer3DModel(**LTX2_CONFIG, gated_attn=True, audio_gated_attn=True)
    text, mask = noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0
    places = model.build_rotary_emb_for_absolute_positions(
        batch_size=BATCH, frame_positions=list(range(FRAMES)), height=4, width=4, device=torch.device("cpu"), fps=24.0
    )

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        times = torch.full(latents.shape[:2], float(timestep))  # one per token
        return model(latents, text, times, places, mask).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES * 16, 8), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "sana-video": lambda: _sana_video(guidance=False),
    "sana-video-guidance": lambda: _sana_video(guidance=True),
    "sana-wm": _sana_wm,
    "sana-wm-refiner": _refiner,
}
