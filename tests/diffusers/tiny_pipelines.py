"""One tiny random stock pipeline per kind of architecture, each with the call that samples a few frames from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTXPipeline,
    StableVideoDiffusionPipeline,
    WanPipeline,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

from tests.diffusers.tiny import (
    ANIMATE_CALL,
    PROMPTS,
    WAN_CALL,
    tiny_animate_diff,
    tiny_wan,
    tiny_wan_transformer,
    word_tokenizer,
)
from tests.tiny_models import tiny_family
from tests.tiny_models.base import TOKENS

TEXT = 32  # width of the text embeddings
LENGTH = 8  # tokens of a prompt
STEPS = 3


@dataclass(frozen=True)
class TinyPipeline:
    """How to build a full-precision pipeline, which component is the denoiser, and how to call it."""

    build: Callable[[], Any]
    denoiser: str = "transformer"
    inputs: Callable[[], dict[str, Any]] = lambda: {"prompt": PROMPTS[0]}
    call: dict[str, Any] = field(default_factory=dict)

    def model(self, pipe: Any) -> Any:
        return getattr(pipe, self.denoiser)

    def sample(self, pipe: Any, seed: int = 0, output_type: str = "np", **call: Any) -> torch.Tensor:
        """Frames [B, T, H, W, C] from one fixed noise; with output_type="latent" what the VAE would decode."""
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        arguments = {**self.inputs(), **self.call, **call}
        return torch.as_tensor(pipe(generator=generator, output_type=output_type, **arguments).frames)


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=16, d_model=TEXT, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def clip_text_encoder(width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return CLIPTextModel(config).eval()


def denoiser(family: str) -> Any:
    """A copy of one of the tiny models, as a user's would be: its parameters take gradients."""
    return copy.deepcopy(tiny_family(family).model).requires_grad_(True)


def tiny_wan22() -> WanPipeline:
    """Wan 2.2: one transformer for the noisy steps, another for the rest."""
    pipe = tiny_wan()
    torch.manual_seed(0)
    first, second = tiny_wan_transformer(seed=0), tiny_wan_transformer(seed=1)
    return WanPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        transformer=first.eval(),
        transformer_2=second.eval(),
        scheduler=pipe.scheduler,
        boundary_ratio=0.7,
    )


def tiny_hunyuan_video() -> HunyuanVideoPipeline:
    transformer = denoiser("hunyuan")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=16,
        hidden_size=TEXT,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
    )
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=word_tokenizer(),
        transformer=transformer,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        text_encoder_2=clip_text_encoder(transformer.config.pooled_projection_dim),
        tokenizer_2=word_tokenizer(),
    )


def tiny_ltx() -> LTXPipeline:
    transformer = denoiser("ltx")
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=word_tokenizer(),
        transformer=transformer,
    )


def tiny_cogvideox() -> CogVideoXPipeline:
    transformer = denoiser("cogvideox")
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
    )
    return CogVideoXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )


def tiny_svd() -> StableVideoDiffusionPipeline:
    unet = denoiser("svd")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=TEXT,
        intermediate_size=64,
        projection_dim=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
    )
    return StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16, force_upcast=False
        ).eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0
        ),
        feature_extractor=CLIPImageProcessor(),
    )


def picture() -> dict[str, Any]:
    """What an image-to-video pipeline starts from."""
    ramp = torch.arange(16 * 16 * 3).reshape(16, 16, 3) % 256
    return {"image": Image.fromarray(ramp.to(torch.uint8).numpy())}


def call(height: int = 16, num_frames: int = 5, steps: int = STEPS, **others: Any) -> dict[str, Any]:
    return {"height": height, "width": height, "num_frames": num_frames, "num_inference_steps": steps, **others}


PIPELINES: dict[str, TinyPipeline] = {
    "Wan": TinyPipeline(tiny_wan, call=WAN_CALL),
    "HunyuanVideo": TinyPipeline(
        tiny_hunyuan_video,
        call=call(32, prompt_template={"template": "{}", "crop_start": 0}, max_sequence_length=LENGTH),
    ),
    "LTX": TinyPipeline(tiny_ltx, call=call(32, 9, guidance_scale=3.0, max_sequence_length=LENGTH)),
    "CogVideoX": TinyPipeline(tiny_cogvideox, call=call(32, 9, guidance_scale=3.0, max_sequence_length=TOKENS)),
    "AnimateDiff": TinyPipeline(tiny_animate_diff, "unet", call=ANIMATE_CALL),
    "SVD": TinyPipeline(tiny_svd, "unet", picture, call(num_frames=3, steps=2, max_guidance_scale=3.0)),
}
