"""Quantized layers: ordinary modules with ordinary tensors, so that offload, peft, casting and safetensors just work.

State dict = checkpoint format:
    weight            int8 [N, K] or [N, C, kh, kw], a frozen `nn.Parameter` (offloading moves parameters);
                      4-bit codes are uint8 [N, ceil(K / 2)] or [N, ceil(C kh kw / 2)], two per byte
    weight_scale      float32 [N, 1(, 1, 1)], buffer
    bias              [N], float parameter (where there is one)
    input_shift, input_scale   float32 [K], buffers, SCRI (where calibrated)
    activation_scale  float32 [1], buffer (static activations only); [G] per range of timesteps, [F] per video frame
    bucket_boundaries float32 [G - 1], buffer: timesteps between the G ranges
The float32 buffers stay float32 through `module.to(dtype)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.clock import SamplingClock
from qvd_core.ops import int8_conv2d, int8_linear, quantize_activation, semantics
from qvd_core.packing import unpack_int4
from qvd_core.spec import QuantSpec

if TYPE_CHECKING:
    from qvd_core.plan import LayerPlan

FLOAT32_BUFFERS = (
    "weight_scale",
    "input_shift",
    "input_scale",
    "activation_scale",
    "bucket_boundaries",
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
    bucket_boundaries: Tensor | None
    clock: SamplingClock | None = None  # shared by the model's layers; only scales that change while sampling need it
    spec: QuantSpec
    plan: LayerPlan
    weight_bits: int
    compute_dtype: torch.dtype

    def _allocate(self, spec: QuantSpec, plan: LayerPlan, weight_shape: torch.Size, dtype: torch.dtype) -> None:
        """Empty tensors on the meta device, as the plan says; loading fills them."""
        self.spec, self.plan = spec, plan
        self.compute_dtype = dtype
        self.weight_bits = plan.weight_bits(spec)
        self.weight_shape = weight_shape
        meta = torch.device("meta")
        outputs, inputs = weight_shape[0], weight_shape[1]
        codes = torch.empty(weight_shape, dtype=torch.int8, device=meta)
        if self.weight_bits == 4:
            codes = torch.empty(outputs, -(-weight_shape[1:].numel() // 2), dtype=torch.uint8, device=meta)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self._buffer("weight_scale", (outputs, *[1] * (len(weight_shape) - 1)))
        bias = torch.empty(outputs, dtype=dtype, device=meta)
        self.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if "bias" in plan.tensors else None)
        self._buffer("input_shift", (inputs,) if "input_shift" in plan.tensors else None)
        self._buffer("input_scale", (inputs,) if "input_scale" in plan.tensors else None)
        self._buffer("activation_scale", (plan.steps,) if "activation_scale" in plan.tensors else None)
        self._buffer("bucket_boundaries", (plan.steps - 1,) if plan.steps_by == "timestep" else None)

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

    def weight_codes(self) -> Tensor:
        """int8 codes in the weight's shape; 4-bit ones are unpacked."""
        return unpack_int4(self.weight, self.weight_shape) if self.weight_bits == 4 else self.weight

    def dequantized_weight(self) -> Tensor:
        """float32 weight that acts on the layer's transformed input."""
        return self.weight_codes().float() * self.weight_scale

    def static_step(self, rows: int) -> Tensor | None:
        """The calibrated step for an input of `rows` rows (images): [1], one per row [rows, 1], or None: dynamic."""
        steps = self.activation_scale
        if steps is None or self.plan.steps_by == "layer":
            return steps
        if self.clock is None:  # taken out of its model
            return steps.amax().view(1)
        if self.bucket_boundaries is not None:
            return self.clock.bucket_step(steps, self.bucket_boundaries)
        return self.clock.frame_step(steps, rows, self.plan.steps_by)


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
            rows,
            self.input_shift,
            self.input_scale,
            self.static_step(len(rows)),
            self.spec.activation_bits,
            self.plan.rotation,
        )
        weight = self.weight_codes()
        out = int8_linear(codes, step, weight, self.weight_scale, self.bias, input.dtype, self.spec.backend)
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
            self.weight_codes(),
            self.weight_scale,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            input.dtype,
            self.spec.backend,
        )

    def _quantize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, P, C] -> codes int8 [B, P, C] and the step [B, 1, 1, 1] or [1]."""
        bits, rotation = self.spec.activation_bits, self.plan.rotation
        step = self.static_step(len(pixels))
        if step is not None:
            step = step.unsqueeze(-1) if step.dim() == 2 else step
            codes, step = quantize_activation(pixels, self.input_shift, self.input_scale, step, bits, rotation)
            return codes, step.unsqueeze(-1) if step.dim() == 3 else step
        transformed = semantics.transform(pixels, self.input_shift, self.input_scale, rotation)
        step = semantics.token_step(transformed, bits, dims=(-2, -1))
        return semantics.encode(transformed, step, bits), step.unsqueeze(-1)

    def extra_repr(self) -> str:
        size, stride = self.kernel_size, self.stride
        return f"{self.in_channels}, {self.out_channels}, kernel_size={size}, stride={stride}, {_describe(self)}"


def _describe(layer: QuantizedLayer) -> str:
    activation = "token"
    if layer.activation_scale is not None:
        activation = {"layer": "static", "timestep": "static by timestep"}.get(layer.plan.steps_by, "static by frame")
    parts = {"shift": layer.input_shift is not None, "scale": layer.input_scale is not None}
    parts["rotation"] = layer.plan.rotation > 0
    transform = "+".join(name for name, present in parts.items() if present) or "plain"
    bits = f"W{layer.weight_bits}A{layer.spec.activation_bits}"
    return f"{bits} {activation}, {transform}, bias={layer.bias is not None}"
