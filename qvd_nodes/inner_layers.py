"""The inside of QVD's layers for ComfyUI: layers of `qvd_core` built around tensors that ComfyUI holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.layers import QuantConv2d, QuantConv3d, QuantizedLayer, QuantLinear
from qvd_core.temporal_layer import TemporalLinear
from qvd_nodes._comfy import QuantizedTensor
from qvd_nodes.layout import CALIBRATED, QVDInt8Layout


class ComfyTemporalLinear(TemporalLinear):
    """A temporal projection that may ask ComfyUI for its weight, when a timestep is not in its table."""

    operands: Callable[[torch.device], tuple[Tensor, Tensor | None]] | None = None

    def _operands(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return super()._operands(device) if self.operands is None else self.operands(device)


_CLASSES: dict[str, type[QuantizedLayer]] = {
    "linear": QuantLinear,
    "conv2d": QuantConv2d,
    "conv3d": QuantConv3d,
    "temporal": ComfyTemporalLinear,
}


@dataclass(frozen=True)
class Inner:
    """A layer of the core, and all that it was built from; a temporal projection's has its table in it."""

    state: tuple[Any, ...]
    device: torch.device
    layer: QuantizedLayer

    def holds_for(self, state: tuple[Any, ...], device: torch.device) -> bool:
        """Whether it was built from these very objects, for this device."""
        same = len(state) == len(self.state) and all(a is b for a, b in zip(state, self.state, strict=True))
        return same and device == self.device


def inner_layer(outer: nn.Module, weight: QuantizedTensor, bias: Tensor | None) -> QuantizedLayer:
    """The layer of the core that computes with these tensors, which it shares; its sizes are those of `outer`."""
    params: QVDInt8Layout.Params = weight._params
    recipe = params.recipe
    assert recipe is not None
    inner = _CLASSES[recipe.plan.kind](_Source(outer, weight), recipe.plan, recipe.spec, params.orig_dtype)
    if params.fold is not None:
        bias = params.fold if bias is None else bias + params.fold.to(bias.dtype)
    # Plain tensors: a new parameter of an inference tensor could not be made outside of inference mode.
    inner._parameters["weight"] = weight._qdata
    inner._parameters["bias"] = bias  # type: ignore[assignment]
    inner._buffers["weight_scale"] = params.scale
    for name in CALIBRATED:
        if name in inner._buffers:
            inner._buffers[name] = getattr(params, name)
    clock: Any = outer.clock
    inner.clock = clock
    return inner.eval()


class _Source:
    """What a layer of the core reads of the float layer it replaces: settings of the outer one, the weight's shape."""

    def __init__(self, outer: nn.Module, weight: QuantizedTensor):
        self._outer = outer
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)
