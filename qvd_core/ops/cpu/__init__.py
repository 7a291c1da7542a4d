"""The CPU backend: exact int8 kernels in C for x86-64 with AVX2 or AVX-512 VNNI.

`build.py` compiles them, `library.py` loads them; whatever they do not support runs emulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvd_core.ops.cpu import gemm, library, quantize
from qvd_core.ops.emulated import Emulated


def available() -> bool:
    """Are the C kernels compiled, fresh, and of use on this CPU?"""
    return library.load() is not None


def isa_name() -> str:
    """The instruction set that runs: "avx2", "avx512vnni", or "none" without the library.

    Raises QVDError when QVD_CPU_ISA asks for one that is not there.
    """
    kernels = library.load()
    if kernels is None:
        return "none"
    names = {code: name for name, code in library.ISA_CODES.items()}
    return names[library.isa(kernels)]


class CpuBackend(Emulated):
    """The C kernels, and `Emulated` for what they leave out."""

    def quantize_rows(
        self,
        x: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        static_step: Tensor | None,
        bits: int,
        rotation: int,
    ) -> tuple[Tensor, Tensor]:
        arguments = (x, shift, scale, static_step, bits, rotation)
        done = quantize.quantize_rows(*arguments)
        return super().quantize_rows(*arguments) if done is None else done

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
        arguments = (x, shift, scale, static_step, bits, rotation, padding)
        done = quantize.quantize_images(*arguments)
        return super().quantize_images(*arguments) if done is None else done

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
        arguments = (x, shift, scale, static_step, bits, rotation, weight, weight_scale, bias, dtype)
        done = gemm.quantized_linear(*arguments)
        return super().quantized_linear(*arguments) if done is None else done

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
        arguments = (codes, step, weight, weight_scale, bias, residual, gate, dtype)
        done = gemm.linear(*arguments)
        return super().linear(*arguments) if done is None else done

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
        arguments = (codes, step, weight, weight_scale, bias, kernel, stride, dilation, dtype)
        done = gemm.conv(*arguments)
        return super().conv(*arguments) if done is None else done
