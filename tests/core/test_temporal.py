"""The search for a quantizer of temporal features."""

import math
import time
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core import temporal, temporal_metrics
from qvd_core.errors import QVDError
from qvd_core.temporal import (
    AMPLITUDE_SHARES,
    POWERS,
    QUANTIZER_NAMES,
    TemporalFit,
    TemporalQuantizer,
    collision_rate,
    fit_temporal_quantizer,
    power_quantizer,
    td_correlation,
    td_ratio,
    td_score,
    uniform_quantizer,
)
from tests.core.temporal_cases import AMPLITUDE, FEATURES, NAN, PROJECTION, projection_weight, silu_features

EVERY_HALF_STEP = silu_features(steps=1997)  # of the timesteps 999 to 1
DENSE, BETWEEN = EVERY_HALF_STEP[::2], EVERY_HALF_STEP[1::2]


def projected_error(E: Tensor, Eq: Tensor, P: Tensor) -> float:
    """||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||², in full and in float64."""
    E, Eq, P = E.double(), Eq.double(), P.double()
    return float(((Eq - E) @ P.T).square().sum() / ((E - E.mean(dim=0)) @ P.T).square().sum())


def objective(E: Tensor, Eq: Tensor, P: Tensor) -> float:
    return projected_error(E, Eq, P) + 0.1 * (1 - td_correlation(E, Eq)) + 0.1 * collision_rate(E, Eq)


