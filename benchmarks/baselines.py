"""Baselines that QVD's own search does not know, as edits of calibrated scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvd_core.families import family_or_generic
from qvd_core.ops.semantics import MINIMUM_STEP, code_limit
from qvd_core.scales import LayerScales, Scales

ALPHA = 0.5  # how much of the difficulty moves from the activations to the weights; SmoothQuant's own default
_SMALLEST = 1e-5  # of a range, as in SmoothQuant


def smooth_scale(input_reach: Tensor, weights: Sequence[Tensor], alpha: float = ALPHA) -> Tensor:
    """SmoothQuant's s_c = max|x_c|^alpha / max|W_c|^(1 - alpha), the maximum over all layers that read the input.

    input_reach: max|x_c|, float32 [K]. weights: [N, K] or [N, K, kh, kw] each. Returns float32 [K]; x is quantized as
    x / s.
    """
    reaches = [weight.detach().float().abs().transpose(0, 1).flatten(1).amax(dim=1) for weight in weights]
    weight_reach = torch.stack(reaches).amax(dim=0).clamp(min=_SMALLEST)
    return input_reach.clamp(min=_SMALLEST) ** alpha / weight_reach ** (1.0 - alpha)


def smoothquant(scales: Scales, model: nn.Module) -> Scales:
    """`scales`, found without shift and scale, with SmoothQuant's scale in every layer and the steps that go with it.

    model: the full-precision model. Steps per range of timesteps and per frame are dropped: they would be wrong.
    """
    family = family_or_generic(model)
    groups: dict[str, list[str]] = {}
    for name in scales.layers:
        groups.setdefault(family.input_group(name), []).append(name)
    layers: dict[str, LayerScales] = {}
    for names in groups.values():
        weights = [_weight(model, name) for name in names]
        for name in names:
            layers[name] = _rescaled(scales.layers[name], weights, scales.spec.activation_bits)
    report = {name: figures for name, figures in scales.report.items() if name in scales.temporal}
    return replace(scales, spec=replace(scales.spec, scale="smooth"), layers=layers, report=report)


def _rescaled(layer: LayerScales, weights: Sequence[Tensor], bits: int) -> LayerScales:
    reach = torch.maximum(layer.input_min.abs(), layer.input_max.abs())
    scale = smooth_scale(reach, [weight.cpu() for weight in weights])
    step = ((reach / scale).max() / code_limit(bits)).clamp(min=MINIMUM_STEP).reshape(1)
    return replace(
        layer,
        input_shift=torch.zeros_like(layer.input_shift),
        input_scale=scale,
        static_step=step,
        bucket_steps=None,
        bucket_boundaries=None,
        frame_steps=None,
    )


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
