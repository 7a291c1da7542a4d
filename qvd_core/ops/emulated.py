"""The emulated backend: exact int8 arithmetic through the float32 units, for every device PyTorch runs on.

A float32 holds every integer up to 2^24, so a sum of up to 1024 products of 8-bit codes is exact in any order.
Longer sums are cut into such pieces, and the pieces are added as int32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops import reference

EXACT_TERMS = 1024  # 1024 * 128 * 128 = 2^24


def integer_linear(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K] x weight int8 [N, K] -> float32 [M, N], the exact integer sum rounded once to float32."""
    terms = codes.shape[1]
    if terms <= EXACT_TERMS:
        return F.linear(codes.float(), weight.float())
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    for start in range(0, terms, EXACT_TERMS):
        piece = slice(start, start + EXACT_TERMS)
        total += F.linear(codes[:, piece].float(), weight[:, piece].float()).to(torch.int32)
    return total.float()


def integer_conv2d(codes: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """codes int8 [B, C, H, W] * weight int8 [N, C, kh, kw] -> float32 [B, N, H', W'], no padding."""
    channels_per_piece = EXACT_TERMS // (weight.shape[2] * weight.shape[3])
    channels = codes.shape[1]
    if channels_per_piece == 0:  # one channel of a 33 x 33 kernel is too long a sum already
        return reference.integer_conv2d(codes, weight, stride, dilation)
    if channels <= channels_per_piece:
        return F.conv2d(codes.float(), weight.float(), stride=stride, dilation=dilation)
    total: Tensor | None = None
    for start in range(0, channels, channels_per_piece):
        piece = slice(start, start + channels_per_piece)
        part = F.conv2d(codes[:, piece].float(), weight[:, piece].float(), stride=stride, dilation=dilation)
        total = part.to(torch.int32) if total is None else total + part.to(torch.int32)
    assert total is not None
    return total.float()
