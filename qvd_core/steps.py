"""Static activation steps: one per layer, per range of timesteps, or per video frame. METHOD section 3.8.

The step is all that may depend on time or frame; shift and scale per channel never do, so that they fold into weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.ops import semantics
from qvd_core.statistics import InputStatistics
from qvd_core.transform import Transform

DRIFT_WORTH_A_BUCKET = 0.02  # mean logarithmic waste of range below which no further bucket is opened


@dataclass(frozen=True)
class StaticSteps:
    """Steps of one layer input, all float32.

    step [1]: for the whole run. bucket_steps [G]: per range of timesteps, bucket_boundaries [G-1] between them,
    ascending. frame_steps [F]: per video frame; None where the layer does not know its frames.
    """

    step: Tensor
    bucket_steps: Tensor
    bucket_boundaries: Tensor
    frame_steps: Tensor | None

    def scaled(self, share: float) -> StaticSteps:
        """All steps times `share`: below 1 the outermost values are clipped, above 1 there is room to spare."""
        frames = None if self.frame_steps is None else self.frame_steps * share
        return StaticSteps(self.step * share, self.bucket_steps * share, self.bucket_boundaries, frames)

    def for_rows(self, statistics: InputStatistics, activation: str) -> Tensor:
        """The step each sampled row is quantized with under `activation`: float32 [1] or [S, 1]."""
        if activation == "static_bucket" and statistics.row_timesteps is not None:
            return self.bucket_steps[torch.bucketize(statistics.row_timesteps, self.bucket_boundaries)].unsqueeze(1)
        if activation == "static_frame" and self.frame_steps is not None and statistics.row_frames is not None:
            return self.frame_steps[statistics.row_frames].unsqueeze(1)
        return self.step


def static_steps(
    statistics: InputStatistics, transform: Transform, bits: int, buckets: int, quantile: bool = False
) -> StaticSteps:
    """The steps that just hold every value seen, max |x~| / q_max; with `quantile`, all but the outermost values.

    Behind a rotation the ranges per channel say little: there, the sample stands for the whole run.
    """
    limit = semantics.code_limit(bits)
    seen = reach(statistics.minimum, statistics.maximum, transform)
    whole = seen
    if transform.rotation:
        whole = transform.apply(statistics.rows, statistics.taps).abs().amax()
    elif quantile:
        whole = reach(*statistics.quantiles(), transform)
    per_reach = whole / seen.clamp(min=semantics.MINIMUM_STEP) / limit
    by_time, boundaries = _bucketed(statistics, transform, seen, buckets)
    frames = None
    if statistics.frame_minimum is not None and statistics.frame_maximum is not None:
        frames = _step(reach(statistics.frame_minimum, statistics.frame_maximum, transform) * per_reach)
    return StaticSteps(_step((whole / limit).reshape(1)), _step(by_time * per_reach), boundaries, frames)


def reach(minimum: Tensor, maximum: Tensor, transform: Transform) -> Tensor:
    """max over channels of |x~|, from ranges [..., K] to [...]."""
    furthest = torch.maximum((maximum - transform.shift).abs(), (minimum - transform.shift).abs())
    return (furthest / transform.scale).amax(dim=-1)


def _step(values: Tensor) -> Tensor:
    return values.clamp(min=semantics.MINIMUM_STEP)


def _bucketed(statistics: InputStatistics, transform: Transform, seen: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Reach per timestep bucket [G] and the boundaries [G-1] between them, chosen by drift."""
    times = statistics.bucket_times
    if times is None or statistics.bucket_minimum is None or statistics.bucket_maximum is None:
        return seen.reshape(1), seen.new_empty(0)
    by_time = reach(statistics.bucket_minimum, statistics.bucket_maximum, transform)
    merged, starts = _merged(by_time, buckets)
    boundaries = [float(times[start - 1, 1] + times[start, 0]) / 2 for start in starts]
    return merged, merged.new_tensor(boundaries)


def _merged(reaches: Tensor, most: int) -> tuple[Tensor, list[int]]:
    """Reaches [B] in at most `most` buckets: the largest of each [G], and where the second and later ones start."""
    starts = drift_buckets(reaches.tolist(), most)
    ends = [*starts[1:], len(reaches)]
    return torch.stack([reaches[start:end].amax() for start, end in zip(starts, ends, strict=True)]), starts[1:]


def drift_buckets(reaches: list[float], most: int) -> list[int]:
    """Where the buckets start if `reaches` (ascending in time) is cut into as few as serve, and at most `most`. [O]

    A step in a bucket wastes log(bucket's reach / its own reach) of its range; dynamic programming finds the cut with
    the least waste for 1, 2, ... buckets, and the first with a mean waste below 2 % is taken.
    """
    count = len(reaches)
    logs = torch.tensor(reaches, dtype=torch.float64).clamp(min=semantics.MINIMUM_STEP).log()
    waste = torch.zeros(count + 1, count + 1, dtype=torch.float64)  # of [start, end) as one bucket
    for start in range(count):
        peaks = logs[start:].cummax(dim=0).values
        sums = logs[start:].cumsum(dim=0)
        waste[start, start + 1 :] = peaks * torch.arange(1, count - start + 1) - sums
    least = waste[0].clone()  # of [0, end) in one bucket
    cuts: list[list[int]] = [[0] for _ in range(count + 1)]
    for _ in range(1, min(most, count)):
        if float(least[count]) / count < DRIFT_WORTH_A_BUCKET:
            break
        better, choice = least.clone(), [list(cut) for cut in cuts]
        for end in range(2, count + 1):
            totals = least[1:end] + waste[1:end, end]
            best = int(totals.argmin())
            if float(totals[best]) < float(better[end]):
                better[end], choice[end] = totals[best], [*cuts[best + 1], best + 1]
        least, cuts = better, choice
    return cuts[count]


def fewer_buckets(steps: Tensor, boundaries: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Calibrated bucket steps [G] and boundaries [G-1], neighbours merged until there are at most `most`. [O]"""
    if len(steps) <= most:
        return steps, boundaries
    merged, starts = _merged(steps, most)
    return merged, boundaries[[start - 1 for start in starts]]
