"""Tiny random models of every video model class, and how to call them."""

from __future__ import annotations

from functools import cache

import diffusers
import torch

from tests.tiny_models import (
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
from tests.tiny_models.base import BATCH, FRAMES, TinyFamily
from tests.tiny_models.classes import RELEASED_WITH, VIDEO_CLASSES

__all__ = ["BATCH", "CLASS_OF", "FRAMES", "TINY_FAMILIES", "TinyFamily", "missing_class", "tiny_family"]

_BUILDERS = {
    name: build
    for module in (wan, hunyuan, minimax, joyimage, ltx, cogvideox, mochi, latte, cosmos, kandinsky, sana, unets)
    for name, build in module.BUILDERS.items()
}
CLASS_OF = {name: class_name for class_name, names in VIDEO_CLASSES.items() for name in names}
"""Tiny model to class name."""

_IN_DIFFUSERS = frozenset(dir(diffusers))  # names alone: nothing is imported for it


def missing_class(name: str) -> str | None:
    """Why there can be no tiny model of this name: the installed diffusers is older than its class. None if it can."""
    class_name = RELEASED_WITH.get(name, CLASS_OF.get(name))
    if class_name is None or class_name in _IN_DIFFUSERS:
        return None
    return f"diffusers {diffusers.__version__} has no {class_name}"


TINY_FAMILIES = tuple(name for name in _BUILDERS if missing_class(name) is None)


@cache
def tiny_family(name: str) -> TinyFamily:
    """The one tiny model of this name; shared between tests."""
    torch.manual_seed(0)
    return _BUILDERS[name]()
