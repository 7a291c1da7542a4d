"""Sampling runs for calibration, by ComfyUI's own samplers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_nodes._comfy import (
    ModelPatcher,
    fix_empty_latent_channels,
    latent_preview,
    prepare_noise,
    sample,
    sample_custom,
    samplers,
)

Conditioning = list[Any]
StepDone = Callable[[int, int, Any], None]  # step, steps, preview


@dataclass(frozen=True)
class SamplerSettings:
    """What stock KSampler asks for, and more for a part of a schedule.

    sigmas: float32 [steps + 1], instead of `scheduler` and `steps`. first_step, last_step: the part to sample, as in
    KSampler (Advanced); None for all.
    """

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    sigmas: Tensor | None = None
    first_step: int | None = None
    last_step: int | None = None

    @property
    def steps_to_run(self) -> int:
        if self.sigmas is not None:
            return len(self.sigmas) - 1
        last = self.steps if self.last_step is None else min(self.last_step, self.steps)
        return last - (self.first_step or 0)

    def describe(self) -> dict[str, Any]:
        """JSON types: what of a calibration's content these settings are."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "sigmas"}
        return {**values, "sigmas": None if self.sigmas is None else self.sigmas.tolist()}


def check_inputs(positives: Sequence[Conditioning], negative: Conditioning, latent: dict[str, Any]) -> None:
    """Raise QVDError in plain words for what a sampler would fail on deep inside."""
    for name, conditioning in [*((f"positive {i}", c) for i, c in enumerate(positives)), ("negative", negative)]:
        if not conditioning or not all(isinstance(entry[0], Tensor) and entry[0].numel() for entry in conditioning):
            raise QVDError(f"the {name} conditioning is empty: connect the output of a text encode node.")
        if not all(bool(entry[0].isfinite().all()) for entry in conditioning):
            raise QVDError(f"the {name} conditioning holds NaN or infinity: check the text encoder.")
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if samples is None or (isinstance(samples, Tensor) and samples.numel() == 0):
        raise QVDError("the latent is empty: connect an empty latent video (or image) of the size you will sample.")


def run_sampler(
    model: ModelPatcher,
    settings: SamplerSettings,
    positive: Conditioning,
    negative: Conditioning,
    latent: dict[str, Any],
    step_done: StepDone | None = None,
) -> Tensor:
    """Sample once and return the latent; `step_done` is told of every step and gets ComfyUI's preview of it.

    The first part of a schedule starts from the seed's noise, a later one from the latent that the first has left.
    """
    ratios = {key: latent[key] for key in ("downscale_ratio_spacial", "downscale_ratio_temporal") if key in latent}
    samples = fix_empty_latent_channels(model, latent["samples"], **ratios)
    noise = prepare_noise(samples, settings.seed, latent.get("batch_index"))
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, denoised: Tensor, _x: Tensor, steps: int) -> None:
        if step_done is None:
            return
        picture = None
        if previewer is not None:
            first = denoised if isinstance(denoised, Tensor) else denoised.tensors[0]  # sound beside the video
            picture = previewer.decode_latent_to_preview_image("JPEG", first)
        step_done(step + 1, steps, picture)

    common: dict[str, Any] = {
        "noise_mask": latent.get("noise_mask"),
        "callback": callback,
        "disable_pbar": True,
        "seed": settings.seed,
    }
    if settings.sigmas is not None:
        sampler = samplers.sampler_object(settings.sampler_name)
        result = sample_custom(
            model, noise, settings.cfg, sampler, settings.sigmas, positive, negative, samples, **common
        )
    else:
        common["force_full_denoise"] = settings.last_step is None or settings.last_step >= settings.steps
        result = sample(
            model,
            torch.zeros_like(noise) if settings.first_step else noise,
            settings.steps,
            settings.cfg,
            settings.sampler_name,
            settings.scheduler,
            positive,
            negative,
            samples,
            denoise=settings.denoise,
            start_step=settings.first_step,
            last_step=settings.last_step,
            **common,
        )
    return result


def digest_of(value: Any) -> str:
    """A hash of everything in a conditioning or latent: tensors by their bytes, the rest by its `repr`."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:32]


def _feed(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor) and getattr(value, "is_nested", False):
        _feed(digest, value.tensors)
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"|{key}=".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"<{value!r}>".encode())
