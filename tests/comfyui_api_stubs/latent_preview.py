"""Rough pictures of latents while they are sampled: a weighted sum of the channels, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_PREVIEW_RESOLUTION = 512


class LatentPreviewer:
    """Makes what the progress bar takes: (format, picture, largest size)."""

    def decode_latent_to_preview(self, x0: Tensor) -> Any:
        raise NotImplementedError

    def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> tuple[str, Any, int]:
        return preview_format, self.decode_latent_to_preview(x0), MAX_PREVIEW_RESOLUTION


class Latent2RGBPreviewer(LatentPreviewer):
    """Of the first frame of the first video."""

    def __init__(
        self,
        latent_rgb_factors: list[list[float]],
        latent_rgb_factors_bias: list[float] | None = None,
        latent_rgb_factors_reshape: Any = None,
    ):
        self.latent_rgb_factors = torch.tensor(latent_rgb_factors)

    def decode_latent_to_preview(self, x0: Tensor) -> Any:
        from PIL import Image

        frame = x0[0, :, 0] if x0.dim() == 5 else x0[0]
        colours = frame.movedim(0, -1).float() @ self.latent_rgb_factors
        pixels = ((colours + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.contiguous().numpy().tobytes())


def get_previewer(device: torch.device, latent_format: Any) -> LatentPreviewer | None:
    """What makes previews of these latents; None where the user or the format wants none."""
    factors = latent_format.latent_rgb_factors
    return None if factors is None else Latent2RGBPreviewer(factors)
