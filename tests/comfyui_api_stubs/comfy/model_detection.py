"""Recognizing what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unet_prefix_from_state_dict(state_dict: Mapping[str, Any]) -> str:
    """What stands before the denoiser's names in whole checkpoints; "model." where nothing known does."""
    for prefix in ("model.diffusion_model.", "model.model.", "net."):
        if sum(name.startswith(prefix) for name in state_dict) > 5:
            return prefix
    return "model."
