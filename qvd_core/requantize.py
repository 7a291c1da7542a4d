"""Give a quantized layer another float function, in place: what merging an adapter into it asks for.

The input transform and the activation steps stay as they were calibrated; the weight, its scale and the bias change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvd_core.checks import cast_finite
from qvd_core.convert import dequantize_layer, plain_twin
from qvd_core.errors import QVDError
from qvd_core.layers import QuantizedLayer
from qvd_core.packing import pack_int4
from qvd_core.temporal_layer import TemporalLinear
from qvd_core.weights import fold_transform


def skeleton(layer: QuantizedLayer, bias: bool | None = None) -> nn.Module:
    """A float layer of the same class, shapes, dtype and device, for code that only looks at these; it has no values.

    All elements of its weight and of its bias share one place in memory. bias: whether it has one; default: as `layer`.
    """
    with torch.device("meta"):
        twin = plain_twin(layer, layer.bias is not None if bias is None else bias)
    for name, parameter in list(twin.named_parameters()):
        value = torch.zeros(1, dtype=layer.compute_dtype, device=layer.weight.device).expand(parameter.shape)
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    return twin


def float_layer(layer: QuantizedLayer) -> nn.Module:
    """The float32 layer of the same function up to the rounding of its input: what is to be changed.

    Raises QVDError when the layer's weight is not at hand.
    """
    if layer.weight.is_meta:
        raise QVDError(
            "an int8 weight is on the meta device, where offloading keeps it between uses: merge adapters first, "
            "then enable offloading."
        )
    return dequantize_layer(layer, torch.float32)


@torch.no_grad()
def requantize(layer: QuantizedLayer, changed: nn.Module) -> dict[str, Tensor]:
    """Quantize the float layer `changed` (weight [N, K, ...] and bias [N], on the original input) into `layer`. [O]

    y = x~ @ W~q^T + bias^ as `weights.fold_transform` without a channel mean, under the layer's own shift, scale,
    rotation and bits. Returns CPU copies of the tensors it replaced, for `restore`.
    Raises QVDError when a value is not finite, or the bias leaves the range of its dtype; then nothing is changed.
    """
    weight, bias = changed.weight, changed.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    if not all(tensor is None or tensor.isfinite().all() for tensor in (weight, bias)):
        raise QVDError(
            "the merged weight or bias of an int8 layer holds NaN or infinity: the adapter is damaged, "
            "or the layer is offloaded to disk, where adapters cannot be merged."
        )
    shift = weight.new_zeros(weight.shape[1]) if layer.input_shift is None else layer.input_shift
    scale = weight.new_ones(weight.shape[1]) if layer.input_scale is None else layer.input_scale
    quantized, folded = fold_transform(
        weight, bias, shift, scale, mean=None, bits=layer.weight_bits, rotation=layer.plan.rotation
    )
    codes = pack_int4(quantized.codes) if layer.weight_bits == 4 else quantized.codes
    tensors = {"weight": codes, "weight_scale": quantized.scale}
    if layer.bias is not None:
        tensors["bias"] = cast_finite("bias", folded, layer.bias.dtype)
    before = {name: getattr(layer, name).detach().to("cpu", copy=True) for name in tensors}
    restore(layer, tensors)
    return before


@torch.no_grad()
def restore(layer: QuantizedLayer, tensors: dict[str, Tensor]) -> None:
    """Put tensors that `requantize` replaced back, bit for bit."""
    for name, value in tensors.items():
        getattr(layer, name).copy_(value)  # in place: offloading hooks and compiled graphs hold these very tensors
    if isinstance(layer, TemporalLinear):
        layer.forget()
