"""The reference backend: integer sums in float64; slow, and the judge of all others.

A float64 sum of int8 products is exact below 2^53, that is up to 5 * 10^11 terms.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def integer_linear(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K] x weight int8 [N, K] -> float32 [M, N], the exact integer sum rounded once to float32."""
    return F.linear(codes.double(), weight.double()).float()


def integer_conv2d(codes: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """codes int8 [B, C, H, W] * weight int8 [N, C, kh, kw] -> float32 [B, N, H', W'], no padding."""
    return F.conv2d(codes.double(), weight.double(), stride=stride, dilation=dilation).float()
