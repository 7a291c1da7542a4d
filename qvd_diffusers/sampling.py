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

OWN_ARGUMENTS = ("prompt", "generator", "latents")
"""Arguments of a pipeline call that follow from prompts and seed and may not be given beside them."""


def require_pipeline(pipe: Any) -> None:
    """Raise QVDError unless `pipe` is a diffusers pipeline."""
    if not isinstance(pipe, DiffusionPipeline):
        raise QVDError(
            f"expected a diffusers pipeline, got {type(pipe).__name__}: load one with "
            "DiffusionPipeline.from_pretrained, or use qvd_core.calibrate_model for a bare model."
        )


def find_denoiser(pipe: DiffusionPipeline, component: str | None = None) -> nn.Module:
    """The model of a pipeline that is quantized. Raises QVDError when there is none, or several and none was named."""
    require_pipeline(pipe)
    models = models_of(pipe)
    if component is not None:
        if component not in models:
            raise QVDError(f"{type(pipe).__name__} has no model {component!r}; it has {', '.join(models)}.")
        return models[component]
    names = [name for name in DENOISERS if name in models]
    if not names:
        raise QVDError(f"{type(pipe).__name__} has no denoiser ({' or '.join(DENOISERS)}): name a component=...")
    if len(names) > 1:
        raise QVDError(
            f"{type(pipe).__name__} has several denoisers, {' and '.join(names)}: calibrate them one by one, "
            f"e.g. component={names[0]!r}."
        )
    return models[names[0]]


def models_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models a pipeline really has (optional ones may be None), by component name."""
    return {name: part for name, part in vars(pipe).items() if isinstance(part, nn.Module) and not name.startswith("_")}


def check_prompts(prompts: Any) -> list[str]:
    """A list of prompts with something in each. Raises QVDError otherwise."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise QVDError(f"prompts must be a list of strings or a callable, got {type(prompts).__name__}.")
    if not prompts:
        raise QVDError("no prompts: give some that resemble what the model will be asked for (8 to 32 are enough).")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise QVDError(f"prompts[{number}] must be a string, got {type(prompt).__name__}.")
        if not prompt.strip():
            raise QVDError(f"prompts[{number}] is empty: remove it, or write a prompt.")
    return list(prompts)


def check_call(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> None:
    """Raise QVDError for arguments the pipeline does not take, or that prompts and seed decide already."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    if "prompt" not in accepted and not open_ended:
        raise QVDError(f"{type(pipe).__name__} takes no prompt: pass a function of the pipeline that samples with it.")
    unknown = sorted(name for name in call if name not in accepted)
    if unknown and not open_ended:
        raise QVDError(f"{type(pipe).__name__} takes no argument {', '.join(map(repr, unknown))}: check the spelling.")
    own = [name for name in OWN_ARGUMENTS if name in call]
    if own:
        names = ", ".join(map(repr, own))
        raise QVDError(f"{names} follows from prompts and seed here: leave it out of the call's arguments.")


def sample(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    call: Mapping[str, Any],
    on_step: Callable[[int], None] | None = None,
) -> Any:
    """One run of the pipeline from the noise of `seed`; returns what the pipeline returns.

    The generator lives on the CPU, so that every device starts from the same noise. `on_step` gets the number of
    finished steps, where the pipeline can tell.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {"prompt": prompt, **call}
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
    prompts: Sequence[str],
    seed: int,
    call: Mapping[str, Any],
    description: str,
    progress: bool,
) -> Iterator[Any]:
    """Sample prompt after prompt (seed, seed + 1, ...) under one progress bar that also shows the steps."""
    with quiet(pipe), tqdm(total=len(prompts), desc=description, unit="prompt", disable=not progress) as bar:
        for number, prompt in enumerate(prompts):
            yield sample(pipe, prompt, seed + number, call, lambda step: bar.set_postfix_str(f"step {step}"))
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
