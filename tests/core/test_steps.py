"""Static steps per layer, range of timesteps and frame: they hold what was seen, and buckets are cut optimally."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvd_core import QuantSpec
from qvd_core.channels import Member, choose
from qvd_core.observe import InputObserver
from qvd_core.ops.semantics import code_limit
from qvd_core.statistics import InputStatistics
from qvd_core.steps import DRIFT_WORTH_A_BUCKET, drift_buckets, fewer_buckets, reach, static_steps
from qvd_core.transform import Transform
from tests.core.video_clock import clock, set_clock


def waste(reaches: list[float], starts: list[int]) -> float:
    """Summed log of how much wider each step's bucket is than the step itself."""
    logs = torch.tensor(reaches, dtype=torch.float64).log()
    ends = [*starts[1:], len(reaches)]
    return float(sum((logs[a:b].max() - logs[a:b]).sum() for a, b in zip(starts, ends, strict=True)))


def least_waste(reaches: list[float], buckets: int) -> float:
    """Over all cuts into exactly so many buckets."""
    return min(
        waste(reaches, [0, *inner]) for inner in combinations(range(1, len(reaches)), min(buckets, len(reaches)) - 1)
    )


class TestDriftBuckets:
    @settings(max_examples=60)
    @given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8), st.integers(1, 9))
    def test_against_all_cuts(self, reaches, most):
        starts = drift_buckets(reaches, most)
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < len(reaches)
        assert len(starts) <= most
        assert waste(reaches, starts) == pytest.approx(least_waste(reaches, len(starts)), abs=1e-9)
        enough = DRIFT_WORTH_A_BUCKET * len(reaches)
        for fewer in range(1, len(starts)):  # no smaller number would have done
            assert least_waste(reaches, fewer) >= enough - 1e-9

    def test_no_drift_needs_one_bucket(self):
        assert drift_buckets([3.0] * 20, 8) == [0]
        assert drift_buckets([3.0, 3.01, 2.99, 3.0], 8) == [0]

    def test_jumps_are_found(self):
        assert drift_buckets([1.0] * 5 + [4.0] * 3 + [2.0] * 4, 8) == [0, 5, 8]
        assert drift_buckets([1.0] * 5 + [4.0] * 3 + [2.0] * 4, 2) == [0, 5]

    def test_a_dead_layer(self):
        assert drift_buckets([0.0, 0.0, 0.0], 4) == [0]
        assert drift_buckets([0.0, 5.0], 4) == [0, 1]


