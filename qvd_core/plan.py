"""The plan: which layers of a model are quantized, as what, and which tensors they will hold.

A plan needs only the model's skeleton (meta tensors do), so it can be made before any weight is read, and it is
all a loader needs to rebuild the skeleton of a saved model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from qvd_core.errors import QVDError
from qvd_core.families import Family, family_or_generic
from qvd_core.families.patterns import has_parts
from qvd_core.layer_kinds import LayerKind, layer_kind
from qvd_core.scales import MOST_STEPS, LayerScales, Scales
from qvd_core.sensitivity import most_sensitive
from qvd_core.spec import QuantSpec
from qvd_core.steps import fewer_buckets

logger = logging.getLogger(__name__)

OptionalTensor = Literal["bias", "input_shift", "input_scale", "activation_scale", "codebook"]
StepsBy = Literal["layer", "timestep", "major", "minor"]

TEMPORAL_WEIGHT_BITS = 8  # a temporal weight is read once per timestep: fewer bits would save no time


@dataclass(frozen=True)
class LayerPlan:
    """One quantized layer: its kind, and the tensors it holds beside `weight` and `weight_scale`.

    steps, steps_by: how many activation scales a static layer has, and what tells them apart: one for the "layer",
        one per range of "timestep", or one per video frame, whose rows run frame by frame ("major") or through all
        frames first ("minor").
    rotation: channels per Hadamard block of the input, 0 for none.
    """

    kind: LayerKind
    tensors: tuple[OptionalTensor, ...] = ()
    steps: int = 1
    steps_by: StepsBy = "layer"
    rotation: int = 0

    def weight_bits(self, spec: QuantSpec) -> int:
        """Bits of this layer's weight codes under `spec`."""
        return TEMPORAL_WEIGHT_BITS if self.kind == "temporal" else spec.weight_bits


def quantizable_layers(model: nn.Module, family: Family, spec: QuantSpec) -> dict[str, nn.Module]:
    """Every linear and convolution of `model` that `family` and `spec` let go to int8, by name, in model order."""
    candidates = {name: module for name, module in model.named_modules() if layer_kind(module) is not None}
    generic = not family.classes
    outermost = set(list(candidates)[:1] + list(candidates)[-1:]) if generic and len(candidates) > 2 else set()
    return {
        name: module
        for name, module in candidates.items()
        if name  # a bare layer has no parent to be replaced in
        and name not in outermost
        and _is_plain(module)
        and not family.keeps(name)
        and not has_parts(name, spec.modules_to_not_convert)
        and min(_features(module)) >= family.minimum_features
    }


def plan_layers(model: nn.Module, spec: QuantSpec, scales: Scales | None = None) -> dict[str, LayerPlan]:
    """Plan the quantization of a float model (its tensors may be on the meta device).

    Raises QVDError when the model is no video denoiser, is quantized already, has nothing to quantize,
    when `scales` belong to another model, or when `spec` needs scales and there are none.
    """
    refuse_quantized(model)
    refuse_altered(model)
    family = family_or_generic(model)
    layers = quantizable_layers(model, family, spec)
    if not layers:
        raise QVDError(f"{type(model).__name__} has no layer that QVD can quantize: nothing was changed.")
    if scales is None:
        _check_data_free(spec)
    if scales is not None:
        scales.check_structure(model, layers)
        layers = _without_sensitive(layers, spec, scales)
        _check_temporal_bits(spec, scales)
        if spec.rounding == "gptq" and not scales.rows:
            raise QVDError(
                'these scales hold no samples of layer inputs, which rounding="gptq" needs: calibrate with '
                'config=QVDConfig(rounding="gptq"), or leave the setting at its default.'
            )
        _warn_of_uncalibrated(layers, family, scales)
    _warn_of_misspelt(model, spec)
    plan: dict[str, LayerPlan] = {}
    for name, module in layers.items():
        if family.is_temporal(name):
            fitted = spec.temporal != "none" and (bool(family.temporal_features) or _has_codebook(scales, name))
            plan[name] = LayerPlan("temporal", _present(bias=module.bias is not None, codebook=fitted))
        else:
            plan[name] = _plan_gemm(name, module, layer_spec(family, name, spec), scales)
    return plan


