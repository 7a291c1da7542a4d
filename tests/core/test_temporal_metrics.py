"""TDScore, TDR, TDC and COL against their formulas, and where those have none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvd_core.temporal import collision_rate, td_correlation, td_ratio, td_score, uniform_quantizer
from tests.core.temporal_cases import FEATURES, NAN


def distances_by_hand(E: Tensor) -> list[float]:
    rows = E.double().tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[value - m for value, m in zip(row, mean, strict=True)] for row in rows]
    return [
        math.dist(centred[i], centred[j]) / (math.hypot(*centred[i]) + math.hypot(*centred[j]))
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
    ]


class TestMetrics:
    quantized = uniform_quantizer(FEATURES, 4)(FEATURES)

    def test_score_and_ratio_follow_the_formula(self) -> None:
        before, after = distances_by_hand(FEATURES), distances_by_hand(self.quantized)
        assert td_score(FEATURES) == pytest.approx(sum(before) / len(before), rel=1e-12)
        assert td_ratio(FEATURES, self.quantized) == pytest.approx(sum(after) / sum(before), rel=1e-12)

    def test_correlation_follows_the_formula(self) -> None:
        pairs = torch.tensor([distances_by_hand(FEATURES), distances_by_hand(self.quantized)], dtype=torch.float64)
        assert td_correlation(FEATURES, self.quantized) == pytest.approx(torch.corrcoef(pairs)[0, 1].item(), rel=1e-9)

    def test_collisions_follow_the_formula(self) -> None:
        before, after = FEATURES.double().tolist(), self.quantized.tolist()
        threshold = 0.001 * (FEATURES.max() - FEATURES.min()).item()
        count = sum(
            abs(before[i + 1][c] - before[i][c]) > threshold and after[i + 1][c] == after[i][c]
            for i in range(len(before) - 1)
            for c in range(len(before[0]))
        )
        assert count > 0
        assert collision_rate(FEATURES, self.quantized) == pytest.approx(count / ((len(before) - 1) * len(before[0])))

    @given(scale=st.floats(1e-12, 1e12), shift=st.floats(-10, 10))
    @settings(max_examples=30)
    def test_score_does_not_depend_on_scale_and_origin(self, scale: float, shift: float) -> None:
        moved = (FEATURES.double() + shift) * scale
        assert td_score(moved) == pytest.approx(td_score(FEATURES), rel=1e-9)
        assert 0.0 <= td_score(moved) <= 1.0

    def test_identity_reaches_every_goal(self) -> None:
        assert td_ratio(FEATURES, FEATURES) == 1.0
        assert td_correlation(FEATURES, FEATURES) == pytest.approx(1.0)
        assert collision_rate(FEATURES, FEATURES) == 0.0

    @pytest.mark.parametrize("E", [torch.tensor([[1.0, -2.0]]), torch.full((5, 3), 0.1), torch.zeros(4, 2)])
    def test_nothing_to_tell_apart(self, E: Tensor) -> None:
        """One step, or equal rows, have score 0 and cannot be harmed."""
        assert td_score(E) == 0.0
        assert td_ratio(E, E) == 1.0
        assert td_correlation(E, E) == 1.0
        assert collision_rate(E, E) == 0.0

    def test_a_quantizer_that_erases_time(self) -> None:
        erased = torch.zeros_like(FEATURES)
        assert td_ratio(FEATURES, erased) == 0.0
        assert td_correlation(FEATURES, erased) == 0.0
        assert collision_rate(FEATURES, erased) > 0.5

    def test_ratio_without_a_score_of_its_own(self) -> None:
        assert td_ratio(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])) == math.inf

    def test_distances_without_variance(self) -> None:
        """Equidistant rows: Pearson is 0/0, defined as 1 for equal distances and 0 for others."""
        E = torch.eye(3)
        assert td_correlation(E, 2 * E) == 1.0
        assert td_correlation(E, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])) == 0.0

    def test_opposite_directions_are_as_far_as_can_be(self) -> None:
        assert td_score(torch.tensor([[-3.0], [3.0]])) == pytest.approx(1.0)

    @pytest.mark.parametrize("E", [torch.zeros(3), torch.zeros(0, 4), torch.tensor([[NAN]])])
    def test_bad_features(self, E: Tensor) -> None:
        for metric in (
            td_score,
            lambda x: td_ratio(x, x),
            lambda x: td_correlation(x, x),
            lambda x: collision_rate(x, x),
        ):
            with pytest.raises(ValueError, match="temporal features"):
                metric(E)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            td_ratio(torch.zeros(2, 3), torch.zeros(2, 4))
