"""Tiny random models of every video model class, and how to call them."""

from __future__ import annotations

from functools import cache

import torch

from tests.tiny_models import cogvideox, cosmos, hunyuan, kandinsky, ltx, mochi, sana, unets, wan
from tests.tiny_models.base import BATCH, FRAMES, TinyFamily

__all__ = ["BATCH", "FRAMES", "TINY_FAMILIES", "TinyFamily", "tiny_family"]

_BUILDERS = {
    name: build
    for module in (wan, hunyuan, ltx, cogvideox, mochi, cosmos, kandinsky, sana, unets)
    for name, build in module.BUILDERS.items()
}

TINY_FAMILIES = tuple(_BUILDERS)


@cache
def tiny_family(name: str) -> TinyFamily:
    """The one tiny model of this name; shared between tests."""
    torch.manual_seed(0)
    return _BUILDERS[name]()
