"""Quantized layers: ordinary modules with ordinary tensors, so that offload, peft, casting and safetensors just work.

State dict = checkpoint format:
    weight            int8 [N, K] or [N, C, (kt,) kh, kw], a frozen `nn.Parameter` (offloading moves parameters);
                      4-bit codes are uint8 [N, ceil(K / 2)], K the product of all but the first, two per byte
    weight_scale      float32 [N, 1, ...], buffer
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
from qvd_core.ops import (
    KITCHEN,
    WEIGHT_ONLY,
    gradient,
    integer_backend,
    kitchen,
    library,
    resolve_backend,
    semantics,
    weight_only_linear,
)
from qvd_core.packing import unpack_int4
from qvd_core.spec import QuantSpec

if TYPE_CHECKING:
    from qvd_core.plan import LayerPlan
    from qvd_core.shared_input import SharedInput

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

    shared_input: SharedInput | None = None  # with the layers that read the same input and code it alike

    def __init__(self, source: nn.Linear, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._allocate(spec, plan, source.weight.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] of any float dtype -> [..., N] of the same dtype."""
        rows = input.reshape(-1, self.in_features)
        watched = torch.is_grad_enabled() and gradient.wanted(input, self.bias)
        out = gradient.linear(self, input, rows) if watched else self.infer(input, rows)
        return out.view(*input.shape[:-1], self.out_features)

    def infer(self, input: Tensor, operand: Tensor) -> Tensor:
        """The product, without gradients: input [..., K], operand its rows [M, K] -> [M, N] of the same dtype."""
        backend = resolve_backend(self.spec.backend, input.device, operand.shape[0])
        if backend == WEIGHT_ONLY:
            return self._weight_only(operand)
        if backend == KITCHEN and self._is_plain():
            return kitchen.token_linear(operand, self.weight, self.weight_scale, self.bias, input.dtype)
        backend = integer_backend(backend, input.device) if backend == KITCHEN else backend
        return self._integer(input, operand, backend)

    def _integer(self, input: Tensor, rows: Tensor, backend: str) -> Tensor:
        # A module's attribute lookup takes longer than a row of a small layer's product.
        buffers: dict[str, Any] = self._buffers
        factors = (self.weight, buffers["weight_scale"], self.bias)
        static_step = None if buffers["activation_scale"] is None else self.static_step(rows.shape[0])
        transform = (buffers["input_shift"], buffers["input_scale"])
        how = (*transform, static_step, self.spec.activation_bits, self.plan.rotation)
        if self.shared_input is None or not self.shared_input.is_worth_it(input):
            return library.quantized_linear(rows, *how, *factors, input.dtype, backend)
        codes, step = self.shared_input.quantize(
            input, backend, lambda: library.quantize_activation(rows, *how, backend)
        )
        return library.int8_linear(codes, step, *factors, None, None, input.dtype, backend)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A file of adapters holds none of these, and leaves the group as it is.
        if any(prefix + name in state_dict for name in (*self._parameters, *self._buffers)):
            self.shared_input = None  # the others of its group may be loaded with something else
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _is_plain(self) -> bool:
        transformed = self.input_shift is not None or self.input_scale is not None or self.plan.rotation
        eight_bits = self.weight_bits > 4 and self.spec.activation_bits == 8
        return eight_bits and not transformed and self.activation_scale is None

    def _weight_only(self, rows: Tensor) -> Tensor:
        transformed = semantics.transform(rows, self.input_shift, self.input_scale, self.plan.rotation)
        return weight_only_linear(transformed, self.weight, self.weight_scale, self.bias, rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {_describe(self)}"


class QuantConvolution(QuantizedLayer):
    """What the int8 convolutions share: SCRI per input channel; dynamic steps are per image (per clip in 3-D).

    The input is zero-padded before it is shifted: the border holds the code of zero, and the bias fold is exact there.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    _reversed_padding_repeated_twice: list[int]

    def __init__(self, source: nn.Conv2d | nn.Conv3d, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype):
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
        """input [B, C, (T,) H, W] of any float dtype -> [B, N, (T',) H', W'] of the same dtype."""
        watched = torch.is_grad_enabled() and gradient.wanted(input, self.bias)
        return gradient.convolution(self, input) if watched else self.infer(input, input)

    def infer(self, input: Tensor, operand: Tensor) -> Tensor:
        """The convolution, without gradients; both arguments are the input."""
        backend = resolve_backend(self.spec.backend, input.device)
        if backend == WEIGHT_ONLY:
            return self._weight_only(input)
        backend = integer_backend(backend, input.device) if backend == KITCHEN else backend
        shift, scale, step = self.input_shift, self.input_scale, self.static_step(input.shape[0])
        bits, rotation = self.spec.activation_bits, self.plan.rotation
        padding = list(self._reversed_padding_repeated_twice)
        codes, step = library.quantize_image(input, shift, scale, step, bits, rotation, padding, backend)
        factors = (self.weight, self.weight_scale, self.bias)
        sizes = (list(self.kernel_size), list(self.stride), list(self.dilation))
        return library.int8_conv(codes, step, *factors, *sizes, input.dtype, backend)

    def _weight_only(self, input: Tensor) -> Tensor:
        padded = F.pad(input, self._reversed_padding_repeated_twice).movedim(1, -1)
        transformed = semantics.transform(padded, self.input_shift, self.input_scale, self.plan.rotation)
        weight, bias = self.dequantized_weight().to(input.dtype), self.bias
        convolve = F.conv2d if input.dim() == 4 else F.conv3d
        return convolve(
            transformed.movedim(-1, 1).to(input.dtype),
            weight,
            None if bias is None else bias.to(input.dtype),
            stride=self.stride,
            dilation=self.dilation,
        )

    def extra_repr(self) -> str:
        size, stride = self.kernel_size, self.stride
        return f"{self.in_channels}, {self.out_channels}, kernel_size={size}, stride={stride}, {_describe(self)}"


class QuantConv2d(QuantConvolution, nn.Conv2d):
    """int8 2-D convolution."""


class QuantConv3d(QuantConvolution, nn.Conv3d):
    """int8 3-D convolution: of a video's frames, or over time alone."""


def _describe(layer: QuantizedLayer) -> str:
    activation = "token"
    if layer.activation_scale is not None:
        activation = {"layer": "static", "timestep": "static by timestep"}.get(layer.plan.steps_by, "static by frame")
    parts = {"shift": layer.input_shift is not None, "scale": layer.input_scale is not None}
    parts["rotation"] = layer.plan.rotation > 0
    transform = "+".join(name for name, present in parts.items() if present) or "plain"
    bits = f"W{layer.weight_bits}A{layer.spec.activation_bits}"
    return f"{bits} {activation}, {transform}, bias={layer.bias is not None}"
