"""Checks of a model's float tensors, shared by calibration and conversion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise QVDError when a weight or bias holds NaN or infinity."""
    if tensor.element_size() < 2:
        tensor = tensor.float()  # 8-bit floats have no test of their own
    if not torch.isfinite(tensor).all():
        raise QVDError(f"{name} holds NaN or infinity: the model file is damaged or overflowed in 16 bits.")


def check_finite_weights(layers: Mapping[str, nn.Module]) -> None:
    """Raise QVDError naming the first layer whose weight or bias holds NaN or infinity."""
    for name, module in layers.items():
        for kind, tensor in module.named_parameters(recurse=False):
            check_finite(f"{name}.{kind}", tensor)
