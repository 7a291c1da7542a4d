"""The fast estimate that a search ranks its grids by."""

import pytest
import torch
from torch import Tensor

from qvd_core import temporal, temporal_metrics, temporal_ranking
from qvd_core.temporal import TemporalFit, fit_temporal_quantizer, logk_quantizer, mix_quantizer, power_quantizer
from qvd_core.temporal_codebook import logk_codebooks, mix_codebooks, power_codebooks
from qvd_core.temporal_metrics import TemporalObjective
from qvd_core.temporal_ranking import Ranking
from tests.core.temporal_cases import AMPLITUDE, FEATURES, HIGHEST, LOWEST, PROJECTION, silu_features

BITS = (2, 4, 8)
SHAPES = torch.tensor([1.0, 1.7, 3.2, 4.0], dtype=torch.float64)  # k, p
AMPLITUDES = torch.tensor([1.0, 0.9, 1.0, 0.95], dtype=torch.float64) * AMPLITUDE
ZERO_SHARES = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
EDGES = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64) * HIGHEST


def power_grid(bits: int):
    parameters = zip(AMPLITUDES.tolist(), SHAPES.tolist(), strict=True)
    return power_codebooks(AMPLITUDES, SHAPES, bits), [power_quantizer(a, p, bits) for a, p in parameters]


def logk_grid(bits: int):
    parameters = zip(AMPLITUDES.tolist(), SHAPES.tolist(), ZERO_SHARES.tolist(), strict=True)
    single = [logk_quantizer(a, k, bits, share) for a, k, share in parameters]
    return logk_codebooks(AMPLITUDES, SHAPES, bits, ZERO_SHARES), single


def mix_grid(bits: int):
    return mix_codebooks(LOWEST, HIGHEST, EDGES, bits), [mix_quantizer(FEATURES, edge, bits) for edge in EDGES.tolist()]


every_grid = pytest.mark.parametrize("grid", [power_grid, logk_grid, mix_grid])


@every_grid
@pytest.mark.parametrize("bits", BITS)
def test_many_codebooks_at_once_are_the_single_ones(grid, bits) -> None:
    """But for levels that coincide or are too small for float32, which a single codebook leaves out."""
    (levels, boundaries), quantizers = grid(bits)
    assert boundaries.shape == (4, levels.shape[1] - 1)
    for row, ends, quantizer in zip(levels, boundaries.float(), quantizers, strict=True):
        codes = torch.searchsorted(ends, FEATURES)
        torch.testing.assert_close(row[codes].float(), quantizer(FEATURES), rtol=1e-6, atol=1e-37)


@every_grid
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_exact_where_channels_do_not_mix(grid, bits, scale) -> None:
    """A diagonal projection, few values: all but TDC, which the estimate leaves out."""
    P = torch.diag(torch.linspace(0.1, 3.0, FEATURES.shape[1]))
    ranking = Ranking(TemporalObjective(FEATURES * scale, P))
    (levels, boundaries), quantizers = grid(bits)
    estimates = ranking.estimate((levels * scale, boundaries * scale))
    plain = TemporalObjective(FEATURES, P)
    reports = [plain.report(quantizer) for quantizer in quantizers]
    assert estimates.tolist() == pytest.approx([r["projected_error"] + 0.1 * r["col"] for r in reports], rel=1e-3)


def test_many_values_and_pairs_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = TemporalObjective(silu_features(128), PROJECTION)
    codebooks, _ = power_grid(4)
    full = Ranking(objective).estimate(codebooks)
    monkeypatch.setattr(temporal_ranking, "_VALUES", 128 * 64 // 8)
    monkeypatch.setattr(temporal_ranking, "_PAIRS", 512)
    some = Ranking(objective).estimate(codebooks)
    assert not torch.equal(some, full)
    torch.testing.assert_close(some, full, rtol=0.2, atol=0.0)


@pytest.mark.parametrize("features", [torch.tensor([[0.3, -0.1, 4.0]]), torch.full((4, 3), 0.7)])
def test_nothing_to_tell_apart_has_no_collisions(features) -> None:
    ranking = Ranking(TemporalObjective(features, None))
    (levels, boundaries), _ = power_grid(8)
    coarse = ranking.estimate((levels, boundaries))
    assert torch.isfinite(coarse).all() and (coarse >= -1e-12).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", ["power", "logk", "mix"])
def test_the_shortlist_holds_the_best_of_the_grid(monkeypatch: pytest.MonkeyPatch, kind, bits) -> None:
    chosen = fit_temporal_quantizer(FEATURES, PROJECTION, bits, kind)
    monkeypatch.setattr(temporal, "_SHORTLIST", 1000)
    monkeypatch.setattr(temporal, "_LONG_SHORTLIST", 1000)
    best = fit_temporal_quantizer(FEATURES, PROJECTION, bits, kind)
    assert best.objective <= chosen.objective <= 1.01 * best.objective


class TestEarlyEnd:
    """Giving a candidate up on some of the rows."""

    features, P = silu_features(128, 192), torch.randn(64, 192, generator=torch.Generator().manual_seed(0))

    def test_rows_in_parts_are_all_rows(self) -> None:
        parts = temporal_metrics._spread_parts(128, 192)
        assert len(parts) > 1 and len(parts[0]) < 16
        assert torch.cat(parts).sort().values.tolist() == list(range(128))

    def test_a_lower_bound_or_the_objective(self) -> None:
        objective = TemporalObjective(self.features, self.P)
        quantizer = power_quantizer(float(self.features.abs().max()), 1.5, 5)
        value = objective(quantizer)
        assert value == pytest.approx(objective.report(quantizer)["objective"], rel=1e-6)
        assert objective(quantizer, give_up_at=value * 1.001) == value
        for share in (1e-3, 0.1, 0.5, 0.99):
            assert share * value <= objective(quantizer, give_up_at=share * value) <= value

    def test_the_worst_candidates_cost_the_least(self) -> None:
        rows: list[int] = []

        def erase(x: Tensor) -> Tensor:
            rows.append(len(x))
            return torch.zeros_like(x)

        TemporalObjective(self.features, self.P)(erase, give_up_at=1e-3)
        assert sum(rows) < 16


def test_auto_does_not_miss_a_kind_by_leaving_hopeless_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def fits() -> list[TemporalFit]:
        return [fit_temporal_quantizer(FEATURES, PROJECTION, bits) for bits in BITS]

    chosen = fits()
    monkeypatch.setattr(temporal, "_HOPELESS", 1e9)
    assert [fit.objective for fit in chosen] == [fit.objective for fit in fits()]
