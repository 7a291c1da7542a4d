"""`TritonBackend`: the Triton kernels behind the interface of every backend.

What a kernel does not support (float64, an empty tensor, a sum too long for int32) goes to the emulated backend.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from qvd_core.ops.backend import output_size
from qvd_core.ops.emulated import INT32_TERMS, Emulated
from qvd_core.ops.fronts import checked_front
from qvd_core.ops.triton import conv as conv_launch
from qvd_core.ops.triton import gemm, quantize
from qvd_core.ops.triton.launch import FLOATS, available, floats, interpreted, runs_on

WEIGHT_ONLY_ROWS = 64  # above, a decoded weight and the vendor's matrix product are faster


@cache
def missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, found by running one; None when they can.

    An installed Triton may still fail: it needs a C compiler for its launchers, and a driver that knows its PTX.
    """
    if not available():
        return "triton is not installed"
    if not runs_on(torch.empty(0, device=device)):
        return f"it has no {device.type} kernels"
    try:
        quantize.quantize_rows(torch.zeros(1, 16, device=device), None, None, None, 8, 0)
    except Exception as error:  # of the compiler, the driver, the operating system: each has its own
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        return f"triton is installed, but its kernels do not run: {reason}"
    return None


class TritonQuantizer(Emulated):
    """The quantizing kernels, which need no int8 tensor cores; products are emulated."""

    def quantize_rows(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int,
    ) -> tuple[Tensor, Tensor]:
        if not _readable(x, shift, scale, static_step):
            return super().quantize_rows(x, shift, scale, static_step, bits, rotation)
        return quantize.quantize_rows(x, shift, scale, static_step, bits, rotation)

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
        """`quantize_rows` of `fronts.apply_front(x, front, gain, offset, eps)`, in one kernel. [O]

        x [M, K], or [M, 2 K] where the front is gated; gain, offset [G, K] or None. Returns codes int8 [M, K] and
        steps; codes differ by 1 at most from those of the two calls. Raises QVDError as `apply_front` does.
        """
        checked = checked_front(x, front, gain, offset)
        if not (_readable(x, shift, scale, static_step) and floats(gain, offset) and quantize.fits_fused(x, checked)):
            return super().quantize_fused(x, front, gain, offset, eps, shift, scale, static_step, bits, rotation)
        return quantize.quantize_fused(x, front, gain, offset, eps, shift, scale, static_step, bits, rotation)

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
        # Padding may also be negative: it crops.
        if not _readable(x, shift, scale, static_step) or min(padding, default=0) < 0 or x.dim() not in (4, 5):
            return super().quantize_images(x, shift, scale, static_step, bits, rotation, padding)
        return quantize.quantize_images(x, shift, scale, static_step, bits, rotation, padding)


class TritonBackend(TritonQuantizer):
    """Quantizing and multiplying kernels, with everything after a sum in the kernel that made it."""

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
        if not _multiplies(codes, weight, codes.shape[1], dtype, bias, residual, gate):
            return super().linear(codes, step, weight, weight_scale, bias, residual, gate, dtype)
        return gemm.linear(codes, step, weight, weight_scale, bias, residual, gate, dtype)

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
        terms = codes.shape[-1] * math.prod(kernel)
        empty = min(output_size(codes.shape[1:-1], kernel, stride, dilation)) < 1
        if empty or len(kernel) not in (2, 3) or not _multiplies(codes, weight, terms, dtype, bias):
            return super().conv(codes, step, weight, weight_scale, bias, kernel, stride, dilation, dtype)
        return conv_launch.conv(codes, step, weight, weight_scale, bias, kernel, stride, dilation, dtype)

    def weight_only_linear(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Decodes the weight in the kernel for few rows; closer to float32 than the base class, which rounds it."""
        wrong = interpreted() and dtype == torch.bfloat16  # the interpreter multiplies its bits as integers
        if wrong or len(x) > WEIGHT_ONLY_ROWS or not _multiplies(x, weight, x.shape[1], dtype, bias):
            return super().weight_only_linear(x, weight, weight_scale, bias, dtype)
        return gemm.weight_only_linear(x.to(dtype), weight, weight_scale, bias)


def _readable(x: Tensor, *parameters: Tensor | None) -> bool:
    return x.dtype in FLOATS and x.numel() > 0 and runs_on(x, *parameters)


def _multiplies(a: Tensor, weight: Tensor, terms: int, dtype: torch.dtype, *others: Tensor | None) -> bool:
    inputs = a.numel() > 0 and weight.numel() > 0 and runs_on(a, weight, *others)
    return inputs and dtype in FLOATS and floats(*others) and terms < INT32_TERMS
