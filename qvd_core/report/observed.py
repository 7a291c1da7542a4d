"""What only calibration sees and a report shows: small summaries that go into the scales file as JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.observation import Observation
from qvd_core.report.data import RangeDrift, TemporalQuantizerReport, TemporalReport
from qvd_core.scales import Scales
from qvd_core.temporal import (
    QUANTIZER_NAMES,
    TemporalQuantizer,
    collision_rate,
    fit_temporal_quantizer,
    td_correlation,
    td_ratio,
    td_score,
)
from qvd_core.temporal_fit import stack_features
from qvd_core.temporal_metrics import pair_distances

logger = logging.getLogger(__name__)

MOST_STEPS = 32  # timesteps of a distance matrix
MOST_GRID_STEPS = 96  # of those between the sampled ones that quantizers are fitted to
MOST_FEATURE_SETS = 2
LINES_SHOWN = 4  # layers whose range moves the most


@torch.no_grad()
def summarize(observation: Observation, scales: Scales) -> dict[str, Any]:
    """Temporal distances and drift of ranges, as JSON; empty, with one warning, when something goes wrong with them.

    A calibration that took an hour must not be lost for a picture.
    """
    try:
        return {
            "temporal": [asdict(report) for report in _temporal(observation, scales)],
            "drift": [asdict(drift) for drift in _drift(observation, scales)],
        }
    except Exception as error:
        logger.warning("The report will lack timesteps and drift: %s: %s", type(error).__name__, error)
        return {}


def _temporal(observation: Observation, scales: Scales) -> Iterator[TemporalReport]:
    """One report per distinct set of features."""
    seen: list[tuple[dict[float, Tensor], list[str]]] = []
    for name, observer in observation.features.items():
        if len(observer.features) < 2:
            continue
        same = next((names for known, names in seen if _same(known, observer.features)), None)
        if same is None:
            seen.append((observer.features, [name]))
        else:
            same.append(name)
    for features, names in seen[:MOST_FEATURE_SETS]:
        steps = _spaced(sorted(features, reverse=True), MOST_STEPS)
        rows = stack_features({step: features[step] for step in steps})
        grid = observation.grid or {}
        between = {step: grid[step] for step in _spaced(sorted(grid), MOST_GRID_STEPS)}
        yield temporal_report(names, steps, rows, stack_features({**between, **features}), scales)


def temporal_report(
    names: list[str], steps: list[float], rows: Tensor, fitted_to: Tensor, scales: Scales
) -> TemporalReport:
    """The features `rows` [T, C] of the timesteps `steps` under every quantizer, each fitted to `fitted_to` [R, C].

    The one that is deployed stands for its kind, as it is.
    """
    bits = scales.spec.activation_bits
    deployed = scales.temporal.get(names[0])
    quantizers = []
    for kind in QUANTIZER_NAMES:
        used = deployed is not None and deployed.name == kind
        try:
            quantizer = deployed if used and deployed else fit_temporal_quantizer(fitted_to, None, bits, kind).quantizer
        except QVDError:
            continue  # there are features that a kind cannot be fitted to
        quantizers.append(_judged(quantizer, rows, used))
    return TemporalReport(
        layers=tuple(names),
        bits=bits,
        td_score=round(td_score(rows), 6),
        timesteps=tuple(float(step) for step in steps),
        distances=_distances(rows),
        quantizers=tuple(quantizers),
    )


def _judged(quantizer: TemporalQuantizer, rows: Tensor, deployed: bool) -> TemporalQuantizerReport:
    quantized = quantizer(rows)
    return TemporalQuantizerReport(
        name=quantizer.name,
        deployed=deployed,
        td_score=round(td_score(quantized), 6),
        tdr=round(td_ratio(rows, quantized), 6),
        tdc=round(td_correlation(rows, quantized), 6),
        col=round(collision_rate(rows, quantized), 6),
        distances=_distances(quantized),
    )


def _drift(observation: Observation, scales: Scales) -> list[RangeDrift]:
    """Of the layer inputs whose range, behind shift and scale, moves the most over the timesteps."""
    found = []
    for first, observer in observation.inputs.items():
        layer, buckets = scales.layers.get(first), observer.ranges.buckets
        if layer is None or len(buckets) < 2:
            continue
        shift, scale = layer.input_shift, layer.input_scale
        reach = torch.stack(
            [
                torch.maximum(
                    ((bucket.minimum.cpu() - shift) / scale).abs().amax(),
                    ((bucket.maximum.cpu() - shift) / scale).abs().amax(),
                )
                for bucket in buckets
            ]
        )
        shares = (reach / reach.max().clamp(min=1e-30)).tolist()
        times = tuple((bucket.first + bucket.last) / 2 for bucket in buckets)
        found.append(RangeDrift(first, times, tuple(round(share, 4) for share in shares)))
    return sorted(found, key=lambda drift: min(drift.reach))[:LINES_SHOWN]


def _same(one: dict[float, Tensor], other: dict[float, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[step], other[step]) for step in one)


def _spaced(values: list[float], most: int) -> list[float]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _distances(rows: Tensor) -> tuple[float, ...]:
    return tuple(round(distance, 4) for distance in pair_distances(rows).tolist())
