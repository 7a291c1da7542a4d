"""CogVideoX and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps


def _cogvideox(**config: int) -> TinyFamily:
    model = diffusers.CogVideoXTransformer3DModel(
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
    text = noise(BATCH, TOKENS, TEXT)
    ofs = torch.full((1,), 2.0) if config.get("ofs_embed_dim") else None

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), ofs=ofs).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _consisid() -> TinyFamily:
    model = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3,  # the face's width is two thirds of the video's
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
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=16,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=32,
        LFE_num_scale=2,
    )
    text, face = noise(BATCH, TOKENS, TEXT), noise(BATCH, 16, seed=2)
    faces = [noise(BATCH, 4, 16, seed=seed) for seed in (3, 4)]

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, text, timesteps(timestep), id_cond=face, id_vit_hidden=faces).sample

    return TinyFamily(randomized(model), noise(BATCH, FRAMES, 4, 4, 4), call)


def _easyanimate() -> TinyFamily:
    """One block with layers of its own for the text, then one whose layers read video and text together."""
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        text_embed_dim_t5=24,
        num_layers=2,
        mmdit_layers=1,
    )
    text, more_text = noise(BATCH, TOKENS, TEXT), noise(BATCH, TOKENS, 24, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(
            latents, timesteps(timestep), encoder_hidden_states=text, encoder_hidden_states_t5=more_text
        ).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "cogvideox": _cogvideox,
    "cogvideox-ofs": lambda: _cogvideox(ofs_embed_dim=16),
    "consisid": _consisid,
    "easyanimate": _easyanimate,
}
