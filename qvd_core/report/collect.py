"""Collecting a report from what a quantization leaves behind: its plan, its scales and the shapes of its weights.

No layer class is asked for anything: what is quantized by other classes (ComfyUI's) is reported the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.plan import LayerPlan
from qvd_core.report.data import ChannelRanges, LayerReport, RangeDrift, Report, TemporalReport, from_plain, rounded
from qvd_core.report.data import TemporalQuantizerReport as QuantizerReport
from qvd_core.report.places import places
from qvd_core.scales import LayerScales, Scales
from qvd_core.sensitivity import END_EFFECT
from qvd_core.spec import QuantSpec

RANGES_SHOWN = 4  # layers, the worst ones
CHANNELS_SHOWN = 128


def collect(
    plan: Mapping[str, LayerPlan],
    spec: QuantSpec,
    shapes: Mapping[str, tuple[int, ...]],
    scales: Scales | None = None,
    *,
    family_name: str = "",
    model_name: str = "",
    kept: Mapping[str, str] | None = None,
    float_bytes: int = 0,
    int8_bytes: int = 0,
    layer_bytes: Mapping[str, int] | None = None,
    quality: Mapping[str, float] | None = None,
    speed: Mapping[str, float] | None = None,
) -> Report:
    """The report of one quantized model.

    plan: its quantized layers; with an empty one, the layers of `scales` are reported. shapes: of their float weights
    [N, K] or [N, C, ...]; a layer without one has no size. scales: what calibration found; None for data-free.
    kept: layer -> why it stays in full precision. float_bytes, int8_bytes: of the whole model. layer_bytes: of
    quantized layers, where they were counted; else they are what the plan says. quality, speed: whatever
    was measured, by name (`words.LABELS` has words for the usual ones); infinite values are kept as None.
    Raises QVDError when the scales hold none of the planned layers.
    """
    if plan and scales is not None and not any(_knows(scales, name) for name in plan):
        raise QVDError(
            f"these scales ({scales.model_class}) know none of the {len(plan)} layers of this "
            f"{model_name or 'model'}: give those it was quantized with."
        )
    layers = _layers(plan, spec, shapes, scales, layer_bytes or {})
    report = Report(
        model=model_name or (scales.model_class if scales is not None else ""),
        family=family_name,
        settings=_plain(spec.to_dict()),
        layers=layers,
        kept=dict(kept or {}),
        float_bytes=int(float_bytes),
        int8_bytes=int(int8_bytes),
        quality=_figures(quality),
        speed=_figures(speed),
    )
    if scales is None:
        return report
    worst = [layer.name for layer in report.worst(len(layers))]
    return replace(
        report,
        calibrated_on=_plain(scales.calibrated_on),
        ranges=_ranges(scales, worst),
        drift=_observed(scales, "drift", tuple[RangeDrift, ...]) or _drift_of_buckets(scales, worst),
        temporal=_temporal(scales),
    )


def _knows(scales: Scales, name: str) -> bool:
    """Whether scales hold anything of a layer; those that a model remembers hold figures alone."""
    return name in scales.layers or name in scales.temporal or name in scales.report


def planned_bytes(layer: LayerPlan, shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Bytes of all tensors of a layer planned like this, for a float weight of `shape` [N, K, ...]."""
    outputs, codes = shape[0], math.prod(shape[1:])
    packed = layer.weight_bits(spec) == 4
    count = outputs * ((codes + 1) // 2 if packed else codes) + 4 * outputs  # the codes, and weight_scale
    if "bias" in layer.tensors:
        count += 4 * outputs
    count += 4 * shape[1] * sum(name in layer.tensors for name in ("input_shift", "input_scale"))
    if "activation_scale" in layer.tensors:
        count += 4 * (2 * layer.steps - 1 if layer.steps_by == "timestep" else layer.steps)
    if "codebook" in layer.tensors:
        count += 4 * (2 ** (spec.activation_bits + 1) - 1 + 2 * shape[1])  # levels, boundaries, offset and gain
    return count


def _layers(
    plan: Mapping[str, LayerPlan],
    spec: QuantSpec,
    shapes: Mapping[str, tuple[int, ...]],
    scales: Scales | None,
    counted: Mapping[str, int],
) -> tuple[LayerReport, ...]:
    names = list(plan) or ([*scales.layers, *scales.temporal] if scales is not None else [])
    found = scales.report if scales is not None else {}
    where = places(names)
    reports = []
    for name in names:
        layer, shape = plan.get(name), tuple(int(length) for length in shapes.get(name, ()))
        figures = found.get(name, {})
        planned = planned_bytes(layer, shape, spec) if layer is not None and len(shape) > 1 else 0
        size = counted.get(name, planned)
        reports.append(
            LayerReport(
                name=name,
                block=where[name][0],
                part=where[name][1],
                kind=layer.kind if layer is not None else "",
                shape=shape,
                weight_bits=layer.weight_bits(spec) if layer is not None else spec.weight_bits,
                activation=_activation(layer, spec),
                bytes=size,
                sqnr_db=rounded(figures.get("sqnr_db")),
                sqnr_db_before=rounded(figures.get("sqnr_db_before")),
                coverage=rounded(figures.get("coverage")),
                coverage_before=rounded(figures.get("coverage_before")),
                end_sqnr_db=rounded(figures.get(END_EFFECT)),
            )
        )
    return tuple(reports)


def _activation(layer: LayerPlan | None, spec: QuantSpec) -> str:
    if layer is None:
        return f"{spec.activation_bits} bit"
    if layer.kind == "temporal":
        return f"{spec.activation_bits} bit codebook" if "codebook" in layer.tensors else "not quantized"
    if "activation_scale" not in layer.tensors:
        return f"{spec.activation_bits} bit per token"
    per = {"layer": "static", "timestep": f"static, {layer.steps} timestep ranges"}
    return f"{spec.activation_bits} bit {per.get(layer.steps_by, f'static, {layer.steps} frames')}"


def _ranges(scales: Scales, worst: list[str]) -> tuple[ChannelRanges, ...]:
    """Of the worst layers, at most one of each part of the blocks; of layers that read one input, the first."""
    where = places(scales.layers)
    shown: dict[str, LayerScales] = {}
    for name in worst:
        layer = scales.layers.get(name)
        if layer is None or any(_same_input(layer, other) for other in shown.values()):
            continue
        if all(where[name][1] != where[other][1] for other in shown):
            shown[name] = layer
        if len(shown) == RANGES_SHOWN:
            break
    return tuple(_channel_ranges(name, layer) for name, layer in shown.items())


def _same_input(one: LayerScales, other: LayerScales) -> bool:
    return torch.equal(one.input_min, other.input_min) and torch.equal(one.input_max, other.input_max)


def _channel_ranges(name: str, layer: LayerScales) -> ChannelRanges:
    before = torch.stack([layer.input_min, layer.input_max], dim=1).double().cpu()  # [K, 2]
    shift, scale = (tensor.double().cpu().unsqueeze(1) for tensor in (layer.input_shift, layer.input_scale))
    after = (before - shift) / scale
    channels = len(before)
    order = before.abs().amax(dim=1).sort(descending=True, stable=True).indices
    chosen = order[torch.linspace(0, channels - 1, min(channels, CHANNELS_SHOWN)).round().long()]
    return ChannelRanges(name, channels, _shares(before, chosen), _shares(after, chosen), layer.rotation > 0)


def _shares(ranges: Tensor, chosen: Tensor) -> tuple[tuple[float, float], ...]:
    largest = max(float(ranges.abs().max()), 1e-30)
    return tuple((round(low / largest, 4), round(high / largest, 4)) for low, high in ranges[chosen].tolist())


def _drift_of_buckets(scales: Scales, worst: list[str]) -> tuple[RangeDrift, ...]:
    """What the steps per range of timesteps say, for files that hold nothing finer; the boundaries stand for times."""
    found = []
    for name in worst:
        layer = scales.layers.get(name)
        if (
            layer is None
            or layer.bucket_steps is None
            or layer.bucket_boundaries is None
            or len(layer.bucket_steps) < 2
        ):
            continue
        edges = layer.bucket_boundaries.tolist()
        times = [edges[0] / 2, *((left + right) / 2 for left, right in pairwise(edges))]
        times.append(edges[-1] + (edges[-1] - times[-1]))
        reach = (layer.bucket_steps / layer.bucket_steps.max()).tolist()
        found.append(RangeDrift(name, tuple(times), tuple(round(share, 4) for share in reach)))
    return tuple(sorted(found, key=lambda drift: min(drift.reach))[:RANGES_SHOWN])


def _temporal(scales: Scales) -> tuple[TemporalReport, ...]:
    """What was observed; else, of each codebook that is deployed, the figures of its search."""
    observed: tuple[TemporalReport, ...] | None = _observed(scales, "temporal", tuple[TemporalReport, ...])
    if observed:
        return observed
    groups: dict[int, list[str]] = {}
    for name, codebook in scales.temporal.items():
        groups.setdefault(hash(tuple(codebook.levels.tolist())), []).append(name)
    found = []
    for names in groups.values():
        figures, codebook = scales.report.get(names[0], {}), scales.temporal[names[0]]
        values = [rounded(figures.get(key)) for key in ("td_score", "tdr", "tdc", "col")]
        score, ratio, correlation, collisions = (0.0 if value is None else value for value in values)
        if values[0] is None or values[1] is None:
            continue
        deployed = QuantizerReport(codebook.name, True, score * ratio, ratio, correlation, collisions)
        found.append(TemporalReport(tuple(names), codebook.bits, score, quantizers=(deployed,)))
    return tuple(found)


def _observed(scales: Scales, key: str, kind: Any) -> Any:
    """A part of what calibration saw; None where the file has none, as older ones."""
    value = scales.observed.get(key)
    return None if value is None else from_plain(kind, value, f"the scales' {key}")


def _figures(values: Mapping[str, float] | None) -> dict[str, float | None]:
    return {str(name): None if value is None else rounded(float(value)) for name, value in (values or {}).items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: what it has no type for as its `repr`, NaN and infinity as None."""
    return json.loads(json.dumps(values, default=repr), parse_constant=lambda name: None)
