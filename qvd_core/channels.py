"""SCRI: bring scattered channel ranges into one range. METHOD section 3.

A transform x~ = (x - shift) / scale per input channel, folded exactly into weight and bias (`weights.py`), is chosen
for every group of layers that read one input, by the output error under the deployed quantizers; with it, how much of
the seen range a static scale should hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops import semantics
from qvd_core.quality import bounded_decibels
from qvd_core.rotation import largest_block
from qvd_core.spec import QuantSpec
from qvd_core.statistics import InputStatistics
from qvd_core.steps import StaticSteps, static_steps
from qvd_core.transform import Transform
from qvd_core.weights import fold_transform

__all__ = ["Choice", "InputStatistics", "LayerQuality", "Member", "Transform", "candidates", "choose", "measure"]

_THRESHOLD_SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way from mean_c a_c to max_c a_c
_SMOOTH_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7)
_RANGE_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the range seen
# Other prompts leave the range that calibration saw, and one clipped outlier costs more than a coarser step does. Eight
# bits can afford room for them, six cannot. Measured on the Wan miniature: W8A8 worst clip 34 -> 47 dB, W6A6 40 -> 38.
_HEADROOM = {8: 1.4, 7: 1.2}
# Shift, scale and rotation cost memory and time in every step: each must take at least this share off the error.
_WORTHWHILE_GAIN = 0.05
_SMALLEST_HALF_RANGE = 1e-5  # share of the widest channel's half-range: dead channels are treated as this wide
_SMALLEST_ROTATION = 16  # channels per block; fewer spread nothing


@dataclass(frozen=True)
class Member:
    """One layer of a group: its float weight [N, K] or [N, C, kh, kw] and bias [N]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Choice:
    """What the search settled on: the transform, and the static steps that go with it."""

    transform: Transform
    steps: StaticSteps


@dataclass(frozen=True)
class LayerQuality:
    """sqnr_db: output signal to noise on the sample; coverage: share of the levels the mean channel uses."""

    sqnr_db: float
    coverage: float


def candidates(statistics: InputStatistics, members: Sequence[Member], spec: QuantSpec) -> Iterator[Transform]:
    """Every transform the search judges; "none" comes first.

    METHOD 3.2 [R], 3.3 [R] (threshold) and [O] (smooth), and all of them once more in front of a rotation [O].
    """
    plain = list(_shifts_and_scales(statistics, members, spec))
    yield from plain
    block = largest_block(statistics.channels)
    if spec.rotate and block >= _SMALLEST_ROTATION:
        for transform in plain:
            yield Transform(f"{transform.name}+rotation", transform.shift, transform.scale, block)


def _shifts_and_scales(statistics: InputStatistics, members: Sequence[Member], spec: QuantSpec) -> Iterator[Transform]:
    identity = Transform.identity(statistics.channels, statistics.mean.device)
    yield identity
    if not (spec.shift or spec.scale != "none"):
        return
    minimum, maximum = statistics.quantiles() if spec.range == "quantile" else (statistics.minimum, statistics.maximum)
    shifts = [("", identity.shift)]
    if spec.shift:
        shifts += [("mid", (maximum + minimum) / 2), ("mean", statistics.mean)]
    for shift_name, shift in shifts:
        if shift_name:
            yield Transform(shift_name, shift, identity.scale)
        half_range = torch.maximum(maximum - shift, shift - minimum)
        half_range = half_range.clamp(min=float(half_range.max()) * _SMALLEST_HALF_RANGE)
        if not half_range.max() > 0:
            continue
        for scale_name, scale in _scales(half_range, members, spec):
            yield Transform(f"{shift_name}+{scale_name}".strip("+"), shift, scale)


