"""HTDQ: the quantizers that keep temporal features discriminable, each as a codebook; `temporal` picks one.

Temporal features are few (one row of C values per sampler step) and heavily skewed. Every HiDi-TQ quantizer here is
elementwise, so each is the same thing to run: sorted levels and the decision boundaries between them. The builders
hold the formulas; whoever executes a quantizer needs no more than a binary search and a table lookup.

Marks: [P] stated in the QVD paper's abstract, [R] reconstructed, [O] ours where the paper cannot be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.errors import QVDError

BITS = range(2, 9)
QUANTIZER_NAMES = ("uniform", "channel", "log2", "power", "logk", "mix")

# Below the smallest normal float32 a device may flush to zero: such values count as zero, no level lies near them.
_ZERO = torch.finfo(torch.float32).tiny
_SMALLEST_LEVEL = 2 * _ZERO
_SMALLEST_AMPLITUDE = 4 * _ZERO
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class TemporalQuantizer:
    """An elementwise quantizer as a codebook; saturates: values outside the fitted range take the end levels.

    name: the HiDi-TQ quantizer it came from: "logk", "log2", "power", "mix", "uniform" or "channel".
    bits: 2 to 8.
    levels: float32 [L], strictly ascending, L <= 2**bits: decoded values on the normalized axis.
    boundaries: float32 [L-1], levels[j] <= boundaries[j] < levels[j+1]: code j ends there, inclusively.
    offset, gain: float32 [1], or [C] for "channel": x = levels[code] * gain + offset. 0 and 1 but for "channel".
    """

    name: str
    bits: int
    levels: Tensor
    boundaries: Tensor
    offset: Tensor
    gain: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Codes of `x` [..., C]: uint8 [..., C]. NaN has no code: its result is undefined."""
        normalized = (x.float() - self.offset) / self.gain
        return torch.bucketize(normalized, self.boundaries, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of `codes` [..., C]: float32 [..., C]."""
        return self.levels[codes.long()] * self.gain + self.offset

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [..., C] rounded to what its codes decode to: float32 [..., C]."""
        return self.decode(self.encode(x))

    def to_tensors(self) -> dict[str, Tensor]:
        """Own copies of the four tensors, by field name, as they go into a safetensors file."""
        return {key: getattr(self, key).detach().clone() for key in _TENSOR_FIELDS}

    @classmethod
    def from_tensors(cls, name: str, bits: int, tensors: Mapping[str, Tensor]) -> TemporalQuantizer:
        """The inverse of `to_tensors`. Raises QVDError, naming the field, for whatever no builder makes."""
        if name not in QUANTIZER_NAMES:
            raise QVDError(f"name: unknown temporal quantizer {name!r}, expected one of {', '.join(QUANTIZER_NAMES)}.")
        check_bits(bits)
        if set(tensors) != set(_TENSOR_FIELDS):
            raise QVDError(f"temporal quantizer has tensors {sorted(tensors)}, expected {sorted(_TENSOR_FIELDS)}.")
        for key, tensor in tensors.items():
            _check_vector(key, tensor)
        levels, boundaries, offset, gain = (tensors[key] for key in _TENSOR_FIELDS)
        if not 1 <= len(levels) <= 2**bits:
            raise QVDError(f"levels: {len(levels)} levels, expected 1 to {2**bits} at {bits} bits.")
        if len(boundaries) != len(levels) - 1:
            raise QVDError(f"boundaries: {len(boundaries)} for {len(levels)} levels, expected {len(levels) - 1}.")
        if not (levels[:-1] < levels[1:]).all():
            raise QVDError("levels: not strictly ascending.")
        if not ((levels[:-1] <= boundaries) & (boundaries < levels[1:])).all():
            raise QVDError("boundaries: each must lie between its two levels.")
        if len(offset) < 1 or (name != "channel" and len(offset) != 1):
            raise QVDError(f"offset: {len(offset)} values, expected {'one per channel' if len(offset) < 1 else '1'}.")
        if len(gain) != len(offset):
            raise QVDError(f"gain: {len(gain)} values for an offset of {len(offset)}.")
        if not (gain > 0).all():
            raise QVDError("gain: not positive everywhere.")
        return cls(name, bits, levels, boundaries, offset, gain)


_TENSOR_FIELDS = ("levels", "boundaries", "offset", "gain")


# Builders ---------------------------------------------------------------------------------------------------------


def log2_quantizer(features: Tensor, bits: int) -> TemporalQuantizer:
    """Sign and power-of-two magnitude, A = max|E| [R]: x̂ = sign(x) A 2^-q,
    q = clip(round(-log2(|x|/A)), 0, 2^(b-1) - 1).

    `features` is E [T, C]. There is no zero level: zero counts as positive and takes the smallest magnitude. Precision
    does not grow with `bits`; this is the faithful mode and a baseline.
    """
    check_bits(bits)
    codes = _codes(2 ** (bits - 1))
    return _logarithmic("log2", bits, largest_magnitude(check_features(features)), 1.0, codes, zero_share=None)


def logk_quantizer(amplitude: float, k: float, bits: int, zero_share: float = 0.0) -> TemporalQuantizer:
    """Constant relative precision [O]: x̂ = sign(x) A 2^(-q/k), q = clip(round(-k log2(|x|/A)), 0, 2^(b-1) - 2).

    `k` steps per octave: inside the range, A 2^(-(2^(b-1) - 2)/k) to A, the relative error is at most 2^(1/(2k)) - 1.
    The code 2^(b-1) - 1 is zero. By the formula exact zero alone has it, and smaller values than the range take its
    smallest magnitude; with `zero_share` > 0, at most 1, all values up to that share of the smallest magnitude do.
    """
    check_bits(bits)
    _check_positive(amplitude=amplitude, k=k)
    if not 0.0 <= zero_share <= 1.0:
        raise QVDError(f"zero_share: {zero_share!r} must lie in [0, 1].")
    return _logarithmic("logk", bits, amplitude, k, _codes(2 ** (bits - 1) - 1), zero_share)


def power_quantizer(amplitude: float, p: float, bits: int) -> TemporalQuantizer:
    """Uniform in the p-th root [O]: x̂ = sign(x) A (q/L)^p, q = clip(round(L (|x|/A)^(1/p)), 0, L), L = 2^(b-1) - 1.

    Zero is a level (q = 0, of either sign) and so is the amplitude A. p = 1 is the symmetric uniform quantizer.
    """
    check_bits(bits)
    _check_positive(amplitude=amplitude, p=p)
    magnitudes, lower_edges = _drop_tiny(*_powers(amplitude, p, bits))
    return _codebook("power", bits, *_both_signs(magnitudes, lower_edges, has_zero=True))


def mix_quantizer(features: Tensor, edge: float, bits: int) -> TemporalQuantizer:
    """Logarithmic below an edge, uniform from there on, with b-1 bits each [R; the split by value and the signs are O].

        x < edge:   x̂ = sign(x) A± 2^-q,  q = clip(round(-log2(|x|/A±)), 0, 2^(b-2) - 1),  A+ = edge, A- = -min E
        x >= edge:  x̂ = edge + q step,    q = clip(round((x - edge)/step), 0, n),  step = (max E - edge)/n

    with n = 2^(b-1) - 1. `features` is E [T, C], 0 <= edge <= max(E, 0). Zero counts as positive: it takes the smallest
    magnitude below the edge, or is the first uniform level when the edge is 0.
    """
    check_bits(bits)
    return mix_between(*limits(check_features(features)), edge, bits)


def mix_between(lowest: float, highest: float, edge: float, bits: int) -> TemporalQuantizer:
    """`mix_quantizer` for features from `lowest` to `highest`."""
    highest = max(highest, 0.0)
    if not 0.0 <= edge <= highest:
        raise QVDError(f"edge: {edge!r} must lie in the positive range of the features, [0, {highest:g}].")
    negative, positive = (
        _drop_tiny(*_octaves(limit, 1.0, _codes(2 ** (bits - 2)))) for limit in (max(-lowest, 0.0), edge)
    )
    return _codebook("mix", bits, *_mixed(negative, positive, edge, highest, bits))


def uniform_quantizer(features: Tensor, bits: int) -> TemporalQuantizer:
    """The baseline of the paper's observation [P]: 2^b levels from min E to max E in equal steps, nearest level.

    `features` is E [T, C]. Zero is no level of its own.
    """
    check_bits(bits)
    lowest, highest = limits(check_features(features))
    step = (highest - lowest) / (2**bits - 1)
    levels = lowest + step * _codes(2**bits)
    return _codebook("uniform", bits, levels, levels[:-1] + step / 2)


def channel_quantizer(features: Tensor, bits: int) -> TemporalQuantizer:
    """Uniform per channel [O]: 2^b levels from the channel's min to its max over the T steps of `features` E [T, C]."""
    check_bits(bits)
    values = check_features(features)
    lowest, highest = values.amin(dim=0).double(), values.amax(dim=0).double()
    gain = ((highest - lowest) / (2**bits - 1)).float()
    gain = gain.clamp(min=_ZERO)  # a channel that never changes: every code decodes to its one value
    levels = _codes(2**bits)
    return _codebook("channel", bits, levels, levels[:-1] + 0.5, offset=lowest.float(), gain=gain)


# Many at once ------------------------------------------------------------------------------------------------------

Codebooks = tuple[Tensor, Tensor]
"""Levels [n, L] and boundaries [n, L-1] of n quantizers in float64, ascending: what a search compares them by."""


def logk_codebooks(amplitude: Tensor, k: Tensor, bits: int, zero_share: Tensor) -> Codebooks:
    """`logk_quantizer` for each of the parameters, float64 [n] each; tiny and equal levels are all kept."""
    magnitudes, lower_edges = _octaves(amplitude[:, None], k[:, None], _codes(2 ** (bits - 1) - 1))
    lower_edges[:, 0] = (zero_share * magnitudes[:, 0]).clamp(min=_ZERO)
    return _both_signs(magnitudes, lower_edges, has_zero=True)


def power_codebooks(amplitude: Tensor, p: Tensor, bits: int) -> Codebooks:
    """`power_quantizer` for each of the parameters, float64 [n] each; tiny and equal levels are all kept."""
    return _both_signs(*_powers(amplitude[:, None], p[:, None], bits), has_zero=True)


def mix_codebooks(lowest: float, highest: float, edge: Tensor, bits: int) -> Codebooks:
    """`mix_between` for each edge, float64 [n]; tiny and equal levels are all kept."""
    codes = _codes(2 ** (bits - 2))
    negative = _octaves(torch.full_like(edge[:, None], max(-lowest, 0.0)), 1.0, codes)
    return _mixed(negative, _octaves(edge[:, None], 1.0, codes), edge[:, None], max(highest, 0.0), bits)


# Formulas, for one quantizer or for many (parameters [n, 1], results [n, ...]) ----------------------------------------


def _codes(count: int) -> Tensor:
    """0 ... count-1 in float64; on the CPU even where new tensors go elsewhere, such as "meta" while a model loads."""
    return torch.arange(count, dtype=torch.float64, device="cpu")


def _logarithmic(
    name: str, bits: int, amplitude: float, k: float, codes: Tensor, zero_share: float | None
) -> TemporalQuantizer:
    """x̂ = sign(x) A 2^(-q/k) for q in `codes` [n] (ascending from 0), rounded in the logarithm; None: no zero level."""
    magnitudes, lower_edges = _drop_tiny(*_octaves(amplitude, k, codes))
    if zero_share is not None:
        lower_edges[0] = max(_ZERO, zero_share * magnitudes[0].item())
    return _codebook(name, bits, *_both_signs(magnitudes, lower_edges, has_zero=zero_share is not None))


def _octaves(amplitude: float | Tensor, k: float | Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """A 2^(-q/k) for q in `codes`, ascending, and where each begins when rounding in the logarithm."""
    codes = codes.flip(0)
    return amplitude * torch.exp2(-codes / k), amplitude * torch.exp2(-(codes + 0.5) / k)


def _powers(amplitude: float | Tensor, p: float | Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A (q/L)^p for q = 1 ... L, and where each begins when rounding in the root."""
    largest = 2 ** (bits - 1) - 1
    codes = _codes(largest) + 1
    return amplitude * (codes / largest) ** p, amplitude * ((codes - 0.5) / largest) ** p


def _both_signs(magnitudes: Tensor, lower_edges: Tensor, *, has_zero: bool) -> tuple[Tensor, Tensor]:
    """Levels and boundaries of a quantizer with odd symmetry, from ascending magnitudes and where each begins.

    Without a zero level, zero goes to the smallest positive magnitude: a sign bit has no third state.
    """
    zero = torch.zeros_like(magnitudes[..., :1])
    if has_zero:
        levels = torch.cat([-magnitudes.flip(-1), zero, magnitudes], dim=-1)
        return levels, torch.cat([_mirror(lower_edges), lower_edges], dim=-1)
    levels = torch.cat([-magnitudes.flip(-1), magnitudes], dim=-1)
    inner = lower_edges[..., 1:]
    return levels, torch.cat([_mirror(inner), zero - _ZERO, inner], dim=-1)


def _mixed(
    negative: tuple[Tensor, Tensor],
    positive: tuple[Tensor, Tensor],
    edge: float | Tensor,
    highest: float,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Levels and boundaries of `mix_quantizer`, from the magnitudes of both signs and where each begins."""
    step = (highest - edge) / (2 ** (bits - 1) - 1)
    uniform = edge + step * _codes(2 ** (bits - 1))
    pieces = [  # levels, the boundaries between them, and the one to the next piece
        (-negative[0].flip(-1), _mirror(negative[1][..., 1:]), torch.full_like(uniform[..., :1], -_ZERO)),
        (positive[0], positive[1][..., 1:], uniform[..., :1]),
        (uniform, uniform[..., :-1] + step / 2, uniform[..., :0]),
    ]
    pieces = [piece for piece in pieces if piece[0].numel()]
    levels = torch.cat([levels for levels, _, _ in pieces], dim=-1)
    return levels, torch.cat([part for _, inner, end in pieces for part in (inner, end)], dim=-1)


def _drop_tiny(magnitudes: Tensor, lower_edges: Tensor) -> tuple[Tensor, Tensor]:
    """Without the magnitudes [n] that float32 cannot hold as normal numbers (8-bit powers of two reach 2^-127)."""
    keep = magnitudes >= _SMALLEST_LEVEL
    return magnitudes[keep], lower_edges[keep]


def _mirror(edges: Tensor) -> Tensor:
    """The boundaries below zero that mirror ascending ones above it.

    A boundary belongs to its lower code, that is to the smaller magnitude above zero but to the larger one below it:
    one float32 further out, ties go to the smaller magnitude on both sides.
    """
    return _next_below(-edges.float()).flip(-1).double()


def _next_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, values.new_tensor(-math.inf))


def _codebook(
    name: str,
    bits: int,
    levels: Tensor,
    boundaries: Tensor,
    offset: Tensor | None = None,
    gain: Tensor | None = None,
) -> TemporalQuantizer:
    """A quantizer in float32 from ascending levels [L] and boundaries [L-1]; levels that coincide there become one."""
    levels, boundaries = levels.float(), boundaries.float()
    distinct = levels[1:] > levels[:-1]
    levels = torch.cat([levels[:1], levels[1:][distinct]])
    # Rounding to float32 must not carry a boundary past a level: each level decodes to itself.
    boundaries = boundaries[distinct].clamp(levels[:-1], _next_below(levels[1:]))
    offset = levels.new_zeros(1) if offset is None else offset
    gain = levels.new_ones(1) if gain is None else gain
    return TemporalQuantizer(name, bits, levels, boundaries, offset, gain)


# Checks -----------------------------------------------------------------------------------------------------------


def check_features(features: Tensor) -> Tensor:
    """E [T, C] in float32 on the CPU. Raises QVDError for features that nothing can be fitted to."""
    if features.dim() != 2 or features.numel() == 0:
        raise QVDError(
            f"temporal features have shape {tuple(features.shape)}, expected [T, C]: "
            "stack one row per sampler step, at least one."
        )
    values = features.detach().float().cpu()
    lowest, highest = limits(values)
    if not math.isfinite(highest - lowest):  # NaN goes through the limits
        raise QVDError("temporal features hold NaN or infinity: compute the timestep embedding in float32.")
    if max(-lowest, highest) < _SMALLEST_AMPLITUDE:
        raise QVDError(
            "temporal features are all zero, as if nothing had been recorded: "
            "record them while sampling, or leave these layers in full precision."
        )
    return values


def check_bits(bits: int) -> None:
    """Raise QVDError unless `bits` is 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise QVDError(f"bits: {bits!r} is no bit-width for temporal features, choose {BITS[0]} to {BITS[-1]}.")


def _check_positive(**parameters: float) -> None:
    for name, value in parameters.items():
        if not _SMALLEST_LEVEL <= value <= _LARGEST:
            raise QVDError(f"{name}: {value!r} must be a positive, finite number in float32.")


def _check_vector(key: str, tensor: Tensor) -> None:
    if tensor.dim() != 1 or tensor.dtype != torch.float32:
        raise QVDError(f"{key}: {tensor.dtype} {tuple(tensor.shape)}, expected a float32 vector.")
    if not torch.isfinite(tensor).all():
        raise QVDError(f"{key}: holds NaN or infinity.")


def largest_magnitude(features: Tensor) -> float:
    """max |E|."""
    return features.abs().amax().item()


def limits(features: Tensor) -> tuple[float, float]:
    """min E and max E."""
    lowest, highest = features.aminmax()
    return lowest.item(), highest.item()