def _without_sensitive(layers: dict[str, nn.Module], spec: QuantSpec, scales: Scales) -> dict[str, nn.Module]:
    """The layers that are not to be kept in full precision for their measured effect on the output."""
    if spec.auto_keep is None:
        return layers
    sizes = {name: module.weight.numel() for name, module in layers.items()}  # type: ignore[operator]
    kept = most_sensitive(scales.report, sizes, spec.auto_keep)
    if not kept:
        logger.warning(
            "auto_keep=%g keeps no layer: the sensitive ones are larger, or none is that sensitive.", spec.auto_keep
        )
    logger.info("auto_keep=%g keeps %d of %d layers: %s", spec.auto_keep, len(kept), len(layers), ", ".join(kept))
    if len(kept) == len(layers):
        raise QVDError(f"auto_keep={spec.auto_keep:g} would keep every layer: nothing is left to quantize, lower it.")
    return {name: module for name, module in layers.items() if name not in kept}


def layer_spec(family: Family, name: str, spec: QuantSpec) -> QuantSpec:
    """The settings one layer is quantized with: layers that read the prompt are dynamic whatever the model is."""
    return replace(spec, activation="token") if family.reads_prompt(name) else spec


def _warn_of_uncalibrated(layers: Mapping[str, nn.Module], family: Family, scales: Scales) -> None:
    without = [name for name in layers if not family.is_temporal(name) and name not in scales.layers]
    if without:
        logger.warning(
            "%d of %d layers have no calibrated scales and are quantized without data (the first is %s): calibration "
            "never reached them.",
            len(without),
            len(layers),
            without[0],
        )


def _warn_of_misspelt(model: nn.Module, spec: QuantSpec) -> None:
    names = [name for name, _ in model.named_modules()]
    for parts in spec.modules_to_not_convert:
        if not any(has_parts(name, (parts,)) for name in names):
            logger.warning("modules_to_not_convert names %r, but %s has no such layer.", parts, type(model).__name__)


def _check_temporal_bits(spec: QuantSpec, scales: Scales) -> None:
    for quantizer in scales.temporal.values():
        if spec.temporal != "none" and quantizer.bits != spec.activation_bits:
            raise QVDError(
                f"these scales hold {quantizer.bits}-bit temporal codebooks, not the {spec.activation_bits}-bit ones "
                "that activation_bits asks for: calibrate with the same number of bits."
            )


def _check_data_free(spec: QuantSpec) -> None:
    needs = {
        f'activation="{spec.activation}"': spec.is_static,
        'rounding="gptq"': spec.rounding == "gptq",
        f"auto_keep={spec.auto_keep}": spec.auto_keep is not None,
    }
    missing = [setting for setting, needed in needs.items() if needed]
    if missing:
        raise QVDError(f"{missing[0]} needs calibrated scales: pass scales=, or leave the setting at its default.")


def _plan_gemm(name: str, module: nn.Module, spec: QuantSpec, scales: Scales | None) -> LayerPlan:
    calibrated = scales.layers.get(name) if scales is not None else None
    if spec.is_static and calibrated is None:
        raise QVDError(
            f"the scales hold nothing for layer {name}, which never ran during calibration: "
            'calibrate with inputs that reach it, keep it with modules_to_not_convert, or use activation="token".'
        )
    shifted = scaled = False
    rotation = 0
    if calibrated is not None and not spec.portable:
        has_shift, has_scale = bool((calibrated.input_shift != 0).any()), bool((calibrated.input_scale != 1).any())
        shifted, scaled = spec.shift and has_shift, spec.scale != "none" and has_scale
        # Steps behind a rotation are known for the whole transform that was searched, not for a part of it.
        whole = (shifted, scaled) == (has_shift, has_scale)
        rotation = calibrated.rotation if spec.rotate and whole else 0
    # A portable layer's shift is in its producer; its W z still needs a bias of its own.
    folds_into_bias = calibrated is not None and (spec.bias_correction or shifted or scaled or spec.portable)
    steps, steps_by = _plan_steps(name, spec, calibrated)
    kind = layer_kind(module)
    assert kind is not None
    return LayerPlan(
        kind,
        _present(
            bias=module.bias is not None or folds_into_bias,
            input_shift=shifted,
            input_scale=scaled,
            activation_scale=spec.is_static,
        ),
        steps,
        steps_by,
        rotation,
    )


