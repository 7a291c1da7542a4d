"""HTDQ on a model: where its temporal features come from, and one codebook for the projections that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qvd_core.families import Family, Sinusoid
from qvd_core.spec import QuantSpec
from qvd_core.temporal import StackedWeights, TemporalQuantizer, fit_temporal_quantizer

GRID_TIMESTEPS = 1001  # evenly spaced over the family's range, both ends included


@torch.no_grad()
def grid_features(model: nn.Module, family: Family) -> dict[float, Tensor]:
    """Temporal features float32 [C] on a grid over the family's timesteps, by timestep. METHOD section 2 [O].

    Needs no data: the model's own timestep embedding computes them; empty where that also holds text, fps or guidance.
    The grid is as fine as the fastest sinusoid of an embedding (one radian per step) needs: ranges taken on every tenth
    step are too narrow for the channels that follow it.
    """
    if not family.temporal_features:
        return {}
    lowest, highest = family.timestep_range
    timesteps = torch.linspace(highest, lowest, GRID_TIMESTEPS, device="cpu")
    features = embed_timesteps(model, family, timesteps)
    return dict(zip(timesteps.tolist(), features.float().cpu(), strict=True))


def embed_timesteps(model: nn.Module, family: Family, timesteps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Temporal features [T, C] of `timesteps` [T], on the embedding's device, for a family that has temporal_features.

    dtype: what the model runs in, where its embedding is kept in another one; None leaves the embedding's.
    """
    modules = dict(model.named_modules())
    parts = [part if isinstance(part, Sinusoid) else modules[part] for part in family.temporal_features]
    # An embedding that is offloaded (meta) fetches its input itself.
    parameters = [parameter for part in _modules(parts) for parameter in part.parameters() if not parameter.is_meta]
    features = timesteps.to(parameters[0].device) if parameters else timesteps
    for index, part in enumerate(parts):
        if isinstance(part, Sinusoid):
            features = sinusoidal_features(features, part, _inputs_of_first_linear(parts[index + 1 :]))
            continue
        parameter = next(part.parameters(), None)
        features = part(features if parameter is None else features.to(_input_dtype(part, parameter, dtype)))
        if parameter is not None and dtype is not None:
            features = features.to(dtype)
    return features


def sinusoidal_features(timesteps: Tensor, embedding: Sinusoid, channels: int) -> Tensor:
    """`embedding` of timesteps [T]: float32 [T, channels], computed as the models do, in float32."""
    half = channels // 2
    exponents = -torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = (embedding.factor * timesteps.float()).unsqueeze(1) * embedding.maximum_period**exponents
    waves = [angles.cos(), angles.sin()]
    if embedding.sine_first:
        waves.reverse()
    return torch.cat([*waves, torch.zeros_like(angles[:, : channels % 2])], dim=1)


def _modules(parts: Sequence[nn.Module | Sinusoid]) -> list[nn.Module]:
    return [part for part in parts if isinstance(part, nn.Module)]


def _inputs_of_first_linear(parts: Sequence[nn.Module | Sinusoid]) -> int:
    linears = (module for part in _modules(parts) for module in part.modules() if isinstance(module, nn.Linear))
    return next(linears).in_features


def _input_dtype(part: nn.Module, parameter: nn.Parameter, dtype: torch.dtype | None) -> torch.dtype:
    """What the input of an embedding must be: what its parameters are, or anything where it casts them to its input.

    ComfyUI's layers do the latter where they are marked so; their weights may then be of an 8-bit type, in which no
    feature can be computed.
    """
    if not any(getattr(module, "comfy_cast_weights", False) for module in part.modules()):
        return parameter.dtype
    wide = parameter.dtype if parameter.is_floating_point() and parameter.element_size() > 1 else torch.float32
    return dtype or wide


def stack_features(features: dict[float, Tensor]) -> Tensor:
    """float32 [T, C], highest noise first."""
    return torch.stack([features[timestep] for timestep in sorted(features, reverse=True)])


def count_outputs(layers: Iterable[nn.Module]) -> int:
    """Output channels of all the layers together; their weights [N, ...] may be on meta."""
    weights = [layer.weight for layer in layers]
    return sum(weight.shape[0] for weight in weights if isinstance(weight, Tensor))


def fit_codebook(
    features: Tensor, weights: Sequence[Tensor] | StackedWeights, spec: QuantSpec
) -> tuple[TemporalQuantizer, dict[str, float]]:
    """Fit one codebook to features [T, C] under the stacked weights [N, C] of the projections that read them.

    `StackedWeights` may read or dequantize each weight when its turn comes: no float32 copy of them all is made.
    """
    stacked = weights if isinstance(weights, StackedWeights) else StackedWeights.of(*weights)
    fit = fit_temporal_quantizer(features, stacked, bits=spec.activation_bits, quantizer=spec.temporal_quantizer)
    return fit.quantizer, fit.report
