"""Wan and its relatives."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps

IMAGE_TEXT = 512  # these models take the last 512 tokens for the text where there is an image
_SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_IMAGE = {"image_dim": 16, "added_kv_proj_dim": 32}


def _latents(frames: int = FRAMES, size: int = 4, seed: int = 1) -> Tensor:
    return noise(BATCH, 4, frames, size, size, seed=seed)


def _text(image: bool = False) -> Tensor:
    return noise(BATCH, IMAGE_TEXT if image else TOKENS, TEXT)


def _picture() -> Tensor:
    return noise(BATCH, 3, 16, seed=2)


def _wan(model_class: str, image: bool) -> TinyFamily:
    model = getattr(diffusers, model_class)(**_SMALL, **(_IMAGE if image else {}))
    text, picture = _text(image), _picture() if image else None

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, picture).sample

    return TinyFamily(randomized(model), _latents(), call)


def _vace() -> TinyFamily:
    model = diffusers.WanVACETransformer3DModel(**_SMALL, **_IMAGE, vace_layers=[0, 1], vace_in_channels=6)
    text, picture, control = _text(image=True), _picture(), noise(BATCH, 6, FRAMES, 4, 4, seed=3)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, picture, control_hidden_states=control).sample

    return TinyFamily(randomized(model), _latents(), call)


def _animate() -> TinyFamily:
    model = diffusers.WanAnimateTransformer3DModel(
        **(_SMALL | {"in_channels": 12}),
        **_IMAGE,
        latent_channels=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    text, picture = _text(image=True), _picture()
    pose, face = _latents(FRAMES - 1, seed=3), noise(BATCH, 3, 4 * (FRAMES - 2) + 1, 8, 8, seed=4)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, picture, pose, face).sample

    return TinyFamily(randomized(model), noise(BATCH, 12, FRAMES, 4, 4), call)


def _animate_2() -> TinyFamily:
    """A reference pass fills the cache of keys and values, then the pass that denoises reads it."""
    model = diffusers.WanAnimate2Transformer3DModel(
        text_len=TOKENS, in_dim=8, dim=32, ffn_dim=64, freq_dim=32, text_dim=TEXT, out_dim=4, num_heads=2, num_layers=2
    )
    module: Any = importlib.import_module(type(model).__module__)
    text, picture = list(_text()), noise(BATCH, 3, 1280, seed=2)
    condition, reference = list(_latents(seed=3)), list(_latents(FRAMES - 1, seed=4))
    reference_grid = torch.tensor([[FRAMES - 1, 2, 2]] * BATCH)
    frames, area = 4 * (FRAMES - 2) + 1, [32, 32]  # of the whole video, in pixels
    eager = module.create_block_mask
    with mock.patch.object(module, "create_block_mask", lambda *args, _compile, **options: eager(*args, **options)):
        masks = {(FRAMES - 1, 4): model.create_mask(FRAMES - 1, 4, torch.device("cpu"))}  # compiled: 20 seconds

    def call(model: Any, latents: Tensor, timestep: float) -> Tensor:
        cache = module.WanAnimate2KVCache(2)
        model.block_masks = masks
        common: dict[str, Any] = {"kv_cache": cache, "encoder_hidden_states_image": picture}
        model(
            reference,
            timesteps(timestep),
            text,
            [entry[:, : FRAMES - 1] for entry in condition],
            kv_cache_mode="extract",
            seq_len=4 * (FRAMES - 1),
            offset_grid_sizes=reference_grid,
            **common,
        )
        samples = model(
            list(latents),
            timesteps(timestep),
            text,
            condition,
            kv_cache_mode="cached",
            seq_len=4 * FRAMES,
            reference_grid_sizes=reference_grid,
            origin_len=frames,
            origin_area=area,
            **common,
        ).sample
        return torch.stack(list(samples))

    return TinyFamily(randomized(model), _latents(), call)


def _skyreels_forcing() -> TinyFamily:
    """Diffusion forcing: one timestep per frame."""
    model = diffusers.SkyReelsV2Transformer3DModel(**_SMALL)
    text = _text()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        steps = torch.full((BATCH, FRAMES), float(timestep))
        return model(latents, steps, text, enable_diffusion_forcing=True).sample

    return TinyFamily(randomized(model), _latents(), call)


def _skyreels_fps() -> TinyFamily:
    model = diffusers.SkyReelsV2Transformer3DModel(**_SMALL, **_IMAGE, inject_sample_info=True)
    text, picture = _text(image=True), _picture()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, picture, fps=[0, 1]).sample

    return TinyFamily(randomized(model), _latents(), call)


def _anyflow() -> TinyFamily:
    model = diffusers.AnyFlowTransformer3DModel(**_SMALL, image_dim=16)
    text, picture = _text(), _picture()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        steps = timesteps(timestep)[:, None].expand(BATCH, FRAMES)
        return model(latents, steps, steps - 100.0, text, picture).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _anyflow_far() -> TinyFamily:
    model = diffusers.AnyFlowFARTransformer3DModel(
        **_SMALL, image_dim=16, chunk_partition=(1, 1, 1), full_chunk_limit=2
    )
    text, picture = _text(), _picture()
    mask = model.build_attention_mask(chunk_partition=[1, 1, 1], height=4, width=4, device=torch.device("cpu"))

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        steps = timesteps(timestep)[:, None].expand(BATCH, FRAMES)
        return model(
            latents,
            timestep=steps,
            r_timestep=steps - 100.0,
            encoder_hidden_states=text,
            encoder_hidden_states_image=picture,
            chunk_partition=[1, 1, 1],
            attention_mask=mask,
        ).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _helios() -> TinyFamily:
    config = {key: value for key, value in _SMALL.items() if key != "rope_max_seq_len"}
    model = diffusers.HeliosTransformer3DModel(**config, rope_dim=(4, 6, 6), is_amplify_history=True)
    text = _text()
    history = {
        "indices_hidden_states": torch.arange(3, 3 + FRAMES).expand(BATCH, -1),
        "indices_latents_history_short": torch.arange(2, 3).expand(BATCH, -1),
        "indices_latents_history_mid": torch.arange(0, 2).expand(BATCH, -1),
        "indices_latents_history_long": torch.arange(0, 4).expand(BATCH, -1),
        "latents_history_short": _latents(1, seed=3),
        "latents_history_mid": _latents(2, seed=4),
        "latents_history_long": _latents(4, seed=5),
    }

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, **history).sample

    return TinyFamily(randomized(model), _latents(), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "wan": lambda: _wan("WanTransformer3DModel", image=False),
    "wan-image": lambda: _wan("WanTransformer3DModel", image=True),
    "wan-vace": _vace,
    "wan-animate": _animate,
    "wan-animate2": _animate_2,
    "skyreels": _skyreels_forcing,
    "skyreels-fps": _skyreels_fps,
    "chronoedit": lambda: _wan("ChronoEditTransformer3DModel", image=True),
    "anyflow": _anyflow,
    "anyflow-far": _anyflow_far,
    "helios": _helios,
}