def _plan_steps(name: str, spec: QuantSpec, calibrated: LayerScales | None) -> tuple[int, StepsBy]:
    """How many static scales a layer gets, and what tells them apart; one where it has no more to offer."""
    if calibrated is None or spec.activation not in ("static_bucket", "static_frame"):
        return 1, "layer"
    if spec.activation == "static_bucket":
        if calibrated.bucket_steps is None:
            raise QVDError(
                f"the scales of layer {name} know nothing of timesteps: they come from an older QVD, calibrate again."
            )
        assert calibrated.bucket_boundaries is not None
        count = len(fewer_buckets(calibrated.bucket_steps, calibrated.bucket_boundaries, spec.buckets)[0])
        return (count, "timestep") if count > 1 else (1, "layer")
    if calibrated.frame_steps is None or len(calibrated.frame_steps) < 2:
        return 1, "layer"
    return len(calibrated.frame_steps), calibrated.frame_order  # type: ignore[return-value]


def refuse_altered(model: nn.Module) -> None:
    """Raise QVDError when the model's layers are no longer those of its class.

    An adapter puts its own layers around them; fused q, k and v leave the layers beside the fused one as dead weight.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise QVDError(
                f"{name} of this {type(model).__name__} holds an adapter (LoRA): unload it, or fuse it and then unload "
                "it, before calibrating or quantizing; adapters can be loaded on the quantized model."
            )
        if getattr(module, "fused_projections", False):
            raise QVDError(
                f"{name} of this {type(model).__name__} has fused projections: call unfuse_qkv_projections() (or "
                "unfuse_projections() on each attention) before calibrating or quantizing it."
            )


def refuse_quantized(model: nn.Module) -> None:
    """Raise QVDError when `model` already holds quantized weights, QVD's own or another backend's."""
    method = getattr(model, "quantization_method", None)
    for name, parameter in model.named_parameters():
        # Backends mark their weights by an integer or 8-bit float dtype or by a tensor subclass.
        codes = not parameter.is_floating_point() or parameter.element_size() < 2
        if codes or type(parameter.data) is not torch.Tensor:
            backend = f" by {getattr(method, 'value', method)}" if method else ""
            raise QVDError(
                f"{type(model).__name__} is quantized already{backend} ({name} is {type(parameter.data).__name__} of "
                f"{parameter.dtype}): load it in full precision to calibrate or quantize it with QVD."
            )


def plan_to_dict(plan: Mapping[str, LayerPlan]) -> dict[str, list[str]]:
    """JSON form: layer name to [kind, tensor, ...], with "steps:8:timestep" and "rotation:64" where they apply."""
    return {name: plan_to_list(layer) for name, layer in plan.items()}


def plan_to_list(layer: LayerPlan) -> list[str]:
    """JSON form of one layer's plan."""
    steps = [f"steps:{layer.steps}:{layer.steps_by}"] if layer.steps_by != "layer" else []
    rotation = [f"rotation:{layer.rotation}"] if layer.rotation else []
    return [layer.kind, *layer.tensors, *steps, *rotation]


def plan_from_dict(values: Mapping[str, Any]) -> dict[str, LayerPlan]:
    """Inverse of `plan_to_dict`; raises QVDError on anything it does not know."""
    if not isinstance(values, Mapping):
        raise QVDError(f"the recorded plan is {values!r}, not a table of layers: damaged, or from a newer QVD.")
    return {name: _layer_from_list(name, entry) for name, entry in values.items()}


def _layer_from_list(name: str, entry: Any) -> LayerPlan:
    if not isinstance(entry, list) or not entry or entry[0] not in get_args(LayerKind):
        raise QVDError(f"the recorded plan of layer {name!r} is {entry!r}: damaged, or from a newer QVD.")
    tensors = tuple(item for item in entry[1:] if item in get_args(OptionalTensor))
    plan = LayerPlan(entry[0], cast("tuple[OptionalTensor, ...]", tensors))
    unknown = []
    for item in entry[1:]:
        match str(item).split(":"):
            case ["steps", count, by] if _is_count(count) and by in get_args(StepsBy)[1:]:
                plan = replace(plan, steps=int(count), steps_by=cast("StepsBy", by))
            case ["rotation", count] if _is_count(count) and int(count).bit_count() == 1:
                plan = replace(plan, rotation=int(count))
            case _ if item not in tensors:
                unknown.append(item)
    if unknown:
        raise QVDError(f"layer {name!r} is said to hold {unknown}: damaged, or from a newer QVD.")
    return plan


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and 1 < int(text) <= MOST_STEPS


def _present(**tensors: bool) -> tuple[OptionalTensor, ...]:
    return cast("tuple[OptionalTensor, ...]", tuple(name for name, present in tensors.items() if present))


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _is_plain(module: nn.Module) -> bool:
    """Grouped, circular or reflecting convolutions are left alone."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return True


def _has_codebook(scales: Scales | None, name: str) -> bool:
    return scales is not None and name in scales.temporal
