"""`calibrate`: run a pipeline over prompts and find the scales of its denoiser, or find that it was done before."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

import qvd_core
from qvd_core.cache import ScaleCache, cache_key
from qvd_core.calibrate import calibrate_model
from qvd_core.checks import check_finite
from qvd_core.errors import QVDError
from qvd_core.fingerprint import content_fingerprint, structure_fingerprint, weight_probe
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_diffusers.config import QVDConfig
from qvd_diffusers.sampling import check_call, check_prompts, find_denoiser, models_of, quiet, sample_all

logger = logging.getLogger(__name__)

KEY_VERSION = 5
"""Part of every cache key beside the release; raised when calibration finds something else for the same input."""


ENOUGH_FOR_STATIC = 8
"""Prompts below which static scales are known to clip; 16 or more are better."""


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | str | Callable[[DiffusionPipeline], Any],
    *,
    config: QVDConfig | QuantSpec | None = None,
    component: str | None = None,
    seed: int = 0,
    cache: bool | str | Path | ScaleCache = True,
    progress: bool = True,
    sensitivity: bool | None = None,
    **call: Any,
) -> Scales:
    """Sample with a full-precision pipeline and find the quantization scales of its denoiser.

    prompts: what to sample, prompt number i from the noise of seed + i; or a function that gets the pipeline and
        samples with it as it likes (image-conditioned pipelines; never cached, because its input cannot be seen).
    config: the settings the scales are for; default `QVDConfig()`.
    component: which denoiser, where the pipeline has several.
    cache: False to calibrate anew and keep nothing; a folder or a `ScaleCache` to use instead of the default.
    progress: show a progress bar and say when cached scales were used.
    sensitivity: also measure what each layer, quantized alone, does to the denoiser's output; default: when the config
        has `auto_keep`.
    call: the other arguments of the pipeline call. Use those you will sample with: all steps and both guidance branches
        are observed, so size, number of steps and guidance should be the real ones.

    The pipeline is left as it was, also after an error. Raises QVDError for bad input (see the message).
    """
    spec = _spec_of(config)
    model = find_denoiser(pipe, component)
    _refuse_recorded_quantization(model)
    measured = spec.auto_keep is not None if sensitivity is None else sensitivity
    job = _Job(pipe, model, spec, prompts, seed, call, measured)
    _check_weights(model)
    store = _cache_of(cache)
    key = job.key() if store is not None else None
    if store is not None and key is not None:
        found = store.load(key)
        if found is not None:
            _say(f"Using cached scales {store.path(key)} (calibrated on {job.size()}).", progress)
            return found
    if spec.is_static and not callable(prompts) and len(job.prompts) < ENOUGH_FOR_STATIC:
        logger.warning(
            "Static scales from %d prompt%s clip what other prompts bring: use %d or more, or activation='token'.",
            len(job.prompts),
            "s" * (len(job.prompts) != 1),
            ENOUGH_FOR_STATIC,
        )
    with _SearchBar(progress) as bar:
        scales = calibrate_model(model, job.runner(progress), spec, bar.show, job.description(), measured)
    if store is not None and key is not None:
        store.store(key, scales)
    return scales


@dataclass(frozen=True)
class _Job:
    """One calibration: what is sampled, with which arguments. Building it validates everything."""

    pipe: DiffusionPipeline
    model: nn.Module
    spec: QuantSpec
    prompts: Any
    seed: int
    call: Mapping[str, Any]
    sensitivity: bool

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise QVDError(f"seed must be an integer, got {self.seed!r}.")
        if not callable(self.prompts):
            object.__setattr__(self, "prompts", check_prompts(self.prompts))
            check_call(self.pipe, self.call)
        elif self.call:
            raise QVDError(
                f"arguments {', '.join(map(repr, self.call))} have nowhere to go when prompts is a function: "
                "use them inside the function."
            )

    def size(self) -> str:
        """How much is sampled, in words."""
        return "a function" if callable(self.prompts) else f"{len(self.prompts)} prompt{'s' * (len(self.prompts) != 1)}"

    def runner(self, progress: bool) -> Callable[[], None]:
        """The function that samples everything once."""
        return self._run_function if callable(self.prompts) else lambda: self._run_prompts(progress)

    def _run_function(self) -> None:
        with torch.no_grad(), quiet(self.pipe):
            self.prompts(self.pipe)

    def _run_prompts(self, progress: bool) -> None:
        call = dict(self.call)
        if "output_type" in inspect.signature(type(self.pipe).__call__).parameters:
            call.setdefault("output_type", "latent")  # decoding would show the denoiser nothing new
        for _ in sample_all(self.pipe, self.prompts, self.seed, call, "Calibrating", progress):
            pass

    def description(self) -> dict[str, Any]:
        """What is remembered in the scales about where they come from."""
        where = {"pipeline": type(self.pipe).__name__, "seed": self.seed}
        if callable(self.prompts):
            return where
        plain = {name: value for name, value in self.call.items() if isinstance(value, (str, int, float, bool))}
        return {**where, "prompts": list(self.prompts), "call": plain}

    def key(self) -> str | None:
        """The cache key: everything the scales depend on; None when some of it cannot be seen."""
        if callable(self.prompts) or any(parameter.is_meta for parameter in self.model.parameters()):
            return None
        call = {name: _content(value) for name, value in self.call.items()}
        if None in call.values():
            logger.info("Not caching: an argument of the pipeline call has no content that could be compared.")
            return None
        return cache_key(
            {
                "version": [KEY_VERSION, qvd_core.__version__],
                "model": content_fingerprint(self.model),
                "pipeline": _surroundings(self.pipe, self.model),
                "spec": self.spec.to_dict(),
                "prompts": self.prompts,
                "call": call,
                "seed": self.seed,
                "sensitivity": self.sensitivity,
            }
        )


def _spec_of(config: Any) -> QuantSpec:
    if config is None:
        return QVDConfig().spec
    if isinstance(config, QVDConfig):
        return config.spec
    if isinstance(config, QuantSpec):
        return config
    raise QVDError(f"config must be a QVDConfig or a QuantSpec, got {type(config).__name__}.")


def _cache_of(cache: Any) -> ScaleCache | None:
    if isinstance(cache, ScaleCache):
        return cache
    if isinstance(cache, bool) or cache is None:
        return ScaleCache() if cache else None
    return ScaleCache(cache)


def _refuse_recorded_quantization(model: nn.Module) -> None:
    """Some backends leave no trace in the weights' types; their entry in the config is one."""
    entry = getattr(model, "config", {}).get("quantization_config")
    if entry is None:
        return
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    raise QVDError(
        f"{type(model).__name__} is quantized already, by {getattr(method, 'value', method)}: "
        "calibrate the full-precision model."
    )


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:  # offloaded parameters are seen by calibration itself
            check_finite(name, parameter)


