"""The rows of the kernel table: everything that computes a linear layer or a convolution, and can be compared.

    float    fp32, and the device's 16-bit type
    qvd      QVD end to end: quantize the input, multiply, dequantize; every backend by name, and what "auto" chooses
    torch    what PyTorch offers, with the usual arithmetic around it
    peer     other projects' layers (`kernel_peers.py`)

A row prepares itself for a problem or raises `RowUnavailable` with the reason, which the table shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_problem import Problem
from benchmarks.kernel_shapes import Shape
from benchmarks.machine import multiplies_in_16_bits
from qvd_core import ops
from qvd_core.packing import pack_int4

FULL_PRECISION = "fp32"
HALF_PRECISION = "16-bit"
ISA_VARIABLE = "QVD_CPU_ISA"

_NO_SCALARS: list[float] = []
_PACKED = "the weight as given; oneDNN keeps a packed copy, a little larger"


class RowUnavailable(RuntimeError):
    """A row that cannot be measured here; the message is what the table says in place of numbers."""


@dataclass(frozen=True)
class Prepared:
    """One row, ready to be timed on one problem.

    run: from the problem's input to the layer's output. weight_bytes: of the weight as the row keeps it.
    quantize: the part of `run` that turns the input into codes, where that can be called alone.
    integer: (codes, weight codes) -> their integer sums as an output, where the row takes codes.
    weight_bits: of the weight codes that `integer` takes. note: what else the report should say of it.
    """

    run: Callable[[], Tensor]
    weight_bytes: int
    quantize: Callable[[], object] | None = None
    integer: Callable[[Tensor, Tensor], Tensor] | None = None
    weight_bits: int = 8
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One row. devices: where it makes sense at all; elsewhere it is not even listed.

    package: the distribution that it needs, whose version the report shows.
    """

    name: str
    kind: Literal["float", "qvd", "torch", "peer"]
    prepare: Callable[[Problem], Prepared]
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str = ""


# --- floating point ---------------------------------------------------------------------------------------------------


def _float(problem: Problem, dtype: torch.dtype) -> Prepared:
    x, weight, bias = (tensor.to(dtype) for tensor in (problem.x, problem.weight, problem.bias))
    size = weight.numel() * weight.element_size()
    if problem.shape.kind == "linear":
        return Prepared(partial(F.linear, x, weight, bias), size)
    shape = problem.shape
    convolve = F.conv2d if len(shape.space) == 2 else F.conv3d
    layout = torch.channels_last if len(shape.space) == 2 else torch.channels_last_3d
    plain = partial(convolve, x, weight, bias, shape.stride, shape.padding)
    last = (x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout))
    channels_last = partial(convolve, *last, bias, shape.stride, shape.padding)
    faster = min((plain, channels_last), key=partial(_quick_seconds, problem.device))
    return Prepared(faster, size, note="channels last" if faster is channels_last else "")


def _quick_seconds(device: torch.device, function: Callable[[], object]) -> float:
    """The shortest of a few calls: enough to choose between two layouts of memory."""
    from benchmarks.timing import clock_for

    clock = clock_for(device)
    clock.time(function)
    return min(clock.time(function) for _ in range(3))


