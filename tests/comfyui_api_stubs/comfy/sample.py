"""Noise, latents and samplers as the sampler nodes use them; latents of sound beside those of a video are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor


def prepare_noise(latent_image: Tensor, seed: int, noise_inds: Any = None) -> Tensor:
    """Normal numbers that depend on the seed alone. `noise_inds`, of parts of a batch, is left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(latent_image.shape, generator=generator).to(latent_image.dtype)


def fix_empty_latent_channels(
    model: ModelPatcher,
    latent_image: Tensor,
    downscale_ratio_spacial: float | None = None,
    downscale_ratio_temporal: float | None = None,
) -> Tensor:
    """An empty latent with as many channels and dimensions as the model has; the sizes stay."""
    latent_format = model.get_model_object("latent_format")
    if not latent_image.any() and latent_image.shape[1] != latent_format.latent_channels:
        latent_image = latent_image.new_zeros(
            (latent_image.shape[0], latent_format.latent_channels, *latent_image.shape[2:])
        )
    if latent_format.latent_dimensions == 3 and latent_image.dim() == 4:
        latent_image = latent_image.unsqueeze(2)
    return latent_image


def sample(
    model: ModelPatcher,
    noise: Tensor,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Any],
    negative: list[Any],
    latent_image: Tensor,
    denoise: float = 1.0,
    disable_noise: bool = False,
    start_step: int | None = None,
    last_step: int | None = None,
    force_full_denoise: bool = False,
    noise_mask: Tensor | None = None,
    sigmas: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Sample as the node KSampler (Advanced) does."""
    sampler = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
    )
    return sampler.sample(
        noise,
        positive,
        negative,
        cfg,
        latent_image,
        start_step,
        last_step,
        force_full_denoise,
        sigmas=sigmas,
        callback=callback,
        seed=seed,
    )


def sample_custom(
    model: ModelPatcher,
    noise: Tensor,
    cfg: float,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: Tensor,
    positive: list[Any],
    negative: list[Any],
    latent_image: Tensor,
    noise_mask: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Sample with a sampler and a schedule of one's own."""
    return comfy.samplers.sample(
        model,
        noise,
        positive,
        negative,
        cfg,
        model.load_device,
        sampler,
        sigmas,
        model.model_options,
        latent_image,
        callback=callback,
        seed=seed,
    )
