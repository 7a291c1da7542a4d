"""Loads the compiled kernels, once per process, and says in one log line why when there are none."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.ops.cpu import build

logger = logging.getLogger(__name__)

ISA_CODES = {"avx2": 1, "avx512vnni": 2}  # enum qvd_isa
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum qvd_dtype
_WITHOUT = "int8 layers run without them, exact but slower"
_HOW_TO_BUILD = "build it with `python -m qvd_core.ops.cpu.build` (needs gcc or clang)"

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []  # empty until the first load()


def load() -> ctypes.CDLL | None:
    """The library of C kernels, or None where it is missing, stale, or of no use on this CPU (said once, in the log).

    Thread-safe; the work is done by the first call.
    """
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(open_library(build.FOLDER / build.LIBRARY_NAME))
    return _loaded[0]


def open_library(path: Path) -> ctypes.CDLL | None:
    """Load one library file, checked and with PyTorch's threads; None, and one log line, when it cannot be used."""
    if not build.is_supported():
        logger.info("QVD's C kernels need Linux on x86-64: int8 layers run without them, exact but slower.")
        return None
    if not path.exists():
        logger.warning(
            "QVD's C kernels are not built: int8 layers run without them, exact but slower; %s.", _HOW_TO_BUILD
        )
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.qvd_abi.restype = ctypes.c_uint
        found = library.qvd_abi()
    except (OSError, AttributeError) as error:
        logger.warning(
            "%s cannot be loaded (%s): int8 layers run without them, exact but slower; %s.",
            path,
            error,
            _HOW_TO_BUILD,
        )
        return None
    if found != build.fingerprint():
        logger.warning(
            "%s is stale, compiled from other sources than those beside it: %s; %s.",
            *(path, _WITHOUT, _HOW_TO_BUILD),
        )
        return None
    library.qvd_best_isa.restype = ctypes.c_int
    if library.qvd_best_isa() == 0:
        logger.info("QVD's C kernels need a CPU with AVX2: int8 layers run without them, exact but slower.")
        return None
    _borrow_threads(library)
    return library


def is_readable(tensor: Tensor) -> bool:
    """Whether C may read the tensor's memory as it is: on the CPU, no subclass, no pending negation."""
    return tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg()


@cache
def isa(library: ctypes.CDLL) -> int:
    """The instruction set to use: QVD_CPU_ISA (avx2 or avx512vnni) where it is set, else the best there is; read once.

    Raises QVDError for a name that is unknown or that this CPU does not have.
    """
    best: int = library.qvd_best_isa()
    name = os.environ.get("QVD_CPU_ISA")
    if not name:
        return best
    code = ISA_CODES.get(name)
    if code is None or code > best:
        usable = [known for known, value in ISA_CODES.items() if value <= best]
        raise QVDError(f"QVD_CPU_ISA={name!r} is not an instruction set of this CPU: use {' or '.join(usable)}.")
    return code


def _borrow_threads(library: ctypes.CDLL) -> None:
    """Let the library run on the OpenMP team of PyTorch."""
    library.qvd_set_parallel.argtypes = [ctypes.c_void_p]
    library.qvd_set_parallel.restype = None
    address = _find_parallel_region()
    if address is None:
        logger.info("PyTorch's OpenMP runtime was not found: QVD's C kernels run on one thread.")
    library.qvd_set_parallel(address)


def _find_parallel_region() -> int | None:
    """Address of GOMP_parallel, looked for as the dynamic linker did for PyTorch: global names, then its libraries'."""
    places: tuple[Callable[[], ctypes.CDLL], ...] = (
        lambda: ctypes.CDLL(None),
        lambda: ctypes.CDLL(torch._C.__file__),
    )
    for place in places:
        try:
            function = place().GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
