"""Entries for the models of ComfyUI: the classes of `BaseModel.diffusion_model`, with ComfyUI's module names."""

from qvd_core.families.comfyui import (
    cogvideox,
    cosmos,
    hunyuan,
    joyimage,
    kandinsky,
    ltx,
    minimax,
    mochi,
    seedvr,
    unets,
    wan,
)
from qvd_core.families.comfyui.images import GENERIC_IMAGE, IMAGE_DENOISERS
from qvd_core.families.family import Family

__all__ = ["FAMILIES", "GENERIC_IMAGE", "IMAGE_DENOISERS"]

FAMILIES: tuple[Family, ...] = (
    *wan.FAMILIES,
    *hunyuan.FAMILIES,
    *ltx.FAMILIES,
    *cogvideox.FAMILIES,
    *mochi.FAMILIES,
    *cosmos.FAMILIES,
    *kandinsky.FAMILIES,
    *minimax.FAMILIES,
    *seedvr.FAMILIES,
    *joyimage.FAMILIES,
    *unets.FAMILIES,
)
