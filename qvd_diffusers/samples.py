"""What a calibration samples: prompts, or whole sets of pipeline arguments, and a key that tells them apart."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from qvd_core.errors import QVDError

OWN_ARGUMENTS = ("prompt", "generator", "latents")
"""Arguments of a pipeline call that follow from prompts and seed and may not be given beside them."""

Sample = Mapping[str, Any]
"""The arguments of one pipeline call that differ between samples: {"prompt": ...}, {"image": ...}, ..."""


def as_samples(prompts: Any) -> list[Sample]:
    """One mapping of arguments per prompt. Raises QVDError when there is nothing, or nothing sensible, to sample."""
    items = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
    if isinstance(items, Sequence) and items and all(isinstance(item, Mapping) for item in items):
        return [_checked_arguments(number, item) for number, item in enumerate(items)]
    return [{"prompt": prompt} for prompt in check_prompts(items)]


def _checked_arguments(number: int, arguments: Mapping[str, Any]) -> Sample:
    if not arguments or not all(isinstance(name, str) for name in arguments):
        raise QVDError(f"prompts[{number}] must name arguments of the pipeline call, got {dict(arguments)!r}.")
    if "generator" in arguments:
        raise QVDError(f"prompts[{number}]: the generator follows from the seed, leave it out.")
    return dict(arguments)


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
            raise QVDError(
                f"prompts[{number}] must be a string, or all of them sets of pipeline arguments such as "
                f"{{'prompt': ..., 'image': ...}}; got {type(prompt).__name__}."
            )
        if not prompt.strip():
            raise QVDError(f"prompts[{number}] is empty: remove it, or write a prompt.")
    return list(prompts)


def check_call(pipe: DiffusionPipeline, call: Mapping[str, Any], samples: Sequence[Sample] = ({"prompt": ""},)) -> None:
    """Raise QVDError for arguments the pipeline does not take, or that samples and seed decide already."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    given = sorted({name for sample in samples for name in sample})
    if "prompt" in given and "prompt" not in accepted and not open_ended:
        raise QVDError(
            f"{type(pipe).__name__} takes no prompt: pass a function of the pipeline that samples with it, "
            "or what it takes, e.g. [{'image': ...}, ...]."
        )
    unknown = sorted(name for name in [*call, *given] if name not in accepted)
    if unknown and not open_ended:
        raise QVDError(f"{type(pipe).__name__} takes no argument {', '.join(map(repr, unknown))}: check the spelling.")
    own = [name for name in (*OWN_ARGUMENTS, *given) if name in call]
    if own:
        names = ", ".join(map(repr, dict.fromkeys(own)))
        raise QVDError(f"{names} follows from prompts and seed here: leave it out of the call's arguments.")


def content_of(value: Any) -> Any:
    """A JSON value that is equal for equal arguments; None when there is no telling."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if hasattr(value, "tobytes"):  # numpy arrays and PIL images
        shape = [str(getattr(value, name, "")) for name in ("dtype", "mode", "shape", "size")]
        return [*shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, (list, tuple)):
        items = [content_of(item) for item in value]
        return None if None in items else items
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None
