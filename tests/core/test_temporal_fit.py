"""HTDQ on a model: features from its own timestep embedding, one codebook for all projections."""

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qvd_core import QuantSpec, calibrate_model, quantize_model, temporal_metrics, weights
from qvd_core.convert import _float_weights
from qvd_core.errors import QVDError
from qvd_core.families import find_family
from qvd_core.families.registry import GENERIC
from qvd_core.temporal import StackedWeights, fit_temporal_quantizer
from qvd_core.temporal_fit import GRID_TIMESTEPS, count_outputs, fit_codebook, grid_features, stack_features
from qvd_core.temporal_layer import TemporalLinear
from tests.core.temporal_cases import FEATURES, projection_weight


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


class TestStackedWeights:
    """Projections of a large model: never all in float32, read when their turn comes."""

    @pytest.mark.parametrize(("rows", "budget"), [(40, None), (1000, None), (1000, 0)], ids=["kept", "gram", "sketch"])
    def test_one_by_one_is_the_same_as_stacked(self, monkeypatch: pytest.MonkeyPatch, rows, budget) -> None:
        monkeypatch.setattr(temporal_metrics, "_CHUNK_ELEMENTS", 64 * 30)
        if budget is not None:
            monkeypatch.setattr(temporal_metrics, "_GRAM_BUDGET", budget)
        P = projection_weight(rows)
        stacked = fit_temporal_quantizer(FEATURES, P, 4, "power")
        parts = fit_temporal_quantizer(FEATURES, StackedWeights(rows, iter(P.split(17))), 4, "power")
        assert parts.objective == pytest.approx(stacked.objective, rel=1e-5)
        assert torch.equal(parts.quantizer.levels, stacked.quantizer.levels)

    def test_weights_are_let_go(self) -> None:
        """Only the one that is read and the one before it are ever in memory."""
        read: list[weakref.ref[Tensor]] = []

        def weights() -> Iterator[Tensor]:
            for seed in range(6):
                assert sum(reference() is not None for reference in read) <= 1
                weight = projection_weight(100, seed=seed)
                read.append(weakref.ref(weight))
                yield weight
                del weight

        fit_temporal_quantizer(FEATURES, StackedWeights(600, weights()), 4, "uniform")
        assert len(read) == 6

    def test_every_weight_is_checked(self) -> None:
        with pytest.raises(QVDError, match=r"projection has shape \(4, 63\), expected \[N, 64\]"):
            fit_temporal_quantizer(FEATURES, StackedWeights(104, [projection_weight(100), torch.zeros(4, 63)]))

    @pytest.mark.parametrize("weight_bits", [8, 4])
    def test_quantized_layers_are_dequantized_in_blocks(
        self, wan, monkeypatch: pytest.MonkeyPatch, weight_bits
    ) -> None:
        model = quantize_model(wan.copy(), QuantSpec(weight_bits=weight_bits, temporal_quantizer="uniform"))
        (layer,) = [module for module in model.modules() if isinstance(module, TemporalLinear)]
        plain = nn.Linear(layer.in_features, 5)
        monkeypatch.setattr(weights, "_CPU_BLOCK", 1)
        monkeypatch.setattr(weights, "_FEWEST_ROWS", 7)
        blocks = list(_float_weights([layer, plain]))
        assert [len(block) for block in blocks[:-2]] == [7] * (layer.out_features // 7)
        torch.testing.assert_close(torch.cat(blocks), torch.cat([layer.dequantized_weight(), plain.weight]))
        assert count_outputs([layer, plain]) == layer.out_features + 5
