"""Tiny random text and image encoders of transformers, and how to call and compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from qvd_core.layers import QuantLinear
from qvd_diffusers import QVDConfig

WORDS = 64
TOKENS = torch.randint(3, WORDS, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
CLIP_TOKENS = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}

ENCODERS: dict[str, tuple[Callable[[], Any], int]] = {
    # name: (a tiny random encoder, the number of linears in its blocks)
    "T5": (lambda: T5EncoderModel(T5Config(**T5_SIZES)), 14),
    "UMT5": (lambda: UMT5EncoderModel(UMT5Config(**T5_SIZES)), 14),
    "CLIP text": (
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_TOKENS, **SIZES, projection_dim=16)),
        12,
    ),
    "CLIP vision": (
        lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16)
        ),
        12,
    ),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **SIZES)), 14),
    "Qwen2": (lambda: Qwen2Model(Qwen2Config(vocab_size=WORDS, num_key_value_heads=2, **SIZES)), 14),
}


def output(model: Any) -> torch.Tensor:
    """The first output [B, ..., C] for fixed tokens, or a fixed image."""
    images = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16).to(model.dtype)
    with torch.no_grad():
        first = model(images if model.main_input_name == "pixel_values" else TOKENS)[0]
    assert isinstance(first, torch.Tensor)
    return first


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def load(folder: Path, config: QVDConfig | None = None, **keywords: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(folder, quantization_config=config or QVDConfig(), **keywords)


def save_encoder(name: str, folder: Path) -> Path:
    """One of `ENCODERS` in full precision, as an ordinary folder."""
    torch.manual_seed(0)
    ENCODERS[name][0]().save_pretrained(folder)
    return folder
