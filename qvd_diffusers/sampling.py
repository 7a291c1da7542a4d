"""Running a pipeline from given seeds, without changing anything about it. Shared by calibration and comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from qvd_core.errors import QVDError
from qvd_diffusers.config import DENOISERS
from qvd_diffusers.samples import Sample


def require_pipeline(pipe: Any) -> None:
    """Raise QVDError unless `pipe` is a diffusers pipeline."""
    if not isinstance(pipe, DiffusionPipeline):
        raise QVDError(
            f"expected a diffusers pipeline, got {type(pipe).__name__}: load one with "
            "DiffusionPipeline.from_pretrained, or use qvd_core.calibrate_model for a bare model."
        )


def find_denoisers(pipe: DiffusionPipeline, component: str | None = None) -> dict[str, nn.Module]:
    """The models of a pipeline that are quantized, by component name: the one that is named, or every denoiser.

    Raises QVDError when there is none.
    """
    require_pipeline(pipe)
    models = models_of(pipe)
    if component is not None:
        if component not in models:
            raise QVDError(f"{type(pipe).__name__} has no model {component!r}; it has {', '.join(models)}.")
        return {component: models[component]}
    denoisers = {name: models[name] for name in DENOISERS if name in models}
    if not denoisers:
        raise QVDError(f"{type(pipe).__name__} has no denoiser ({' or '.join(DENOISERS)}): name a component=...")
    return denoisers


def find_denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The only denoiser of a pipeline. Raises QVDError when there is none, or several."""
    denoisers = find_denoisers(pipe)
    if len(denoisers) > 1:
        raise QVDError(f"{type(pipe).__name__} has several denoisers, {' and '.join(denoisers)}.")
    return next(iter(denoisers.values()))


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models a pipeline really has (optional ones may be None), by component name."""
    return {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module) and not name.startswith("_")}


def sample(
    pipe: DiffusionPipeline,
    arguments: Sample,
    seed: int,
    call: Mapping[str, Any],
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """One run of the pipeline from the noise of `seed`; returns what the pipeline returns.

    The generator lives on the CPU, so that every device starts from the same noise. `on_step` gets the number of
    finished steps, where the pipeline can tell.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = {**call, **arguments}
    if "generator" in accepted:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    if on_step is not None and "callback_on_step_end" in accepted and "callback_on_step_end" not in call:

        def report(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1)
            return tensors

        arguments["callback_on_step_end"] = report
    return pipe(**arguments)


def sample_all(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    seed: int,
    call: Mapping[str, Any],
    description: str,
    progress: bool,
    done: int = 0,
) -> Iterator[Any]:
    """Sample one after the other (seed, seed + 1, ...) under one progress bar that also shows the steps.

    done: how many need not be sampled any more.
    """
    bar = tqdm(total=len(samples), initial=done, desc=description, unit="prompt", disable=not progress)
    with quiet(pipe), bar:
        for number, arguments in enumerate(samples[done:], start=done):
            yield sample(pipe, arguments, seed + number, call, lambda step: bar.set_postfix_str(f"step {step}"))
            bar.update()


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Silence the pipeline's own progress bars inside, and leave its settings as they were."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
