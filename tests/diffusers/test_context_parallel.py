"""Context parallelism of a quantized model: every process quantizes its own tokens, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from torch import multiprocessing

from tests.diffusers.parallel_worker import compare


@pytest.mark.slow
@pytest.mark.skipif(diffusers.__version__ < "0.42", reason="older releases want a CUDA device")
@pytest.mark.parametrize("method", ["ulysses_degree"])
def test_two_processes_compute_what_one_does(
    method: str, quantized_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    multiprocessing.spawn(compare, args=(quantized_folder("Wan"), tmp_path, method), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    assert all(float((tmp_path / rank).read_text()) < 1e-3 for rank in "01")
