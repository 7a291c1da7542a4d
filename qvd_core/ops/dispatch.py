"""Which backend runs an int8 operator: the fastest exact one for the device and the shape, unless someone chose.

What "auto" decides, and why, comes from measured crossovers (`benchmarks/kernels.py`) where a machine was at hand, and
is marked where it is an expectation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from qvd_core.errors import QVDError
from qvd_core.ops import kitchen
from qvd_core.ops.backend import Backend
from qvd_core.ops.emulated import Emulated
from qvd_core.ops.reference import Reference

# Not backends of single operators but other ways for a whole layer:
WEIGHT_ONLY = "weight_only"  # multiply in 16 bits with the decoded weight
KITCHEN = "comfy_kitchen"  # another library's linear, where the layer is plain enough for it
FEW_ROWS = 16  # below, a GPU reads the weight longer than it multiplies, and `torch._int_mm` refuses


@dataclass(frozen=True)
class Choice:
    """The backend that will run, and the reason in one phrase."""

    backend: str
    reason: str


@dataclass(frozen=True)
class _Entry:
    make: Callable[[], Backend]
    missing: Callable[[torch.device], str | None]  # why it cannot run on a device; None: it can


def _cpu() -> Backend:
    from qvd_core.ops.cpu import CpuBackend

    return CpuBackend()


def _cpu_missing(device: torch.device) -> str | None:
    from qvd_core.ops import cpu

    if device.type != "cpu":
        return f"it has no {device.type} kernels"
    return None if cpu.available() else "the C kernels are not built: python -m qvd_core.ops.cpu.build"


def _int_mm() -> Backend:
    from qvd_core.ops.int_mm import IntMM

    return IntMM()


def _int_mm_missing(device: torch.device) -> str | None:
    from qvd_core.ops import int_mm

    return None if int_mm.usable(device) else f"torch._int_mm is not exact or not there on this {device.type}"


def _triton() -> Backend:
    from qvd_core.ops.triton import TritonBackend

    return TritonBackend()


def _triton_missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it has no {device.type} kernels"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "its int8 products need an NVIDIA GPU of compute capability 8.0 or newer"
    from qvd_core.ops import triton

    return triton.missing(device)


_BACKENDS: dict[str, _Entry] = {
    "reference": _Entry(Reference, lambda device: None),
    "emulated": _Entry(Emulated, lambda device: None),
    "cpu": _Entry(_cpu, _cpu_missing),
    "int_mm": _Entry(_int_mm, _int_mm_missing),
    "triton": _Entry(_triton, _triton_missing),
}


@cache
def backend(name: str) -> Backend:
    """The one instance of a backend, made when it is first used."""
    return _BACKENDS[name].make()


def available_backends(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can run on `device`."""
    return [name for name, entry in _BACKENDS.items() if entry.missing(torch.device(device)) is None]


def resolve_backend(name: str = "auto", device: torch.device | str = "cpu", rows: int | None = None) -> str:
    """What a layer runs on `rows` rows: `QVD_BACKEND` if set, else `name`, else ("auto") the fastest exact backend.

    rows: tokens of the input; None for many. `WEIGHT_ONLY` and `KITCHEN` are among the answers.
    Raises QVDError for an unknown name, and for one that cannot run on `device`.
    """
    many, few, _ = _names(name, str(device), os.environ.get("QVD_BACKEND") or None)
    # Asking for the rows only where they matter leaves a compiler free to take any number of them.
    return many if many == few or rows is None or rows > FEW_ROWS else few


def integer_backend(name: str, device: torch.device) -> str:
    """`resolve_backend` for one operator: always a backend, even where a layer would go another way."""
    return _names(name, str(device), os.environ.get("QVD_BACKEND") or None)[2]


@torch.compiler.assume_constant_result
def _names(name: str, device: str, override: str | None) -> tuple[str, str, str]:
    """The answers for many rows, for few, and for single operators: constants to a compiler."""
    return _remembered_names(name, device, override)


