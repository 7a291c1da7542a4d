"""The Triton backend: quantizing and multiplying kernels for NVIDIA GPUs of compute capability 8.0 and newer.

Triton is optional: this package imports without it, and `missing` says why its kernels cannot run.
"""

from __future__ import annotations

from qvd_core.ops.triton.backend import TritonBackend, TritonQuantizer, missing
from qvd_core.ops.triton.launch import available

__all__ = ["TritonBackend", "TritonQuantizer", "available", "missing"]
