"""Video UNets."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized


def _animatediff(linear: bool) -> TinyFamily:
    model = diffusers.UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        use_linear_projection=linear,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=True,
    )
    text = noise(BATCH, TOKENS, TEXT).repeat_interleave(FRAMES, dim=0)  # one text per frame

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(int(timestep)), text).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 8, 8), call)


def _svd() -> TinyFamily:
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
    )
    picture, times = noise(BATCH, 1, TEXT), torch.tensor([[6.0, 127.0, 0.02]] * BATCH)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(float(timestep)), picture, times).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 8, 8, 8), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "animatediff": lambda: _animatediff(linear=False),
    "animatediff-linear": lambda: _animatediff(linear=True),
    "svd": _svd,
}
