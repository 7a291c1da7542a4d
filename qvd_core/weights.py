"""Weights: symmetric int codes per output channel, and the exact SCRI fold into weight and bias.

Weights are [N, K] (linear) or [N, C, kh, kw] (convolution); "input channel" is dimension 1 of either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.ops.semantics import code_limit

# Shares of max|w| tried as clipping points below 8 bits, where a smaller step can pay for clipped tails.
_CLIP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True)
class QuantizedWeight:
    """codes int8, shape of the weight; scale float32 [N, 1(, 1, 1)]: weight ~ codes * scale."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """float32, shape of the weight."""
        return self.codes.float() * self.scale


def quantize_weight(weight: Tensor, bits: int) -> QuantizedWeight:
    """Symmetric codes per output channel; the scale is max|w| / q_max, below 8 bits the least-squares clip of a grid.

    weight: float [N, ...]. An all-zero channel gets scale 1 and codes 0. METHOD 3.6 [O].
    """
    weight = weight.float()
    limit = code_limit(bits)
    peak = weight.abs().flatten(1).amax(dim=1).view(-1, *[1] * (weight.dim() - 1))
    full = peak / limit
    full = torch.where(full > 0, full, torch.ones_like(full))
    if bits >= 8:
        return QuantizedWeight(_encode(weight, full, limit), full)
    best_scale, best_error = full, torch.full_like(full, torch.inf)
    for share in _CLIP_SHARES:
        scale = full * share
        error = (_encode(weight, scale, limit).float() * scale - weight).square().flatten(1).sum(dim=1).view_as(full)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return QuantizedWeight(_encode(weight, best_scale, limit), best_scale)


def _encode(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    return (weight / scale).round().clamp(-limit, limit).to(torch.int8)


def per_input_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Reshape values [K] so that they multiply the input channels of a weight [N, K] or [N, K, kh, kw]."""
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
) -> tuple[QuantizedWeight, Tensor]:
    """Fold x~ = (x - shift) / scale into a layer and quantize it: y = x~ @ W~q^T + bias^ .

    weight float [N, K(, kh, kw)], bias [N] or None; shift, scale float32 [K]. With `mean` [K] (E[x]) the bias also
    cancels the mean effect of the weight's rounding: bias^ = b + W E[x] + W~q (shift - E[x]) / scale.
    Without it bias^ = b + W shift. Both are exact when weights are not rounded. METHOD 3.5 [R], 3.7 [O].
    Returns the quantized W * scale and bias^ float32 [N].
    """
    weight = weight.float()
    quantized = quantize_weight(weight * per_input_channel(scale, weight), bits)
    center = shift if mean is None else mean
    folded = sum_over_inputs(weight, center)
    if mean is not None:
        folded = folded + sum_over_inputs(quantized.dequantize(), (shift.double() - mean.double()) / scale.double())
    if bias is not None:
        folded = folded + bias.double()
    return quantized, folded.float()
