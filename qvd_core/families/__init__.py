"""The family registry: which layers of which video model are quantized how, as data."""

from qvd_core.families.family import Family, Fold, FrameOrder, Sinusoid
from qvd_core.families.registry import COMFYUI_FAMILIES, FAMILIES, family_or_generic, find_family, is_image_model

__all__ = [
    "COMFYUI_FAMILIES",
    "FAMILIES",
    "Family",
    "Fold",
    "FrameOrder",
    "Sinusoid",
    "family_or_generic",
    "find_family",
    "is_image_model",
]
