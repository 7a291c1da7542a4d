"""One layer of each kind: as ComfyUI's float layer, as QVD's for ComfyUI, and as `qvd_core`'s own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec
from qvd_core.convert import fill_layer, make_layer
from qvd_core.encode import encode_layer
from qvd_core.layers import QuantizedLayer
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales, Scales
from qvd_nodes.layers import QuantizedOp, outer_layer
from qvd_nodes.layout import QVDTensor, Recipe, quantized_weight

INPUTS, OUTPUTS = 32, 16
MODULES: dict[str, Callable[[bool], Any]] = {
    "linear": lambda bias: comfy.ops.manual_cast.Linear(INPUTS, OUTPUTS, bias=bias),
    "temporal": lambda bias: comfy.ops.manual_cast.Linear(INPUTS, OUTPUTS, bias=bias),
    "conv2d": lambda bias: comfy.ops.manual_cast.Conv2d(INPUTS, OUTPUTS, 3, padding=1, stride=2, bias=bias),
    "conv3d": lambda bias: comfy.ops.disable_weight_init.Conv3d(
        INPUTS, OUTPUTS, (3, 1, 1), padding=(1, 0, 0), bias=bias
    ),
}
SHAPES = {
    "linear": (2, 7, INPUTS),
    "temporal": (3, INPUTS),
    "conv2d": (2, INPUTS, 5, 6),
    "conv3d": (2, INPUTS, 4, 3, 3),
}


@dataclass
class Case:
    """tensors: the layer's entries in a checkpoint. x: an input."""

    module: nn.Module
    x: Tensor
    tensors: dict[str, Tensor]
    recipe: Recipe

    @property
    def weight(self) -> QVDTensor:
        """A quantized weight of its own memory."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return quantized_weight(tensors, tuple(self.module.weight.shape), self.module.weight.dtype, self.recipe)

    @property
    def bias(self) -> Tensor | None:
        bias = self.tensors.get("bias")
        return None if bias is None else bias.to(self.module.weight.dtype)

    def outer(self, weight: Any = None) -> QuantizedOp:
        return outer_layer(self.module, self.weight if weight is None else weight, self.bias)

    def core(self) -> QuantizedLayer:
        layer = make_layer(self.module, self.recipe.plan, self.recipe.spec, self.module.weight.dtype)
        fill_layer(layer, {**self.tensors, **({} if self.bias is None else {"bias": self.bias})})
        return layer.eval()


def case(
    kind: str = "linear",
    calibrated: bool = True,
    bias: bool = True,
    rotation: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Case:
    """A layer with random weights; calibrated: with a shift far from zero, and a scale."""
    spec = QuantSpec(**{"bias_correction": False, "rounding": "nearest", **fields})
    generator = torch.Generator().manual_seed(3)
    module = MODULES[kind](bias).requires_grad_(False)
    module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / module.weight[0].numel() ** 0.5)
    if bias:
        module.bias.copy_(torch.randn(OUTPUTS, generator=generator))
    module = module.to(dtype)
    x = torch.randn(SHAPES[kind], generator=generator).to(dtype)
    names = ["bias"] if bias or calibrated else []
    scales = None
    if kind == "temporal":
        names.append("codebook")
    elif calibrated:
        names += ["input_shift", "input_scale"]
        names += ["activation_scale"] if spec.is_static else []
        shift = 4 * torch.randn(INPUTS, generator=generator)
        scale = 0.5 + torch.rand(INPUTS, generator=generator)
        if kind == "linear":
            x = (x.float() * scale + shift).to(dtype)
        layer = LayerScales(shift - 3, shift + 3, shift, shift, scale, torch.zeros(0), rotation=rotation)
        scales = Scales("Model", "0", spec, layers={"it": layer})
    plan = LayerPlan(kind, tuple(names), rotation=rotation)
    tensors = encode_layer("it", plan, module.weight, module.bias, spec, scales)
    if kind == "temporal":
        levels = torch.linspace(-3, 3, 2**spec.activation_bits)
        tensors |= {"levels": levels, "boundaries": (levels[:-1] + levels[1:]) / 2}
        tensors |= {"offset": 0.1 * torch.randn(INPUTS, generator=generator), "gain": torch.ones(INPUTS)}
    return Case(module, x, tensors, Recipe(plan, spec))


def hadamard_matrix(block: int, channels: int) -> Tensor:
    """The rotation of each `block` channels as one float64 matrix, by its definition."""
    one = torch.ones(1, 1, dtype=torch.float64)
    while len(one) < block:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)]) / 2**0.5
    return torch.block_diag(*[one] * (channels // block)) if block else torch.eye(channels, dtype=torch.float64)
