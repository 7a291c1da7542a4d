"""What is known of a model's latents."""

from __future__ import annotations

from torch import Tensor


class LatentFormat:
    """latent_dimensions: 2 of images, 3 of videos. latent_rgb_factors: [channels][3], of a rough preview."""

    latent_channels = 4
    latent_dimensions = 2
    latent_rgb_factors: list[list[float]] | None = None
    spacial_downscale_ratio = 8
    temporal_downscale_ratio = 1

    def process_in(self, latent: Tensor) -> Tensor:
        return latent

    def process_out(self, latent: Tensor) -> Tensor:
        return latent
