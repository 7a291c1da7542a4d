"""Image models of ComfyUI: they go through the generic rule."""

from __future__ import annotations

IMAGE_DENOISERS = frozenset(
    {
        "Flux",
    }
)
"""Class names; those that end with "2DModel" need no entry."""
