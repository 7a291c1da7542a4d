"""Fused fronts: the operation before a linear whose output only the quantizer reads. Their meaning in plain PyTorch.

An activation or a norm writes a float tensor that the quantizer reads again; a kernel that does both saves that trip.
Everything is float32 here, so a fused front rounds less often than the float model in 16 bits did. [O]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.errors import QVDError


@dataclass(frozen=True)
class Front:
    """What is done to a row before it is quantized: an activation, perhaps gated, or a norm."""

    activation: str = ""  # "gelu", "gelu_tanh", "silu"
    gated: bool = False  # rows are [hidden, gate] and become hidden * activation(gate), as GEGLU and SwiGLU store them
    norm: str = ""  # "layer", "rms"


FRONTS = {
    "gelu": Front("gelu"),
    "gelu_tanh": Front("gelu_tanh"),
    "silu": Front("silu"),
    "gelu_mul": Front("gelu", gated=True),
    "gelu_tanh_mul": Front("gelu_tanh", gated=True),
    "silu_mul": Front("silu", gated=True),
    "layer_norm": Front(norm="layer"),
    "rms_norm": Front(norm="rms"),
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def checked_front(x: Tensor, name: str, gain: Tensor | None, offset: Tensor | None) -> Front:
    """The front called `name`, if x [M, K] (or [M, 2 K] where gated) and gain, offset [G, K] fit it.

    Raises QVDError otherwise.
    """
    front = FRONTS.get(name)
    if front is None:
        raise QVDError(f"unknown fused front {name!r}: use one of {', '.join(FRONTS)}.")
    if x.dim() != 2 or (front.gated and x.shape[1] % 2):
        raise QVDError(
            f"the fused front {name!r} takes rows [M, {'2 K' if front.gated else 'K'}], got {list(x.shape)}."
        )
    for label, tensor in (("gain", gain), ("offset", offset)):
        if tensor is None:
            continue
        if not front.norm:
            raise QVDError(f"the fused front {name!r} takes no {label}: only norms do.")
        if tensor.dim() != 2 or tensor.shape[1] != x.shape[1] or x.shape[0] % max(len(tensor), 1):
            raise QVDError(
                f"{label} of a fused norm is [G, {x.shape[1]}] with G a divisor of {x.shape[0]} rows, "
                f"got {list(tensor.shape)}."
            )
    return front


def apply_front(
    x: Tensor, name: str, gain: Tensor | None = None, offset: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """The input of the quantizer: float32 [M, K].

    x [M, K], or [M, 2 K] where gated: hidden and gate, of any float dtype. gain, offset [G, K] or None: norm(x) * gain
    + offset, where G divides M and row m belongs to group m // (M / G); adaLN's modulation is gain = 1 + scale.
    Raises QVDError for an unknown name and for shapes that do not fit.
    """
    front = checked_front(x, name, gain, offset)
    x = x.float()
    if front.activation:
        activation = _ACTIVATIONS[front.activation]
        if not front.gated:
            return activation(x)
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * activation(gate)
    if front.norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if gain is not None:
        x = x * _per_row(gain, len(x))
    return x if offset is None else x + _per_row(offset, len(x))


def _per_row(groups: Tensor, rows: int) -> Tensor:
    return groups.float().repeat_interleave(rows // len(groups), dim=0)