# --- QVD --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operators:
    """The only place here that calls `qvd_core.ops`: one backend's operators for one shape."""

    shape: Shape
    backend: str
    isa: str = ""

    def quantize(self, x: Tensor, shift: Tensor | None, scale: Tensor | None, step: Tensor | None) -> Any:
        with _isa(self.isa):
            if self.shape.kind == "linear":
                return ops.quantize_activation(x, shift, scale, step, 8, backend=self.backend)
            padding = self.shape.low_high_padding
            return ops.quantize_image(x, shift, scale, step, 8, 0, padding, backend=self.backend)

    def multiply(
        self, codes: Tensor, step: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        shape = self.shape
        with _isa(self.isa):
            if shape.kind == "linear":
                return ops.int8_linear(codes, step, weight, scale, bias, dtype, backend=self.backend)
            sizes = (shape.kernel, shape.stride, shape.dilation)
            return ops.int8_conv(codes, step, weight, scale, bias, *sizes, dtype, backend=self.backend)

    def weight_only(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return ops.weight_only_linear(x, weight, scale, bias, x.dtype)

    def is_weight_only(self, device: torch.device) -> bool:
        """Whether a layer of this backend would not multiply in integers at all."""
        rows = self.shape.rows if self.shape.kind == "linear" else None
        return ops.resolve_backend(self.backend, device, rows) == ops.WEIGHT_ONLY

    def check(self, device: torch.device) -> str:
        """What runs, in words. Raises RowUnavailable where this backend cannot run on `device`."""
        try:
            with _isa(self.isa):
                many, _ = ops.explain_backend(self.backend, device)
                if many.backend == "cpu":
                    return f"cpu, {self._cpu_isa()}"
                return many.backend
        except (ValueError, ImportError) as error:
            raise RowUnavailable(str(error).splitlines()[0]) from error

    def _cpu_isa(self) -> str:
        from qvd_core.ops import cpu

        name = str(cpu.isa_name())
        if self.isa and self.isa not in name:
            raise RowUnavailable(f"the C kernels run {name}: start the process with {ISA_VARIABLE}={self.isa}")
        return name


@contextmanager
def _isa(name: str) -> Iterator[None]:
    """Inside, QVD's C kernels are told to use no more than the instruction set `name` ("" for the best)."""
    if not name:
        yield
        return
    before = os.environ.get(ISA_VARIABLE)
    os.environ[ISA_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ISA_VARIABLE]
        else:
            os.environ[ISA_VARIABLE] = before


def _qvd(problem: Problem, backend: str = "auto", isa: str = "", bits: int = 8, static: bool = False) -> Prepared:
    operators = Operators(problem.shape, backend, isa)
    note = operators.check(problem.device)
    if not static and operators.is_weight_only(problem.device):
        return _weight_only(problem, bits)
    codes, scale = problem.weight_codes(bits)
    shift = ones = step = None
    bias = problem.bias
    if static:  # calibrated: a shift and a scale per channel, the shift folded into the bias, one fixed step
        shift, ones = (torch.ones(problem.shape.inputs, device=problem.device) for _ in range(2))
        step = ((problem.x - 1).abs().amax() / 127).clamp(min=(1 / 127)).view(1)
        bias = bias + (codes.float() * scale).flatten(1).sum(dim=1)
    weight = _stored(codes, bits)

    def quantize() -> Any:
        return operators.quantize(problem.input, shift, ones, step)

    def run() -> Tensor:
        quantized, own_step = quantize()
        return operators.multiply(quantized, own_step, weight, scale, bias, problem.dtype)

    def integer(codes: Tensor, weight: Tensor) -> Tensor:
        one = torch.ones(1, device=problem.device)
        plain = torch.ones((len(weight), *[1] * (weight.dim() - 1)), device=problem.device)
        return operators.multiply(codes, one, _stored(weight, bits), plain, None, torch.float32)

    return Prepared(run, weight.numel(), quantize, integer, bits, note)


def _weight_only(problem: Problem, bits: int = 8) -> Prepared:
    if problem.shape.kind == "conv":
        raise RowUnavailable("matrix products only")
    codes, scale = problem.weight_codes(bits)
    weight, operators = _stored(codes, bits), Operators(problem.shape, "auto")
    run = partial(operators.weight_only, problem.input, weight, scale, problem.bias)
    return Prepared(run, weight.numel(), note="weight decoded, product in floating point")


def _stored(codes: Tensor, bits: int) -> Tensor:
    return pack_int4(codes) if bits == 4 else codes


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric codes int8 and steps float32 of the rows of x, in plain PyTorch."""
    x = x.float()
    step = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-20)
    return (x / step).round().clamp(-127, 127).to(torch.int8), step


def _int_mm(problem: Problem, compiled: bool = False) -> Prepared:
    if problem.shape.kind == "conv":
        raise RowUnavailable("matrix products only")
    codes, scale = problem.weight_codes()
    scale, bias, dtype = scale.flatten(), problem.bias, problem.dtype

    def layer(x: Tensor) -> Tensor:
        quantized, step = per_token(x)
        total = torch._int_mm(quantized, codes.t())
        return (total.float() * step * scale + bias).to(dtype)

    def integer(codes: Tensor, weight: Tensor) -> Tensor:
        return torch._int_mm(codes, weight.t()).float()

    run = torch.compile(layer, dynamic=False) if compiled else layer
    return Prepared(partial(run, problem.input), codes.numel(), partial(per_token, problem.input), integer)


def _onednn(problem: Problem) -> Prepared:
    if problem.shape.kind == "conv":
        return _onednn_conv(problem)
    codes, scale = problem.weight_codes()
    packed = _pack_linear(codes, problem.x.shape)

    def quantize() -> tuple[Tensor, Tensor]:
        quantized, step = per_token(problem.input)
        return _unsigned(quantized), step

    def run() -> Tensor:
        quantized, step = quantize()
        return _onednn_linear(quantized, packed, scale.flatten()) * step + problem.bias

    def integer(codes: Tensor, weight: Tensor) -> Tensor:
        return _onednn_linear(_unsigned(codes), _pack_linear(weight, problem.x.shape), torch.ones(len(weight)))

    return Prepared(run, codes.numel(), quantize, integer, note=_PACKED)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 -> uint8, 128 higher: the one type of activation that oneDNN multiplies fast."""
    return (codes.view(torch.uint8) ^ 128).contiguous()


def _pack_linear(codes: Tensor, size: torch.Size) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), list(size))


