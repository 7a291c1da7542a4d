"""Made-up temporal features, and every quantizer on them: what the tests of HTDQ share."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec
from qvd_core.convert import fill_layer
from qvd_core.plan import LayerPlan
from qvd_core.temporal import (
    TemporalQuantizer,
    channel_quantizer,
    log2_quantizer,
    logk_quantizer,
    mix_quantizer,
    power_quantizer,
    uniform_quantizer,
)
from qvd_core.temporal_layer import TemporalLinear, codebook_tensors
from qvd_core.weights import quantize_weight

NAN = float("nan")


def silu_features(steps: int = 20, channels: int = 64, seed: int = 0) -> Tensor:
    """Features [T, C] like a timestep MLP's: smooth in time, a dense mass in [-0.28, 0.3], a thin positive tail."""
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(999, 1, steps)[:, None]
    angles = timesteps * torch.exp(-math.log(1e4) * torch.arange(32) / 32)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(sinusoids @ torch.randn(64, channels, generator=generator) / 4)
    spread = torch.exp(0.8 * torch.randn(channels, generator=generator))
    features: Tensor = F.silu(
        hidden @ torch.randn(channels, channels, generator=generator) / channels**0.5 * spread - 0.3
    )
    return features


def projection_weight(rows: int = 128, channels: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) / math.sqrt(channels)


FEATURES = silu_features()
PROJECTION = projection_weight()
LOWEST, HIGHEST = FEATURES.min().item(), FEATURES.max().item()
AMPLITUDE = FEATURES.abs().max().item()

# Every builder at typical parameters, on FEATURES.
BUILDERS: dict[str, Callable[[int], TemporalQuantizer]] = {
    "log2": lambda bits: log2_quantizer(FEATURES, bits),
    "logk": lambda bits: logk_quantizer(AMPLITUDE, 2.5, bits),
    "logk, half zero": lambda bits: logk_quantizer(AMPLITUDE, 2.5, bits, zero_share=0.5),
    "power": lambda bits: power_quantizer(AMPLITUDE, 2.3, bits),
    "mix": lambda bits: mix_quantizer(FEATURES, 0.3, bits),
    "mix, edge 0": lambda bits: mix_quantizer(FEATURES, 0.0, bits),
    "uniform": lambda bits: uniform_quantizer(FEATURES, bits),
    "channel": lambda bits: channel_quantizer(FEATURES, bits),
}


# A small projection --------------------------------------------------------------------------------------------------

CHANNELS, OUTPUTS = 24, 10


def layer_features(steps: int, seed: int = 0) -> Tensor:
    """Skewed, as SiLU(temb) is."""
    return F.silu(torch.randn(steps, CHANNELS, generator=torch.Generator().manual_seed(seed)) * 2)


def layer_quantizer(quantizer: str, bits: int) -> TemporalQuantizer:
    """One quantizer of each kind over `layer_features(20)`, without a search."""
    x = layer_features(20)
    return {
        "uniform": lambda: uniform_quantizer(x, bits),
        "channel": lambda: channel_quantizer(x, bits),
        "log2": lambda: log2_quantizer(x, bits),
        "power": lambda: power_quantizer(float(x.max()), 1.7, bits),
        "logk": lambda: logk_quantizer(float(x.max()), 2**bits / 16, bits),
        "mix": lambda: mix_quantizer(x, 0.3, bits),
    }[quantizer]()


def temporal_layer(
    temporal: str = "table", quantizer: str = "power", bits: int = 8, fitted: bool = True
) -> TemporalLinear:
    torch.manual_seed(0)
    source = nn.Linear(CHANNELS, OUTPUTS)
    spec = QuantSpec(temporal=temporal, activation_bits=bits)
    plan = LayerPlan("temporal", ("bias", "codebook") if fitted else ("bias",))
    layer = TemporalLinear(source, plan, spec, torch.float32)
    weight = quantize_weight(source.weight.detach(), 8)
    fill_layer(layer, {"weight": weight.codes, "weight_scale": weight.scale, "bias": source.bias})
    if fitted:
        fill_layer(layer, codebook_tensors(layer_quantizer(quantizer, bits), CHANNELS))
    return layer.eval()


def one_by_one(layer: TemporalLinear, rows: Tensor) -> Tensor:
    """Row by row through a copy that has no table."""
    twin = copy.deepcopy(layer)
    twin.spec = replace(layer.spec, temporal="online")
    return torch.cat([twin(row[None]) for row in rows.reshape(-1, CHANNELS)]).view(*rows.shape[:-1], OUTPUTS)
