"""Blockwise Hadamard rotation of channels: spreads what a few channels hold over all channels of their block. [O]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvd_core.errors import QVDError


def hadamard(x: Tensor, block: int, dim: int = -1) -> Tensor:
    """Rotate each group of `block` consecutive channels of `dim` by the orthonormal Hadamard matrix, its own inverse.

    x: float32 or float64, any shape; the result has its shape and dtype. The matrix is Sylvester's, symmetric with
    entries +-1/sqrt(block), applied by log2(block) additions per channel. Blocks of 0 or 1 leave x as it is.
    Raises QVDError when `block` is not a power of two that divides the channels.
    """
    if block in (0, 1):
        return x
    channels = x.shape[dim]
    if block < 0 or block & (block - 1) or channels % block:
        raise QVDError(
            f"{channels} channels cannot be rotated in blocks of {block}: use a power of two that divides them, "
            f"{largest_block(channels, channels)} at most."
        )
    rotated = x.movedim(dim, -1)
    shape = rotated.shape
    for stage in range(block.bit_length() - 1):
        first, second = rotated.reshape(*shape[:-1], -1, 2, 2**stage).unbind(-2)
        rotated = torch.stack((first + second, first - second), dim=-2)
    norm = torch.full((), math.sqrt(block), dtype=x.dtype, device=x.device)  # by a number, a GPU would not divide
    return (rotated.reshape(shape) / norm).movedim(-1, dim).contiguous()


def largest_block(channels: int, limit: int = 128) -> int:
    """The largest power of two, up to `limit`, that divides `channels`."""
    divisor = channels & -channels  # the lowest set bit
    return min(divisor, 1 << (limit.bit_length() - 1))
