"""`calibrate`: run a pipeline over prompts and find the scales of its denoisers, or find that it was done before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from qvd_core.cache import ScaleCache
from qvd_core.calibrate import search_scales
from qvd_core.checks import check_finite
from qvd_core.convert import dequantize_layer
from qvd_core.errors import QVDError
from qvd_core.fingerprint import weight_probe
from qvd_core.layers import QuantizedLayer
from qvd_core.observation import Observation, watch
from qvd_core.observation_state import load_observations, save_observations
from qvd_core.report import report_of_model, write_report
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_diffusers.config import QVDConfig
from qvd_diffusers.float_weights import WeightFiles, float_skeleton, weights_behind_hooks
from qvd_diffusers.job import Job
from qvd_diffusers.residence import is_offloaded_to_disk
from qvd_diffusers.samples import Sample
from qvd_diffusers.sampling import find_denoisers

logger = logging.getLogger(__name__)

ENOUGH_FOR_STATIC = 8
"""Prompts below which static scales are known to clip; 16 or more are better."""

SAME_WEIGHTS = 0.3
"""Largest relative difference between a weight and its codes, 4-bit ones included, on the samples that are compared."""

SECONDS_BETWEEN_SAVES = 60.0
"""How much sampling an interruption may cost, beside the sample that is under way."""


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | str | Sequence[Sample] | Callable[[DiffusionPipeline], Any],
    *,
    config: QVDConfig | QuantSpec | None = None,
    component: str | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    cache: bool | str | Path | ScaleCache = True,
    progress: bool = True,
    sensitivity: bool | None = None,
    report: str | Path | None = None,
    **call: Any,
) -> Any:
    """Sample with a pipeline and find the quantization scales of its denoiser: `Scales`.

    A pipeline with several denoisers (Wan 2.2) gives a dict of `Scales` by component name, from one run.

    prompts: what to sample, number i from the noise of seed + i: strings; or sets of pipeline arguments, for pipelines
        that also take (or only take) images or video, `[{"prompt": ..., "image": ...}, ...]`; or a function that gets
        the pipeline and samples with it as it likes (never cached, because its input cannot be seen).
    config: the settings the scales are for; default `QVDConfig()`.
    component: one denoiser alone; the result is then its `Scales`.
    weights: for a model that does not fit into memory in full precision: load the pipeline with
        `QVDConfig(backend="weight_only")`, which keeps it in int8, and say here where its full-precision weights are
        (the folder or the name it was loaded from). They are read one layer at a time.
    cache: False to calibrate anew and keep nothing; a folder or a `ScaleCache` to use instead of the default. With a
        cache, a calibration that was interrupted goes on after its last finished prompts.
    progress: show a progress bar and say when cached scales were used.
    sensitivity: also measure what each layer, quantized alone, does to the denoiser's output; default: when the config
        has `auto_keep`.
    report: an HTML file to write the report to (docs/report.md), with its JSON beside it; of several denoisers, one
        file each, with the component in its name. It never fails a calibration: what goes wrong is one warning.
    call: the other arguments of the pipeline call. Use those you will sample with: all steps and both guidance branches
        are observed, so size, number of steps and guidance should be the real ones.

    Offloaded pipelines (model, sequential, group) are calibrated as they are. The pipeline is left as it was, also
    after an error. Raises QVDError for bad input (see the message).
    """
    spec = _spec_of(config)
    measured = spec.auto_keep is not None if sensitivity is None else sensitivity
    if measured and weights is not None:
        raise QVDError("sensitivity and auto_keep compare with the full-precision model: load that, without weights=.")
    observations = {
        name: _observation(model, name, spec, weights) for name, model in find_denoisers(pipe, component).items()
    }
    job = Job(pipe, observations, spec, prompts, seed, call, measured)
    for observation in observations.values():
        _check_weights(observation.running)
    store = _Store(_cache_of(cache), job)
    found = store.finished()
    if found is None:
        _warn_of_few(job)
        _sample(job, store, progress)
        with _SearchBar(progress) as bar:
            found = {
                name: search_scales(observation, spec, bar.show, job.description(name), measured)
                for name, observation in observations.items()
            }
        store.finish(found)
    else:
        _say(f"Using cached scales {store.where()} (calibrated on {job.size()}).", progress)
    if report is not None:
        _write_reports(Path(report), observations, found, spec)
    return next(iter(found.values())) if len(found) == 1 else found


def _write_reports(
    path: Path, observations: Mapping[str, Observation], found: Mapping[str, Scales], spec: QuantSpec
) -> None:
    """The report of every denoiser; or a warning: scales that took an hour must not be lost for it."""
    for name, observation in observations.items():
        own = path.with_name(f"{path.stem}.{name}{path.suffix}") if len(observations) > 1 else path
        try:
            write_report(own, report_of_model(observation.model, spec, found[name]))
        except Exception as error:
            logger.warning("No report was written to %s: %s", own, str(error).strip() or type(error).__name__)


def _sample(job: Job, store: _Store, progress: bool) -> None:
    """Watch the denoisers sample; what an earlier run got done is taken over."""
    done = store.resume()
    if done:
        _say(f"Going on with a calibration that was interrupted after {done} of {job.size()}.", progress)
    watch(list(job.observations.values()), lambda: job.run(progress, done, store.save))


class _Store:
    """Where one calibration is cached: its result, and before that what was seen so far."""

    def __init__(self, cache: ScaleCache | None, job: Job):
        self._cache = cache
        self._observations = job.observations
        self._key = job.key() if cache is not None else None
        self._total = len(job.samples)
        self._saved_at = time.monotonic()

    def where(self) -> str:
        """The files of a finished calibration, for a message."""
        assert self._cache is not None
        return ", ".join(str(self._cache.path(self._name(component))) for component in self._observations)

    def finished(self) -> dict[str, Scales] | None:
        """The result, where all of it is there."""
        if self._cache is None or self._key is None:
            return None
        found = {component: self._cache.load(self._name(component)) for component in self._observations}
        complete = {component: scales for component, scales in found.items() if scales is not None}
        return complete if len(complete) == len(found) else None

    def finish(self, result: Mapping[str, Scales]) -> None:
        """Keep the result; what led to it is no longer needed."""
        if self._cache is None or self._key is None:
            return
        for component, scales in result.items():
            self._cache.store(self._name(component), scales)
        self._cache.partial_path(self._key).unlink(missing_ok=True)

    def resume(self) -> int:
        """Take over what an interrupted run has seen; how many samples it had finished."""
        path = self._cache.partial_path(self._key) if self._cache is not None and self._key is not None else None
        if path is None or not path.is_file():
            return 0
        try:
            return load_observations(path, self._observations, self._total or None)
        except QVDError as error:
            logger.warning("Starting the calibration anew: %s", error)
            return 0

    def save(self, done: int) -> None:
        """Keep what was seen after `done` samples, now and then."""
        due = time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES
        if self._cache is None or self._key is None or not due or done == self._total:
            return
        try:
            save_observations(self._cache.partial_path(self._key), self._observations, done)
        except QVDError as error:
            logger.warning("If it is interrupted, this calibration will have to start anew: %s", error)
        self._saved_at = time.monotonic()

    def _name(self, component: str) -> str:
        return f"{self._key}-{component}"


def _observation(model: nn.Module, name: str, spec: QuantSpec, weights: str | Path | None) -> Observation:
    """Nothing seen yet of a denoiser that is in memory, offloaded, or (with `weights`) quantized by QVD."""
    method = _recorded_method(model)
    if weights is None and method is not None:
        raise QVDError(
            f"{type(model).__name__} is quantized already, by {method}: calibrate the full-precision model; for one "
            "that does not fit into memory, say with weights=... where its full-precision weights are."
        )
    if weights is None:
        return Observation.of(model, spec, weights=weights_behind_hooks(model))
    if method != "qvd":
        raise QVDError(
            f"weights= goes with a {type(model).__name__} that was loaded with "
            f'quantization_config=QVDConfig(backend="weight_only"); this one is {method or "in full precision"}.'
        )
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    files = WeightFiles(weights, name, device)
    observation = Observation.of(float_skeleton(model), spec, model, files)
    files.check_shapes(observation.layers)
    _check_same_weights(model, files)
    return observation


def _check_same_weights(model: nn.Module, files: WeightFiles) -> None:
    """Raise QVDError when the float weights in the files are not those that the int8 model was made from."""
    if is_offloaded_to_disk(model):
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer) or layer.weight.is_meta:
            continue
        wanted = weight_probe(dequantize_layer(layer, torch.float32).weight)  # type: ignore[arg-type]
        found = weight_probe(files.tensor(f"{name}.weight"))
        if float((found - wanted).norm()) > SAME_WEIGHTS * max(float(wanted.norm()), 1e-30):
            raise QVDError(
                f"{name}.weight in {files.files[0].parent} is not what this {type(model).__name__} was quantized from: "
                "give the folder it was loaded from."
            )


def _recorded_method(model: nn.Module) -> str | None:
    """The method a model says it was quantized by. Some backends leave no trace in the weights' types."""
    entry = getattr(model, "config", {}).get("quantization_config")
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    return str(getattr(method, "value", method))


def _check_weights(model: nn.Module) -> None:
    if is_offloaded_to_disk(model):
        return
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point():  # the search looks at offloaded ones itself
            check_finite(name, parameter)


def _warn_of_few(job: Job) -> None:
    if job.spec.is_static and 0 < len(job.samples) < ENOUGH_FOR_STATIC:
        logger.warning(
            "Static scales from %s clip what other prompts bring: use %d or more, or activation='token'.",
            job.size(),
            ENOUGH_FOR_STATIC,
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
        """Called by `search_scales` before each layer and at the end, once per search."""
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
