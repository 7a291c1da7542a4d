"""The `torch._int_mm` backend: PyTorch's own int8 product, for Turing GPUs and for CPUs with VNNI.

It returns bare int32 sums; what follows is one Triton kernel where Triton runs, else a few operations of PyTorch.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops.backend import Backend, output_size, weight_codes
from qvd_core.ops.emulated import INT32_TERMS
from qvd_core.ops.triton import TritonQuantizer
from qvd_core.ops.triton.launch import FLOATS, floats, runs_on

WINDOW_BYTES = 2**26  # of a convolution's windows at a time: 9 to 27 times the codes, if made at once
FEWEST_ROWS = 17  # on CUDA


def usable(device: torch.device | str) -> bool:
    """Whether `torch._int_mm` is there and exact on `device`.

    An NVIDIA GPU of compute capability 7.5 or newer, or a CPU with AVX-512 VNNI: without it PyTorch's product is
    exact as well, but 20 times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return not torch.version.hip and torch.cuda.get_device_capability(device) >= (7, 5)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(features.get("avx512_vnni")) and _sums_on_cpu()


@cache
def _sums_on_cpu() -> bool:
    """Whether the largest sums come out: oneDNN told to do without VNNI (ONEDNN_MAX_CPU_ISA) saturates at 16 bits."""
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == 64 * 127 * 127).all())


class IntMM(TritonQuantizer):
    """Exact sums by `torch._int_mm`, padded to the shapes it takes; convolutions through their windows."""

    def integer_linear(self, codes: Tensor, weight: Tensor) -> Tensor:
        if not _summable(codes, weight):
            return super().integer_linear(codes, weight)
        return integer_product(codes, weight).float()

    def integer_conv(self, codes: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
        """Some images, or some lines of one, at a time."""
        if not _summable(codes, weight) or weight[0].numel() >= INT32_TERMS:
            return super().integer_conv(codes, weight, stride, dilation)
        kernel = list(weight.shape[2:])
        size = output_size(codes.shape[1:-1], kernel, stride, dilation)
        line = math.prod(size[1:]) * weight[0].numel()  # bytes of the windows of one line (plane) of outputs
        lines = min(max(WINDOW_BYTES // max(line, 1), 1), size[0])
        images = max(WINDOW_BYTES // max(line * size[0], 1), 1)
        out = torch.empty(len(codes), len(weight), *size, dtype=torch.float32, device=codes.device)
        for image in range(0, len(codes), images):
            for first in range(0, size[0], lines):
                stop = min(first + lines, size[0])
                read = slice(first * stride[0], (stop - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1)
                some = codes[image : image + images, read]
                total = Backend.integer_conv(self, some, weight, stride, dilation)
                out[image : image + images, :, first:stop] = total
        return out

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
        fused = dtype in FLOATS and floats(bias, residual, gate) and runs_on(codes, weight, bias, residual, gate)
        if not fused or not _summable(codes, weight):
            return super().linear(codes, step, weight, weight_scale, bias, residual, gate, dtype)
        from qvd_core.ops.triton.gemm import dequantize

        total = integer_product(codes, weight_codes(weight, list(codes.shape[1:])))
        return dequantize(total, step, weight_scale, bias, residual, gate, dtype)


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes int8 [M, K] x weight int8 [N, K] -> int32 [M, N], rows contiguous."""
    rows, columns = len(codes), len(weight)
    fewest, multiple = 1, (1, 2 if codes.shape[1] == 1 else 1)  # on a CPU, sums of one product come out wrong
    if codes.device.type == "cuda":
        turing = torch.cuda.get_device_capability(codes.device) < (8, 0)
        fewest, multiple = FEWEST_ROWS, (32 if turing else 8, 8)
    codes, weight = padded(codes, weight, fewest, *multiple)
    # The transpose must stay a view: a contiguous [K, N] is several times slower.
    return torch._int_mm(codes.contiguous(), weight.contiguous().t())[:rows, :columns]


def padded(codes: Tensor, weight: Tensor, fewest: int, multiple_n: int, multiple_k: int) -> tuple[Tensor, Tensor]:
    """codes [M, K] and weight [N, K] with zeros appended: M at least `fewest`, N and K multiples."""
    rows = max(fewest - len(codes), 0)
    columns, terms = -len(weight) % multiple_n, -codes.shape[1] % multiple_k
    if rows or terms:
        codes = F.pad(codes, (0, terms, 0, rows))
    return codes, F.pad(weight, (0, terms, 0, columns)) if columns or terms else weight


def _summable(codes: Tensor, weight: Tensor) -> bool:
    """Whether the sums of codes [..., K] fit int32, and there are any."""
    return codes.numel() > 0 and weight.numel() > 0 and codes.shape[-1] < INT32_TERMS