def _onednn_linear(codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    output = (1.0, 0, torch.float32, "none", _NO_SCALARS, "")
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, scale, zeros, None, *output)


def _onednn_conv(problem: Problem) -> Prepared:
    shape, (codes, scale) = problem.shape, problem.weight_codes()
    ones = [1] * len(shape.space)
    sizes = (list(shape.stride), [0] * len(shape.space), list(shape.dilation), 1)

    def pack(weight: Tensor, scales: Tensor) -> Tensor:
        return torch.ops.onednn.qconv_prepack(weight, scales, 1.0, 128, *sizes, None)

    def convolve(images: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        output = (1.0, 0, torch.float32, "none", _NO_SCALARS, "")
        return torch.ops.onednn.qconv_pointwise(images, 1.0, 128, packed, scales, zeros, None, *sizes, *output)

    def quantize() -> tuple[Tensor, Tensor]:
        x = F.pad(problem.input, shape.low_high_padding)
        step = (x.abs().flatten(1).amax(dim=1) / 127).clamp(min=1e-20).view(-1, 1, *ones)
        quantized = (x / step).round().clamp(-127, 127).to(torch.int8)
        return _channels_last(_unsigned(quantized)), step

    packed, flat = pack(codes, scale.flatten()), scale.flatten()

    def run() -> Tensor:
        images, step = quantize()
        return convolve(images, packed, flat) * step + problem.bias.view(-1, *ones)

    def integer(codes: Tensor, weight: Tensor) -> Tensor:
        plain = torch.ones(len(weight))
        return convolve(_channels_last(_unsigned(codes.movedim(-1, 1))), pack(weight, plain), plain)

    return Prepared(run, codes.numel(), quantize, integer, note=_PACKED)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.channels_last_3d)


# --- the list ---------------------------------------------------------------------------------------------------------


def _sixteen(problem: Problem) -> Prepared:
    if problem.shape.kind == "conv" and problem.device.type == "cpu" and not multiplies_in_16_bits():
        raise RowUnavailable("no 16-bit arithmetic on this CPU: a convolution takes many times longer")
    return _float(problem, problem.half)


ROWS: tuple[Row, ...] = (
    Row(FULL_PRECISION, "float", partial(_float, dtype=torch.float32)),
    Row(HALF_PRECISION, "float", _sixteen),
    Row("QVD", "qvd", _qvd),
    Row("QVD static, shift and scale", "qvd", partial(_qvd, static=True)),
    Row("QVD 4-bit weights", "qvd", partial(_qvd, bits=4)),
    Row("QVD cpu", "qvd", partial(_qvd, backend="cpu"), devices=("cpu",)),
    Row("QVD cpu avx2", "qvd", partial(_qvd, backend="cpu", isa="avx2"), devices=("cpu",)),
    Row("QVD triton", "qvd", partial(_qvd, backend="triton"), devices=("cuda",)),
    Row("QVD weight-only", "qvd", _weight_only, devices=("cuda",)),
    Row("QVD int_mm", "qvd", partial(_qvd, backend="int_mm")),
    Row("QVD emulated", "qvd", partial(_qvd, backend="emulated")),
    Row("torch._int_mm", "torch", _int_mm),
    Row("torch._int_mm compiled", "torch", partial(_int_mm, compiled=True), devices=("cuda",)),
    Row("oneDNN u8", "torch", _onednn, devices=("cpu",)),
)


def rows_for(device: str, patterns: tuple[str, ...] = ("*",)) -> list[Row]:
    """Rows for "cpu" or "cuda" whose name (with *) or kind is asked for; fp32 and 16-bit always: all is relative."""
    from benchmarks.kernel_peers import PEER_ROWS

    return [
        row
        for row in (*ROWS, *PEER_ROWS)
        if device in row.devices
        and (row.kind == "float" or any(fnmatch(row.name, pattern) or row.kind == pattern for pattern in patterns))
    ]
