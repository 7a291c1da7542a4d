"""Weights: symmetric int codes per output channel, and the exact SCRI fold into weight and bias.

Weights are [N, K] (linear) or [N, C, kh, kw] (convolution); "input channel" is dimension 1 of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core import rounding
from qvd_core.ops.semantics import code_limit
from qvd_core.rotation import hadamard

# Shares of max|w| tried as clipping points below 8 bits, where a smaller step can pay for clipped tails.
_CLIP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)

# Weights are worked on some output channels at a time: in float32 those stay in a CPU's cache, and a whole layer in
# float32 is never there. A GPU needs long calls instead.
_CPU_BLOCK, _DEVICE_BLOCK = 2**19, 2**25  # elements
_FEWEST_ROWS = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """codes int8, shape of the weight; scale float32 [N, 1, ...]: weight ~ codes * scale."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """float32, shape of the weight."""
        return self.codes.float() * self.scale


def quantize_weight(weight: Tensor, bits: int, rows: Tensor | None = None) -> QuantizedWeight:
    """Symmetric codes per output channel; the scale is max|w| / q_max, below 8 bits the least-squares clip of a grid.

    weight: float [N, ...]. An all-zero channel gets scale 1 and codes 0; one that holds
    NaN or infinity gets a scale that is not finite, and codes without meaning. METHOD 3.6 [O].
    rows: float32 [S, K], a sample of the layer's input, K as in weight.flatten(1): then the rounding is error-
    compensating and the clip of each channel the one with the least output error. Raises QVDError on unusable rows.
    """
    if rows is None:
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = weight.new_empty((weight.shape[0], *[1] * (weight.dim() - 1)), dtype=torch.float32)
        for part in row_blocks(weight):
            block = weight[part].float()
            codes[part], scale[part] = _nearest(block, _candidate_scales(block, bits), code_limit(bits))
        return QuantizedWeight(codes, scale)
    weight = weight.float()
    candidates = _candidate_scales(weight, bits)
    nearest_codes, nearest_scale = _nearest(weight, candidates, code_limit(bits))
    codes, scale = rounding.compensate(
        weight.flatten(1),
        nearest_codes.to(torch.int8).flatten(1),
        nearest_scale.flatten(1),
        [candidate.flatten(1) for candidate in candidates],
        rows,
        code_limit(bits),
    )
    return QuantizedWeight(codes.view(weight.shape), scale.view_as(nearest_scale))


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Output channels of a weight [N, ...], a bounded number of elements at a time."""
    elements = _CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(_FEWEST_ROWS, elements // max(1, weight.shape[1:].numel()))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def _candidate_scales(weight: Tensor, bits: int) -> list[Tensor]:
    """Scales float32 [N, 1, ...] to choose from, the one that clips nothing first; NaN for a channel with NaN."""
    channels = weight.flatten(1)
    largest = torch.maximum(-channels.amin(dim=1), channels.amax(dim=1))  # of abs(), without a copy
    full = largest.view(-1, *[1] * (weight.dim() - 1)) / code_limit(bits)
    full = torch.where(full == 0, torch.ones_like(full), full)
    return [full if share == 1.0 else full * share for share in (_CLIP_SHARES if bits < 8 else (1.0,))]


def _nearest(weight: Tensor, scales: Sequence[Tensor], limit: int) -> tuple[Tensor, Tensor]:
    """Nearest codes (whole numbers in float32) at the scale of least squared weight error, per output channel."""
    best_scale = scales[0]
    if len(scales) > 1:
        best_error = torch.full_like(best_scale, torch.inf)
        for scale in scales:
            rounded = _nearest_grid_points(weight, scale, limit) * scale
            error = (rounded - weight).square().flatten(1).sum(dim=1).view_as(scale)
            best_scale = torch.where(error < best_error, scale, best_scale)
            best_error = torch.minimum(error, best_error)
    return _nearest_grid_points(weight, best_scale, limit), best_scale


def _nearest_grid_points(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    """`rounding.nearest_codes` in float32, with one temporary tensor instead of three."""
    return (weight / scale).round_().clamp_(-limit, limit)


def per_input_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Reshape values [K] so that they multiply the input channels of a weight [N, K] or [N, K, *kernel]."""
    return values.view(1, -1, *[1] * (weight.dim() - 2))


def sum_over_inputs(weight: Tensor, values: Tensor) -> Tensor:
    """sum over input channels (and taps) of weight * values: the output [N] for a constant input [K], in float64."""
    return (weight.double() * per_input_channel(values.double(), weight)).flatten(1).sum(dim=1)


def fold_transform(
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    bits: int,
    rows: Tensor | None = None,
    rotation: int = 0,
) -> tuple[QuantizedWeight, Tensor]:
    """Fold x~ = H (x - shift) / scale into a layer and quantize it: y = x~ @ W~q^T + bias^, W~ = W diag(scale) H.

    weight float [N, K(, kh, kw)], bias [N] or None; shift, scale float32 [K]. H rotates each `rotation` consecutive
    input channels (`rotation.hadamard`; 0: not at all). With `mean` [K] (E[x]) the bias also cancels the mean effect
    of the weight's rounding: bias^ = b + W E[x] + W~q H (shift - E[x]) / scale. Without it bias^ = b + W shift. Both
    are exact when weights are not rounded. METHOD 3.5 [R], 3.7 [O].
    rows: float32 [S, K(* kh * kw)], a sample of x~ for error-compensating rounding; None rounds to nearest.
    Returns the quantized W~ and bias^ float32 [N]. Raises QVDError on unusable rows or rotation.
    """
    if rows is None:
        blocks = [_fold_block(weight[part], shift, scale, mean, bits, None, rotation) for part in row_blocks(weight)]
        quantized = QuantizedWeight(
            torch.cat([block.codes for block, _ in blocks]), torch.cat([block.scale for block, _ in blocks])
        )
        folded = torch.cat([sums for _, sums in blocks])
    else:
        quantized, folded = _fold_block(weight, shift, scale, mean, bits, rows, rotation)
    if bias is not None:
        folded = folded + bias.double()
    return quantized, folded.float()


def _fold_block(
    weight: Tensor, shift: Tensor, scale: Tensor, mean: Tensor | None, bits: int, rows: Tensor | None, rotation: int
) -> tuple[QuantizedWeight, Tensor]:
    """The quantized W~ of some output channels, and what the bias gains from it, float64 [N]."""
    weight = weight.float()
    transformed = hadamard(weight * per_input_channel(scale, weight), rotation, dim=1)
    center = shift if mean is None else mean
    folded = sum_over_inputs(weight, center)
    if mean is None:
        return quantize_weight(transformed, bits, rows), folded
    offset = hadamard((shift.double() - mean.double()) / scale.double(), rotation)
    if rows is not None:
        # The bias makes good what rounding does to the mean of x~, -offset: only the spread around it counts.
        taps = weight[0, 0].numel()
        rounding.check_width(rows, len(offset) * taps)
        rows = rows + offset.to(rows).repeat_interleave(taps)
    quantized = quantize_weight(transformed, bits, rows)
    return quantized, folded + sum_over_inputs(quantized.dequantize(), offset)
