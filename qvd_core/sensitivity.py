"""Sensitivity: what each layer, quantized alone, does to the model's output; measured, not guessed. [O]"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.quality import bounded_decibels

END_EFFECT = "end_sqnr_db"  # the report's name for it

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def end_effects(
    model: nn.Module,
    calls: Sequence[Call],
    quantized: Mapping[str, Callable[[], nn.Module]],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of `model` on `calls` with one layer quantized at a time, by layer; smaller: more sensitive.

    quantized: layer name -> a function that makes its quantized version. The model is left as it was.
    """
    targets = [_output(model(*args, **kwargs)) for args, kwargs in calls]
    signal = sum(float(target.square().sum()) for target in targets)
    effects = {}
    for done, (name, make) in enumerate(quantized.items()):
        if progress is not None:
            progress(done, len(quantized), name)
        original = model.get_submodule(name)
        model.set_submodule(name, make())
        try:
            outputs = [_output(model(*args, **kwargs)) for args, kwargs in calls]
        finally:
            model.set_submodule(name, original)
        noise = sum(float((output - target).square().sum()) for output, target in zip(outputs, targets, strict=True))
        effects[name] = bounded_decibels(signal, noise)
    return effects


def most_sensitive(report: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], auto_keep: float) -> list[str]:
    """The layers `auto_keep` keeps in full precision, the most sensitive first.

    report: of `Scales`, with the end effect of every layer. sizes: weight elements of the quantizable layers.
    auto_keep: below 1 a share of all weight elements, filled in order of sensitivity (a layer that no longer fits is
    passed over for the next); from 1 on a number of dB: every
    layer whose end effect is smaller. Raises QVDError when the end effects were not measured.
    """
    effects = {name: report[name][END_EFFECT] for name in sizes if END_EFFECT in report.get(name, {})}
    if not effects:
        raise QVDError(
            "these scales do not say how sensitive each layer is: "
            "calibrate with config=QVDConfig(auto_keep=...), or with sensitivity=True."
        )
    ranked = sorted(effects, key=lambda name: (effects[name], name))
    if auto_keep >= 1.0:
        return [name for name in ranked if effects[name] < auto_keep]
    budget, kept = auto_keep * sum(sizes.values()), []
    for name in ranked:
        if sizes[name] <= budget:
            kept.append(name)
            budget -= sizes[name]
    return kept


def _output(result: Any) -> Tensor:
    """The denoised tensor in whatever a forward pass returns, in float64."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result.double()
