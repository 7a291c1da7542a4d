"""Image models, which have no entry: they show that the generic rule works on ComfyUI's classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, TOKENS, TinyModel, noise, randomized, timesteps

_CHANNELS, _WIDTH, _TEXT, _POOLED = 16, 128, 96, 80


def _build(module: str, class_name: str, conditions: dict[str, Any], latents: Tensor, **config: Any) -> TinyModel:
    operations = comfyui("ops").disable_weight_init
    model = randomized(getattr(comfyui(f"ldm.{module}"), class_name)(**config, operations=operations))
    for name, buffer in model.named_buffers():
        if "embed" in name:
            buffer.copy_(noise(*buffer.shape, seed=3))
    text = noise(BATCH, TOKENS, _TEXT, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), context=text, transformer_options={}, **conditions)

    return TinyModel(model, latents, call)


def _latents(*frames: int) -> Tensor:
    return noise(BATCH, _CHANNELS, *frames, 4, 4)


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "flux": lambda: _build(
        "flux.model",
        "Flux",
        {"y": noise(BATCH, _POOLED, seed=4)},
        _latents(),
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        vec_in_dim=_POOLED,
        context_in_dim=_TEXT,
        hidden_size=_WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 24, 24],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
    ),
    "sd3": lambda: _build(
        "modules.diffusionmodules.mmdit",
        "OpenAISignatureMMDITWrapper",
        {"y": noise(BATCH, _POOLED, seed=4)},
        _latents(),
        input_size=None,
        in_channels=_CHANNELS,
        depth=2,  # times 64 gives its width
        adm_in_channels=_POOLED,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": _TEXT, "out_features": _WIDTH},
        },
        num_patches=64,
        pos_embed_max_size=8,
        qk_norm="rms",
    ),
    "qwen-image": lambda: _build(
        "qwen_image.model",
        "QwenImageTransformer2DModel",
        {},
        _latents(1),
        in_channels=4 * _CHANNELS,
        out_channels=_CHANNELS,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=_TEXT,
        axes_dims_rope=(16, 24, 24),
    ),
    "lumina2": lambda: _build(
        "lumina.model",
        "NextDiT",
        {"num_tokens": TOKENS},
        _latents(),
        in_channels=_CHANNELS,
        dim=_WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=1,
        ffn_dim_multiplier=1.0,
        qk_norm=True,
        cap_feat_dim=_TEXT,
        axes_dims=[16, 24, 24],
        axes_lens=[32, 32, 32],
    ),
}
