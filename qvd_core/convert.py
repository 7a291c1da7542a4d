"""Convert a model: float layers to quantized ones and back, in place, all checks first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qvd_core.checks import cast_finite
from qvd_core.clock import SamplingClock
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic, find_family
from qvd_core.joined import join_instead_of_fusing
from qvd_core.layers import QuantConv2d, QuantConv3d, QuantizedLayer, QuantLinear
from qvd_core.plan import LayerPlan
from qvd_core.rotation import hadamard
from qvd_core.scales import Scales
from qvd_core.shared_input import share_inputs
from qvd_core.spec import QuantSpec
from qvd_core.temporal import StackedWeights, TemporalQuantizer
from qvd_core.temporal_fit import count_outputs, fit_codebook, grid_features, stack_features
from qvd_core.temporal_layer import TemporalLinear, codebook_tensors
from qvd_core.weights import row_blocks

logger = logging.getLogger(__name__)

_LAYER_CLASSES: dict[str, type[QuantizedLayer]] = {
    "linear": QuantLinear,
    "conv2d": QuantConv2d,
    "conv3d": QuantConv3d,
    "temporal": TemporalLinear,
}
_FLOAT_CLASSES: dict[str, type[nn.Module]] = {"conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


@torch.no_grad()
def quantize_model(model: nn.Module, spec: QuantSpec | None = None, scales: Scales | None = None) -> nn.Module:
    """Quantize a float model in place and return it.

    Without `scales`: int8 weights, dynamic activations, HTDQ fitted on the model's own timestep embedding.
    With them: SCRI shift and scale, bias correction and calibrated HTDQ as `spec` says.
    Raises QVDError (wrong model, NaN, scales of another model, ...) before anything is changed.
    """
    spec = spec or (scales.spec if scales is not None else QuantSpec())
    encoding = Encoding.of(model, spec, scales)
    for name in encoding.plan:
        layer = model.get_submodule(name)
        encoding.check(name, layer.weight, layer.bias)  # type: ignore[arg-type]
    edited = [
        (tensor, encoding.edit(name, tensor))
        for name, tensor in model.named_parameters()
        if name in encoding.edits and name.rpartition(".")[0] not in encoding.plan
    ]
    uncalibrated = encoding.without_codebook()
    codebook = _fit_data_free(model, [model.get_submodule(name) for name in uncalibrated], spec)
    for name in encoding.plan:
        layer = quantized_layer(name, model.get_submodule(name), encoding)
        if codebook is not None and name in uncalibrated:
            assert isinstance(layer, TemporalLinear)
            tensors = codebook_tensors(codebook, layer.in_features)
            fill_layer(layer, {key: tensor.to(layer.weight.device) for key, tensor in tensors.items()})
        model.set_submodule(name, layer)
    for tensor, value in edited:
        tensor.data = value
    attach_clock(model)
    share_inputs(model)
    join_instead_of_fusing(model)
    return model


def quantized_layer(
    name: str, source: nn.Module, encoding: Encoding, tensors: tuple[Tensor, Tensor | None] | None = None
) -> QuantizedLayer:
    """The quantized version of one float layer, on the device of its weight.

    tensors: its weight and bias where the layer does not hold them itself.
    """
    weight, bias = (source.weight, source.bias) if tensors is None else tensors
    assert isinstance(weight, Tensor) and not isinstance(bias, nn.Module)
    encoded = encoding.encode(name, weight, bias)
    layer = make_layer(source, encoding.plan[name], encoding.spec, weight.dtype)
    fill_layer(layer, {key: tensor.to(weight.device) for key, tensor in encoded.items()})
    return layer


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
        if not isinstance(modules.get(name), _FLOAT_CLASSES.get(layer_plan.kind, nn.Linear)):
            raise QVDError(
                f"the quantized checkpoint has a {layer_plan.kind} layer {name}, this {type(model).__name__} has not: "
                "the checkpoint belongs to another model or another version of it."
            )
    for name, layer_plan in plan.items():
        _check_rotation(name, modules[name], layer_plan)
        model.set_submodule(name, make_layer(modules[name], layer_plan, spec, dtype))
    attach_clock(model)
    join_instead_of_fusing(model)
    return model


def _check_rotation(name: str, source: nn.Module, plan: LayerPlan) -> None:
    channels = getattr(source, "in_features", getattr(source, "in_channels", 0))
    if plan.rotation and channels % plan.rotation:
        raise QVDError(
            f"layer {name} is said to rotate blocks of {plan.rotation} of its {channels} channels: "
            "the quantized checkpoint is damaged."
        )


def attach_clock(model: nn.Module) -> None:
    """Tell the layers whose scales change while sampling what is being sampled, through one hook on the model."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.plan.steps_by != "layer"
    ]
    if not layers:
        return
    clock = SamplingClock(model, family_or_generic(model))
    clock.handle = model.register_forward_pre_hook(clock.read, with_kwargs=True)
    for layer in layers:
        layer.clock = clock