@cache  # apart from the function above: a compiler looks through caches, into everything the answers depend on
def _remembered_names(name: str, device: str, override: str | None) -> tuple[str, str, str]:
    many, few = explain_backend(name, device)
    integer = many.backend
    if integer == KITCHEN:
        integer = _automatic(torch.device(device).type, torch.device(device).index)[0].backend
    if integer == WEIGHT_ONLY:
        integer = "triton" if _triton_missing(torch.device(device)) is None else "emulated"
    return many.backend, few.backend, integer


def explain_backend(name: str = "auto", device: torch.device | str = "cpu") -> tuple[Choice, Choice]:
    """What runs, and why, for many rows and for `FEW_ROWS` or fewer."""
    device = torch.device(device)
    wanted = os.environ.get("QVD_BACKEND") or name
    if wanted == "auto":
        return _automatic(device.type, device.index)
    choice = _chosen(wanted, device, "QVD_BACKEND" if os.environ.get("QVD_BACKEND") else "the layer's setting")
    return choice, choice


@cache
def _chosen(name: str, device: torch.device, by: str) -> Choice:
    if name == WEIGHT_ONLY or (name == KITCHEN and kitchen.installed()):
        return Choice(name, f"chosen by {by}")
    if name == KITCHEN:
        raise QVDError(f"the int8 backend {name!r}, chosen by {by}, is not installed: pip install comfy-kitchen.")
    if name not in _BACKENDS:
        known = ", ".join([*_BACKENDS, WEIGHT_ONLY, KITCHEN])
        raise QVDError(f"unknown int8 backend {name!r} (`backend` or QVD_BACKEND): use auto, {known}.")
    missing = None if device.type == "meta" else _BACKENDS[name].missing(device)
    if missing:
        raise QVDError(f"the int8 backend {name!r}, chosen by {by}, cannot run on {device}: {missing}. Use auto.")
    return Choice(name, f"chosen by {by}")


@cache
def _automatic(kind: str, index: int | None) -> tuple[Choice, Choice]:
    """The choices for many rows and for few."""
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    if kind == "cpu":
        choice = _automatic_cpu()
        return choice, choice
    if kind == "cuda" and not torch.version.hip:
        return _automatic_cuda(device)
    choice = Choice("emulated", f"no int8 kernels for {kind}: exact sums through its float32 units")
    return choice, choice


def _automatic_cpu() -> Choice:
    device = torch.device("cpu")
    missing = _cpu_missing(device)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if features.get("amx_int8") and _int_mm_missing(device) is None:
        return Choice("int_mm", "AMX: oneDNN's tiles, exact (speed not measured by us)")
    if missing is None:
        from qvd_core.ops import cpu

        return Choice("cpu", f"C kernels, {cpu.isa_name()}")
    if _int_mm_missing(device) is None:
        return Choice("int_mm", f"{missing}; torch._int_mm is exact with VNNI")
    return Choice("emulated", missing)


def _automatic_cuda(device: torch.device) -> tuple[Choice, Choice]:
    capability = torch.cuda.get_device_capability(device)
    name = f"sm_{capability[0]}{capability[1]}"
    if capability == (10, 3):
        choice = Choice(WEIGHT_ONLY, f"{name} has next to no int8 throughput: 16-bit products, int8 memory")
        return choice, choice
    few = Choice(WEIGHT_ONLY, f"{FEW_ROWS} rows or fewer: reading the weight is all the time there is")
    if _triton_missing(device) is None:
        return Choice("triton", f"{name}: fused Triton kernels"), few
    if _int_mm_missing(device) is None:
        return Choice("int_mm", f"{name}: {_triton_missing(device)}; torch._int_mm"), few
    emulated = Choice("emulated", f"{name}: neither Triton nor torch._int_mm can run here")
    return emulated, emulated
