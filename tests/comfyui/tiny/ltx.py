"""LTX-Video and LTX-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, FRAMES, TEXT, TOKENS, TinyModel, noise, randomized, timesteps

_CHANNELS, _SOUND = 4, (8, 4, 16)  # of the latents; channels, length and frequencies of those of the sound
_SMALL: dict[str, Any] = {
    "in_channels": _CHANNELS,
    "cross_attention_dim": 32,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": TEXT,
    "num_layers": 2,
}
_SOUND_TOO: dict[str, Any] = {
    "audio_in_channels": 8 * 16,
    "audio_cross_attention_dim": 16,
    "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 2,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 8,
    "connector_num_layers": 1,
    "use_middle_indices_grid": True,
}
_MODULATED_TEXT: dict[str, Any] = {"cross_attention_adaln": True, "caption_proj_before_connector": True}


def _build(module: str, class_name: str, text_channels: int = TEXT, sound: bool = False, **changes: Any) -> TinyModel:
    operations = comfyui("ops").disable_weight_init
    model_class = getattr(comfyui(f"ldm.lightricks.{module}"), class_name)
    model = randomized(model_class(**(_SMALL | changes), operations=operations))
    text, sound_latents = noise(BATCH, TOKENS, text_channels, seed=2), noise(BATCH, *_SOUND, seed=3)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        steps = timesteps(timestep)
        if not sound:
            return model(latents, steps, text, None, transformer_options={})
        return model([latents, sound_latents.clone()], (steps, steps), text, None, transformer_options={})[0]

    return TinyModel(model, noise(BATCH, _CHANNELS, FRAMES, 2, 4), call)


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "ltx": lambda: _build("model", "LTXVModel"),
    "ltx-modulated-text": lambda: _build("model", "LTXVModel", 32, **_MODULATED_TEXT),
    "ltx2": lambda: _build("av_model", "LTXAVModel", 2 * TEXT, sound=True, **_SOUND_TOO),
    "ltx2-gated": lambda: _build(
        "av_model", "LTXAVModel", 2 * TEXT, sound=True, **_SOUND_TOO, apply_gated_attention=True
    ),
    "ltx2-modulated-text": lambda: _build(
        "av_model",
        "LTXAVModel",
        32 + 16,
        sound=True,
        **_SOUND_TOO,
        **_MODULATED_TEXT,
        apply_gated_attention=True,
    ),
}
