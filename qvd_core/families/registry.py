"""The registry: one data entry per family, and the rule for models no entry knows."""

from __future__ import annotations

import logging
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.families.family import Family

logger = logging.getLogger(__name__)

WAN = Family(
    name="Wan",
    classes=("WanTransformer3DModel",),
    keep=(
        "patch_embedding",
        "condition_embedder.time_embedder.**",
        "condition_embedder.text_embedder.**",
        "condition_embedder.image_embedder.**",
        "proj_out",
    ),
    temporal=("condition_embedder.time_proj",),
    temporal_features=(
        "condition_embedder.timesteps_proj",
        "condition_embedder.time_embedder",
        "condition_embedder.act_fn",
    ),
    shared_inputs=(
        ("blocks.*.attn1", ("to_q", "to_k", "to_v")),
        ("blocks.*.attn2", ("to_k", "to_v")),
        ("blocks.*.attn2", ("add_k_proj", "add_v_proj")),
    ),
    prompt_inputs=tuple(f"blocks.*.attn2.{layer}" for layer in ("to_k", "to_v", "add_k_proj", "add_v_proj")),
)

ANIMATEDIFF = Family(
    name="AnimateDiff",
    classes=("UNetMotionModel",),
    keep=("conv_in", "conv_out", "time_embedding.**", "add_embedding.**", "encoder_hid_proj.**"),
    temporal=("**.time_emb_proj",),
    temporal_features=("time_proj", "time_embedding", "mid_block.resnets.0.nonlinearity"),
    shared_inputs=(
        ("**.motion_modules.*.transformer_blocks.*.attn1", ("to_q", "to_k", "to_v")),
        ("**.motion_modules.*.transformer_blocks.*.attn2", ("to_q", "to_k", "to_v")),
        ("**.attentions.*.transformer_blocks.*.attn1", ("to_q", "to_k", "to_v")),
        ("**.attentions.*.transformer_blocks.*.attn2", ("to_k", "to_v")),
    ),
    prompt_inputs=tuple(f"**.attentions.*.transformer_blocks.*.attn2.{layer}" for layer in ("to_k", "to_v")),
)

FAMILIES: tuple[Family, ...] = (WAN, ANIMATEDIFF)

GENERIC_MINIMUM_FEATURES = 64
GENERIC = Family(name="generic", classes=(), keep=(), minimum_features=GENERIC_MINIMUM_FEATURES)

# Class names of what QVD does not quantize: image and audio denoisers, autoencoders, text and image encoders.
# Names of one part, so the pattern grammar's "*" cannot be used; a prefix or suffix says enough.
_NOT_VIDEO_PREFIXES = ("Autoencoder", "VQModel", "UNet1D", "UNet2D", "CLIP", "T5", "UMT5", "Llama", "Qwen2", "Gemma")
_NOT_VIDEO_SUFFIXES = ("2DModel", "TextModel", "TextEncoder", "VisionModel", "EncoderModel")


def find_family(model: Any) -> Family | None:
    """The family of a model or of a class name; None when no entry knows it."""
    name = _class_name(model)
    return next((family for family in FAMILIES if name in family.classes), None)


def family_or_generic(model: Any) -> Family:
    """The family of a model, or the generic rule for an unknown denoiser (one log line says so).

    Raises QVDError for a model that is known not to be a video denoiser.
    """
    family = find_family(model)
    if family is not None:
        return family
    name = _class_name(model)
    if name.startswith(_NOT_VIDEO_PREFIXES) or name.endswith(_NOT_VIDEO_SUFFIXES):
        known = ", ".join(known_class for entry in FAMILIES for known_class in entry.classes)
        raise QVDError(
            f"{name} is not a video denoiser, so QVD does not quantize it; "
            f"pass a video pipeline or its denoiser (for example {known})."
        )
    logger.warning(
        "QVD has no entry for %s: using the generic rule (linear and 2-D convolution layers with at least %d inputs "
        "and outputs, the first and the last layer kept).",
        name,
        GENERIC_MINIMUM_FEATURES,
    )
    return GENERIC


def _class_name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
