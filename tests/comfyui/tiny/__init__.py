"""Tiny models of ComfyUI's classes, with random parameters: each is built once, from a real checkout."""

from __future__ import annotations

from functools import cache

from tests.comfyui.tiny import hunyuan, ltx, others, unets, wan
from tests.comfyui.tiny.base import BATCH, FRAMES, TinyModel

__all__ = ["BATCH", "BUILDERS", "FRAMES", "TinyModel", "tiny_model"]

BUILDERS = {**wan.BUILDERS, **hunyuan.BUILDERS, **ltx.BUILDERS, **others.BUILDERS, **unets.BUILDERS}


@cache
def tiny_model(name: str) -> TinyModel:
    """The tiny model of this name. It is shared: no test may change it."""
    return BUILDERS[name]()
