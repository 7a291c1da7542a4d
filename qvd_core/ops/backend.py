"""`Backend`: one way to run the int8 operators. The base class is plain PyTorch over two exact integer sums.

A faster backend overrides what it is faster at and leaves the rest, so that every operator works on every backend.
All of them give the same codes, steps and integer sums bit for bit (`semantics.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops import semantics
from qvd_core.ops.fronts import apply_front
from qvd_core.packing import unpack_int4


class Backend(ABC):
    """The operators of `qvd_core.ops`; shapes and dtypes are described there."""

    @abstractmethod
    def integer_linear(self, codes: Tensor, weight: Tensor) -> Tensor:
        """codes int8 [M, K] x weight int8 [N, K] -> float32 [M, N], the exact integer sum rounded once to float32."""

    def integer_conv(self, codes: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
        """codes int8 [B, *space, C] * weight int8 [N, C, *kernel] -> float32 [B, N, *out], rounded once, no padding."""
        windows = patches(codes, list(weight.shape[2:]), stride, dilation)
        total = self.integer_linear(windows.flatten(0, -2), weight.flatten(1))
        return total.view(*windows.shape[:-1], len(weight)).movedim(-1, 1).contiguous()

    def quantize_rows(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int,
    ) -> tuple[Tensor, Tensor]:
        """x [M, K] -> codes int8 [M, K], step float32 [M, 1] or as `static_step`."""
        x = semantics.transform(x, shift, scale, rotation)
        step = semantics.token_step(x, bits) if static_step is None else semantics.checked_step(x, static_step)
        return semantics.encode(x, step, bits).contiguous(), step

    def quantize_fused(
        self,
        x: Tensor,
        front: str,
        gain: Tensor | None,
        offset: Tensor | None,
        eps: float,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`quantize_rows` of what `fronts.apply_front(x, front, gain, offset, eps)` makes of x."""
        moved = apply_front(x, front, gain, offset, eps)
        return self.quantize_rows(moved, shift, scale, static_step, bits, rotation)

    def quantize_images(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int,
        padding: list[int],
    ) -> tuple[Tensor, Tensor]:
        """x [B, C, *space] -> codes int8 [B, *padded space, C], step float32 [B, 1] or as `static_step`."""
        padded = F.pad(x, padding)
        pixels = semantics.transform(padded.movedim(1, -1).flatten(1, -2), shift, scale, rotation)  # [B, P, C]
        if static_step is None:
            step = semantics.token_step(pixels, bits, dims=(-2, -1)).squeeze(-1)
        else:
            step = semantics.checked_step(pixels, static_step)
        codes = semantics.encode(pixels, step.unsqueeze(-1), bits).contiguous()
        return codes.reshape(padded.shape[0], *padded.shape[2:], padded.shape[1]), step

    def linear(
        self,
        codes: Tensor,
        step: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gate: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """codes [M, K] x weight [N, K], dequantized -> `dtype` [M, N]."""
        with torch.autocast(codes.device.type, enabled=False):  # it would round the sums to 16 bits
            total = self.integer_linear(codes, weight_codes(weight, list(codes.shape[1:])))
        if gate is not None:
            gate = gate.repeat_interleave(len(codes) // len(gate), dim=0)
        return semantics.epilogue(total, step, weight_scale.view(1, -1), bias, residual, gate).to(dtype)

    def quantized_linear(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """`quantize_rows` and `linear`, one after the other: x [M, K] -> `dtype` [M, N]."""
        codes, step = self.quantize_rows(x, shift, scale, static_step, bits, rotation)
        return self.linear(codes, step, weight, weight_scale, bias, None, None, dtype)

    def conv(
        self,
        codes: Tensor,
        step: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        kernel: list[int],
        stride: list[int],
        dilation: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        """codes [B, *space, C] * weight [N, C, *kernel], dequantized -> `dtype` [B, N, *out]."""
        with torch.autocast(codes.device.type, enabled=False):
            total = self.integer_conv(codes, weight_codes(weight, [codes.shape[-1], *kernel]), stride, dilation)
        ones = [1] * len(kernel)
        bias = None if bias is None else bias.view(1, -1, *ones)
        step = step.view(-1, 1, *ones)
        return semantics.epilogue(total, step, weight_scale.view(1, -1, *ones), bias).to(dtype)

    def weight_only_linear(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """x [M, K] in full precision x dequantized weight [N, K], both rounded to `dtype` -> `dtype` [M, N]."""
        weight = weight_codes(weight, list(x.shape[1:])).float() * weight_scale
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def weight_codes(weight: Tensor, features: Sequence[int]) -> Tensor:
    """int8 codes [N, *features] of a weight that may be packed, two 4-bit codes to a byte (uint8)."""
    return unpack_int4(weight, torch.Size((len(weight), *features))) if weight.dtype == torch.uint8 else weight


def output_size(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Extents of a convolution's output without padding."""
    return [
        (extent - gap * (taps - 1) - 1) // hop + 1
        for extent, taps, hop, gap in zip(space, kernel, stride, dilation, strict=True)
    ]


def patches(codes: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """Every window of codes [B, *space, C] as a row [B, *out, C * taps], in the order of a flattened weight."""
    size = output_size(codes.shape[1:-1], kernel, stride, dilation)
    windows = codes
    for axis, (extent, taps, hop, gap) in enumerate(zip(size, kernel, stride, dilation, strict=True), start=1):
        first = torch.arange(extent, device=codes.device) * hop
        index = first[:, None] + torch.arange(taps, device=codes.device) * gap
        gathered = windows.index_select(axis, index.flatten())
        shape = (*windows.shape[:axis], extent, taps, *windows.shape[axis + 1 :])
        windows = gathered.view(shape).movedim(axis + 1, -1)
    return windows.reshape(len(codes), *size, codes.shape[-1] * math.prod(kernel))
