"""One calibration: what is sampled with which arguments, and the key under which its result is cached."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import qvd_core
from qvd_core.cache import cache_key
from qvd_core.errors import QVDError
from qvd_core.fingerprint import content_fingerprint, structure_fingerprint, weight_probe
from qvd_core.observation import Observation
from qvd_core.spec import QuantSpec
from qvd_diffusers.float_weights import WeightFiles
from qvd_diffusers.residence import is_offloaded_to_disk
from qvd_diffusers.samples import Sample, as_samples, check_call, content_of
from qvd_diffusers.sampling import models_of, quiet, sample_all

logger = logging.getLogger(__name__)

KEY_VERSION = 6
"""Part of every cache key beside the release; raised when calibration finds something else for the same input."""


@dataclass(frozen=True)
class Job:
    """What is sampled. Building it validates everything.

    prompts: samples, or a function of the pipeline. observations: of the denoisers, by component name.
    """

    pipe: DiffusionPipeline
    observations: Mapping[str, Observation]
    spec: QuantSpec
    prompts: Any
    seed: int
    call: Mapping[str, Any]
    sensitivity: bool

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise QVDError(f"seed must be an integer, got {self.seed!r}.")
        if not callable(self.prompts):
            object.__setattr__(self, "prompts", as_samples(self.prompts))
            check_call(self.pipe, self.call, self.prompts)
        elif self.call:
            raise QVDError(
                f"arguments {', '.join(map(repr, self.call))} have nowhere to go when prompts is a function: "
                "use them inside the function."
            )

    @property
    def samples(self) -> Sequence[Sample]:
        """What is sampled; nothing that could be listed when it is a function."""
        return () if callable(self.prompts) else self.prompts

    def size(self) -> str:
        """How much is sampled, in words."""
        return "a function" if callable(self.prompts) else f"{len(self.prompts)} prompt{'s' * (len(self.prompts) != 1)}"

    def run(self, progress: bool, done: int = 0, after_each: Callable[[int], None] = lambda finished: None) -> None:
        """Sample everything but the first `done`; `after_each` gets the number of samples that are finished."""
        if callable(self.prompts):
            with torch.no_grad(), quiet(self.pipe):
                self.prompts(self.pipe)
            return
        call = dict(self.call)
        if "output_type" in inspect.signature(type(self.pipe).__call__).parameters:
            call.setdefault("output_type", "latent")  # decoding would show the denoiser nothing new
        runs = sample_all(self.pipe, self.prompts, self.seed, call, "Calibrating", progress, done)
        for finished, _ in enumerate(runs, start=done + 1):
            after_each(finished)

    def description(self, component: str) -> dict[str, Any]:
        """What is remembered in the scales of one component about where they come from."""
        where = {"pipeline": type(self.pipe).__name__, "component": component, "seed": self.seed}
        if callable(self.prompts):
            return where
        plain = {name: value for name, value in self.call.items() if isinstance(value, (str, int, float, bool))}
        texts = [sample["prompt"] for sample in self.prompts if isinstance(sample.get("prompt"), str)]
        return {**where, "prompts": texts, "samples": len(self.prompts), "call": plain}

    def key(self) -> str | None:
        """The cache key: everything the scales depend on; None when some of it cannot be seen."""
        models = {name: _content_of_model(observation) for name, observation in self.observations.items()}
        if callable(self.prompts) or None in models.values():
            return None
        call, *samples = (
            {name: content_of(value) for name, value in arguments.items()} for arguments in (self.call, *self.prompts)
        )
        if any(None in arguments.values() for arguments in (call, *samples)):
            logger.info("Not caching: an argument of the pipeline call has no content that could be compared.")
            return None
        return cache_key(
            {
                "version": [KEY_VERSION, qvd_core.__version__],
                "models": models,
                "pipeline": self._surroundings(),
                "spec": self.spec.to_dict(),
                "samples": samples,
                "call": call,
                "seed": self.seed,
                "sensitivity": self.sensitivity,
            }
        )

    def _surroundings(self) -> dict[str, Any]:
        """What else decides the denoisers' input: the scheduler's settings and the models that feed them."""
        scheduler = getattr(self.pipe, "scheduler", None)
        config = getattr(scheduler, "config", {})
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        settings["class"] = type(scheduler).__name__
        others = {
            name: _light_fingerprint(part)
            for name, part in models_of(self.pipe).items()
            if name not in self.observations
        }
        return {"class": type(self.pipe).__name__, "scheduler": settings, "models": others}


def _content_of_model(observation: Observation) -> str | None:
    """What a denoiser computes, as a hash; None when its weights cannot be seen without bringing them all back."""
    weights, model = observation.weights, observation.running
    if isinstance(weights, WeightFiles):
        return _content_of_files(observation.model, weights)
    if any(parameter.is_meta for parameter in model.parameters()) or is_offloaded_to_disk(model):
        return None
    return content_fingerprint(model)


def _content_of_files(skeleton: nn.Module, weights: WeightFiles) -> str:
    digest = hashlib.sha256(structure_fingerprint(skeleton).encode())
    for name in sorted(weights.home):
        digest.update(f"|{name}".encode())
        digest.update(weights.probe(name).numpy().tobytes())
    return f"files:{digest.hexdigest()[:32]}"


def _light_fingerprint(model: nn.Module) -> str:
    """Structure and a few samples of every weight: a text encoder may be many times larger than the denoiser."""
    digest = hashlib.sha256(structure_fingerprint(model).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if not parameter.is_meta:
            digest.update(weight_probe(parameter).numpy().tobytes())
    return digest.hexdigest()
