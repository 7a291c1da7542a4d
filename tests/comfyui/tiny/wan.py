"""Wan and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, FRAMES, TEXT, TOKENS, TinyModel, noise, randomized, timesteps

_CHANNELS, _PICTURE_TOKENS = 4, 3
_SIZE = (4, 8)  # two and four patches: a frame is eight tokens
_SMALL: dict[str, Any] = {
    "in_dim": _CHANNELS,
    "out_dim": _CHANNELS,
    "dim": 32,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": TEXT,
    "num_heads": 2,
    "num_layers": 2,
}


def _latents(frames: int = FRAMES, channels: int = _CHANNELS, seed: int = 1) -> Tensor:
    return noise(BATCH, channels, frames, *_SIZE, seed=seed)


def _text() -> Tensor:
    return noise(BATCH, TOKENS, TEXT, seed=2)


def _picture(seed: int = 3) -> Tensor:
    return noise(BATCH, _PICTURE_TOKENS, 1280, seed=seed)


def _build(
    module: str,
    class_name: str,
    conditions: dict[str, Any] | None = None,
    channels: int = _CHANNELS,
    other_timesteps: tuple[float, ...] = (),
    frames: int = FRAMES,
    **changes: Any,
) -> TinyModel:
    """conditions: more arguments of the forward pass, none of which may depend on the latents."""
    operations = comfyui("ops").disable_weight_init
    config = _SMALL | {"in_dim": channels} | changes
    model = randomized(getattr(comfyui(f"ldm.wan.{module}"), class_name)(**config, operations=operations))
    text = _text()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        options: dict[str, Any] = {}
        return model(latents, timesteps(timestep), text, transformer_options=options, **(conditions or {}))

    return TinyModel(model, _latents(frames, channels), call, other_timesteps)


def _animate() -> TinyModel:
    tiny = _build(
        "model_animate",
        "AnimateWanModel",
        {"clip_fea": _picture(), "pose_latents": _latents(FRAMES - 1, 16, seed=4), "face_pixel_values": _faces()},
        num_layers=5,  # a face adapter for every fifth block
    )
    # The encoder of the motion wants pictures of 512 by 512: what it makes of them is all that matters here.
    tiny.model.motion_encoder.get_motion = _motion_of
    return tiny


def _faces() -> Tensor:
    return noise(BATCH, 3, 4, 16, 16, seed=5)


def _motion_of(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)[:, :512]


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "wan": lambda: _build("model", "WanModel", model_type="t2v"),
    "wan-image": lambda: _build("model", "WanModel", {"clip_fea": _picture()}, model_type="i2v"),
    "wan-reference": lambda: _build(
        "model",
        "WanModel",
        {"clip_fea": _picture(), "reference_latent": noise(BATCH, _CHANNELS, *_SIZE, seed=4)},
        model_type="i2v",
        in_dim_ref_conv=_CHANNELS,
    ),
    "wan-causal": lambda: _build("ar_model", "CausalWanModel", model_type="t2v"),
    "wan-camera": lambda: _build(
        "model",
        "CameraWanModel",
        {
            "clip_fea": _picture(),
            "camera_conditions": noise(BATCH, 24, FRAMES, *(8 * size for size in _SIZE), seed=4),
        },
    ),
    "wan-vace": lambda: _build(
        "model",
        "VaceWanModel",
        {"vace_context": _latents(channels=6, seed=4).unsqueeze(1), "vace_strength": [0.7]},
        vace_layers=2,
        vace_in_dim=6,
    ),
    "wan-s2v": lambda: _build(
        "model",
        "WanModel_S2V",
        {"audio_embed": noise(BATCH, 25, 16, 4 * FRAMES, seed=4), "control_video": _latents(seed=5)},
        audio_dim=16,
        cond_dim=_CHANNELS,
        audio_inject_layers=[0, 1],
    ),
    "wan-humo": lambda: _build("model", "HumoWanModel", {"audio_embed": noise(BATCH, FRAMES, 8, 5, 1280, seed=4)}),
    "wan-animate": _animate,
    "wan-animate2": lambda: _build(
        "model_animate2",
        "WanAnimate2Model",
        {"clip_fea": _picture(), "pose_latents": noise(BATCH, 16, FRAMES - 1, *_SIZE, seed=4)},
        channels=36,
        other_timesteps=(1.0,),
    ),
    "wan-scail": lambda: _build(
        "model",
        "SCAILWanModel",
        {"clip_fea": _picture(), "pose_latents": _latents(seed=4), "reference_latent": _latents(1, seed=5)},
    ),
    "wan-scail2": lambda: _build(
        "model",
        "SCAIL2WanModel",
        {
            "clip_fea": _picture(),
            "pose_latents": _latents(seed=4),
            "reference_latent": _latents(1, seed=5),
            "sam_latents": _latents(channels=6, seed=6),
            "ref_mask_latents": _latents(1 + FRAMES, channels=6, seed=7),
            "ref_mask_flag": True,
        },
        mask_in_dim=6,
    ),
    "wan-dancer": lambda: _build(
        "model_wandancer",
        "WanDancerModel",
        {"clip_fea": _picture(), "clip_fea_ref": _picture(6), "audio_embed": noise(BATCH, 16, 35, seed=4)},
        audio_inject_layers=[0, 1],
        music_dim=32,
        music_latent_dim=32,
    ),
}