def _scales(half_range: Tensor, members: Sequence[Member], spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    if spec.scale in ("search", "threshold"):
        low, high = float(half_range.mean()), float(half_range.max())
        for share in _THRESHOLD_SHARES:
            threshold = low + share * (high - low)
            yield f"threshold {share:g}", (half_range / threshold).clamp(min=1.0)
    if spec.scale in ("search", "smooth"):
        reach = torch.stack([member.weight.abs().transpose(0, 1).flatten(1).amax(dim=1) for member in members])
        reach = reach.amax(dim=0).float()
        reach = reach.clamp(min=max(float(reach.max()) * _SMALLEST_HALF_RANGE, torch.finfo(torch.float32).tiny))
        for exponent in _SMOOTH_EXPONENTS:
            scale = half_range**exponent / reach ** (1.0 - exponent)
            yield f"smooth {exponent:g}", scale / scale.log().mean().exp()


@dataclass(frozen=True)
class _Trial:
    """The members' weights folded with one transform and quantized, and the transformed sample."""

    transform: Transform
    weights: list[tuple[Tensor, Tensor]]  # dequantized [N, K * taps] and bias [N], float32
    rows: Tensor

    @classmethod
    def of(
        cls, statistics: InputStatistics, members: Sequence[Member], transform: Transform, spec: QuantSpec
    ) -> _Trial:
        mean = statistics.mean if spec.bias_correction else None
        folded = (
            fold_transform(
                member.weight,
                member.bias,
                transform.shift,
                transform.scale,
                mean,
                spec.weight_bits,
                rotation=transform.rotation,
            )
            for member in members
        )
        weights = [(weight.dequantize().flatten(1), bias) for weight, bias in folded]
        return cls(transform, weights, transform.apply(statistics.rows, statistics.taps))

    def outputs(self, codes: Tensor, step: Tensor) -> list[Tensor]:
        """Every member's output float32 [S, N] for codes [S, K * taps]."""
        quantized = codes.float() * step
        return [F.linear(quantized, weight, bias) for weight, bias in self.weights]


def choose(
    statistics: InputStatistics,
    members: Sequence[Member],
    spec: QuantSpec,
    allowed: Callable[[Transform], Transform] | None = None,
) -> Choice:
    """The candidate with the least summed relative output error over the group's members. METHOD 3.4 [R].

    allowed: gives the part of a candidate that may be used, where not all of it may.
    Simpler ones get a small advantage [O]: it saves memory and guards against fitting the sample.
    """
    targets = [full_output(statistics, member) for member in members]
    energies = [float(target.square().sum()) + 1e-30 for target in targets]
    offered = candidates(statistics, members, spec)
    if allowed is not None:
        offered = _distinct(map(allowed, offered))
    best: Choice | None = None
    best_error = float("inf")
    for candidate in offered:
        trial = _Trial.of(statistics, members, candidate, spec)
        steps = _choose_steps(statistics, trial, spec)
        codes, step = _quantize(statistics, members, trial, steps, spec)
        error = sum(
            float((output - target).square().sum()) / energy
            for output, target, energy in zip(trial.outputs(codes, step), targets, energies, strict=True)
        )
        error *= 1.0 + _WORTHWHILE_GAIN * candidate.parts
        if best is None or error < best_error:
            best, best_error = Choice(candidate, steps), error
    assert best is not None
    return best


def _distinct(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """Each transform once: restricted to what folds, many candidates become the same, and a trial is dear."""
    seen: list[Transform] = []
    for transform in transforms:
        if not any(transform.same(other) for other in seen):
            seen.append(transform)
            yield transform


def _choose_steps(statistics: InputStatistics, trial: _Trial, spec: QuantSpec) -> StaticSteps:
    """Static steps for one trial. Clipping is judged by the input error, each channel weighted by its squared weights.

    That is the expected output error of independent rounding errors [O]; it needs no matrix product per share.
    """
    everything = static_steps(
        statistics, trial.transform, spec.activation_bits, spec.buckets, quantile=spec.range == "quantile"
    )
    if spec.range != "search" or not spec.is_static:
        return everything
    energy = torch.stack([weight.square().sum(dim=0) for weight, _ in trial.weights]).sum(dim=0)
    best, best_error = everything, float("inf")
    for share in _RANGE_SHARES:
        steps = everything.scaled(share)
        step = steps.for_rows(statistics, spec.activation)
        error = float((_rounding_error(trial.rows, step, spec.activation_bits).square_() @ energy).sum())
        if error >= best_error:  # rounding error falls and clipping error grows with the share: one minimum
            break
        best, best_error = steps, error
    return best.scaled(_HEADROOM.get(spec.activation_bits, 1.0))


def _rounding_error(rows: Tensor, step: Tensor, bits: int) -> Tensor:
    """What `semantics.encode` does to rows [S, K], in place on one copy: this is the inner loop of the search."""
    limit = semantics.code_limit(bits)
    return (rows / step).round_().clamp_(-limit, limit).mul_(step).sub_(rows)


def _quantize(
    statistics: InputStatistics, members: Sequence[Member], trial: _Trial, steps: StaticSteps, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Codes int8 [S, K * taps] of the sample as the layer will quantize it, and their step."""
    bits = spec.activation_bits
    if spec.is_static:
        step = steps.for_rows(statistics, spec.activation)
    elif members[0].weight.dim() > 2:  # a convolution's dynamic step is one per image; the sample stands for it
        step = semantics.token_step(trial.rows, bits, dims=(0, 1))
    else:
        step = semantics.token_step(trial.rows, bits)
    return semantics.encode(trial.rows, step, bits), step


def full_output(statistics: InputStatistics, member: Member) -> Tensor:
    """The member's full-precision output on the sampled rows, float32 [S, N]."""
    bias = None if member.bias is None else member.bias.float()
    return F.linear(statistics.rows, member.weight.float().flatten(1), bias)


def quantized_output(
    statistics: InputStatistics, member: Member, choice: Choice, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Output float32 [S, N] on the sampled rows under the deployed quantizers, and the codes int8 [S, K * taps]."""
    trial = _Trial.of(statistics, [member], choice.transform, spec)
    codes, step = _quantize(statistics, [member], trial, choice.steps, spec)
    return trial.outputs(codes, step)[0], codes


def measure(statistics: InputStatistics, member: Member, choice: Choice, spec: QuantSpec) -> LayerQuality:
    """Output SQNR and mean coverage (max q_c - min q_c) / (2^b - 1) of one layer on the sample. METHOD 3.4, 5.3."""
    output, codes = quantized_output(statistics, member, choice, spec)
    target = full_output(statistics, member)
    noise = float((output - target).double().square().sum())
    signal = float(target.double().square().sum())
    per_channel = codes.float().reshape(len(codes), statistics.channels, -1).transpose(1, 2).flatten(0, 1)
    used = per_channel.amax(dim=0) - per_channel.amin(dim=0)
    return LayerQuality(bounded_decibels(signal, noise), float(used.mean()) / (2**spec.activation_bits - 1))
