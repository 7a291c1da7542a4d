"""Convert a model: float layers to quantized ones and back, in place, all checks first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qvd_core.calibrate import check_finite
from qvd_core.channels import Transform, static_step
from qvd_core.errors import QVDError
from qvd_core.families import find_family
from qvd_core.layers import QuantConv2d, QuantizedLayer, QuantLinear
from qvd_core.plan import LayerPlan, plan_layers
from qvd_core.scales import LayerScales, Scales
from qvd_core.spec import QuantSpec
from qvd_core.temporal import TemporalQuantizer
from qvd_core.temporal_fit import fit_codebook, grid_features, stack_features
from qvd_core.temporal_layer import TemporalLinear, codebook_tensors
from qvd_core.weights import fold_transform, quantize_weight

logger = logging.getLogger(__name__)

_LAYER_CLASSES: dict[str, type[QuantizedLayer]] = {
    "linear": QuantLinear,
    "conv2d": QuantConv2d,
    "temporal": TemporalLinear,
}


@torch.no_grad()
def quantize_model(model: nn.Module, spec: QuantSpec | None = None, scales: Scales | None = None) -> nn.Module:
    """Quantize a float model in place and return it.

    Without `scales`: int8 weights, dynamic activations, HTDQ fitted on the model's own timestep embedding.
    With them: SCRI shift and scale, bias correction and calibrated HTDQ as `spec` says.
    Raises QVDError (wrong model, NaN, scales of another model, ...) before anything is changed.
    """
    spec = spec or (scales.spec if scales is not None else QuantSpec())
    plan = plan_layers(model, spec, scales)
    for name in plan:
        layer = model.get_submodule(name)
        check_layer(name, layer.weight, layer.bias, scales)  # type: ignore[arg-type]
    uncalibrated = [name for name, layer_plan in plan.items() if _needs_codebook(name, layer_plan, scales)]
    codebook = _fit_data_free(model, [model.get_submodule(name) for name in uncalibrated], spec)
    for name, layer_plan in plan.items():
        source = model.get_submodule(name)
        weight, bias = source.weight, source.bias
        assert isinstance(weight, Tensor)
        tensors = encode_layer(name, layer_plan, weight, bias, spec, scales)  # type: ignore[arg-type]
        if codebook is not None and name in uncalibrated:
            tensors.update(codebook_tensors(codebook, weight.shape[1]))
        layer = make_layer(source, layer_plan, spec, weight.dtype)
        fill_layer(layer, {key: tensor.to(weight.device) for key, tensor in tensors.items()})
        model.set_submodule(name, layer)
    return model


def _needs_codebook(name: str, plan: LayerPlan, scales: Scales | None) -> bool:
    return "codebook" in plan.tensors and (scales is None or name not in scales.temporal)


def check_layer(name: str, weight: Tensor, bias: Tensor | None, scales: Scales | None) -> None:
    """Raise QVDError when a layer's float tensors hold NaN or do not belong to `scales`."""
    check_finite(f"{name}.weight", weight)
    if bias is not None:
        check_finite(f"{name}.bias", bias)
    if scales is not None:
        scales.check_weight(name, weight)


def encode_layer(
    name: str, plan: LayerPlan, weight: Tensor, bias: Tensor | None, spec: QuantSpec, scales: Scales | None = None
) -> dict[str, Tensor]:
    """Every state-dict entry of a quantized layer, from its float weight [N, K] / [N, C, kh, kw] and bias [N].

    Raises QVDError on NaN, or when the weight does not belong to `scales`. The codebook of a temporal layer without
    scales is left out; `fit_temporal_layers` makes it once the whole model is there.
    """
    check_layer(name, weight, bias, scales)
    weight = weight.float()
    calibrated = scales.layers.get(name) if scales is not None else None
    tensors: dict[str, Tensor] = {}
    if calibrated is not None and plan.kind != "temporal" and "bias" in plan.tensors:
        transform = _transform(calibrated, plan)
        shift, scale = transform.shift.to(weight.device), transform.scale.to(weight.device)
        mean = calibrated.input_mean.to(weight.device) if spec.bias_correction else None
        quantized, folded = fold_transform(weight, bias, shift, scale, mean, spec.weight_bits)
        tensors["bias"] = folded
        # Clones: q, k and v share one transform, and a file wants every tensor to own its memory.
        if "input_shift" in plan.tensors:
            tensors["input_shift"] = shift.clone()
        if "input_scale" in plan.tensors:
            tensors["input_scale"] = scale.clone()
    else:
        quantized = quantize_weight(weight, spec.weight_bits)
        if bias is not None:
            tensors["bias"] = bias
    if "activation_scale" in plan.tensors:
        assert calibrated is not None
        tensors["activation_scale"] = static_step(
            calibrated.input_min, calibrated.input_max, _transform(calibrated, plan), spec.activation_bits
        )
    if "codebook" in plan.tensors and scales is not None and name in scales.temporal:
        tensors.update(codebook_tensors(scales.temporal[name], weight.shape[1]))
    return {"weight": quantized.codes, "weight_scale": quantized.scale, **tensors}


