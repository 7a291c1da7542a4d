"""The registry: every family entry, and the rule for models no entry knows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.families import (
    cogvideox,
    comfyui,
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
from qvd_core.families.comfyui.images import GENERIC_MINIMUM_FEATURES
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
"""Of the models of diffusers."""

COMFYUI_FAMILIES: tuple[Family, ...] = comfyui.FAMILIES
"""Of the models of ComfyUI: what its `BaseModel.diffusion_model` is."""

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
    same_class = [family for family in (*FAMILIES, *COMFYUI_FAMILIES) if name in family.classes]
    # Entries with a signature first: those without one take every model of their class.
    same_class.sort(key=lambda family: isinstance(model, str) or not family.signature)
    family = next((family for family in same_class if isinstance(model, str) or _is_signed(model, family)), None)
    if family is not None and any(_has_part(model, path) for path in family.other_conditions):
        return replace(family, temporal_features=())
    return family


def family_or_generic(model: Any) -> Family:
    """The family of a model, or the generic rule for an unknown denoiser (one log line says so).

    Raises QVDError for a model that is known not to be a video denoiser, unless it is a denoiser of ComfyUI: those
    that make images are quantized too, and one more line says so.
    """
    family = find_family(model)
    name = _class_name(model)
    if family is None:
        image = is_image_model(model)
        if _is_refused(name) and not image:
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
        family = comfyui.GENERIC_IMAGE if image else GENERIC
    if family.image:
        logger.info("%s makes no videos: QVD quantizes it, but is made for and measured on video models.", name)
    return family


def is_image_model(model: Any) -> bool:
    """Whether a model makes images (or sounds) and no videos: QVD takes those of ComfyUI, but is made for videos."""
    family = find_family(model)
    if family is not None:
        return family.image
    name = _class_name(model)
    return _is_comfyui(model) and (name in comfyui.IMAGE_DENOISERS or name.endswith("2DModel"))


def _is_refused(name: str) -> bool:
    return name.startswith(_NOT_VIDEO_PREFIXES) or name.endswith(_NOT_VIDEO_SUFFIXES)


def _is_comfyui(model: Any) -> bool:
    """Whether the class of a model is ComfyUI's own: some image models have the same name in diffusers."""
    return type(model).__module__.partition(".")[0] == "comfy"


def _is_signed(model: Any, family: Family) -> bool:
    return all(_has_part(model, path) for path in family.signature)


def _has_part(model: Any, path: str) -> bool:
    """Whether `model.a.b` exists and is not None, for the path "a.b"."""
    for name in path.split("."):
        model = getattr(model, name, None)
    return model is not None


def _class_name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
