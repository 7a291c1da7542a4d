"""JoyImage-Edit in ComfyUI, with the module names of diffusers."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families import joyimage

JOY_IMAGE = replace(joyimage.JOY_IMAGE_EDIT, classes=("JoyImageTransformer3DModel",), image=True)

FAMILIES = (JOY_IMAGE,)
