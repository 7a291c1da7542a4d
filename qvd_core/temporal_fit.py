"""HTDQ on a model: where its temporal features come from, and one codebook for the projections that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvd_core.families import Family
from qvd_core.spec import QuantSpec
from qvd_core.temporal import TemporalQuantizer, fit_temporal_quantizer

TRAINING_TIMESTEPS = 1000
GRID_TIMESTEPS = 101  # evenly spaced over the training range, both ends included


@torch.no_grad()
def grid_features(model: nn.Module, family: Family) -> dict[float, Tensor]:
    """Temporal features float32 [C] on a grid over the training range, by timestep. METHOD section 2 [O].

    Needs no data: the model's own timestep embedding computes them; empty where that also holds text, fps or guidance.
    """
    if not family.temporal_features:
        return {}
    modules = dict(model.named_modules())
    projection = next(module for name, module in modules.items() if family.is_temporal(name))
    timesteps = torch.linspace(TRAINING_TIMESTEPS, 0, GRID_TIMESTEPS)
    features = timesteps.to(projection.weight.device)
    for name in family.temporal_features:
        parameter = next(modules[name].parameters(), None)
        features = modules[name](features if parameter is None else features.to(parameter.dtype))
    return dict(zip(timesteps.tolist(), features.float().cpu(), strict=True))


def stack_features(features: dict[float, Tensor]) -> Tensor:
    """float32 [T, C], highest noise first."""
    return torch.stack([features[timestep] for timestep in sorted(features, reverse=True)])


def fit_codebook(
    features: Tensor, projections: Sequence[nn.Module], spec: QuantSpec
) -> tuple[TemporalQuantizer, dict[str, float]]:
    """Fit one codebook to features [T, C] under the stacked weights of the projections that read them."""
    stacked = torch.cat([_float_weight(module).cpu() for module in projections])
    fit = fit_temporal_quantizer(features, stacked, bits=spec.activation_bits, quantizer=spec.temporal_quantizer)
    return fit.quantizer, fit.report


def _float_weight(module: nn.Module) -> Tensor:
    """float32 weight of a float or a quantized layer."""
    dequantized = getattr(module, "dequantized_weight", None)
    weight = dequantized() if callable(dequantized) else module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()
