"""Cosmos 1 to 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny_models.base import BATCH, FRAMES, TEXT, TOKENS, TinyFamily, noise, randomized, timesteps

_BLOCKS = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT,
    "adaln_lora_dim": 8,
    "max_size": (8, 8, 8),
}
_CONTEXTS = {  # Cosmos 2.5 and later
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 24,
    "encoder_hidden_states_channels": TEXT,
    "img_context_dim_in": 16,
    "img_context_dim_out": 32,
}


def _cosmos(image: bool) -> TinyFamily:
    """image: Cosmos 2.5, which projects its text and whose cross attention reads a picture beside it."""
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        concat_padding_mask=False,
        **_BLOCKS,
        **(_CONTEXTS if image else {}),
    )
    text, picture = noise(BATCH, TOKENS, 24 if image else TEXT), noise(BATCH, 3, 16, seed=2)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        return model(latents, timesteps(timestep), (text, picture) if image else text).sample

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


@contextmanager
def _resizing(module: str) -> Iterator[None]:
    """Let a module of diffusers "resize" a mask that has its size already: it asks torchvision, which tests lack."""
    namespace = __import__(module, fromlist=["__dict__"]).__dict__
    if "transforms" in namespace:
        yield
        return
    namespace["transforms"] = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: mask.reshape(*mask.shape[:-2], *size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    try:
        yield
    finally:
        del namespace["transforms"]


def _cosmos_controlnet() -> TinyFamily:
    model = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=6, latent_channels=6, model_channels=32, **_BLOCKS, **_CONTEXTS
    )
    text, picture = noise(BATCH, TOKENS, 24), noise(BATCH, 3, 16, seed=2)
    control, mask = noise(BATCH, 4, FRAMES, 4, 4, seed=3), torch.ones(BATCH, 1, FRAMES, 4, 4)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        with _resizing(diffusers.CosmosControlNetModel.__module__):
            residuals = model(
                control, latents, timesteps(timestep), (text, picture), mask, padding_mask=torch.zeros(1, 1, 4, 4)
            )
        return torch.cat(residuals.control_block_samples, dim=1)

    return TinyFamily(randomized(model), noise(BATCH, 4, FRAMES, 4, 4), call)


def _cosmos3(**config: bool) -> TinyFamily:
    """One packed sequence: TOKENS of text, then the patches of one video and, where it is asked for, of one sound."""
    sound = bool(config.get("sound_gen"))
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=40,
        rope_axes_dim=(4, 2, 2),
        sound_dim=4 if sound else None,
        **config,
    )
    patches, sounds = FRAMES * 4, 6 if sound else 0
    length = TOKENS + patches + sounds
    places = torch.arange(TOKENS, TOKENS + patches)
    sound_places = torch.arange(TOKENS + patches, length)

    def call(model: nn.Module, latents: Tensor, timestep: float) -> Tensor:
        audio = {
            "sound_tokens": [latents.reshape(4, -1)[:, :sounds] * 0.5],
            "sound_token_shapes": [(sounds, 1, 1)],
            "sound_sequence_indexes": sound_places,
            "sound_mse_loss_indexes": sound_places,
            "sound_timesteps": torch.full((sounds,), float(timestep)),
            "sound_noisy_frame_indexes": [torch.arange(sounds)],
        }
        video, heard, _ = model(
            input_ids=torch.arange(TOKENS),
            text_indexes=torch.arange(TOKENS),
            position_ids=torch.arange(length).expand(3, length),
            und_len=TOKENS,
            sequence_length=length,
            vision_tokens=[latents],
            vision_token_shapes=[(FRAMES, 2, 2)],
            vision_sequence_indexes=places,
            vision_mse_loss_indexes=places,
            vision_timesteps=torch.full((patches,), float(timestep)),
            vision_noisy_frame_indexes=[torch.arange(FRAMES)],
            return_dict=False,
            **(audio if sound else {}),
        )
        return torch.cat([part.flatten() for part in (*video, *(heard or []))])

    return TinyFamily(randomized(model), noise(1, 4, FRAMES, 4, 4), call)


BUILDERS: dict[str, Callable[[], TinyFamily]] = {
    "cosmos": lambda: _cosmos(image=False),
    "cosmos-image": lambda: _cosmos(image=True),
    "cosmos-control": _cosmos_controlnet,
    "cosmos3": _cosmos3,
    "cosmos3-sound": lambda: _cosmos3(sound_gen=True),
}
