"""Entries for the models of ComfyUI: the classes of `BaseModel.diffusion_model`, with ComfyUI's module names."""

from qvd_core.families.comfyui import hunyuan, unets, wan
from qvd_core.families.comfyui.images import IMAGE_DENOISERS
from qvd_core.families.family import Family

__all__ = ["FAMILIES", "IMAGE_DENOISERS"]

FAMILIES: tuple[Family, ...] = (
    *wan.FAMILIES,
    *hunyuan.FAMILIES,
    *unets.FAMILIES,
)
