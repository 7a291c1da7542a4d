"""HTDQ: a fast estimate of the search objective, for whole grids of quantizers at a time.

The objective itself takes tens of milliseconds per quantizer of a large model; the search asks it only about the few
that this estimate ranks first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvd_core.temporal_codebook import Codebooks
from qvd_core.temporal_metrics import COLLISION_WEIGHT, TemporalObjective

_VALUES = 2**16  # values to measure errors on, whole rows
_PAIRS = 2048  # adjacent values to count collisions on
_SEED = 0


class Ranking:
    """Estimates the objective of elementwise quantizers that treat all channels alike [O].

    What it leaves out: products of errors of different channels (they nearly cancel: rounding errors are of either
    sign) and TDC. Collisions are counted on at most 2048 pairs of adjacent values, drawn once.
    """

    def __init__(self, objective: TemporalObjective) -> None:
        stride = max(1, objective.sample.numel() // _VALUES)
        sample = objective.sample[::stride]
        weights = objective.channel_weights() * (len(objective.sample) / len(sample))
        self._values, order = sample.flatten().sort()
        # Per bin, sum_i w_i (x_i - level)^2 follows from the sums of w, w x and w x^2 up to its two ends.
        weight = weights.expand(sample.shape).flatten()[order]
        value = self._values.double()
        moments = torch.stack([weight, weight * value, weight * value.square()])
        self._moments = torch.nn.functional.pad(moments.cumsum(dim=1), (1, 0))
        self._smaller, self._larger, self._collision_scale = _draw_pairs(objective)

    def estimate(self, codebooks: Codebooks) -> Tensor:
        """The estimated objective of each quantizer: float64 [n]; comparable with each other only."""
        levels, boundaries = codebooks
        boundaries = _merge_equal(levels.float(), boundaries.float())  # as the quantizers have them
        return self._errors(levels, boundaries) + COLLISION_WEIGHT * self._collisions(boundaries)

    def _errors(self, levels: Tensor, boundaries: Tensor) -> Tensor:
        ends = torch.searchsorted(self._values, boundaries, right=True)  # a boundary belongs to its lower code
        outer = torch.full_like(ends[:, :1], len(self._values))
        ends = torch.cat([torch.zeros_like(outer), ends, outer], dim=1)
        weight, first, second = (moment[ends].diff(dim=1) for moment in self._moments)
        return (second - 2 * levels * first + levels.square() * weight).sum(dim=1)

    def _collisions(self, boundaries: Tensor) -> Tensor:
        if not len(self._smaller):
            return boundaries.new_zeros(len(boundaries), dtype=torch.float64)
        count = len(boundaries)
        following = torch.searchsorted(boundaries, self._smaller.expand(count, -1).contiguous())
        beyond = torch.full_like(boundaries[:, :1], torch.inf)
        end_of_code = torch.cat([boundaries, beyond], dim=1).gather(1, following)
        return (end_of_code >= self._larger).sum(dim=1) * self._collision_scale


def _merge_equal(levels: Tensor, boundaries: Tensor) -> Tensor:
    """Boundaries [n, L-1] with those between equal levels moved up to the next: what decodes alike has one code."""
    equal = levels[:, 1:] == levels[:, :-1]
    if not equal.any():
        return boundaries
    return boundaries.masked_fill(equal, torch.inf).flip(1).cummin(dim=1).values.flip(1).contiguous()


def _draw_pairs(objective: TemporalObjective) -> tuple[Tensor, Tensor, float]:
    """Adjacent values that differ [m], the smaller and the larger one; and the share of COL that each stands for."""
    sample, differs = objective.sample, objective.differs
    before, after = sample[:-1][differs], sample[1:][differs]
    total = len(before)
    if total > _PAIRS:
        generator = torch.Generator().manual_seed(_SEED)
        drawn = torch.randint(total, (_PAIRS,), generator=generator, device="cpu")
        before, after = before[drawn], after[drawn]
    scale = total / (max(1, differs.numel()) * max(1, len(before)))
    smaller, order = torch.minimum(before, after).sort()  # neighbours are looked up faster
    return smaller, torch.maximum(before, after)[order], scale
