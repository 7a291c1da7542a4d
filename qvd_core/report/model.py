"""The report of a float model that is quantized, or is to be, with given settings and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qvd_core.families import family_or_generic
from qvd_core.plan import plan_layers
from qvd_core.report.collect import collect
from qvd_core.report.data import Report
from qvd_core.report.kept import kept_layers
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec


def report_of_model(
    model: nn.Module,
    spec: QuantSpec,
    scales: Scales | None = None,
    quality: Mapping[str, float] | None = None,
    speed: Mapping[str, float] | None = None,
) -> Report:
    """The report of `model` (in full precision, its tensors may be on meta) quantized with `spec` and `scales`.

    Its sizes are those of its own dtype before, and of the planned tensors after. quality, speed: see `collect`.
    Raises QVDError for what cannot be quantized like this.
    """
    family = family_or_generic(model)
    plan = plan_layers(model, spec, scales)
    weights = {name: _weight(model, name) for name in plan}
    arguments: dict[str, Any] = {
        "family_name": family.name,
        "model_name": type(model).__name__,
        "kept": kept_layers(model, family, spec, plan, scales.report if scales is not None else None),
        "quality": quality,
        "speed": speed,
    }
    report = collect(plan, spec, {name: tuple(weight.shape) for name, weight in weights.items()}, scales, **arguments)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    replaced = sum(tensor.nbytes for name in plan for tensor in model.get_submodule(name).state_dict().values())
    after = before - replaced + sum(layer.bytes for layer in report.layers)
    return report.with_sizes(before, after)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