def _surroundings(pipe: DiffusionPipeline, model: nn.Module) -> dict[str, Any]:
    """What else decides the denoiser's input: the scheduler's settings and the models that feed it."""
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    settings["class"] = type(scheduler).__name__
    others = {name: _light_fingerprint(part) for name, part in models_of(pipe).items() if part is not model}
    return {"class": type(pipe).__name__, "scheduler": settings, "models": others}


def _light_fingerprint(model: nn.Module) -> str:
    """Structure and a few samples of every weight: a text encoder may be many times larger than the denoiser."""
    digest = hashlib.sha256(structure_fingerprint(model).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if not parameter.is_meta:
            digest.update(weight_probe(parameter).numpy().tobytes())
    return digest.hexdigest()


def _content(value: Any) -> Any:
    """A JSON value that is equal for equal arguments; None when there is no telling."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if hasattr(value, "tobytes"):  # numpy arrays and PIL images
        shape = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
        return [*shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, (list, tuple)):
        items = [_content(item) for item in value]
        return None if None in items else items
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None


class _SearchBar:
    """The progress bar of the search for scales; it appears when sampling is done."""

    def __init__(self, shown: bool):
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> _SearchBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int, layer: str) -> None:
        """Called by `calibrate_model` before each layer and at the end, once per search."""
        if self._bar is not None and (self._bar.total != total or done < self._bar.n):  # the next search
            self._bar.close()
            self._bar = None
        if self._bar is None:
            self._bar = tqdm(total=total, desc="Searching scales", unit="layer", disable=not self._shown)
        self._bar.set_postfix_str(layer, refresh=False)
        self._bar.update(done - self._bar.n)


def _say(line: str, aloud: bool) -> None:
    if aloud:
        tqdm.write(line)
    else:
        logger.info(line)
