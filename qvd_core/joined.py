"""`fuse_qkv_projections` on a quantized model: the projections stay what they are and are called together.

Attention modules of diffusers fuse by concatenating float weights into a new `nn.Linear`, which has no place for int8
codes and their scales. A quantized model gains nothing from it either: q, k and v quantize their common input once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.layers import QuantizedLayer

ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


class JoinedLinears(nn.Module):
    """The outputs of some layers of `owner`, side by side. It holds no tensor, so that no checkpoint changes.

    The layers are looked up when they are called: an adapter may have taken their place by then.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self._owner = (owner,)  # in a tuple: as a submodule, the owner would contain itself

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], N the sum of the layers' outputs."""
        owner = self._owner[0]
        return torch.cat([getattr(owner, name)(input) for name in self.names], dim=-1)

    def extra_repr(self) -> str:
        return ", ".join(self.names)


def join_instead_of_fusing(model: nn.Module) -> None:
    """Give every attention module that can fuse its projections, and has quantized ones, a way that works. [O]"""
    for module in model.modules():
        if callable(getattr(type(module), "fuse_projections", None)) and _has_quantized_projection(module):
            # On the module alone: its class, and every other model, stays as diffusers made it.
            module.fuse_projections = functools.partial(_join_projections, module)  # type: ignore[assignment]


def _join_projections(attention: Any, fuse: bool = True) -> None:
    """In the place of `fuse_projections`: the same submodules under the same names, which `unfuse` deletes again."""
    if not _has_quantized_projection(attention):  # dequantized meanwhile
        del attention.fuse_projections
        attention.fuse_projections()
        return
    supported = getattr(attention, "_supports_qkv_fusion", True)
    if not supported or getattr(attention, "fused_projections", False):
        return
    if getattr(attention, "is_cross_attention", False):
        attention.to_kv = JoinedLinears(attention, ("to_k", "to_v"))
    else:
        attention.to_qkv = JoinedLinears(attention, ("to_q", "to_k", "to_v"))
    added = [name for name in ADDED if getattr(attention, name, None) is not None]
    if len(added) == 3:
        attention.to_added_qkv = JoinedLinears(attention, added)
    elif len(added) == 2:
        attention.to_added_kv = JoinedLinears(attention, added)
    attention.fused_projections = fuse


def _has_quantized_projection(attention: nn.Module) -> bool:
    layers = [attention._modules.get(name) for name in ("to_q", "to_k", "to_v", *ADDED)]
    return any(isinstance(getattr(layer, "base_layer", layer), QuantizedLayer) for layer in layers)  # peft wraps layers
