"""HTDQ on real temporal features: those of the trained miniatures, at their own sampler's timesteps and at others."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec, quantize_model
from qvd_core.families import find_family
from qvd_core.temporal import (
    AMPLITUDE_SHARES,
    TemporalFit,
    TemporalQuantizer,
    collision_rate,
    fit_temporal_quantizer,
    power_quantizer,
    td_correlation,
    td_ratio,
    uniform_quantizer,
)
from qvd_core.temporal_fit import embed_timesteps, grid_features, stack_features
from qvd_core.temporal_layer import TemporalLinear
from qvd_core.temporal_table import precompute_tables

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "moving_digits"
BITS = (8, 6, 4)


@dataclass(frozen=True)
class Miniature:
    model: nn.Module
    timesteps: Tensor  # of its own sampler
    grid: Tensor  # features [1001, C]
    own: Tensor  # features at its own timesteps
    others: Tensor  # features at half-integer timesteps, which lie between those of the grid
    projection: Tensor  # [N, C], stacked

    def error(self, quantizer: TemporalQuantizer, features: Tensor) -> float:
        """||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||² in float64."""
        E, P = features.double(), self.projection.double()
        return float(((quantizer(features) - E) @ P.T).square().sum() / ((E - E.mean(dim=0)) @ P.T).square().sum())


@cache
def load(name: str) -> Miniature:
    part = {"wan": "transformer", "unet": "unet"}[name]
    folder = FOLDER / name
    library, kind = json.loads((folder / "model_index.json").read_text())[part]
    assert library == "diffusers"
    model = getattr(diffusers, kind).from_pretrained(folder / part).eval()
    kind = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    scheduler = getattr(diffusers, kind).from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(json.loads((folder / "call.json").read_text())["num_inference_steps"])
    family = find_family(model)
    with torch.no_grad():
        own, others = (
            embed_timesteps(model, family, timesteps).float()
            for timesteps in (scheduler.timesteps, torch.arange(999.5, 0, -1))
        )
    projection = torch.cat([layer.weight for path, layer in model.named_modules() if family.is_temporal(path)])
    grid = stack_features(grid_features(model, family))
    return Miniature(model, scheduler.timesteps, grid, own, others, projection.detach())


@cache
def fitted(name: str, bits: int, quantizer: str = "auto") -> TemporalFit:
    """As data-free quantization fits it: on the grid, under the model's own projections."""
    miniature = load(name)
    return fit_temporal_quantizer(miniature.grid, miniature.projection, bits, quantizer)


def uniform_quantizers(features: Tensor, bits: int) -> Iterator[TemporalQuantizer]:
    """Per tensor, from the smallest to the largest value and symmetric about zero, with and without clipping."""
    for share in (*AMPLITUDE_SHARES, 0.8, 0.7):
        yield uniform_quantizer(features * share, bits)
        yield power_quantizer(share * float(features.abs().max()), 1.0, bits)


@pytest.mark.parametrize("name", ["wan", "unet"])
class TestMiniatures:
    @pytest.mark.parametrize("bits", [8, 6])
    @pytest.mark.parametrize("timesteps", ["own", "others"])
    def test_timesteps_stay_apart(self, name, bits, timesteps):
        quantizer, features = fitted(name, bits).quantizer, getattr(load(name), timesteps)
        assert 0.99 <= td_ratio(features, quantizer(features)) <= 1.01
        assert td_correlation(features, quantizer(features)) >= 0.99

    @pytest.mark.parametrize("bits", BITS)
    def test_fewer_collisions_and_errors_than_any_uniform_quantizer(self, name, bits):
        miniature, quantizer = load(name), fitted(name, bits).quantizer
        features, uniform = miniature.own, list(uniform_quantizers(miniature.grid, bits))
        assert collision_rate(features, quantizer(features)) < min(
            collision_rate(features, u(features)) for u in uniform
        )
        assert miniature.error(quantizer, features) < 0.5 * min(miniature.error(other, features) for other in uniform)

    @pytest.mark.parametrize("bits", BITS)
    def test_holds_between_the_timesteps_it_was_fitted_to(self, name, bits):
        """Other schedulers, fractional timesteps: channel ranges fitted too coarsely fail exactly here."""
        miniature, fit = load(name), fitted(name, bits)
        assert fit.quantizer.name == "channel"
        assert miniature.error(fit.quantizer, miniature.others) < 1.3 * fit.report["projected_error"]

    def test_every_tenth_step_is_too_coarse_for_channel_ranges(self, name):
        miniature = load(name)
        coarse = fit_temporal_quantizer(miniature.grid[::10], miniature.projection, 8, "channel")
        fine = fitted(name, 8, "channel")
        assert coarse.report["projected_error"] <= fine.report["projected_error"]
        assert miniature.error(coarse.quantizer, miniature.others) > 1.5 * miniature.error(
            fine.quantizer, miniature.others
        )

    @pytest.mark.parametrize("temporal", ["table", "online"])
    def test_table_and_online_in_any_batch(self, name, temporal):
        """Real layers, real features: one row, both guidance branches, a clean first frame, all steps at once."""
        model = quantize_model(_copy(name), QuantSpec(temporal=temporal, temporal_quantizer="channel"))
        layer = next(module for module in model.modules() if isinstance(module, TemporalLinear))
        own = load(name).own
        with torch.no_grad():
            single = torch.cat([layer(row[None]) for row in own])
            for batch in ([0], [1, 1], [2, 3], [4] * 30 + [5] * 70, list(range(len(own)))):
                assert torch.equal(layer(own[batch]), single[batch])

    def test_a_sampler_finds_every_step_precomputed(self, name):
        model = quantize_model(_copy(name), QuantSpec(temporal_quantizer="channel"))
        miniature = load(name)
        layers = [module for module in model.modules() if isinstance(module, TemporalLinear)]
        added = precompute_tables(model, miniature.timesteps.tolist())
        family = find_family(model)
        with torch.no_grad():
            for timestep in miniature.timesteps:
                for batch in (1, 2):
                    features = embed_timesteps(model, family, timestep.expand(batch))
                    for layer in layers:
                        layer(features.repeat_interleave(8, dim=0))
        assert added == sum(len(layer.table) for layer in layers)


def _copy(name: str) -> nn.Module:
    model = load(name).model
    copied: nn.Module = type(model).from_config(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_one_codebook_for_the_tensor_repairs_much_at_four_bits():
    """The paper's first observation, on a trained Wan: even against the best clipping of a uniform quantizer."""
    miniature = load("wan")
    uniform = min(miniature.error(quantizer, miniature.own) for quantizer in uniform_quantizers(miniature.grid, 4))
    plain, power, best = (
        miniature.error(fitted("wan", 4, kind).quantizer, miniature.own) for kind in ("uniform", "power", "auto")
    )
    assert power < 0.7 * uniform and power < 0.2 * plain and best < 0.1 * uniform
