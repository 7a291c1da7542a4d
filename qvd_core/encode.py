"""Encoding: the quantized tensors of every layer, one layer at a time, in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvd_core.checks import check_finite
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic
from qvd_core.folds import TensorEdit, foldable_transforms, producer_edits
from qvd_core.ops import semantics
from qvd_core.packing import pack_int4
from qvd_core.plan import LayerPlan, plan_layers
from qvd_core.scales import LayerScales, Scales
from qvd_core.spec import QuantSpec
from qvd_core.steps import fewer_buckets, reach
from qvd_core.temporal_layer import codebook_tensors
from qvd_core.transform import Transform
from qvd_core.weights import QuantizedWeight, fold_transform, quantize_weight, sum_over_inputs


@dataclass(frozen=True)
class Encoding:
    """How one model is quantized: everything that has to be known before its weights are read.

    plan, spec, scales: what each layer becomes, and from which scales.
    edits: float tensors, by name, that take over the shift and scale of the layers behind them (spec.portable).
    folded: the transform that the input of such a layer then already has had.
    """

    plan: Mapping[str, LayerPlan]
    spec: QuantSpec
    scales: Scales | None = None
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    folded: Mapping[str, Transform] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, spec: QuantSpec, scales: Scales | None) -> Encoding:
        """Plan a float model, whose tensors may be on the meta device. Raises QVDError as `plan_layers` does."""
        plan = plan_layers(model, spec, scales)
        if scales is None or not spec.portable:
            return cls(plan, spec, scales)
        family = family_or_generic(model)
        wanted = {
            name: _part(scales.layers[name], spec.shift, spec.scale != "none") for name in plan if name in scales.layers
        }
        folded = foldable_transforms(model, family, wanted)
        edits, _ = producer_edits(model, family, folded)
        return cls(plan, spec, scales, edits, folded)

    def without_codebook(self) -> list[str]:
        """Temporal layers whose codebook is to be fitted without data."""
        known = self.scales.temporal if self.scales is not None else {}
        return [name for name, layer in self.plan.items() if "codebook" in layer.tensors and name not in known]

    def check(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Raise QVDError when a layer's tensors hold NaN, do not belong to the scales, or do not bear the fold."""
        check_layer(name, weight, bias, self.scales)
        self._check_fold(name, weight, bias)

    def _check_fold(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        if self.scales is None or "input_shift" not in self.plan[name].tensors or weight.dtype != torch.float16:
            return
        check_finite(f"{name}.weight", weight)
        folded = sum_over_inputs(weight, self.scales.layers[name].input_shift.to(weight.device))
        if bias is not None:
            folded = folded + bias.double()
        if not folded.to(weight.dtype).isfinite().all():
            raise QVDError(
                f"folding the input shift of layer {name} into its bias leaves the range of {weight.dtype}: "
                "load the model in bfloat16 or float32, or use shift=False."
            )

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """A float tensor as the quantized model holds it. Raises QVDError when it leaves the range of its dtype."""
        return self.edits[name].apply(tensor) if name in self.edits else tensor

    def encode(self, name: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Every state-dict entry of layer `name`, from its float weight [N, K] / [N, C, kh, kw] and bias [N].

        Raises QVDError on NaN, or when the weight does not belong to the scales. The codebook of a temporal layer
        without scales is left out; `fit_temporal_layers` makes it once the whole model is there.
        """
        if self.scales is not None:
            self.check(name, weight, bias)
        elif bias is not None:
            check_finite(f"{name}.bias", bias)
        edited = self._edited(f"{name}.weight", weight)
        bias = None if bias is None else self._edited(f"{name}.bias", bias)
        encoded = encode_layer(name, self.plan[name], edited, bias, self.spec, self.scales, self.folded.get(name))
        if not encoded["weight_scale"].isfinite().all():  # spares looking for NaN in every weight
            check_finite(f"{name}.weight", weight)
        return encoded

    def _edited(self, name: str, tensor: Tensor) -> Tensor:
        return self.edits[name].apply(tensor, torch.float32) if name in self.edits else tensor


def check_layer(name: str, weight: Tensor, bias: Tensor | None, scales: Scales | None) -> None:
    """Raise QVDError when a layer's float tensors hold NaN or do not belong to `scales`."""
    # The extremes of a tensor with NaN are NaN; finding them takes a tenth of the time of looking at every element.
    if not (weight.numel() and weight.element_size() > 1 and bool((weight.amax() - weight.amin()).isfinite())):
        check_finite(f"{name}.weight", weight)
    if bias is not None:
        check_finite(f"{name}.bias", bias)
    if scales is not None:
        scales.check_weight(name, weight)


def encode_layer(
    name: str,
    plan: LayerPlan,
    weight: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    scales: Scales | None = None,
    folded: Transform | None = None,
) -> dict[str, Tensor]:
    """Every state-dict entry of a quantized layer. `folded`: the transform its input has had by a producer already."""
    calibrated = scales.layers.get(name) if scales is not None else None
    tensors: dict[str, Tensor] = {}
    if scales is not None and calibrated is not None and plan.kind != "temporal":
        carried = _part(calibrated, "input_shift" in plan.tensors, "input_scale" in plan.tensors, plan.rotation)
        transform = (folded or carried).to(weight.device)
        rows = scales.rows.get(calibrated.rows_of) if spec.compensates_rounding else None
        mean = calibrated.input_mean.to(weight.device) if spec.bias_correction else None
        quantized, tensors = _fold(weight, bias, transform, mean, rows, plan, spec)
        if "activation_scale" in plan.tensors:
            tensors.update(_steps(calibrated, transform.to("cpu"), plan, scales.spec, spec))
    else:
        quantized = quantize_weight(weight, plan.weight_bits(spec))
        if bias is not None:
            tensors["bias"] = bias
    if "codebook" in plan.tensors and scales is not None and name in scales.temporal:
        tensors.update(codebook_tensors(scales.temporal[name], weight.shape[1]))
    codes = pack_int4(quantized.codes) if plan.weight_bits(spec) == 4 else quantized.codes
    return {"weight": codes, "weight_scale": quantized.scale, **tensors}


def _part(calibrated: LayerScales, shift: bool, scale: bool, rotation: int = 0) -> Transform:
    """The calibrated transform with or without its shift and its scale."""
    identity = Transform.identity(len(calibrated.input_shift))
    return Transform(
        "calibrated",
        calibrated.input_shift if shift else identity.shift,
        calibrated.input_scale if scale else identity.scale,
        rotation,
    )


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    mean: Tensor | None,
    rows: Tensor | None,
    plan: LayerPlan,
    spec: QuantSpec,
) -> tuple[QuantizedWeight, dict[str, Tensor]]:
    """The quantized weight of a calibrated layer, and its bias, shift and scale."""
    if rows is not None:
        rows = transform.apply(rows.to(weight.device).float(), rows.shape[1] // weight.shape[1])
    quantized, corrected = fold_transform(
        weight, bias, transform.shift, transform.scale, mean, spec.weight_bits, rows, transform.rotation
    )
    # Clones: q, k and v share one transform, and a file wants every tensor to own its memory.
    own = {"bias": corrected, "input_shift": transform.shift.clone(), "input_scale": transform.scale.clone()}
    return quantized, {key: tensor for key, tensor in own.items() if key in plan.tensors}


def _steps(
    calibrated: LayerScales, transform: Transform, plan: LayerPlan, searched: QuantSpec, spec: QuantSpec
) -> dict[str, Tensor]:
    """The activation scales of a static layer, and what lies between them.

    The stored steps belong to the stored transform and to the bits of the search; for others, the ranges say how much
    wider the steps must be.
    """
    stored = Transform("stored", calibrated.input_shift, calibrated.input_scale, calibrated.rotation)
    limits = [semantics.code_limit(bits) for bits in (searched.activation_bits, spec.activation_bits)]
    if calibrated.static_step is not None and transform.same(stored):
        steps = calibrated.static_step * (limits[0] / limits[1])
    else:
        steps = reach(calibrated.input_min, calibrated.input_max, transform).reshape(1) / limits[1]
    tensors: dict[str, Tensor] = {}
    if plan.steps_by != "layer":
        several = calibrated.frame_steps
        if plan.steps_by == "timestep":
            assert calibrated.bucket_steps is not None and calibrated.bucket_boundaries is not None
            several, between = fewer_buckets(calibrated.bucket_steps, calibrated.bucket_boundaries, spec.buckets)
            tensors["bucket_boundaries"] = between.clone()
        assert several is not None and calibrated.static_step is not None
        steps = steps * (several / calibrated.static_step)
    return {"activation_scale": steps.clamp(min=semantics.MINIMUM_STEP), **tensors}
