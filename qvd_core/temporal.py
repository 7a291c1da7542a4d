"""HTDQ: the search for the quantizer of a model's temporal features. The quantizers themselves: `temporal_codebook`.

Marks: [P] stated in the QVD paper's abstract, [R] reconstructed, [O] ours where the paper cannot be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.temporal_codebook import (
    QUANTIZER_NAMES,
    Codebooks,
    TemporalQuantizer,
    channel_quantizer,
    check_bits,
    check_features,
    limits,
    log2_quantizer,
    logk_codebooks,
    logk_quantizer,
    mix_between,
    mix_codebooks,
    mix_quantizer,
    power_codebooks,
    power_quantizer,
    uniform_quantizer,
)
from qvd_core.temporal_metrics import (
    StackedWeights,
    TemporalObjective,
    collision_rate,
    td_correlation,
    td_ratio,
    td_score,
)
from qvd_core.temporal_ranking import Ranking

__all__ = [
    "QUANTIZER_NAMES",
    "StackedWeights",
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

# So many of a grid are judged by the objective itself; more where few levels leave errors that do not cancel.
_SHORTLIST = 8
_LONG_SHORTLIST, _FEW_BITS = 32, 4
_HOPELESS = 3.0  # times the best value so far: a kind whose first candidate is worse is left


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
    features: Tensor, projection: Tensor | StackedWeights | None = None, bits: int = 8, quantizer: str = "auto"
) -> TemporalFit:
    """The HiDi-TQ quantizer with the smallest objective on the finite set of features; needs no data [O].

        ||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||² + 0.1 (1 - TDC) + 0.1 COL

    features: E [T, C], one row per sampler step, in sampling order. projection: P [N, C], all temporal projections
    stacked; None weighs all channels alike. quantizer: one of `QUANTIZER_NAMES` (searches its parameters only), or
    "auto" for the best of all. Everything returned is on the CPU; the same input always gives the same result.

    Of each grid of parameters, all points are ranked by an estimate of the objective (see `Ranking`); the first 8 (up
    to 4 bits: 32) are judged by the objective itself; "auto" leaves a kind whose first is three times worse than the
    best so far [O].

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
    with torch.no_grad():
        search = _Search(values, bits, TemporalObjective(values, projection))
        best = search.best_of_all() if quantizer == "auto" else search.best_of(quantizer)
        report = search.objective.report(best)
    return TemporalFit(best, report.pop("objective"), report)


class _Search:
    """The search for the best quantizer of E [T, C], float32 on the CPU."""

    def __init__(self, features: Tensor, bits: int, objective: TemporalObjective) -> None:
        self.objective = objective
        self._features, self._bits = features, bits
        self._lowest, self._highest = limits(features)
        self._best: TemporalQuantizer | None = None
        self._best_value = math.inf

    def best_of(self, name: str) -> TemporalQuantizer:
        """The best parameters of one quantizer."""
        hopeless = _HOPELESS * self._best_value
        for number, candidate in enumerate(self._candidates(name)):
            value = self._try(candidate, give_up_at=self._best_value if number else hopeless)
            if number == 0 and value >= hopeless:
                break
        assert self._best is not None  # every quantizer has at least one candidate
        return self._best

    def best_of_all(self) -> TemporalQuantizer:
        """The best of all quantizers; the cheap ones come first: their value lets others be given up early."""
        for name in QUANTIZER_NAMES:
            if name != "channel":
                self.best_of(name)
            elif len(self._features) > 1:
                twin = channel_quantizer(self._features[::2], self._bits)
                self._try(channel_quantizer(self._features, self._bits), self._best_value, judged_by=twin)
        assert self._best is not None
        return self._best

    def _try(
        self, candidate: TemporalQuantizer, give_up_at: float, judged_by: TemporalQuantizer | None = None
    ) -> float:
        """Its objective, where that reaches `give_up_at` a lower bound; the best so far is kept."""
        value = self.objective(judged_by or candidate, give_up_at)
        if self._best is None or value < self._best_value:
            self._best, self._best_value = candidate, value
        return value

    def _candidates(self, name: str) -> Iterator[TemporalQuantizer]:
        if name in _SINGLE:
            yield _SINGLE[name](self._features, self._bits)
        else:
            yield from {"power": self._powers, "logk": self._logarithms, "mix": self._mixes}[name]()

    def _powers(self) -> Iterator[TemporalQuantizer]:
        amplitude, p = self._grid(self._amplitudes(), POWERS)
        for point in self._first(power_codebooks(amplitude, p, self._bits)):
            yield power_quantizer(amplitude[point].item(), p[point].item(), self._bits)

    def _logarithms(self) -> Iterator[TemporalQuantizer]:
        amplitude, k, zero_share = self._grid(self._amplitudes(), LOG_STEPS_PER_OCTAVE, ZERO_SHARES)
        for point in self._first(logk_codebooks(amplitude, k, self._bits, zero_share)):
            yield logk_quantizer(amplitude[point].item(), k[point].item(), self._bits, zero_share[point].item())

    def _mixes(self) -> Iterator[TemporalQuantizer]:
        highest = max(self._highest, 0.0)
        points = EDGE_POINTS if highest > 0.0 else 1
        (edge,) = self._grid([highest * point / (EDGE_POINTS - 1) for point in range(points)])
        for point in self._first(mix_codebooks(self._lowest, self._highest, edge, self._bits)):
            yield mix_between(self._lowest, self._highest, edge[point].item(), self._bits)

    def _amplitudes(self) -> list[float]:
        return [share * max(-self._lowest, self._highest) for share in AMPLITUDE_SHARES]

    def _first(self, codebooks: Codebooks) -> list[int]:
        """Which of a grid to judge by the objective, the most promising ones first."""
        count = _LONG_SHORTLIST if self._bits <= _FEW_BITS else _SHORTLIST
        points: list[int] = self._ranking.estimate(codebooks).sort(stable=True).indices[:count].tolist()
        return points

    @cached_property
    def _ranking(self) -> Ranking:
        return Ranking(self.objective)

    @staticmethod
    def _grid(*axes: Sequence[float]) -> tuple[Tensor, ...]:
        """Every combination of the parameters: float64 [n] each."""
        combinations = torch.tensor(list(product(*axes)), dtype=torch.float64, device="cpu")
        return combinations.unbind(dim=1)


# These have no parameters to search.
_SINGLE: dict[str, Callable[[Tensor, int], TemporalQuantizer]] = {
    "uniform": uniform_quantizer,
    "channel": channel_quantizer,
    "log2": log2_quantizer,
}
