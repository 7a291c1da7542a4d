"""CogVideoX, Mochi, Cosmos, Kandinsky 5, MiniMax-H3, SeedVR2 and JoyImage-Edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.comfyui.checkout import comfyui
from tests.comfyui.tiny.base import BATCH, FRAMES, TEXT, TOKENS, TinyModel, noise, randomized, timesteps

_CHANNELS, _POOLED = 4, 24


def _model(module: str, class_name: str, **config: Any) -> nn.Module:
    operations = comfyui("ops").disable_weight_init
    return randomized(getattr(comfyui(f"ldm.{module}"), class_name)(**config, operations=operations))


def _text() -> Tensor:
    return noise(BATCH, TOKENS, TEXT, seed=2)


def _video(channels: int = _CHANNELS, batch: int = BATCH, seed: int = 1) -> Tensor:
    return noise(batch, channels, FRAMES, 4, 4, seed=seed)


def _plain(model: nn.Module, **conditions: Any) -> TinyModel:
    """A model that is called with latents, timesteps, a text and conditions."""
    text = _text()

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), text, transformer_options={}, **conditions)

    return TinyModel(model, _video(), call)


def _cogvideox(**changes: Any) -> TinyModel:
    conditions = {"ofs": torch.tensor([2.0])} if "ofs_embed_dim" in changes else {}
    model = _model(
        "cogvideo.model",
        "CogVideoXTransformer3DModel",
        num_attention_heads=3,  # its positional embedding has three parts
        attention_head_dim=16,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        time_embed_dim=24,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=TOKENS,
        **changes,
    )
    return _plain(model, **conditions)


def _mochi() -> TinyModel:
    model = _model(
        "genmo.joint_model.asymm_models_joint",
        "AsymmDiTJoint",
        in_channels=_CHANNELS,
        hidden_size_x=32,
        hidden_size_y=16,
        depth=3,
        num_heads=2,
        mlp_ratio_x=384.0,  # it takes no other width than 12288
        learn_sigma=False,
        use_t5=True,
        t5_feat_dim=TEXT,
        t5_token_length=TOKENS,
        timestep_scale=1000.0,
        qk_norm=True,
        qkv_bias=False,
    )
    return _plain(model, attention_mask=torch.ones(BATCH, TOKENS, dtype=torch.bool), num_tokens=TOKENS)


_COSMOS: dict[str, Any] = {
    "max_img_h": 8,
    "max_img_w": 8,
    "max_frames": 8,
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 32,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": TEXT,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
    "extra_per_block_abs_pos_emb": True,
}


def _cosmos() -> TinyModel:
    return _plain(
        _model(
            "cosmos.model",
            "GeneralDIT",
            **_COSMOS,
            block_x_format="THWBD",
            affline_emb_norm=True,
            extra_per_block_abs_pos_emb_type="learnable",
        )
    )


def _kandinsky() -> TinyModel:
    model = _model(
        "kandinsky5.model",
        "Kandinsky5",
        out_visual_dim=_CHANNELS,
        in_text_dim=TEXT,
        in_text_dim2=_POOLED,
        time_dim=24,
        model_dim=32,
        ff_dim=64,
        visual_embed_dim=4 * _CHANNELS,
        num_text_blocks=2,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    return _plain(model, y=noise(BATCH, _POOLED, seed=3))


def _minimax(**changes: Any) -> TinyModel:
    """It takes one video at a time."""
    model = _model(
        "minimax.model",
        "MiniMaxH3Model",
        hidden_size=32,
        num_layers=2,
        token_refiner_num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_hidden_size=48,
        latents_dim=_CHANNELS,
        audio_latents_dim=_CHANNELS,
        text_dim=TEXT + 8,  # a text as wide as the model would count as refined
        timestep_input_dim=32,
        time_embed_hidden_size=32,
        rope_inv_freq_len=2,
        **({"time_embed_dim": 24} | changes),
    )
    for name, buffer in model.named_buffers():
        buffer.copy_(noise(*buffer.shape, seed=len(name)))
    text, sound = noise(1, TOKENS, TEXT + 8, seed=2), noise(1, _CHANNELS, 2, 4, seed=3)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model([latents, sound], torch.tensor([timestep]), text, transformer_options={})[0]

    return TinyModel(model, _video(batch=1), call)


def _seedvr(**changes: Any) -> TinyModel:
    model = _model(
        "seedvr.model",
        "NaDiT",
        norm_eps=1e-5,
        num_layers=4,
        vid_dim=32,
        txt_in_dim=TEXT + 8,
        heads=2,
        head_dim=32,
        mm_layers=2,
        rope_dim=32,
        **changes,
    )
    text, condition = noise(BATCH, TOKENS, TEXT + 8, seed=2), _video(17, seed=3)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        options = {"cond_or_uncond": [0]}
        return model(latents, timesteps(timestep), text, condition=condition, transformer_options=options)

    return TinyModel(model, _video(16), call)


def _joyimage() -> TinyModel:
    return _plain(
        _model(
            "joyimage.model",
            "JoyImageTransformer3DModel",
            in_channels=_CHANNELS,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=TEXT,
            num_layers=2,
            rope_dim_list=[4, 6, 6],
        ),
        ref_latents=[_video(seed=4)],
    )


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "cogvideox": _cogvideox,
    "cogvideox15": lambda: _cogvideox(patch_size_t=2, ofs_embed_dim=24, use_rotary_positional_embeddings=True),
    "mochi": _mochi,
    "cosmos": _cosmos,
    "cosmos-predict2": lambda: _plain(_model("cosmos.predict2", "MiniTrainDIT", **_COSMOS)),
    "anima": lambda: _plain(_model("anima.model", "Anima", **_COSMOS)),
    "kandinsky5": _kandinsky,
    "minimax": _minimax,
    "minimax-curves": lambda: _minimax(adaln_curve_grid=11, time_embed_dim=8),
    "seedvr2": lambda: _seedvr(mlp_type="swiglu", vid_out_norm="rms"),
    "seedvr2-gelu": lambda: _seedvr(mlp_type="normal"),
    "joyimage": _joyimage,
}
