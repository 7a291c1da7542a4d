"""What every Triton launch shares: whether it can run here, for which GPU it is tuned, and the launch itself.

Nothing here imports triton before a kernel is needed: it stays an optional package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments by name and its compile options; `run` starts it.

    The tests compile the very same launches ahead of time, with tensors of the meta device.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self, device: torch.device) -> None:
        """Start the kernel on `device`, whatever the current device is."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            # Without fusion: a product and a sum contracted to one operation would round once instead of twice.
            options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
            self.kernel[self.grid](**self.arguments, **options)


@cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(*tensors: Tensor | None) -> bool:
    """Whether all tensors are on one device whose memory the kernels can read."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1 or not available():
        return False
    kind = next(iter(devices)).type
    return kind == "cuda" or (kind == "cpu" and interpreted())


def floats(*tensors: Tensor | None) -> bool:
    """Whether all tensors are of float types that the kernels read."""
    return all(tensor is None or tensor.dtype in FLOATS for tensor in tensors)


@cache
def capability(device: torch.device) -> int:
    """Compute capability as in sm_89; 80 where there is no NVIDIA GPU (the interpreter)."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


def blocks(extent: int, block: int) -> int:
    """Blocks that cover `extent`."""
    return -(-extent // block)
