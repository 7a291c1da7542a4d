"""Tiny random pipelines. They prove plumbing, not quality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    UNetMotionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "seven", "three", "moving", "left", "right", "up")
WAN_CALL: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": 8,
}
ANIMATE_CALL: dict[str, Any] = {
    "height": 16,
    "width": 16,
    "num_frames": 2,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
}
PROMPTS = ["a seven moving left", "a three moving right"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


def tiny_wan_transformer(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def tiny_wan() -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
    )
    text = UMT5Config(vocab_size=16, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    return WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=tiny_wan_transformer().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
    )


def tiny_animate_diff() -> AnimateDiffPipeline:
    torch.manual_seed(0)
    unet = UNetMotionModel(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=True,
        motion_max_seq_length=8,
    )
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16)
    text = CLIPTextConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AnimateDiffPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=word_tokenizer(),
        unet=unet.eval(),
        motion_adapter=MotionAdapter(
            block_out_channels=(16,), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
        ),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def group_offload(model: Any, **options: Any) -> None:
    """Group offloading as far as it goes without an accelerator: from the CPU to the CPU, or to a folder."""
    try:
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
    except AttributeError:
        pytest.skip("this diffusers cannot offload groups from a CPU")


def sample_frames(pipe: Any, call: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Frames [B, T, H, W, C] of the first prompt from one fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(PROMPTS[0], generator=generator, output_type="np", **call).frames)