def make_layer(source: nn.Module, plan: LayerPlan, spec: QuantSpec, dtype: torch.dtype) -> QuantizedLayer:
    """An empty quantized layer (meta tensors) in the place of a float one; `dtype` is that of its bias."""
    layer = _LAYER_CLASSES[plan.kind](source, plan, spec, dtype)
    layer.train(source.training)
    return layer


def install_layers(model: nn.Module, plan: Mapping[str, LayerPlan], spec: QuantSpec, dtype: torch.dtype) -> nn.Module:
    """Swap the planned float layers for empty quantized ones, in place, and return the model.

    Raises QVDError, before any change, when the plan names a layer the model does not have.
    """
    modules = dict(model.named_modules())
    for name, layer_plan in plan.items():
        wanted = nn.Conv2d if layer_plan.kind == "conv2d" else nn.Linear
        if not isinstance(modules.get(name), wanted):
            raise QVDError(
                f"the quantized checkpoint has a {layer_plan.kind} layer {name}, this {type(model).__name__} has not: "
                "the checkpoint belongs to another model or another version of it."
            )
    for name, layer_plan in plan.items():
        model.set_submodule(name, make_layer(modules[name], layer_plan, spec, dtype))
    return model


def fill_layer(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Put real tensors into an empty layer; what is missing stays on meta. Dtypes are the layer's."""
    for key, tensor in tensors.items():
        own = getattr(layer, key)
        value = tensor.detach().to(own.dtype)
        if isinstance(own, nn.Parameter):
            setattr(layer, key, nn.Parameter(value, requires_grad=False))
        else:
            setattr(layer, key, value)


@torch.no_grad()
def fit_temporal_layers(model: nn.Module, spec: QuantSpec) -> None:
    """Data-free HTDQ: fit the codebooks that no calibration has filled, from the model's own timestep embedding."""
    waiting = [
        module
        for module in model.modules()
        if isinstance(module, TemporalLinear) and module.levels is not None and module.levels.is_meta
    ]
    codebook = _fit_data_free(model, waiting, spec)
    if codebook is None:
        return
    for layer in waiting:
        tensors = codebook_tensors(codebook, layer.in_features)
        fill_layer(layer, {key: tensor.to(layer.weight.device) for key, tensor in tensors.items()})
        layer.forget()


def _fit_data_free(model: nn.Module, projections: Sequence[nn.Module], spec: QuantSpec) -> TemporalQuantizer | None:
    """One codebook for temporal projections, float or int8, from the model's timestep embedding; changes nothing."""
    family = find_family(model)
    features = grid_features(model, family) if projections and family is not None else {}
    if not features:
        return None
    quantizer, report = fit_codebook(stack_features(features), projections, spec)
    logger.info("HTDQ (data-free): %s, TDScore kept %.4f", quantizer.name, report["tdr"])
    return quantizer


@torch.no_grad()
def dequantize_model(model: nn.Module) -> nn.Module:
    """Turn every quantized layer back into a float layer of the same function up to quantization, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLayer):
            model.set_submodule(name, dequantize_layer(layer))
    return model


def dequantize_layer(layer: QuantizedLayer) -> nn.Module:
    """The float layer W = dequantized W~ / scale, b = bias - W shift, in the layer's compute dtype."""
    weight = layer.dequantized_weight()
    bias = None if layer.bias is None else layer.bias.double()
    if layer.input_scale is not None:
        weight = weight / layer.input_scale.view(1, -1, *[1] * (weight.dim() - 2))
    if layer.input_shift is not None:
        assert bias is not None
        shift = layer.input_shift.double().view(1, -1, *[1] * (weight.dim() - 2))
        bias = bias - (weight.double() * shift).flatten(1).sum(dim=1)
    with torch.device("meta"):
        plain = _plain_twin(layer, bias is not None)
    dtype = layer.compute_dtype
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    plain.train(layer.training)
    return plain


def _plain_twin(layer: QuantizedLayer, bias: bool) -> nn.Linear | nn.Conv2d:
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=bias,
        )
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features, bias=bias)


def _transform(calibrated: LayerScales, plan: LayerPlan) -> Transform:
    """As much of the calibrated transform as the plan carries."""
    identity = Transform.identity(len(calibrated.input_shift))
    shift = calibrated.input_shift if "input_shift" in plan.tensors else identity.shift
    scale = calibrated.input_scale if "input_scale" in plan.tensors else identity.scale
    return Transform("calibrated", shift, scale)