def drifting(
    steps: int = 12, frames: int = 3, seed: int = 0, frame_order: str | None = "major"
) -> tuple[InputStatistics, dict[float, Tensor]]:
    """Inputs [2 * frames * 4, 16] whose size and centre change over the timesteps, and grow from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    hours = clock()
    watch = InputObserver(nn.Linear(16, 4), generator, hours, frame_order)
    inputs = {}
    for index in range(steps):
        timestep = 1000.0 - 80.0 * index
        x = torch.randn(2, frames, 4, 16, generator=generator) * (1 + index**1.5) + 3
        x = x * (1 + torch.arange(frames).view(1, -1, 1, 1))
        inputs[timestep] = x.reshape(-1, 16)
        set_clock(hours, timestep, 2, frames)
        watch.observe(x.reshape(2, -1, 16))
    return InputStatistics.of(watch), inputs


def transform(seed: int = 1) -> Transform:
    generator = torch.Generator().manual_seed(seed)
    return Transform("any", torch.randn(16, generator=generator), torch.rand(16, generator=generator) + 0.5)


def peak(x: Tensor, chosen: Transform) -> float:
    return float(((x.double() - chosen.shift.double()) / chosen.scale.double()).abs().max())


class TestStaticSteps:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_the_whole_run(self, bits):
        found, inputs = drifting()
        steps = static_steps(found, transform(), bits, 8)
        everything = torch.cat(list(inputs.values()))
        assert steps.step.shape == (1,) and steps.step.dtype == torch.float32
        assert float(steps.step) * code_limit(bits) == pytest.approx(peak(everything, transform()), rel=1e-5)

    @pytest.mark.parametrize("buckets", [1, 2, 5, 32])
    def test_every_bucket_just_holds_its_timesteps(self, buckets):
        found, inputs = drifting()
        steps = static_steps(found, transform(), 8, buckets)
        count = len(steps.bucket_steps)
        assert 1 <= count <= buckets and len(steps.bucket_boundaries) == count - 1
        assert bool((steps.bucket_boundaries.diff() > 0).all())
        peaks = torch.zeros(count, dtype=torch.float64)
        for timestep, x in inputs.items():
            bucket = int((steps.bucket_boundaries < timestep).sum())
            peaks[bucket] = max(float(peaks[bucket]), peak(x, transform()))
        torch.testing.assert_close(steps.bucket_steps.double() * 127, peaks, rtol=1e-5, atol=0)
        assert float(steps.bucket_steps.max()) == pytest.approx(float(steps.step), rel=1e-6)

    def test_drift_opens_buckets(self):
        assert len(static_steps(drifting()[0], transform(), 8, 8).bucket_steps) == 8

    def test_frames(self):
        found, inputs = drifting()
        steps = static_steps(found, transform(), 8, 8)
        for frame in range(3):
            seen = torch.cat([x.view(2, 3, 4, 16)[:, frame].reshape(-1, 16) for x in inputs.values()])
            assert float(steps.frame_steps[frame]) * 127 == pytest.approx(peak(seen, transform()), rel=1e-5)

    def test_without_frames(self):
        assert static_steps(drifting(frame_order=None)[0], transform(), 8, 8).frame_steps is None

    def test_a_constant_or_dead_input_has_positive_steps(self):
        for value in (0.0, 1.0):
            hours = clock(500.0, 1, 2)
            watch = InputObserver(nn.Linear(16, 4), torch.Generator(), hours, "major")
            watch.observe(torch.full((1, 4, 16), value))
            exactly = Transform("mid", torch.full((16,), value), torch.ones(16))
            steps = static_steps(InputStatistics.of(watch), exactly, 8, 8)
            assert all(bool((each > 0).all()) for each in (steps.step, steps.bucket_steps, steps.frame_steps))

    def test_quantiles_leave_the_outermost_values_out(self):
        rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
        rows[5, 2] = 50.0
        found = InputStatistics(rows.amin(dim=0), rows.amax(dim=0), rows.mean(dim=0), rows)
        identity = Transform.identity(16)
        assert float(static_steps(found, identity, 8, 8).step) == pytest.approx(50 / 127)
        ordered = rows.sort(dim=0).values
        expected = max(float(ordered[1000 - 1 - 5].max()), -float(ordered[5].min()))
        assert float(static_steps(found, identity, 8, 8, quantile=True).step) == pytest.approx(expected / 127)

    def test_rotated_inputs_are_measured_on_the_sample(self):
        found, _ = drifting()
        rotated = Transform("r", torch.zeros(16), torch.ones(16), rotation=16)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(4):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        expected = float((found.rows.double() @ matrix / 4).abs().max()) / 127
        assert float(static_steps(found, rotated, 8, 8).step) == pytest.approx(expected, rel=1e-5)

    def test_scaled_scales_all(self):
        steps = static_steps(drifting()[0], transform(), 8, 8)
        half = steps.scaled(0.5)
        for name in ("step", "bucket_steps", "frame_steps"):
            assert torch.equal(getattr(half, name), getattr(steps, name) * 0.5)
        assert torch.equal(half.bucket_boundaries, steps.bucket_boundaries)

    def test_one_timestep(self):
        steps = static_steps(drifting(steps=1)[0], transform(), 8, 8)
        assert torch.equal(steps.bucket_steps, steps.step) and len(steps.bucket_boundaries) == 0


class TestForRows:
    """Every sampled row is judged with the step it will meet while sampling."""

    def test_by_timestep_and_frame(self):
        found, inputs = drifting()
        steps = static_steps(found, transform(), 8, 8)
        by_time = steps.for_rows(found, "static_bucket")
        by_frame = steps.for_rows(found, "static_frame")
        assert by_time.shape == by_frame.shape == (len(found.rows), 1)
        for index, row in enumerate(found.rows):
            timestep = float(found.row_timesteps[index])
            place = int((inputs[timestep] == row).all(dim=1).nonzero()[0])
            assert float(by_time[index]) == float(steps.bucket_steps[int((steps.bucket_boundaries < timestep).sum())])
            assert float(by_frame[index]) == float(steps.frame_steps[place // 4 % 3])

    @pytest.mark.parametrize("activation", ["static", "static_frame"])
    def test_the_layer_step_where_there_is_no_other(self, activation):
        found, _ = drifting(frame_order=None)
        steps = static_steps(found, transform(), 8, 8)
        assert torch.equal(steps.for_rows(found, activation), steps.step)


def test_buckets_quantize_a_drifting_input_better():
    """The small steps of early timesteps pay: at 4 bits by several dB of the early outputs."""
    found, inputs = drifting(frames=1)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    errors = {}
    for activation in ("static", "static_bucket"):
        spec = QuantSpec(activation_bits=4, activation=activation, range="minmax", shift=False, scale="none")
        steps = choose(found, [Member(weight, None)], spec).steps
        step = steps.for_rows(found, activation)
        rounded = (found.rows / step).round().clamp(-7, 7) * step
        early = found.row_timesteps >= 900
        errors[activation] = float((rounded - found.rows)[early].square().sum())
    assert errors["static_bucket"] < errors["static"] / 4


def test_reach_is_over_channels_and_keeps_leading_dimensions():
    low, high = -torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    shifted = Transform("s", torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert reach(low, high, shifted).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_fewer_buckets_hold_what_the_many_held(most):
    steps, boundaries = torch.tensor([1.0, 1.1, 4.0, 2.0]), torch.tensor([100.0, 300.0, 600.0])
    merged, between = fewer_buckets(steps, boundaries, most)
    assert len(merged) == min(most, 4) and len(between) == len(merged) - 1
    assert set(between.tolist()) <= set(boundaries.tolist())
    for timestep in (50.0, 200.0, 400.0, 900.0):
        wide, narrow = (kept[int((edges < timestep).sum())] for kept, edges in ((merged, between), (steps, boundaries)))
        assert float(wide) >= float(narrow)
    assert float(merged.max()) == 4.0
