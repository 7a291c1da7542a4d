"""comfy-kitchen's fused int8 linear, for the plain case it covers: 8 bits, one dynamic step per token, nothing else.

It quantizes by itself, in the dtype of the input, so that its codes may differ by one from ours where that is not
float32. Runs only where someone chooses it: `backend="comfy_kitchen"`.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor


def installed() -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec("comfy_kitchen") is not None


def token_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] quantized per row x weight int8 [N, K] with weight_scale [N, 1], + bias [N] -> `dtype` [M, N]."""
    out: Tensor = importlib.import_module("comfy_kitchen").int8_linear(x, weight, weight_scale, bias, dtype)
    return out
