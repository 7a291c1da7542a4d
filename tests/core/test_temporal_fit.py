"""HTDQ on a model: features from its own timestep embedding, one codebook for all projections."""

import math

import pytest
import torch
from torch import nn

from qvd_core import QuantSpec, calibrate_model
from qvd_core.families import find_family
from qvd_core.families.registry import GENERIC
from qvd_core.temporal_fit import GRID_TIMESTEPS, fit_codebook, grid_features, stack_features


def test_grid_features_are_what_the_model_feeds_its_projections(denoiser) -> None:
    family = find_family(denoiser.model)
    features = grid_features(denoiser.model, family)
    assert len(features) == GRID_TIMESTEPS
    seen = []
    projections = [module for name, module in denoiser.model.named_modules() if family.is_temporal(name)]
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in projections]
    with torch.no_grad():
        denoiser.forward(denoiser.model, 900.0)
    for handle in handles:
        handle.remove()
    assert len(seen) >= len(projections)
    for rows in seen:
        torch.testing.assert_close(rows.reshape(-1, rows.shape[-1])[0], features[900.0], rtol=1e-5, atol=1e-6)


def test_no_grid_where_the_embedding_is_not_known() -> None:
    assert grid_features(nn.Linear(4, 4), GENERIC) == {}


def test_features_are_stacked_from_the_highest_noise_down() -> None:
    stacked = stack_features({10.0: torch.full((2,), 1.0), 900.0: torch.full((2,), 2.0), 0.5: torch.zeros(2)})
    assert stacked[:, 0].tolist() == [2.0, 1.0, 0.0]


def test_the_fit_judges_by_all_the_weights_that_read_the_features() -> None:
    torch.manual_seed(0)
    features, weights = torch.randn(5, 6), [torch.randn(4, 6), torch.randn(3, 6)]
    spec = QuantSpec(temporal_quantizer="uniform")
    separate, figures = fit_codebook(features, weights, spec)
    stacked, same_figures = fit_codebook(features, [torch.cat(weights).bfloat16().float()], spec)
    assert separate.name == "uniform" and torch.equal(separate.levels, stacked.levels)
    assert math.isfinite(figures["projected_error"])
    assert figures["projected_error"] == pytest.approx(same_figures["projected_error"], rel=0.02)


@pytest.mark.parametrize("steps", [1, 2])
def test_codebooks_hold_steps_that_calibration_never_saw(wan, steps: int) -> None:
    """A codebook fitted to one or two steps alone would map every other timestep to those."""
    spec = QuantSpec(shift=False, scale="none")
    scales = calibrate_model(wan.model, lambda: [wan.forward(wan.model, t) for t in (900.0, 800.0)[:steps]], spec)
    features = stack_features(grid_features(wan.model, find_family(wan.model)))
    (codebook,) = scales.temporal.values()
    error = (codebook(features) - features).norm() / features.norm()
    assert error < 0.01
