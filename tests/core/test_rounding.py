"""Error-compensating rounding: its algebra against float64, and what it promises on seen and unseen inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.rounding import compensate, compensated_codes, nearest_codes, output_error, rounding_feedback


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows [count, width] of one distribution whose channels share a few strong directions; `seed` draws the rows."""
    directions = random(width, width, seed=99) * torch.linspace(0, 5, width).neg().exp().unsqueeze(1)
    return random(count, width, seed=seed) @ directions + 0.05 * random(count, width, seed=seed + 1000)


def peak_scale(weight: Tensor, limit: int) -> Tensor:
    return weight.abs().amax(dim=1, keepdim=True) / limit


def error(weight: Tensor, codes: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    """Output error [N] in float64."""
    difference = weight.double() - codes.double() * scale.double()
    return (rows.double() @ difference.T).square().sum(dim=0)


class TestFeedback:
    @pytest.mark.parametrize("count", [5, 200])
    def test_is_the_factorization_of_the_ridged_gram_matrix(self, count):
        rows, damping = correlated_inputs(count, 24), 0.02
        feedback = rounding_feedback(rows, damping)
        unit = rows.double() / rows.abs().max().double()
        gram = unit.T @ unit
        ridge = damping * (1 + 8 * 24 / count) * gram.diagonal().mean()
        expected = (gram + ridge * torch.eye(24))[feedback.order][:, feedback.order]
        upper = feedback.matrix.double()
        assert torch.equal(upper.diagonal(), torch.ones(24).double()) and not upper.tril(-1).any()
        torch.testing.assert_close(
            upper @ feedback.energy.double().diag() @ upper.T, expected, rtol=0, atol=1e-6 * float(expected.max())
        )

    def test_columns_of_most_energy_come_first(self):
        rows = random(50, 6) * torch.tensor([1.0, 16.0, 0.0, 4.0, 2.0, 8.0])
        assert rounding_feedback(rows).order.tolist() == [1, 5, 3, 4, 0, 2]

    def test_the_loss_it_reports_is_the_error_on_the_ridged_gram_matrix(self):
        weight, rows = random(7, 40), correlated_inputs(300, 40)
        scale = peak_scale(weight, 7)
        feedback = rounding_feedback(rows)
        codes, loss = feedback.round(weight, scale, 7)
        difference = (weight - codes.float() * scale).double()[:, feedback.order]
        whole = feedback.matrix.double() @ feedback.energy.double().diag() @ feedback.matrix.double().T
        torch.testing.assert_close(loss.double(), ((difference @ whole) * difference).sum(dim=1), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("block", [1, 3, 16, 37, 128])
    def test_the_block_size_changes_nothing(self, block):
        weight, rows = random(5, 37), correlated_inputs(100, 37)
        feedback = rounding_feedback(rows)
        codes, _ = feedback.round(weight, peak_scale(weight, 7), 7, block)
        expected, _ = feedback.round(weight, peak_scale(weight, 7), 7, 37)
        assert torch.equal(codes, expected)

    def test_a_column_takes_over_the_error_of_its_twin(self):
        """Two equal inputs and weights of 0.3 steps: nearest gives 0 + 0 for 0.6, compensated 0 + 1."""
        rows = random(50, 1).expand(50, 2)
        codes = compensated_codes(torch.full((1, 2), 0.3), torch.ones(1, 1), rows, 7, damping=1e-4)
        assert sorted(codes[0].tolist()) == [0, 1]


class TestCompensatedCodes:
    @settings(max_examples=30)
    @given(st.integers(0, 10_000), st.sampled_from([1, 3, 7, 31, 127]), st.sampled_from([4, 20, 200]))
    def test_never_worse_than_nearest_on_the_rows_given(self, seed, limit, count):
        weight, rows = random(6, 20, seed=seed), correlated_inputs(count, 20, seed=seed)
        scale = peak_scale(weight, limit) * 0.8
        codes = compensated_codes(weight, scale, rows, limit)
        assert codes.dtype == torch.int8 and codes.shape == weight.shape and codes.abs().max() <= limit
        nearest = nearest_codes(weight, scale, limit)
        assert (error(weight, codes, scale, rows) <= error(weight, nearest, scale, rows) * (1 + 1e-4)).all()

    def test_falls_back_to_nearest_where_compensation_loses(self):
        """A ridge as large as the inputs themselves misjudges a few outputs; just those are rounded to nearest."""
        weight, rows = random(400, 12), correlated_inputs(200, 12)
        scale = peak_scale(weight, 1)
        rounded, _ = rounding_feedback(rows, damping=1.0).round(weight, scale, 1)
        nearest = nearest_codes(weight, scale, 1)
        codes = compensated_codes(weight, scale, rows, 1, damping=1.0)
        loses = error(weight, rounded, scale, rows) > error(weight, nearest, scale, rows) * (1 + 1e-5)
        wins = error(weight, rounded, scale, rows) < error(weight, nearest, scale, rows) * (1 - 1e-5)
        assert loses.any() and wins.any()
        assert torch.equal(codes[loses], nearest[loses]) and torch.equal(codes[wins], rounded[wins])

    def test_close_to_the_best_of_all_codes(self):
        """Against exhaustive search over 3^6 codes per output."""
        weight, rows = random(20, 6), correlated_inputs(100, 6)
        scale = peak_scale(weight, 1) * 0.7
        every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)))
        best = torch.stack(
            [error(row.expand(len(every), 6), every, step, rows).min() for row, step in zip(weight, scale, strict=True)]
        )
        found = error(weight, compensated_codes(weight, scale, rows, 1), scale, rows)
        nearest = error(weight, nearest_codes(weight, scale, 1), scale, rows)
        assert (found >= best * (1 - 1e-6)).all()
        assert (found - best).sum() < 0.35 * (nearest - best).sum()

    @pytest.mark.parametrize("count, gain_db", [(16, 0.3), (64, 1.5), (512, 4.0)])
    def test_helps_on_inputs_it_has_not_seen(self, count, gain_db):
        """K = 96: also with far fewer rows than columns."""
        weight, held_out = random(32, 96), correlated_inputs(1000, 96, seed=7)
        scale = peak_scale(weight, 7) * 0.8
        codes = compensated_codes(weight, scale, correlated_inputs(count, 96), 7)
        nearest = error(weight, nearest_codes(weight, scale, 7), scale, held_out).sum()
        compensated = error(weight, codes, scale, held_out).sum()
        assert 10 * torch.log10(nearest / compensated) > gain_db

    def test_few_rows_would_overfit_without_the_ridge(self):
        weight, rows, held_out = random(32, 96), correlated_inputs(16, 96), correlated_inputs(1000, 96, seed=7)
        scale = peak_scale(weight, 7) * 0.8

        def judge(damping: float, on: Tensor) -> float:
            return float(error(weight, compensated_codes(weight, scale, rows, 7, damping), scale, on).sum())

        assert judge(1e-6, rows) < judge(0.01, rows)
        assert judge(1e-6, held_out) > judge(0.01, held_out)

    def test_dead_channels_are_rounded_to_nearest_and_disturb_nothing(self):
        weight, rows = random(8, 30), correlated_inputs(200, 30)
        dead = torch.arange(0, 30, 4)
        rows[:, dead] = 0
        scale = peak_scale(weight, 7)
        codes = compensated_codes(weight, scale, rows, 7)
        assert torch.equal(codes[:, dead], nearest_codes(weight, scale, 7)[:, dead])
        assert (error(weight, codes, scale, rows) < error(weight, nearest_codes(weight, scale, 7), scale, rows)).all()

    def test_no_input_at_all_is_rounded_to_nearest(self):
        weight = random(4, 9)
        scale = peak_scale(weight, 7)
        assert torch.equal(compensated_codes(weight, scale, torch.zeros(5, 9), 7), nearest_codes(weight, scale, 7))

    @pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
    @pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
    def test_singular_inputs_of_any_size(self, damping, magnitude):
        """Three rows, all the same: a Gram matrix of rank one."""
        weight, rows = random(4, 50), random(1, 50).expand(3, 50) * magnitude
        scale = peak_scale(weight, 7)
        codes = compensated_codes(weight, scale, rows, 7, damping)
        expected = compensated_codes(weight, scale, rows / magnitude, 7, damping)
        assert (codes == expected).float().mean() > 0.95
        unit = rows / magnitude
        assert (
            error(weight, codes, scale, unit).sum()
            < 0.1 * error(weight, nearest_codes(weight, scale, 7), scale, unit).sum()
        )

    def test_the_best_of_several_scales_per_output(self):
        weight, rows = random(30, 40), correlated_inputs(400, 40)
        first = peak_scale(weight, 7)
        nearest = nearest_codes(weight, first, 7)
        scales = [first * share for share in (1.0, 0.8, 0.6)]
        codes, scale = compensate(weight, nearest, first, scales, rows, 7)
        assert scale.shape == (30, 1) and len((scale / first).mul(10).round().unique()) > 1
        alone = torch.stack([error(weight, compensated_codes(weight, one, rows, 7), one, rows) for one in scales])
        assert error(weight, codes, scale, rows).sum() < alone.sum(dim=1).min()

    def test_output_error(self):
        difference, rows = random(3, 5), random(9, 5)
        expected = error(difference, torch.zeros(3, 5), torch.ones(3, 1), rows)
        torch.testing.assert_close(output_error(difference, rows).double(), expected, rtol=1e-5, atol=0)


class TestBadRows:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad):
        rows = random(10, 6)
        rows[3, 2] = bad
        with pytest.raises(QVDError, match="NaN or infinite"):
            compensated_codes(random(4, 6), torch.ones(4, 1), rows, 7)

    @pytest.mark.parametrize("shape", [(10, 7), (6,), (2, 3, 6)])
    def test_of_another_layer(self, shape):
        with pytest.raises(QVDError, match=r"\[S, 6\]"):
            compensated_codes(random(4, 6), torch.ones(4, 1), random(*shape), 7)

    def test_none(self):
        with pytest.raises(QVDError, match="no input rows"):
            compensated_codes(random(4, 6), torch.ones(4, 1), torch.zeros(0, 6), 7)
