"""SCRI: bring scattered channel ranges into one range. METHOD section 3.

A transform x~ = (x - shift) / scale per input channel, folded exactly into weight and bias (`weights.py`), is chosen
for every group of layers that read one input, by the output error under the deployed quantizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops import semantics
from qvd_core.spec import QuantSpec
from qvd_core.weights import fold_transform

_THRESHOLD_SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way from mean_c a_c to max_c a_c
_SMOOTH_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7)
# Shift and scale each cost memory and time in every step: each must take at least this share off the squared error.
_WORTHWHILE_GAIN = 0.05
_SMALLEST_HALF_RANGE = 1e-5  # share of the widest channel's half-range: dead channels are treated as this wide


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one input: minimum, maximum, mean float32 [K]; rows float32 [S, K * taps], a sample."""

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Member:
    """One layer of a group: its float weight [N, K] or [N, C, kh, kw] and bias [N]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Transform:
    """A chosen transform: shift, scale float32 [K]; name says which candidate it was."""

    name: str
    shift: Tensor
    scale: Tensor

    @property
    def parts(self) -> int:
        """How many of shift and scale do something: 0, 1 or 2."""
        return int(bool((self.shift != 0).any())) + int(bool((self.scale != 1).any()))

    @classmethod
    def identity(cls, channels: int) -> Transform:
        return cls("none", torch.zeros(channels), torch.ones(channels))


@dataclass(frozen=True)
class LayerQuality:
    """sqnr_db: output signal to noise on the sample; coverage: share of the levels the mean channel uses."""

    sqnr_db: float
    coverage: float


def candidates(statistics: InputStatistics, members: Sequence[Member], spec: QuantSpec) -> Iterator[Transform]:
    """Every transform the search judges; "none" comes first. METHOD 3.2 [R], 3.3 [R] (threshold) and [O] (smooth)."""
    identity = Transform.identity(len(statistics.mean))
    yield identity
    if not spec.transforms_inputs:
        return
    shifts = [("", identity.shift)]
    if spec.shift:
        shifts += [("mid", (statistics.maximum + statistics.minimum) / 2), ("mean", statistics.mean)]
    for shift_name, shift in shifts:
        if shift_name:
            yield Transform(shift_name, shift, identity.scale)
        half_range = torch.maximum(statistics.maximum - shift, shift - statistics.minimum)
        half_range = half_range.clamp(min=float(half_range.max()) * _SMALLEST_HALF_RANGE)
        if not half_range.max() > 0:
            continue
        for scale_name, scale in _scales(half_range, members, spec):
            yield Transform(f"{shift_name}+{scale_name}".strip("+"), shift, scale)


def _scales(half_range: Tensor, members: Sequence[Member], spec: QuantSpec) -> Iterator[tuple[str, Tensor]]:
    if spec.scale == "search":
        low, high = float(half_range.mean()), float(half_range.max())
        for share in _THRESHOLD_SHARES:
            threshold = low + share * (high - low)
            yield f"threshold {share:g}", (half_range / threshold).clamp(min=1.0)
    if spec.scale in ("search", "smooth"):
        reach = torch.stack([member.weight.abs().transpose(0, 1).flatten(1).amax(dim=1) for member in members])
        reach = reach.amax(dim=0).float().cpu()
        reach = reach.clamp(min=max(float(reach.max()) * _SMALLEST_HALF_RANGE, torch.finfo(torch.float32).tiny))
        for exponent in _SMOOTH_EXPONENTS:
            scale = half_range**exponent / reach ** (1.0 - exponent)
            yield f"smooth {exponent:g}", scale / scale.log().mean().exp()


def static_step(minimum: Tensor, maximum: Tensor, transform: Transform, bits: int) -> Tensor:
    """Step [1] of the static grid that just holds every value seen, max |x~| / q_max; minimum, maximum [K]."""
    reach = torch.maximum((maximum - transform.shift).abs(), (minimum - transform.shift).abs())
    step = (reach / transform.scale).max() / semantics.code_limit(bits)
    return step.clamp(min=semantics.MINIMUM_STEP).reshape(1)


def quantized_output(
    statistics: InputStatistics, member: Member, transform: Transform, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Output float32 [S, N] on the sampled rows under the deployed quantizers, and the codes int8 [S, K]."""
    mean = statistics.mean if spec.bias_correction else None
    weight, bias = fold_transform(member.weight, member.bias, transform.shift, transform.scale, mean, spec.weight_bits)
    taps = statistics.rows.shape[1] // len(statistics.mean)
    shift, scale = transform.shift.repeat_interleave(taps), transform.scale.repeat_interleave(taps)
    x = semantics.transform(statistics.rows, shift, scale)
    if spec.activation == "static":
        step = static_step(statistics.minimum, statistics.maximum, transform, spec.activation_bits)
    elif member.weight.dim() == 4:  # a convolution's dynamic step is one per image; the sample stands for it
        step = semantics.token_step(x, spec.activation_bits, dims=(0, 1))
    else:
        step = semantics.token_step(x, spec.activation_bits)
    codes = semantics.encode(x, step, spec.activation_bits)
    return F.linear(codes.float() * step, weight.dequantize().flatten(1)) + bias, codes


def full_output(statistics: InputStatistics, member: Member) -> Tensor:
    """The member's full-precision output on the sampled rows, float32 [S, N]."""
    bias = None if member.bias is None else member.bias.float()
    return F.linear(statistics.rows, member.weight.float().flatten(1), bias)


def choose_transform(statistics: InputStatistics, members: Sequence[Member], spec: QuantSpec) -> Transform:
    """The candidate with the least summed relative output error over the group's members. METHOD 3.4 [R].

    Simpler ones get a small advantage [O]: it saves memory and guards against fitting the sample.
    """
    targets = [full_output(statistics, member) for member in members]
    energies = [float(target.square().sum()) + 1e-30 for target in targets]
    best, best_error = None, float("inf")
    for candidate in candidates(statistics, members, spec):
        error = 0.0
        for member, target, energy in zip(members, targets, energies, strict=True):
            output, _ = quantized_output(statistics, member, candidate, spec)
            error += float((output - target).square().sum()) / energy
        error *= 1.0 + _WORTHWHILE_GAIN * candidate.parts
        if best is None or error < best_error:
            best, best_error = candidate, error
    assert best is not None
    return best


def measure(statistics: InputStatistics, member: Member, transform: Transform, spec: QuantSpec) -> LayerQuality:
    """Output SQNR and mean coverage (max q_c - min q_c) / (2^b - 1) of one layer on the sample. METHOD 3.4, 5.3."""
    output, codes = quantized_output(statistics, member, transform, spec)
    target = full_output(statistics, member)
    noise = float((output - target).double().square().sum())
    signal = float(target.double().square().sum())
    sqnr = 10.0 * float(torch.log10(torch.tensor((signal + 1e-30) / (noise + 1e-30))))
    per_channel = codes.float().reshape(len(codes), len(statistics.mean), -1).transpose(1, 2).flatten(0, 1)
    used = per_channel.amax(dim=0) - per_channel.amin(dim=0)
    return LayerQuality(min(sqnr, 150.0), float(used.mean()) / (2**spec.activation_bits - 1))
