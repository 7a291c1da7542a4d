"""Calibrating one MODEL, or the two experts of one video, by sampling with ComfyUI's own samplers.

The MODEL is watched through hooks that leave no trace: however a run ends, what is loaded stays as it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qvd_core.calibrate import search_scales
from qvd_core.errors import QVDError
from qvd_core.observation import Observation, watch
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import ModelPatcher, WrappersMP, management
from qvd_nodes.events import CalibrationEvents
from qvd_nodes.quantize import COMPILE_WRAPPER
from qvd_nodes.sampling import Conditioning, SamplerSettings, check_inputs, digest_of, run_sampler
from qvd_nodes.scale_cache import calibration_key, scale_cache
from qvd_nodes.weights import float_denoiser, patched_weights, unload


@dataclass(frozen=True)
class Expert:
    """One MODEL and the part of the schedule it samples. name: "" for the only one, else "high" or "low"."""

    name: str
    model: ModelPatcher
    settings: SamplerSettings


@dataclass(frozen=True)
class Job:
    """All a calibration depends on."""

    experts: tuple[Expert, ...]
    positives: Sequence[Conditioning]
    negative: Conditioning
    latent: dict[str, Any]
    spec: QuantSpec

    def check(self) -> None:
        """Raise QVDError, before anything is sampled, for what cannot be calibrated."""
        check_inputs(self.positives, self.negative, self.latent)
        for expert in self.experts:
            float_denoiser(expert.model)
            if expert.settings.sigmas is not None and len(expert.settings.sigmas) < 2:
                raise QVDError("the sigmas hold no step: connect a scheduler node with at least one step.")
            if expert.settings.denoise <= 0:
                raise QVDError("denoise is 0: nothing would be sampled; use 1, or what the KSampler uses.")
            if expert.settings.steps_to_run < 1:
                raise QVDError(
                    f"the {expert.name or 'only'} MODEL would sample no step of {expert.settings.steps}: "
                    "put the switch between the first and the last step."
                )
        if len({id(expert.model.model) for expert in self.experts}) < len(self.experts):
            raise QVDError("both experts are one MODEL: load the high-noise and the low-noise file in a node each.")
        kinds = {type(float_denoiser(expert.model)).__name__ for expert in self.experts}
        if len(kinds) > 1:
            raise QVDError(f"the experts are different kinds of model, {' and '.join(sorted(kinds))}: load two of one.")

    def key(self, expert: Expert) -> str:
        """The cache's key of one expert's scales. Both experts shape what either of them sees."""
        settings = {
            "spec": self.spec.to_dict(),
            "positives": [digest_of(positive) for positive in self.positives],
            "negative": digest_of(self.negative),
            "latent": digest_of(self.latent),
            "expert": expert.name,
            "experts": [calibration_key(other.model, other.settings.describe()) for other in self.experts],
        }
        return calibration_key(expert.model, settings)


@dataclass
class Calibration:
    """The scales of each expert, and how they came about."""

    scales: list[Scales] = field(default_factory=list)
    from_cache: bool = False
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0


def calibrate(job: Job, node: str = "", use_cache: bool = True) -> Calibration:
    """The scales of every expert of `job`, from the cache where they are there.

    Raises QVDError for inputs that cannot be calibrated; ComfyUI's own exception when the user interrupts.
    """
    started = time.monotonic()
    job.check()
    for expert in job.experts:
        unload(expert.model)
    keys = [job.key(expert) for expert in job.experts]
    cache = scale_cache()
    files = [cache.path(key).name for key in keys]
    known = [cache.load(key) for key in keys] if use_cache else []
    events = CalibrationEvents(node, total=1)
    found = [scales for scales in known if scales is not None]
    if len(found) == len(keys):
        events.end("cached", "loaded from the cache")
        return Calibration(found, True, files, time.monotonic() - started)
    try:
        scales = _calibrate(job, events)
    except management.InterruptProcessingException:
        events.end("interrupted", "interrupted: nothing was kept")
        raise
    except Exception as error:
        events.end("failed", str(error))
        raise
    for key, result in zip(keys, scales, strict=True):
        cache.store(key, result)
    events.end("done")
    return Calibration(scales, False, files, time.monotonic() - started)


@torch.no_grad()
def _calibrate(job: Job, events: CalibrationEvents) -> list[Scales]:
    models = [_plain_clone(expert.model) for expert in job.experts]
    observations = [Observation.of(float_denoiser(model), job.spec, weights=patched_weights(model)) for model in models]
    steps = sum(expert.settings.steps_to_run for expert in job.experts)
    searched = sum(len(observation.groups) for observation in observations)
    if job.spec.auto_keep is not None:
        searched += sum(len(observation.layers) for observation in observations)
    events.total = len(job.positives) * steps + searched

    def sample_all() -> None:
        for number, positive in enumerate(job.positives, start=1):
            _sample(job, models, positive, events, number)

    watch(observations, sample_all)
    results = []
    for expert, model, observation in zip(job.experts, models, observations, strict=True):
        if job.spec.auto_keep is None:
            unload(model)  # the search wants the room
        else:
            management.load_models_gpu([model])  # and this runs the model again, layer by layer
        events.expert = expert.name
        results.append(_search(job, expert, observation, events))
    return results


def _plain_clone(source: ModelPatcher) -> ModelPatcher:
    """The MODEL without what hides its layers from hooks: a compiled one calls none."""
    model = source.clone()
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER)
    return model


def _sample(
    job: Job, models: Sequence[ModelPatcher], positive: Conditioning, events: CalibrationEvents, number: int
) -> None:
    """Sample one video with one prompt, each expert going on where the one before it stopped."""
    latent = job.latent
    for expert, model in zip(job.experts, models, strict=True):
        events.expert = expert.name

        def step_done(step: int, steps: int, preview: Any) -> None:
            events.step(number, len(job.positives), step, steps, preview)

        try:
            samples = run_sampler(model, expert.settings, positive, job.negative, latent, step_done)
        except torch.OutOfMemoryError:
            raise  # ComfyUI has words of its own for it
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise QVDError(
                f"this MODEL ({type(model.model.diffusion_model).__name__}) cannot be sampled with these inputs "
                f"({type(error).__name__}: {error}): the conditioning and the latent must be made for it. Try the same "
                "inputs in a KSampler."
            ) from error
        latent = {**latent, "samples": samples}


def _search(job: Job, expert: Expert, observation: Observation, events: CalibrationEvents) -> Scales:
    """The second half: choose the scales from what was seen, one layer group after the other."""
    figures: dict[str, dict[str, float]] = {}
    told: set[str] = set()

    def progress(done: int, total: int, layer: str) -> None:
        management.throw_exception_if_processing_interrupted()
        new = {name: found["sqnr_db"] for name, found in figures.items() if name not in told and "sqnr_db" in found}
        told.update(new)
        events.found(new)
        if done < total:  # the last call, of a search or a measurement that is done, has no layer
            events.layer(layer)

    description = {
        "component": expert.name or None,
        "prompts": len(job.positives),
        "sampler": expert.settings.describe(),
        "latent": list(job.latent["samples"].shape),
    }
    return search_scales(observation, job.spec, progress, description, figures=figures)
