"""Gradients of the int8 layers: the forward pass of inference, the backward pass of the float layer it stands for. [O]

    y = f(x), bit for bit what inference computes      dx = dy @ W      db = sum of dy over all but the outputs

W is the dequantized weight that acts on the layer's original input: rounding is taken for the identity, and the shift,
the scale and the rotation of the input are folded back. Values that a static step clips get the same gradient: the
backward pass then needs no input, and calibrated steps clip next to nothing. Nothing is kept between the passes but the
int8 weight itself; W is rebuilt, in the dtype of dy, when the backward pass comes by. Derivatives of the backward pass,
which is linear in dy, are those of that product.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as of_convolution

from qvd_core.ops.backend import weight_codes
from qvd_core.rotation import hadamard


class DifferentiableLayer(Protocol):
    """What `linear` and `convolution` need to know of a layer."""

    weight: Tensor
    bias: Any
    weight_scale: Tensor
    input_scale: Tensor | None
    plan: Any

    def infer(self, input: Tensor, operand: Tensor) -> Tensor:
        """The forward pass of inference, as a tensor of its own (no view); operand: the input, in rows or as it is."""


def wanted(input: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd, where it is on, will ask for the gradient of the input or of the bias."""
    return input.requires_grad or (bias is not None and bias.requires_grad)


def linear(layer: DifferentiableLayer, input: Tensor, rows: Tensor) -> Tensor:
    """`layer.infer(input, rows)`, rows [M, K] -> [M, N], with a gradient for the rows and the bias."""
    out: Tensor = _Linear.apply(rows, layer.bias, input, layer, *_factors(layer))  # type: ignore[no-untyped-call]
    return out


def convolution(layer: Any, input: Tensor) -> Tensor:
    """`layer.infer(input, input)`, [B, C, *space] -> [B, N, *out], with a gradient for the input and the bias."""
    sizes = (list(layer.stride), list(layer.dilation), list(layer._reversed_padding_repeated_twice))
    factors = _factors(layer)
    out: Tensor = _Convolution.apply(input, layer.bias, layer, *factors, *sizes)  # type: ignore[no-untyped-call]
    return out


def _factors(layer: DifferentiableLayer) -> tuple[Tensor, Tensor, Tensor | None, int]:
    return layer.weight, layer.weight_scale, layer.input_scale, layer.plan.rotation


def effective_weight(
    weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, rotation: int, features: list[int]
) -> Tensor:
    """float32 [N, *features]: the decoded weight, acting on the input before its shift, scale and rotation.

    weight: int8 of that shape, or packed 4-bit codes; weight_scale float32 [N, 1, ...]; input_scale float32 [K] or
    None; features: [K] or [C, *kernel]. The shift is the bias's affair.
    """
    decoded = weight_codes(weight, features).float() * weight_scale
    decoded = hadamard(decoded, rotation, dim=1)  # its own inverse
    return decoded if input_scale is None else decoded / input_scale.view(1, -1, *[1] * (len(features) - 1))


def _rebuilt(ctx: Any, features: list[int], dy: Tensor) -> Tensor:
    """The effective weight, on the device and in the dtype of the gradient; the weight may have been offloaded."""
    weight, weight_scale, input_scale = ctx.saved_tensors
    input_scale = None if input_scale is None else input_scale.to(dy.device)
    factors = (weight.to(dy.device), weight_scale.to(dy.device), input_scale)
    return effective_weight(*factors, ctx.rotation, features).to(dy.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor,
        bias: Tensor | None,
        input: Tensor,
        layer: DifferentiableLayer,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None,
        rotation: int,
    ) -> Tensor:
        return layer.infer(input, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, bias, _, _, weight, weight_scale, input_scale, rotation = inputs
        ctx.save_for_backward(weight, weight_scale, input_scale)
        ctx.rotation, ctx.features = rotation, rows.shape[1]
        ctx.dtypes = rows.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        d_rows = d_bias = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                d_rows = (dy @ _rebuilt(ctx, [ctx.features], dy)).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                d_bias = dy.float().sum(dim=0).to(ctx.dtypes[1])
        return d_rows, d_bias, None, None, None, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        bias: Tensor | None,
        layer: DifferentiableLayer,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None,
        rotation: int,
        stride: list[int],
        dilation: list[int],
        padding: list[int],
    ) -> Tensor:
        return layer.infer(input, input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, bias, layer, weight, weight_scale, input_scale, rotation, stride, dilation, padding = inputs
        ctx.save_for_backward(weight, weight_scale, input_scale)
        ctx.rotation, ctx.features = rotation, [input.shape[1], *layer.kernel_size]
        ctx.shape, ctx.sizes, ctx.padding = tuple(input.shape), (stride, dilation), padding
        ctx.dtypes = input.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        d_input = d_bias = None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                padded = _padded_shape(ctx.shape, ctx.padding)
                stride, dilation = ctx.sizes
                to_input: Any = of_convolution.conv2d_input if dy.dim() == 4 else of_convolution.conv3d_input
                d_padded = to_input(padded, _rebuilt(ctx, ctx.features, dy), dy, stride, 0, dilation)
                d_input = F.pad(d_padded, [-extent for extent in ctx.padding]).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                d_bias = dy.float().sum(dim=[0, *range(2, dy.dim())]).to(ctx.dtypes[1])
        return d_input, d_bias, *[None] * 8


def _padded_shape(shape: tuple[int, ...], padding: list[int]) -> list[int]:
    """[B, C, *padded space]; padding as `F.pad` takes it: low and high of the last dimension first."""
    ends = zip(reversed(padding[0::2]), reversed(padding[1::2]), strict=True)
    return [*shape[:2], *(extent + low + high for extent, (low, high) in zip(shape[2:], ends, strict=True))]