@pytest.fixture
def coarse_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few candidates of every quantizer, for tests that are not about the best one."""
    monkeypatch.setattr(temporal, "LOG_STEPS_PER_OCTAVE", (1.0, 8.0, 32.0))
    monkeypatch.setattr(temporal, "POWERS", (1.0, 2.0, 4.0))
    monkeypatch.setattr(temporal, "EDGE_POINTS", 6)


@cache
def fitted(bits: int, quantizer: str = "auto") -> TemporalFit:
    """The fit to FEATURES under PROJECTION; each is searched once for all tests."""
    return fit_temporal_quantizer(FEATURES, PROJECTION, bits, quantizer)


class TestSearch:
    @pytest.mark.parametrize("rows", [16, 64, 500])
    def test_objective_and_report_are_those_of_the_returned_quantizer(self, rows: int) -> None:
        P = projection_weight(rows)
        fit = fit_temporal_quantizer(FEATURES, P, bits=6, quantizer="power")
        quantized = fit.quantizer(FEATURES)
        assert fit.objective == pytest.approx(objective(FEATURES, quantized, P), rel=1e-3)
        assert fit.report == {
            "td_score": td_score(FEATURES),
            "tdr": td_ratio(FEATURES, quantized),
            "tdc": td_correlation(FEATURES, quantized),
            "col": collision_rate(FEATURES, quantized),
            "projected_error": pytest.approx(projected_error(FEATURES, quantized, P), rel=1e-3),
        }

    def test_each_name_searches_its_own_kind(self) -> None:
        assert {name: fitted(4, name).quantizer.name for name in QUANTIZER_NAMES} == {
            name: name for name in QUANTIZER_NAMES
        }

    @pytest.mark.parametrize("bits", [4, 8])
    def test_auto_is_the_best_of_all(self, bits: int) -> None:
        each = {name: fit_temporal_quantizer(DENSE, PROJECTION, bits, name) for name in QUANTIZER_NAMES}
        best = fit_temporal_quantizer(DENSE, PROJECTION, bits)
        assert best.objective == min(fit.objective for fit in each.values())
        assert best.quantizer.name == "channel"

    def test_auto_takes_no_channel_ranges_that_too_few_steps_have_shown(self) -> None:
        """They fit the 20 given steps best, but every other timestep falls outside some of them."""
        best, channel = fitted(4), fitted(4, "channel")
        assert channel.objective < best.objective
        assert best.objective == min(fitted(4, name).objective for name in QUANTIZER_NAMES if name != "channel")
        assert projected_error(BETWEEN, best.quantizer(BETWEEN), PROJECTION) < projected_error(
            BETWEEN, channel.quantizer(BETWEEN), PROJECTION
        )

    @pytest.mark.parametrize("bits", [4, 6, 8])
    def test_dense_steps_give_ranges_that_hold_between_them(self, bits: int) -> None:
        fit = fit_temporal_quantizer(DENSE, PROJECTION, bits, "channel")
        between = projected_error(BETWEEN, fit.quantizer(BETWEEN), PROJECTION)
        assert between < 1.2 * fit.report["projected_error"]

    def test_one_step_says_nothing_about_ranges(self) -> None:
        assert fit_temporal_quantizer(FEATURES[:1], PROJECTION, 8).quantizer.name != "channel"

    def test_the_grid_is_searched_exhaustively(self) -> None:
        """Giving candidates up early must not lose the best one."""
        fit = fitted(4, "power")
        every = [
            objective(FEATURES, power_quantizer(share * AMPLITUDE, p, 4)(FEATURES), PROJECTION)
            for share in AMPLITUDE_SHARES
            for p in POWERS
        ]
        assert fit.objective == pytest.approx(min(every), rel=1e-3)

    def test_skewed_features_need_more_than_a_uniform_quantizer(self) -> None:
        """The paper's first observation; already one codebook for the whole tensor beats it."""
        uniform, power, best = fitted(4, "uniform").report, fitted(4, "power").report, fitted(4).report
        assert power["projected_error"] < 0.8 * uniform["projected_error"]
        assert best["projected_error"] < 0.5 * uniform["projected_error"]
        assert best["col"] < uniform["col"]

    def test_many_steps_are_searched_on_some_and_reported_on_all(self) -> None:
        fit = fit_temporal_quantizer(DENSE, PROJECTION, 8, "power")
        error = projected_error(DENSE, fit.quantizer(DENSE), PROJECTION)
        assert fit.report["projected_error"] == pytest.approx(error, rel=1e-3)
        amplitude = DENSE.abs().max().item()
        whole = temporal_metrics.TemporalObjective(DENSE, PROJECTION)
        assert fit.objective < 1.05 * min(whole.report(power_quantizer(amplitude, p, 8))["objective"] for p in POWERS)

    def test_log2_beats_uniform_at_4_bits_only(self) -> None:
        def errors(bits: int) -> list[float]:
            names = ("log2", "uniform")
            return [fitted(bits, name).report["projected_error"] for name in names]

        log2, uniform = errors(4)
        assert log2 < uniform
        log2, uniform = errors(8)
        assert log2 > uniform

    def test_more_bits_are_better(self) -> None:
        objectives = [fitted(bits, "power").objective for bits in (2, 4, 8)]
        assert objectives == sorted(objectives, reverse=True)

    def test_the_projection_matters(self) -> None:
        """Channels that no projection reads do not count."""
        features = torch.cat([FEATURES, 100 * FEATURES[:, :1]], dim=1)
        blind = F.pad(PROJECTION, (0, 1))
        fit = fit_temporal_quantizer(features, blind, 4, "power")
        everything = fit_temporal_quantizer(features, None, 4, "power")
        assert projected_error(features, fit.quantizer(features), blind) <= projected_error(
            features, everything.quantizer(features), blind
        )

    def test_does_not_depend_on_the_features_scale(self) -> None:
        small, plain, large = (fit_temporal_quantizer(FEATURES * 2.0**e, PROJECTION, 4, "power") for e in (-60, 0, 60))
        assert small.objective == pytest.approx(plain.objective, rel=1e-4)
        assert large.objective == pytest.approx(plain.objective, rel=1e-4)

    def test_repeatable(self) -> None:
        features = silu_features(steps=150, channels=8)  # more steps than the search correlates
        first, second = (fit_temporal_quantizer(features, projection_weight(9, 8), 4, "power") for _ in range(2))
        assert first.report == second.report
        assert torch.equal(first.quantizer.levels, second.quantizer.levels)

    def test_a_projection_too_large_for_its_gram_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The sketch estimates the error within a few per cent, and chooses as well."""
        P = projection_weight(20_000)
        exact = fit_temporal_quantizer(FEATURES, P, 4, "power")
        monkeypatch.setattr(temporal_metrics, "_GRAM_BUDGET", 10**6)
        monkeypatch.setattr(temporal_metrics, "_CHUNK_ELEMENTS", 10**5)
        sketched = fit_temporal_quantizer(FEATURES, P, 4, "power")
        assert sketched.report["projected_error"] != exact.report["projected_error"]
        assert sketched.report["projected_error"] == pytest.approx(exact.report["projected_error"], rel=0.1)
        assert objective(FEATURES, sketched.quantizer(FEATURES), P) <= 1.02 * exact.objective

    def test_half_precision_and_gradients(self) -> None:
        features, P = (tensor.bfloat16().requires_grad_() for tensor in (FEATURES, PROJECTION))
        fit = fit_temporal_quantizer(features, P, 8, "channel")
        assert fit.quantizer.levels.dtype == torch.float32
        assert not any(tensor.requires_grad for tensor in fit.quantizer.to_tensors().values())

    @pytest.mark.usefixtures("coarse_grids")
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    def test_inside_a_loading_context(self, quantizer: str) -> None:
        """While a model loads, new tensors may be on "meta" and in half precision."""
        features = FEATURES[:4, :8]
        plain = fit_temporal_quantizer(features, None, 4, quantizer)
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("meta"):
                loading = fit_temporal_quantizer(features, None, 4, quantizer)
        finally:
            torch.set_default_dtype(dtype)
        assert loading.report == plain.report

    def test_is_quick(self) -> None:
        features, P = silu_features(50, 256), projection_weight(2000, 256)
        start = time.process_time()
        fit_temporal_quantizer(features, P)
        assert time.process_time() - start < 2  # takes about 0.1 s: a busy machine is no failure


@pytest.mark.usefixtures("coarse_grids")
class TestDegenerateFeatures:
    @pytest.mark.parametrize("quantizer", QUANTIZER_NAMES)
    @pytest.mark.parametrize(
        "features",
        [
            pytest.param(torch.tensor([[0.3, -0.1, 4.0]]), id="one step"),
            pytest.param(torch.tensor([0.3, -0.1, 4.0]).repeat(5, 1), id="equal rows"),
            pytest.param(torch.full((4, 3), 0.7), id="one value"),
            pytest.param(torch.full((4, 3), -0.7), id="one negative value"),
            pytest.param(torch.tensor([[-1.0, -2.0], [-3.0, -1.5]]), id="all negative"),
            pytest.param(torch.tensor([[1.0, 2.0], [3.0, 1.5]]), id="all positive"),
        ],
    )
    def test_defined_result(self, features: Tensor, quantizer: str) -> None:
        fit = fit_temporal_quantizer(features, projection_weight(8, features.shape[1]), 4, quantizer)
        assert all(math.isfinite(value) for value in [fit.objective, *fit.report.values()])
        TemporalQuantizer.from_tensors(fit.quantizer.name, 4, fit.quantizer.to_tensors())

    @pytest.mark.parametrize("features", [torch.tensor([[0.3, -0.1, 4.0]]), torch.full((4, 3), 0.7)])
    def test_what_does_not_vary_is_kept_exactly(self, features: Tensor) -> None:
        fit = fit_temporal_quantizer(features, None, 4, "channel")
        assert torch.equal(fit.quantizer(features), features)
        assert fit.objective == 0.0

    def test_a_zero_projection_is_ignored(self) -> None:
        """Zero-initialized modulation: nothing is known about which channels matter."""
        ignored = fit_temporal_quantizer(FEATURES, torch.zeros(8, 64), 4, "power")
        assert ignored.report == fit_temporal_quantizer(FEATURES, None, 4, "power").report


class TestBadInput:
    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (torch.zeros(5), r"shape \(5,\), expected \[T, C\]"),
            (torch.zeros(0, 4), r"shape \(0, 4\)"),
            (torch.zeros(4, 0), r"shape \(4, 0\)"),
            (torch.tensor([[1.0, NAN]]), "NaN"),
            (torch.tensor([[1.0, math.inf]]), "infinity"),
            (torch.zeros(4, 3), "all zero"),
        ],
    )
    def test_features(self, features: Tensor, message: str) -> None:
        with pytest.raises(QVDError, match=rf"^temporal features .*{message}.*\.$"):
            fit_temporal_quantizer(features)
        with pytest.raises(QVDError, match=message):
            uniform_quantizer(features, 8)

    @pytest.mark.parametrize("bits", [1, 9, 0, 8.0, True, "8"])
    def test_bits(self, bits: int) -> None:
        with pytest.raises(QVDError, match=r"^bits: .*choose 2 to 8"):
            fit_temporal_quantizer(FEATURES, bits=bits)
        with pytest.raises(QVDError, match=r"^bits: "):
            power_quantizer(1.0, 2.0, bits)

    def test_quantizer_name(self) -> None:
        with pytest.raises(QVDError, match=r"'log3': choose auto or one of .*logk"):
            fit_temporal_quantizer(FEATURES, quantizer="log3")

    @pytest.mark.parametrize("P", [torch.zeros(8), torch.zeros(8, 63), torch.zeros(0, 64)])
    def test_projection_shape(self, P: Tensor) -> None:
        with pytest.raises(QVDError, match=r"projection has shape .*expected \[N, 64\]: "):
            fit_temporal_quantizer(FEATURES, P)

    @pytest.mark.parametrize("rows", [8, 100])
    @pytest.mark.parametrize("value", [NAN, math.inf])
    def test_projection_values(self, rows: int, value: float) -> None:
        P = projection_weight(rows)
        P[3, 5] = value
        with pytest.raises(QVDError, match="projection holds NaN or infinity: "):
            fit_temporal_quantizer(FEATURES, P)