def fill_layer(layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Put real tensors into an empty layer; what is missing stays on meta. Dtypes are the layer's."""
    for key, tensor in tensors.items():
        own = getattr(layer, key)
        value = cast_finite(key, tensor.detach(), own.dtype)
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
    """One codebook for temporal projections, float or int8, of this model."""
    return fit_data_free(model, StackedWeights(count_outputs(projections), _float_weights(projections)), spec)


def fit_data_free(model: nn.Module, weights: StackedWeights, spec: QuantSpec) -> TemporalQuantizer | None:
    """One codebook for the temporal projections with these weights, from the model's own timestep embedding.

    None where there are no projections, or where the embedding also holds what only a run shows. Changes nothing.
    """
    family = find_family(model)
    features = grid_features(model, family) if weights.rows and family is not None else {}
    if not features:
        return None
    quantizer, report = fit_codebook(stack_features(features), weights, spec)
    logger.info("HTDQ (data-free): %s, TDScore kept %.4f", quantizer.name, report["tdr"])
    return quantizer


def _float_weights(layers: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Weights [N, K] of float layers, and those of quantized layers in float32, a bounded number of rows at a time."""
    for layer in layers:
        if isinstance(layer, QuantizedLayer):
            codes = layer.weight_codes()
            for rows in row_blocks(codes):
                yield codes[rows].float() * layer.weight_scale[rows]
        else:
            assert isinstance(layer.weight, Tensor)
            yield layer.weight.detach()


@torch.no_grad()
def dequantize_model(model: nn.Module) -> nn.Module:
    """Turn every quantized layer back into a float layer of the same function up to quantization, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLayer):
            if layer.clock is not None:
                layer.clock.detach()
            model.set_submodule(name, dequantize_layer(layer))
    return model


def dequantize_layer(layer: QuantizedLayer, dtype: torch.dtype | None = None) -> nn.Module:
    """The float layer W = dequantized W~ / scale, b = bias - W shift, in `dtype` or the layer's compute dtype."""
    weight = hadamard(layer.dequantized_weight(), layer.plan.rotation, dim=1)  # its own inverse
    bias = None if layer.bias is None else layer.bias.double()
    if layer.input_scale is not None:
        weight = weight / layer.input_scale.view(1, -1, *[1] * (weight.dim() - 2))
    if layer.input_shift is not None:
        assert bias is not None
        shift = layer.input_shift.double().view(1, -1, *[1] * (weight.dim() - 2))
        bias = bias - (weight.double() * shift).flatten(1).sum(dim=1)
    with torch.device("meta"):
        plain = plain_twin(layer, bias is not None)
    dtype = dtype or layer.compute_dtype
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    plain.train(layer.training)
    return plain


def plain_twin(layer: QuantizedLayer, bias: bool) -> nn.Linear | nn.Conv2d | nn.Conv3d:
    """A new float layer of the same class and sizes, on the default device."""
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        convolution = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv3d
        return convolution(
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
