"""Tiny random models of every family, and how to call them. Every parameter is random: nothing is trivially 0 or 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

BATCH, FRAMES, TEXT, TOKENS = 2, 3, 32, 5


@dataclass(frozen=True)
class TinyFamily:
    """A model that no test may change, latents for it, and how to call it (or a copy) on latents at a timestep."""

    model: nn.Module
    latents: Tensor
    call: Callable[[nn.Module, Tensor, float], Tensor]

    def forward(self, model: nn.Module, timestep: float = 500.0) -> Tensor:
        return self.call(model, self.latents, timestep)


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _batch(timestep: float) -> Tensor:
    return torch.full((BATCH,), float(timestep))


def _randomized(model: nn.Module) -> nn.Module:
    """Norms, biases and tables away from 0 and 1, and no zero-initialised output."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and parameter.dim() == 1:
            parameter.data = 1.0 + 0.3 * noise
        elif name.endswith("weight"):
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise
    return model.eval().requires_grad_(False)


def _wan(image: bool) -> TinyFamily:
    model = WanTransformer3DModel(
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
    text, picture = _noise(BATCH, 512 if image else TOKENS, TEXT), _noise(BATCH, 3, 16, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, _batch(timestep), text, picture if image else None).sample

    return TinyFamily(_randomized(model), _noise(BATCH, 4, FRAMES, 4, 4), call)


def _hunyuan_video(condition: str | None = None) -> TinyFamily:
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    )
    text, pooled, mask = _noise(BATCH, TOKENS, TEXT), _noise(BATCH, 8, seed=2), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, _batch(timestep), text, mask, pooled, guidance=torch.full((BATCH,), 6.0)).sample

    return TinyFamily(_randomized(model), _noise(BATCH, 4, FRAMES, 4, 4), call)


def _ltx_video() -> TinyFamily:
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    text, mask = _noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS)
    mask[1, 3:] = 0

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, _batch(timestep), mask, num_frames=FRAMES, height=4, width=4).sample

    return TinyFamily(_randomized(model), _noise(BATCH, FRAMES * 16, 8), call)


def _cogvideox(**config: int) -> TinyFamily:
    model = CogVideoXTransformer3DModel(
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
    text = _noise(BATCH, TOKENS, TEXT)
    ofs = torch.full((1,), 2.0) if config.get("ofs_embed_dim") else None

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, _batch(timestep), ofs=ofs).sample

    return TinyFamily(_randomized(model), _noise(BATCH, FRAMES, 4, 4, 4), call)


def _mochi() -> TinyFamily:
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        max_sequence_length=TOKENS,
    )
    text, mask = _noise(BATCH, TOKENS, TEXT), torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 3:] = False

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, _batch(timestep), mask).sample

    return TinyFamily(_randomized(model), _noise(BATCH, 4, FRAMES, 4, 4), call)


def _animatediff(linear: bool) -> TinyFamily:
    model = UNetMotionModel(
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
    text = _noise(BATCH, TOKENS, TEXT).repeat_interleave(FRAMES, dim=0)  # one text per frame

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(int(timestep)), text).sample

    return TinyFamily(_randomized(model), _noise(BATCH, 4, FRAMES, 8, 8), call)


def _svd() -> TinyFamily:
    model = UNetSpatioTemporalConditionModel(
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
    picture, times = _noise(BATCH, 1, TEXT), torch.tensor([[6.0, 127.0, 0.02]] * BATCH)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, torch.tensor(float(timestep)), picture, times).sample

    return TinyFamily(_randomized(model), _noise(BATCH, FRAMES, 8, 8, 8), call)


_BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "wan": lambda: _wan(image=False),
    "wan-image": lambda: _wan(image=True),
    "hunyuan": _hunyuan_video,
    "hunyuan-image": lambda: _hunyuan_video("token_replace"),
    "ltx": _ltx_video,
    "cogvideox": _cogvideox,
    "cogvideox-ofs": lambda: _cogvideox(ofs_embed_dim=16),
    "mochi": _mochi,
    "animatediff": lambda: _animatediff(linear=False),
    "animatediff-linear": lambda: _animatediff(linear=True),
    "svd": _svd,
}

TINY_FAMILIES = tuple(_BUILDERS)


@cache
def tiny_family(name: str) -> TinyFamily:
    """The one tiny model of this name; shared between tests."""
    torch.manual_seed(0)
    return _BUILDERS[name]()
