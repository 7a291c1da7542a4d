"""Layers that read one tensor (q, k and v) quantize it once: the first one codes it, the others find the codes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.families import find_family
from qvd_core.layers import QuantLinear

SMALL_INPUT = 2**16  # elements: a CPU quantizes them in the time of a few Python calls
Coded = tuple[Tensor, Tensor]  # codes and step


@dataclass
class _Last:
    """What was coded last, for the members that have not asked for it yet."""

    input: weakref.ref[Tensor]
    version: int
    address: int
    backend: str
    coded: Coded
    uses_left: int


class SharedInput:
    """The memory of one group of layers that transform their input alike.

    It holds codes from the first member's call to the last one's, at most as long as the input lives, and gives them
    out for the very same, unmodified tensor only. (What is written through `.data` or NumPy, autograd's counter of
    changes does not see, and neither does this.)
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self._last: _Last | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start empty."""
        return {"members": self.members, "_last": None}

    def is_worth_it(self, input: Tensor) -> bool:
        """Whether to remember the codes of `input`: not of a small one, which is quantized again in less time.

        Nor of an inference tensor, which does not count its changes, nor in a traced program, which has no memory
        between layers.
        """
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() or input.is_inference():
            return False
        return not input.is_cpu or input.numel() >= SMALL_INPUT

    def quantize(self, input: Tensor, backend: str, code: Callable[[], Coded]) -> Coded:
        """The codes of `input` and their step: remembered, or made by `code` and remembered for the others."""
        last = self._last
        now = (input._version, input.data_ptr(), backend)
        if last is not None and last.input() is input and (last.version, last.address, last.backend) == now:
            last.uses_left -= 1
            if last.uses_left == 0:
                self._last = None
            return last.coded
        coded = code()
        self._last = _Last(weakref.ref(input, self._forget), *now, coded, uses_left=self.members - 1)
        return coded

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last.input is gone:
            self._last = None


def share_inputs(model: nn.Module) -> None:
    """Let the int8 linears of `model` that read one input, and transform it alike, quantize it once.

    Call it when the layers hold their tensors, and again after changing one; those on the meta device, with other
    values, or with steps that follow the timestep, which the input does not tell, stay on their own.
    """
    family = find_family(model)
    if family is None:
        return
    groups: dict[str, list[QuantLinear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.shared_input = None
            groups.setdefault(family.input_group(name), []).append(layer)
    for layers in groups.values():
        alike = [layer for layer in layers if _alike(layers[0], layer)]
        if len(alike) > 1:
            shared = SharedInput(len(alike))
            for layer in alike:
                layer.shared_input = shared


def _alike(first: QuantLinear, other: QuantLinear) -> bool:
    """Whether two layers code the same input alike."""
    if (first.plan.rotation, first.plan.steps_by) != (other.plan.rotation, other.plan.steps_by):
        return False
    if first.plan.steps_by == "timestep":
        return False
    names = ("input_shift", "input_scale", "activation_scale", "bucket_boundaries")
    return all(_equal(getattr(first, name), getattr(other, name)) for name in names)


def _equal(first: Tensor | None, other: Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    return not first.is_meta and not other.is_meta and torch.equal(first, other)
