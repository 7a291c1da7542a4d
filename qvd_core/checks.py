"""Checks of a model's float tensors, shared by calibration and conversion."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError

_POSITIVE = ("weight_scale", "input_scale", "activation_scale", "gain")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise QVDError when a weight or bias holds NaN or infinity."""
    if tensor.element_size() < 2:
        tensor = tensor.float()  # 8-bit floats have no test of their own
    if not torch.isfinite(tensor).all():
        raise QVDError(f"{name} holds NaN or infinity: the model file is damaged or overflowed in 16 bits.")


def cast_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises QVDError when a finite value leaves its range, as a folded float16 bias may."""
    cast = tensor.to(dtype)
    if (
        cast.dtype == torch.float16
        and tensor.dtype != cast.dtype
        and bool((tensor.isfinite() & ~cast.isfinite()).any())
    ):
        raise QVDError(
            f"{name} of the quantized model leaves the range of float16: load the model in bfloat16 or float32, "
            'or use shift=False, scale="none" and bias_correction=False.'
        )
    return cast


def stored_problem(key: str, tensor: Tensor) -> str | None:
    """What is wrong with a tensor of a quantized checkpoint, by the last part of its name; None for a sound one."""
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
        return "holds NaN or infinity"
    if key in _POSITIVE and not bool((tensor > 0).all()):
        return "must be positive"
    if key in ("bucket_boundaries", "boundaries", "levels") and not bool((tensor[:-1] <= tensor[1:]).all()):
        return "must ascend"
    if key == "weight" and tensor.dtype == torch.uint8 and bool((((tensor & 15) == 8) | ((tensor >> 4) == 8)).any()):
        return "holds codes outside -7 ... 7"
    return None


def check_finite_weights(layers: Mapping[str, nn.Module]) -> None:
    """Raise QVDError naming the first layer whose weight or bias holds NaN or infinity."""
    for name, module in layers.items():
        for kind, tensor in module.named_parameters(recurse=False):
            check_finite(f"{name}.{kind}", tensor)
