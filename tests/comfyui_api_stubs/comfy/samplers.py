"""Sampling: Euler steps with classifier-free guidance, under every name.

Both guidance branches go through the model in one batch, the negative one first, as ComfyUI does where there is room;
without guidance (cfg 1) the positive one goes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

_Callback = Callable[[int, Tensor, Tensor, int], None]


class Sampler:
    """What knows how to go from one sigma to the next."""

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        """Whether the schedule starts from pure noise."""
        largest = float(model_wrap.inner_model.model_sampling.sigmas[-1])
        return math.isclose(largest, float(sigmas[0]), rel_tol=1e-5) or float(sigmas[0]) > largest


class KSAMPLER(Sampler):
    """sampler_function: Euler's method here, whatever the name it was asked for by."""

    def __init__(
        self,
        sampler_function: Callable[..., Tensor],
        extra_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
        inpaint_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
    ):
        self.sampler_function = sampler_function
        self.extra_options = extra_options


def sampler_object(name: str) -> KSAMPLER:
    return KSAMPLER(_euler)


class KSampler:
    """The schedule of a sampler node, and its part that is to be sampled."""

    SCHEDULERS = ["simple", "normal"]  # noqa: RUF012 - as in ComfyUI
    SAMPLERS = ["euler", "heun"]  # noqa: RUF012 - as in ComfyUI

    def __init__(
        self,
        model: ModelPatcher,
        steps: int,
        device: torch.device,
        sampler: str | None = None,
        scheduler: str | None = None,
        denoise: float | None = None,
        model_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
    ):
        self.model = model
        self.device = device
        self.sampler = sampler or "euler"
        self.model_options = model_options
        whole = steps if denoise is None or denoise > 0.9999 else int(steps / denoise)
        self.sigmas = _schedule(model.get_model_object("model_sampling").sigmas, whole)[-(steps + 1) :]

    def sample(
        self,
        noise: Tensor,
        positive: list[Any],
        negative: list[Any],
        cfg: float,
        latent_image: Tensor | None = None,
        start_step: int | None = None,
        last_step: int | None = None,
        force_full_denoise: bool = False,
        denoise_mask: Tensor | None = None,
        sigmas: Tensor | None = None,
        callback: _Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        sigmas = (self.sigmas if sigmas is None else sigmas).clone()
        if last_step is not None and last_step < len(sigmas) - 1:
            sigmas = sigmas[: last_step + 1]
            if force_full_denoise:
                sigmas[-1] = 0
        if start_step is not None:
            if start_step >= len(sigmas) - 1:
                return torch.zeros_like(noise) if latent_image is None else latent_image
            sigmas = sigmas[start_step:]
        sampler = sampler_object(self.sampler)
        return sample(
            self.model,
            noise,
            positive,
            negative,
            cfg,
            self.device,
            sampler,
            sigmas,
            self.model_options,
            latent_image=latent_image,
            callback=callback,
            seed=seed,
        )


def sample(
    model: ModelPatcher,
    noise: Tensor,
    positive: list[Any],
    negative: list[Any],
    cfg: float,
    device: torch.device,
    sampler: KSAMPLER,
    sigmas: Tensor,
    model_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    callback: _Callback | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
) -> Tensor:
    """Load the MODEL and sample with it; only the first entry of a conditioning counts, masks are left out."""
    comfy.model_management.load_models_gpu([model])
    model.model.current_patcher = model
    latent = torch.zeros_like(noise) if latent_image is None else model.model.latent_format.process_in(latent_image)
    options = {
        **model_options.get("transformer_options", {}),
        "sample_sigmas": sigmas,
        "wrappers": {kind: dict(wrappers) for kind, wrappers in model.wrappers.items()},
    }
    try:
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return _guided(model.model, x, sigma, positive, negative, cfg, options)

        x = sampler.sampler_function(denoise, x, sigmas, callback)
        x = x / (1 - sigmas[-1])  # what is left is noise, and the next sampler adds it again
    finally:
        model.model.current_patcher = None
    out: Tensor = model.model.latent_format.process_out(x)
    return out


def _euler(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor, callback: _Callback | None
) -> Tensor:
    for step in range(len(sigmas) - 1):
        sigma, following = sigmas[step], sigmas[step + 1]
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(step, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def _guided(
    model: Any, x: Tensor, sigma: Tensor, positive: Any, negative: Any, cfg: float, options: dict[str, Any]
) -> Tensor:
    contexts = [positive[0][0]] if cfg == 1.0 else [negative[0][0], positive[0][0]]
    count = len(contexts)
    options = {**options, "sigmas": sigma.view(1), "cond_or_uncond": [0] if count == 1 else [1, 0]}
    out: Tensor = model.apply_model(
        x.repeat(count, *[1] * (x.dim() - 1)),
        sigma.repeat(count * len(x)),
        c_crossattn=torch.cat([context.expand(len(x), *context.shape[1:]) for context in contexts]),
        transformer_options=options,
    )
    if count == 1:
        return out
    unconditional, conditional = out.chunk(2)
    return unconditional + cfg * (conditional - unconditional)


def _schedule(sigmas: Tensor, steps: int) -> Tensor:
    """The schedule "simple": sigmas [steps + 1] at equal distances, the last one zero."""
    index = [-(1 + int(step * len(sigmas) / steps)) for step in range(steps)]
    return torch.tensor([*(float(sigmas[i]) for i in index), 0.0])
