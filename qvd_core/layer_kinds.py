"""Which module classes are layers that QVD can quantize, and as what."""

from __future__ import annotations

from typing import Literal

from torch import nn

LayerKind = Literal["linear", "conv2d", "conv3d", "temporal"]

_KINDS: dict[type[nn.Module], LayerKind] = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}


def layer_kind(module: nn.Module) -> LayerKind | None:
    """What `module` is quantized as; None when it is no layer that QVD can quantize.

    Only exact classes count: a subclass may compute something else.
    """
    return _KINDS.get(type(module))


def register_layer_class(layer_class: type[nn.Module], kind: LayerKind) -> None:
    """Let a class of another library that computes what PyTorch's does, with the same attributes, be quantized too."""
    _KINDS[layer_class] = kind
