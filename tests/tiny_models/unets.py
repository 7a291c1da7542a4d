"""Video UNets and what belongs to them: motion modules, a ControlNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def _unet3d() -> TinyFamily:
    model = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )
    text = noise(BATCH, TOKENS, TEXT)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(int(timestep)), text).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 8, 8), call)


def _i2vgen_xl() -> TinyFamily:
    model = diffusers.I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )
    text, picture, rate = noise(BATCH, TOKENS, TEXT), noise(BATCH, TEXT, seed=2), torch.full((BATCH,), 16.0)
    picture_latents = noise(BATCH, 4, FRAMES, 8, 8, seed=3)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(int(timestep)), rate, picture_latents, picture, text).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 8, 8), call)


def _motion_adapter() -> TinyFamily:
    """It has no forward pass of its own (its modules go into a UNet): all of one width run, one after the other."""
    model = diffusers.MotionAdapter(
        block_out_channels=(16,),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )

    def call(adapter: Any, latents: Tensor, timestep: float) -> Tensor:
        x: Tensor = latents.movedim(1, 2).flatten(0, 1)  # [BATCH * FRAMES, C, H, W]
        for block in (*adapter.down_blocks, adapter.mid_block, *adapter.up_blocks):
            for module in block.motion_modules:
                x = module(x, num_frames=FRAMES)
        return x

    return TinyFamily(randomized(model), noise(BATCH, 16, FRAMES, 4, 4), call)


def _sparse_controlnet(linear: bool) -> TinyFamily:
    """It does not look at the noisy latents: those given here are its condition."""
    model = diffusers.SparseControlNetModel(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_linear_projection=linear,
        use_simplified_condition_embedding=linear,
        conditioning_embedding_out_channels=(4, 8),
    )
    text, mask = noise(BATCH, TOKENS, TEXT).repeat_interleave(FRAMES, dim=0), torch.ones(BATCH, 1, FRAMES, 1, 1)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        condition = latents if linear else latents.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        marks = mask.expand(-1, -1, -1, *condition.shape[-2:])
        down, mid = model(
            latents, torch.tensor(int(timestep)), text, condition, conditioning_mask=marks, return_dict=False
        )
        return torch.cat([part.flatten() for part in (*down, mid)])

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 8, 8), call)


def _temporal_transformer() -> TinyFamily:
    model = diffusers.TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4
    )

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, num_frames=FRAMES).sample

    return TinyFamily(randomized(model), noise(BATCH * FRAMES, 16, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "animatediff": lambda: _animatediff(linear=False),
    "animatediff-linear": lambda: _animatediff(linear=True),
    "svd": _svd,
    "unet3d": _unet3d,
    "i2vgen": _i2vgen_xl,
    "motion-adapter": _motion_adapter,
    "sparse-control": lambda: _sparse_controlnet(linear=False),
    "sparse-control-linear": lambda: _sparse_controlnet(linear=True),
    "temporal-transformer": _temporal_transformer,
}
