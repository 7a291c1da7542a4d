"""The matrix: every video model class of diffusers, and what its users do with a quantized one.

One function per column. It takes a `Subject` (a class, one tiny random model of it and a folder) and returns what the
table says of it; a column that does not hold raises. Where the model cannot do it in full precision either, the cell
names that limit: an exception of the quantized model passes only when the float one raises the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.layers import QuantizedLayer
from qvd_core.quality import sqnr_db
from qvd_diffusers import QVDConfig
from tests.tiny_models import tiny_family

LEAST_SQNR = 25.0
"""dB of a data-free W8A8 output against full precision."""

CLOSER = 3.0
"""dB by which two outputs of the same codes are nearer to each other than to full precision. They need not be equal:
another order of a float sum moves a few roundings, and a deep random model makes much of them. A layer that computes
something else would show as another error of quantization does, at 0 dB or less."""

LEAST_SHARDS = 2
LONGEST_REASON = 110

COMPILE = "compile fullgraph"
"""The one column that takes seconds per class."""


class ColumnError(AssertionError):
    """A column that does not hold; the message says why."""


class Subject:
    """One model class, through its tiny model, saved in full precision below `folder`."""

    def __init__(self, name: str, folder: Path):
        self.tiny = tiny_family(name)
        self.model_class: Any = type(self.tiny.model)
        self.folder = folder
        model: Any = self.tiny.model
        model.save_pretrained(self.float_folder)

    @property
    def float_folder(self) -> Path:
        return self.folder / "float"

    @property
    def quantized_folder(self) -> Path:
        """Where the quantized model is, written on first use."""
        folder = self.folder / "int8"
        if not folder.is_dir():
            quantized: Any = self.quantized
            quantized.save_pretrained(folder)
        return folder

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """`from_pretrained`, as a user calls it."""
        model: nn.Module = self.model_class.from_pretrained(folder, **options)
        return model.eval()

    @cached_property
    def quantized(self) -> nn.Module:
        """Quantized while loading, data-free W8A8 with one scale per token. Shared: no column may change it."""
        return self.load(self.float_folder, quantization_config=QVDConfig())

    @torch.no_grad()
    def output(self, model: Any) -> Tensor:
        return self.tiny.forward(model)

    @cached_property
    def expected(self) -> Tensor:
        """What the float model says, loaded as the quantized one is."""
        return self.output(self.load(self.float_folder))

    @cached_property
    def quantized_output(self) -> Tensor:
        return self.output(self.quantized)


def quantize(subject: Subject) -> str:
    """Which of its linear and convolution layers went to int8."""
    layers = [module for module in subject.quantized.modules() if isinstance(module, QuantizedLayer)]
    candidates = [m for m in subject.tiny.model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    if not layers:
        raise ColumnError("no layer was quantized")
    return f"{len(layers)} of {len(candidates)} layers"


def finite(subject: Subject) -> str:
    """One forward pass: as many finite values as the float model gives."""
    output = subject.quantized_output
    if output.shape != subject.expected.shape or not output.isfinite().all():
        raise ColumnError(f"output {list(output.shape)} is not finite or not {list(subject.expected.shape)}")
    return "yes"


def sqnr(subject: Subject) -> str:
    """The output against full precision."""
    decibels = sqnr_db(subject.expected, subject.quantized_output)
    if not decibels >= LEAST_SQNR:
        raise ColumnError(f"{decibels:.1f} dB to full precision, less than {LEAST_SQNR:g}")
    return f"{decibels:.1f} dB"


def save(subject: Subject) -> str:
    """Saved and loaded again, with nothing but the folder: the same tensors, the same output."""
    _check_identical(subject, subject.load(subject.quantized_folder))
    return "yes"


def sharded_save(subject: Subject) -> str:
    """The same through several files."""
    folder = subject.folder / "sharded"
    size = sum(tensor.nbytes for tensor in subject.quantized.state_dict().values())
    saved: Any = subject.quantized
    saved.save_pretrained(folder, max_shard_size=size // 3)
    files = len(list(folder.glob("*.safetensors")))
    if files < LEAST_SHARDS:
        raise ColumnError(f"{files} file instead of at least {LEAST_SHARDS}")
    _check_identical(subject, subject.load(folder))
    return f"yes, {files} files"


def device_map(subject: Subject) -> str:
    """Loaded with `device_map="auto"`."""
    try:
        model = subject.load(subject.quantized_folder, device_map="auto")
    except ValueError as error:
        return _upstream(error, lambda: subject.load(subject.float_folder, device_map="auto"))
    _check_identical(subject, model)
    return "yes"


def compile_fullgraph(subject: Subject) -> str:
    """`torch.compile(model, fullgraph=True)`: one graph, and the same output. No code is generated for it."""
    try:
        output = _compiled_output(subject, copy.deepcopy(subject.quantized))
    except Exception as error:  # whatever dynamo refuses, it must refuse of the float model too
        return _upstream(error, lambda: _compiled_output(subject, subject.load(subject.float_folder)))
    _check_same_output(subject, output)
    return "yes"


COLUMNS: dict[str, Callable[[Subject], str]] = {
    "quantized": quantize,
    "finite": finite,
    "SQNR": sqnr,
    "save": save,
    "sharded save": sharded_save,
    'device_map="auto"': device_map,
    COMPILE: compile_fullgraph,
}


def _check_identical(subject: Subject, model: nn.Module) -> None:
    expected, found = subject.quantized.state_dict(), model.state_dict()
    if found.keys() != expected.keys():
        raise ColumnError(f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor):
            raise ColumnError(f"{name} is not the tensor that was saved")
    _check_same_output(subject, subject.output(model))


def _check_same_output(subject: Subject, output: Tensor) -> None:
    apart = sqnr_db(subject.quantized_output, output)
    least = sqnr_db(subject.expected, subject.quantized_output) + CLOSER
    if not apart >= least:
        raise ColumnError(f"the same codes give another output: {apart:.1f} dB, less than {least:.1f}")


def _compiled_output(subject: Subject, model: nn.Module) -> Tensor:
    torch._dynamo.reset()
    try:
        return subject.output(torch.compile(model, fullgraph=True, backend="eager"))
    finally:
        torch._dynamo.reset()


def _upstream(error: Exception, of_float_model: Callable[[], object]) -> str:
    """The cell of a limit that the float model has too; raises where it has not."""
    try:
        of_float_model()
    except Exception as upstream:
        if type(upstream) is type(error) and _reason(upstream) == _reason(error):
            return f"upstream: {_reason(error)}"
        raise ColumnError(f"{_reason(error)!r}, but the float model says {_reason(upstream)!r}") from error
    raise error


def _reason(error: Exception) -> str:
    """The longest sentence of an exception's first line, in its own words."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    sentence = max(line.split(". "), key=len).rstrip(".")
    return sentence if len(sentence) <= LONGEST_REASON else sentence[: LONGEST_REASON - 1] + "…"
