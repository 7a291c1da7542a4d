"""The emulated backend: exact int8 arithmetic through the float32 units, for every device PyTorch runs on.

A float32 holds every integer up to 2^24, so a sum of up to 1024 products of 8-bit codes is exact in any order.
Longer sums are cut into such pieces, and the pieces are added as int32. Codes fit the 8 bits of significand that
TF32 and bfloat16 multiply with, so reduced precision of matrix products does no harm either.
"""

from __future__ import annotations

import math
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops.backend import Backend

EXACT_TERMS = 1024  # 1024 * 128 * 128 = 2^24
INT32_TERMS = 2**17  # of products up to 2^14


def _convolves_directly(codes: Tensor) -> bool:
    """Whether a float32 convolution is a plain sum: Winograd's method, which others than oneDNN take, has fractions."""
    on_x86 = codes.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and torch._C._has_mkldnn and torch._C._get_mkldnn_enabled()


class Emulated(Backend):
    """Exact everywhere; transient float32 copies of codes and weights."""

    def integer_linear(self, codes: Tensor, weight: Tensor) -> Tensor:
        terms = codes.shape[1]
        if terms <= EXACT_TERMS:
            return F.linear(codes.float(), weight.float())
        dtype = torch.int32 if terms < INT32_TERMS else torch.int64
        total = torch.zeros(codes.shape[0], weight.shape[0], dtype=dtype, device=codes.device)
        for start in range(0, terms, EXACT_TERMS):
            piece = slice(start, start + EXACT_TERMS)
            total += F.linear(codes[:, piece].float(), weight[:, piece].float()).to(dtype)
        return total.float()

    def integer_conv(self, codes: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
        channels_per_piece = EXACT_TERMS // math.prod(weight.shape[2:])
        if not _convolves_directly(codes) or channels_per_piece == 0 or weight[0].numel() >= INT32_TERMS:
            return super().integer_conv(codes, weight, stride, dilation)
        convolve = F.conv2d if codes.dim() == 4 else F.conv3d
        # Laid out anew: with one channel, oneDNN misreads the strides of the view.
        images = codes.movedim(-1, 1).clone(memory_format=torch.contiguous_format)
        channels = images.shape[1]
        if channels <= channels_per_piece:
            return convolve(images.float(), weight.float(), stride=stride, dilation=dilation).contiguous()
        total: Tensor | None = None
        for start in range(0, channels, channels_per_piece):
            piece = slice(start, start + channels_per_piece)
            part = convolve(images[:, piece].float(), weight[:, piece].float(), stride=stride, dilation=dilation)
            total = part.to(torch.int32) if total is None else total + part.to(torch.int32)
        assert total is not None
        return total.float().contiguous()
