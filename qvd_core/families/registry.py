"""The registry: every family entry, and the rule for models no entry knows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.families import (
    cogvideox,
    cosmos,
    hunyuan,
    joyimage,
    kandinsky,
    latte,
    ltx,
    minimax,
    mochi,
    sana,
    unets,
    wan,
)
from qvd_core.families.family import Family

logger = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (
    *wan.FAMILIES,
    *hunyuan.FAMILIES,
    *minimax.FAMILIES,
    *joyimage.FAMILIES,
    *ltx.FAMILIES,
    *cogvideox.FAMILIES,
    *mochi.FAMILIES,
    *latte.FAMILIES,
    *cosmos.FAMILIES,
    *kandinsky.FAMILIES,
    *sana.FAMILIES,
    *unets.FAMILIES,
)

GENERIC_MINIMUM_FEATURES = 64
GENERIC = Family(name="generic", classes=(), keep=(), minimum_features=GENERIC_MINIMUM_FEATURES)

# Class names of what QVD does not quantize: image and audio denoisers, autoencoders, text and image encoders.
# Names of one part, so the pattern grammar's "*" cannot be used; a prefix or suffix says enough.
_NOT_VIDEO_PREFIXES = ("Autoencoder", "VQModel", "UNet1D", "UNet2D", "CLIP", "T5", "UMT5", "Llama", "Qwen2", "Gemma")
_NOT_VIDEO_SUFFIXES = ("2DModel", "TextModel", "TextEncoder", "VisionModel", "EncoderModel")


def find_family(model: Any) -> Family | None:
    """The family of a model or of a class name; None when no entry knows it.

    For a model whose timestep embedding also holds other conditions: its family without temporal_features.
    """
    name = _class_name(model)
    family = next((family for family in FAMILIES if name in family.classes), None)
    if family is not None and any(_has_part(model, path) for path in family.other_conditions):
        return replace(family, temporal_features=())
    return family


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
        "QVD has no entry for %s: using the generic rule (linear and convolution layers with at least %d inputs "
        "and outputs, the first and the last layer kept).",
        name,
        GENERIC_MINIMUM_FEATURES,
    )
    return GENERIC


def _has_part(model: Any, path: str) -> bool:
    """Whether `model.a.b` exists and is not None, for the path "a.b"."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model is not None


def _class_name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
