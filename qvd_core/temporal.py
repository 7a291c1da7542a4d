"""HTDQ: the search for the quantizer of a model's temporal features. The quantizers themselves: `temporal_codebook`.

Marks: [P] stated in the QVD paper's abstract, [R] reconstructed, [O] ours where the paper cannot be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.temporal_codebook import (
    QUANTIZER_NAMES,
    TemporalQuantizer,
    channel_quantizer,
    check_bits,
    check_features,
    largest_magnitude,
    log2_quantizer,
    logk_quantizer,
    mix_quantizer,
    power_quantizer,
    uniform_quantizer,
)
from qvd_core.temporal_metrics import TemporalObjective, collision_rate, td_correlation, td_ratio, td_score

__all__ = [
    "QUANTIZER_NAMES",
    "TemporalFit",
    "TemporalQuantizer",
    "channel_quantizer",
    "collision_rate",
    "fit_temporal_quantizer",
    "log2_quantizer",
    "logk_quantizer",
    "mix_quantizer",
    "power_quantizer",
    "td_correlation",
    "td_ratio",
    "td_score",
    "uniform_quantizer",
]

# Search grids.
AMPLITUDE_SHARES = (1.0, 0.95, 0.9)  # of max|E|: clipping the tail a little may serve the rest
LOG_STEPS_PER_OCTAVE = tuple(half / 2 for half in range(2, 65))  # k = 1, 1.5, ... 32
POWERS = tuple(tenth / 10 for tenth in range(10, 41))  # p = 1, 1.1, ... 4
ZERO_SHARES = (0.0, 0.5)  # of logk's smallest magnitude
EDGE_POINTS = 101  # of mix


@dataclass(frozen=True, eq=False)
class TemporalFit:
    """The quantizer a search chose.

    objective: projected_error + 0.1 (1 - tdc) + 0.1 col of that quantizer on all features; smaller is better.
    report: "td_score" of the features, "tdr", "tdc", "col" of the quantizer, and "projected_error" =
        ||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||², the error of the projections' outputs against their variation over time.
    """

    quantizer: TemporalQuantizer
    objective: float
    report: dict[str, float]


def fit_temporal_quantizer(
    features: Tensor, projection: Tensor | None = None, bits: int = 8, quantizer: str = "auto"
) -> TemporalFit:
    """The HiDi-TQ quantizer with the smallest objective on the finite set of features; needs no data [O].

        ||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||² + 0.1 (1 - TDC) + 0.1 COL

    features: E [T, C], one row per sampler step, in sampling order. projection: P [N, C], all temporal projections
    stacked; None weighs all channels alike. quantizer: one of `QUANTIZER_NAMES` (searches its parameters only), or
    "auto" for the best of all. Everything returned is on the CPU; the same input always gives the same result.

    Ranges come from all rows; where there are more than 128, candidates are compared on 128 of them. Only "channel" has
    parameters per channel, so that it can fit the given rows and yet fail between them: among others it is judged by a
    twin that has seen every other row. One row says nothing about a channel's range: "auto" then leaves it out.

    Where E does not vary over time the error is divided by ||E Pᵀ||², and a projection that maps E to zero (one
    initialized to zero, for example) is ignored. For a projection too large for its Gram matrix the error is an
    unbiased estimate from a random sketch, within a few per cent.
    """
    values = check_features(features)
    check_bits(bits)
    if quantizer != "auto" and quantizer not in QUANTIZER_NAMES:
        raise QVDError(f"unknown temporal quantizer {quantizer!r}: choose auto or one of {', '.join(QUANTIZER_NAMES)}.")
    # The caller may be inside another default device, such as "meta" while a model loads.
    with torch.device("cpu"), torch.no_grad():
        objective = TemporalObjective(values, projection)
        best = _search(values, bits, objective) if quantizer == "auto" else _best_of(quantizer, values, bits, objective)
        report = objective.report(best)
    return TemporalFit(best, report.pop("objective"), report)


def _best_of(name: str, values: Tensor, bits: int, objective: TemporalObjective) -> TemporalQuantizer:
    """The best parameters of one quantizer for E [T, C]."""
    return _better(_CANDIDATES[name](values, bits), objective, None, math.inf)[0]


def _search(values: Tensor, bits: int, objective: TemporalObjective) -> TemporalQuantizer:
    """The best of all quantizers for E [T, C]."""
    best: TemporalQuantizer | None = None
    best_value = math.inf
    for name in QUANTIZER_NAMES:
        if name != "channel":
            best, best_value = _better(_CANDIDATES[name](values, bits), objective, best, best_value)
        elif len(values) > 1:
            value = objective(channel_quantizer(values[::2], bits), give_up_at=best_value)
            if value < best_value:
                best, best_value = channel_quantizer(values, bits), value
    assert best is not None
    return best


def _better(
    candidates: Iterator[TemporalQuantizer],
    objective: TemporalObjective,
    best: TemporalQuantizer | None,
    best_value: float,
) -> tuple[TemporalQuantizer, float]:
    """The best candidate and its value, or what was best before."""
    for candidate in candidates:
        value = objective(candidate, give_up_at=best_value)
        if best is None or value < best_value:
            best, best_value = candidate, value
    assert best is not None  # every quantizer has at least one candidate
    return best, best_value


def _logk_candidates(features: Tensor, bits: int) -> Iterator[TemporalQuantizer]:
    largest = largest_magnitude(features)
    for k in LOG_STEPS_PER_OCTAVE:
        for share in AMPLITUDE_SHARES:
            for zero_share in ZERO_SHARES:
                yield logk_quantizer(share * largest, k, bits, zero_share)


def _power_candidates(features: Tensor, bits: int) -> Iterator[TemporalQuantizer]:
    largest = largest_magnitude(features)
    for p in POWERS:
        for share in AMPLITUDE_SHARES:
            yield power_quantizer(share * largest, p, bits)


def _mix_candidates(features: Tensor, bits: int) -> Iterator[TemporalQuantizer]:
    highest = max(features.amax().item(), 0.0)
    for point in range(EDGE_POINTS if highest > 0.0 else 1):
        yield mix_quantizer(features, highest * point / (EDGE_POINTS - 1), bits)


# Searched in the order of QUANTIZER_NAMES, the cheap ones first: their value lets most others be given up early.
_CANDIDATES: dict[str, Callable[[Tensor, int], Iterator[TemporalQuantizer]]] = {
    "uniform": lambda features, bits: iter((uniform_quantizer(features, bits),)),
    "channel": lambda features, bits: iter((channel_quantizer(features, bits),)),
    "log2": lambda features, bits: iter((log2_quantizer(features, bits),)),
    "power": _power_candidates,
    "logk": _logk_candidates,
    "mix": _mix_candidates,
}
