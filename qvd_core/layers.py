"""Quantized layers: ordinary modules with ordinary tensors, so that offload, peft, casting and safetensors just work.

State dict = checkpoint format:
    weight            int8 [N, K] or [N, C, kh, kw], a frozen `nn.Parameter` (offloading moves parameters)
    weight_scale      float32 [N, 1(, 1, 1)], buffer
    bias              [N], float parameter (where there is one)
    input_shift, input_scale   float32 [K], buffers, SCRI (where calibrated)
    activation_scale  float32 [1], buffer (static activations only)
The float32 buffers stay float32 through `module.to(dtype)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.ops import int8_conv2d, int8_linear, quantize_activation, semantics
from qvd_core.spec import QuantSpec

if TYPE_CHECKING:
    from qvd_core.plan import LayerPlan

FLOAT32_BUFFERS = (
    "weight_scale",
    "input_shift",
    "input_scale",
    "activation_scale",
    "levels",
    "boundaries",
    "offset",
    "gain",
)


class QuantizedLayer(nn.Module):
    """What all quantized layers share: an int8 weight with its scale, and float32 buffers that no cast touches."""

    weight: Tensor
    bias: Any  # Tensor | None; the float classes beside this base declare it differently
    weight_scale: Tensor
    input_shift: Tensor | None
    input_scale: Tensor | None
    activation_scale: Tensor | None
    spec: QuantSpec
    compute_dtype: torch.dtype

    def _allocate(self, spec: QuantSpec, plan: LayerPlan, weight_shape: torch.Size, dtype: torch.dtype) -> None:
        """Empty tensors on the meta device, as the plan says; loading fills them."""
        self.spec = spec
        self.compute_dtype = dtype
        meta = torch.device("meta")
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=torch.int8, device=meta), requires_grad=False)
        outputs, inputs = weight_shape[0], weight_shape[1]
        self._buffer("weight_scale", (outputs, *[1] * (len(weight_shape) - 1)))
        bias = torch.empty(outputs, dtype=dtype, device=meta)
        self.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if "bias" in plan.tensors else None)
        self._buffer("input_shift", (inputs,) if "input_shift" in plan.tensors else None)
        self._buffer("input_scale", (inputs,) if "input_scale" in plan.tensors else None)
        self._buffer("activation_scale", (1,) if "activation_scale" in plan.tensors else None)

    def _buffer(self, name: str, shape: tuple[int, ...] | None) -> None:
        self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=torch.float32, device="meta"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move like any module, but keep the float32 buffers float32 when `fn` casts."""
        kept = {name: tensor for name in FLOAT32_BUFFERS if (tensor := getattr(self, name, None)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A cast is meant for the layer's compute dtype too.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device="cpu")).dtype
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self

    def dequantized_weight(self) -> Tensor:
        """float32 weight that acts on the layer's transformed input."""
        return self.weight.float() * self.weight_scale


class QuantLinear(QuantizedLayer, nn.Linear):
    """int8 linear: y = int8((x - z) / s) @ int8(W)^T, dequantized, + bias. METHOD 3.8."""

    def __init__(self, source: nn.Linear, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._allocate(spec, plan, source.weight.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] of any float dtype -> [..., N] of the same dtype."""
        rows = input.reshape(-1, self.in_features)
        codes, step = quantize_activation(
            rows, self.input_shift, self.input_scale, self.activation_scale, self.spec.activation_bits
        )
        out = int8_linear(codes, step, self.weight, self.weight_scale, self.bias, input.dtype, self.spec.backend)
        return out.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {_describe(self)}"


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """int8 2-D convolution with SCRI per input channel; dynamic steps are per image.

    The input is zero-padded before it is shifted: the border holds the code of zero, and the bias fold is exact there.
    """

    def __init__(self, source: nn.Conv2d, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype):
        nn.Module.__init__(self)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "transposed",
            "output_padding",
            "groups",
            "padding_mode",
            "_reversed_padding_repeated_twice",
        ):
            setattr(self, name, getattr(source, name))
        self._allocate(spec, plan, source.weight.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W] of any float dtype -> [B, N, H', W'] of the same dtype."""
        padded = F.pad(input, self._reversed_padding_repeated_twice)
        pixels = padded.permute(0, 2, 3, 1).reshape(padded.shape[0], -1, self.in_channels)
        codes, step = self._quantize(pixels)
        images = codes.view(padded.shape[0], *padded.shape[2:], self.in_channels).permute(0, 3, 1, 2)
        return int8_conv2d(
            images,
            step,
            self.weight,
            self.weight_scale,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            input.dtype,
            self.spec.backend,
        )

    def _quantize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, P, C] -> codes int8 [B, P, C] and the step [B, 1, 1, 1] or [1]."""
        bits = self.spec.activation_bits
        if self.activation_scale is not None:
            return quantize_activation(pixels, self.input_shift, self.input_scale, self.activation_scale, bits)
        transformed = semantics.transform(pixels, self.input_shift, self.input_scale)
        step = semantics.token_step(transformed, bits, dims=(-2, -1))
        return semantics.encode(transformed, step, bits), step.unsqueeze(-1)

    def extra_repr(self) -> str:
        size, stride = self.kernel_size, self.stride
        return f"{self.in_channels}, {self.out_channels}, kernel_size={size}, stride={stride}, {_describe(self)}"


def _describe(layer: QuantizedLayer) -> str:
    activation = "token" if layer.activation_scale is None else "static"
    transform = "shift+scale" if layer.input_shift is not None else "plain"
    bits = f"W{layer.spec.weight_bits}A{layer.spec.activation_bits}"
    return f"{bits} {activation}, {transform}, bias={layer.bias is not None}"
