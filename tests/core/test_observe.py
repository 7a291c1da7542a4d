"""Observers: streamed statistics equal those of the whole tensor; samples are bounded and are what the layer sees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.observe import ROWS_KEPT, ROWS_PER_CALL, BucketedRanges, FeatureObserver, InputObserver
from qvd_core.spec import MOST_BUCKETS
from qvd_core.temporal_fit import stack_features
from tests.core.video_clock import clock, set_clock


def observer(module: nn.Module, seed: int = 0) -> InputObserver:
    return InputObserver(module, torch.Generator().manual_seed(seed), clock())


class TestStatistics:
    @settings(max_examples=25)
    @given(
        st.integers(0, 9999),
        st.lists(st.integers(1, 299), max_size=4, unique=True).map(sorted),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def test_linear_equals_the_whole_tensor_for_any_split(self, seed, cuts, dtype):
        x = (torch.randn(300, 7, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)
        watch = observer(nn.Linear(7, 2))
        for piece in x.tensor_split(cuts):
            watch.observe(piece[None])
        assert watch.count == 300
        assert torch.equal(watch.minimum, x.float().amin(dim=0))
        assert torch.equal(watch.maximum, x.float().amax(dim=0))
        torch.testing.assert_close(watch.mean, x.double().mean(dim=0).float(), rtol=1e-6, atol=1e-6)

    def test_mean_of_many_small_terms(self):
        watch = observer(nn.Linear(1, 1))
        for value in (1e6, *[0.01] * 500):
            watch.observe(torch.full((10, 1), value))
        assert watch.mean.item() == pytest.approx((1e6 + 0.01 * 500) / 501, rel=1e-7)

    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
    def test_any_batch_dimensions(self, shape):
        x = torch.randn(shape)
        watch = observer(nn.Linear(5, 2))
        watch.observe(x)
        assert torch.equal(watch.minimum, x.reshape(-1, 5).amin(dim=0)) and watch.count == x.numel() // 5

    @pytest.mark.parametrize("padding", [0, 1])
    def test_convolution_ranges_hold_the_padding(self, padding):
        """Zeros at the border are quantized too: a static grid without them would clip the border."""
        x = torch.rand(2, 3, 4, 5) + torch.tensor([1.0, -3.0, -0.5]).view(1, 3, 1, 1)
        watch = observer(nn.Conv2d(3, 2, 3, padding=padding))
        watch.observe(x)
        whole = F.pad(x, [padding] * 4)
        assert torch.equal(watch.minimum, whole.amin(dim=(0, 2, 3))) and torch.equal(
            watch.maximum, whole.amax(dim=(0, 2, 3))
        )
        torch.testing.assert_close(watch.mean, x.mean(dim=(0, 2, 3)))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_values_are_not_lost(self, bad):
        watch = observer(nn.Linear(4, 2))
        x = torch.randn(6, 4)
        x[3, 1] = bad
        for piece in (torch.randn(6, 4), x, torch.randn(6, 4)):
            watch.observe(piece)
        assert watch.maximum.isfinite().tolist() == [True, False, True, True]


class TestRows:
    def test_short_inputs_are_kept_whole(self):
        x = torch.randn(ROWS_PER_CALL, 3)
        watch = observer(nn.Linear(3, 2))
        watch.observe(x)
        assert torch.equal(watch.rows, x)

    def test_reservoir_is_bounded_and_holds_rows_of_every_call(self):
        watch = observer(nn.Linear(3, 2))
        calls = 40
        for call in range(calls):
            watch.observe(torch.full((100, 3), float(call)).to(torch.bfloat16))
        assert watch.rows.shape == (ROWS_KEPT, 3) and watch.rows.dtype == torch.float32
        per_call = watch.rows[:, 0].long().bincount(minlength=calls)
        expected = ROWS_KEPT / calls
        assert len(per_call) == calls and per_call.min() > expected / 4 and per_call.max() < expected * 3

    def test_rows_of_one_call_are_spread(self):
        watch = observer(nn.Linear(1, 1))
        watch.observe(torch.arange(10000.0)[:, None])
        assert len(watch.rows) == ROWS_PER_CALL
        assert watch.rows.min() < 2000 and watch.rows.max() > 8000

    def test_the_same_seed_gives_the_same_rows(self):
        torch.manual_seed(0)
        inputs = [torch.randn(1000, 3) for _ in range(3)]
        watches = [observer(nn.Linear(3, 2)) for _ in range(2)]
        for index, watch in enumerate(watches):
            torch.manual_seed(index)  # the global generator plays no part
            for x in inputs:
                watch.observe(x)
        assert torch.equal(watches[0].rows, watches[1].rows)

    @pytest.mark.parametrize(
        "module",
        [
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(3, 4, (3, 2), stride=2, padding=(2, 1)),
            nn.Conv2d(3, 4, 2, padding="same", dilation=3),
            nn.Conv2d(3, 4, 1),
        ],
    )
    def test_patches_are_what_the_convolution_multiplies(self, module):
        x = torch.randn(1, 3, 7, 6)
        watch = observer(module)
        watch.observe(x)
        outputs = F.linear(watch.rows, module.weight.flatten(1), module.bias)
        pixels = module(x)[0].flatten(1).T
        assert len(pixels) <= ROWS_PER_CALL
        torch.testing.assert_close(outputs, pixels, rtol=1e-4, atol=1e-5)

    def test_patches_of_large_images_are_sampled_from_the_whole_batch(self):
        x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 20, 20)
        watch = observer(nn.Conv2d(1, 1, 3))
        for _ in range(20):
            watch.observe(x)
        assert watch.rows.shape == (ROWS_KEPT, 9)
        assert set(watch.rows[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0}


def test_inputs_are_not_kept_alive_or_changed():
    x = torch.randn(4, 3, requires_grad=True)
    before: Tensor = x.detach().clone()
    watch = observer(nn.Linear(3, 2))
    watch.observe(x)
    assert torch.equal(x, before) and not watch.rows.requires_grad
    with torch.no_grad():
        x.zero_()
    assert torch.equal(watch.rows, before)


class TestFeatures:
    def test_first_row_per_timestep_highest_noise_first(self):
        watch = FeatureObserver()
        for timestep, value in ((500.0, 1.0), (900.0, 2.0), (500.0, 3.0), (0.5, 4.0)):
            watch.observe(timestep, torch.full((2, 3, 4), value, dtype=torch.bfloat16))
        stacked = stack_features(watch.features)
        assert torch.equal(stacked, torch.tensor([[2.0], [1.0], [4.0]]).expand(3, 4))
        assert stacked.dtype == torch.float32


class TestTimesteps:
    """Ranges per timestep in a bounded number of buckets."""

    def test_few_timesteps_have_a_bucket_each(self):
        hours = clock()
        watch = InputObserver(nn.Linear(5, 2), torch.Generator(), hours)
        seen = {}
        for index, timestep in enumerate([900.0, 100.0, 500.0, 900.0]):
            set_clock(hours, timestep)
            x = torch.randn(20, 5, generator=torch.Generator().manual_seed(index)) * (index + 1)
            watch.observe(x)
            seen[timestep] = torch.cat([seen[timestep], x]) if timestep in seen else x
        assert [(bucket.first, bucket.last) for bucket in watch.ranges.buckets] == [(t, t) for t in sorted(seen)]
        for bucket in watch.ranges.buckets:
            assert torch.equal(bucket.minimum, seen[bucket.first].amin(dim=0))
            assert torch.equal(bucket.maximum, seen[bucket.first].amax(dim=0))

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, 999), min_size=33, max_size=150), st.integers(0, 9999))
    def test_many_timesteps_share_buckets_that_hold_all_of_them(self, timesteps, seed):
        ranges = BucketedRanges()
        values = torch.randn(len(timesteps), 3, generator=torch.Generator().manual_seed(seed))
        for timestep, value in zip(timesteps, values, strict=True):
            ranges.observe(float(timestep), value - 1, value + 1)
        buckets = ranges.buckets
        assert len(buckets) == min(MOST_BUCKETS, len(set(timesteps)))
        for left, right in pairwise(buckets):
            assert left.first <= left.last < right.first <= right.last
        for timestep, value in zip(timesteps, values, strict=True):
            (home,) = [bucket for bucket in buckets if bucket.first <= timestep <= bucket.last]
            assert bool((home.minimum <= value - 1).all()) and bool((home.maximum >= value + 1).all())
        whole = torch.stack([bucket.minimum for bucket in buckets]).amin(dim=0)
        assert torch.equal(whole, values.amin(dim=0) - 1)

    def test_neighbours_in_time_are_merged_first(self):
        ranges = BucketedRanges()
        for timestep in [*range(0, MOST_BUCKETS * 10, 10), 101]:
            ranges.observe(float(timestep), torch.zeros(1), torch.ones(1))
        assert [(bucket.first, bucket.last) for bucket in ranges.buckets if bucket.first != bucket.last] == [(100, 101)]

    def test_memory_does_not_grow_with_steps_or_prompts(self):
        hours = clock()
        watch = InputObserver(nn.Linear(64, 2), torch.Generator().manual_seed(0), hours, "major")
        sizes = []
        for prompt in range(3):
            for step in range(50):
                set_clock(hours, 1000.0 - 20 * step + prompt, 2, 3)
                watch.observe(torch.randn(2, 36, 64))
            sizes.append(watch.memory_bytes())
        assert sizes[0] == sizes[1] == sizes[2]
        ranges = 2 * MOST_BUCKETS * 64 * 4 + 2 * 3 * 64 * 4
        sample = ROWS_KEPT * (64 + 2 + 1) * 4
        assert sizes[0] == ranges + 64 * 8 + sample

    def test_a_model_without_timesteps_has_one_bucket(self):
        watch = observer(nn.Linear(5, 2))
        for _ in range(3):
            watch.observe(torch.randn(4, 5))
        assert len(watch.ranges.buckets) == 1 and not watch.row_timesteps.any()


class TestFrames:
    @pytest.mark.parametrize("order", ["major", "minor"])
    @pytest.mark.parametrize("frames", [1, 3])
    def test_linear_ranges_per_frame(self, order, frames):
        x = torch.randn(2, frames, 4, 5, generator=torch.Generator().manual_seed(0))
        x = x * (1 + torch.arange(frames)).view(1, -1, 1, 1)
        watch = InputObserver(nn.Linear(5, 2), torch.Generator(), clock(500.0, 2, frames), order)
        for piece in (x, x * 0.5 + 1):
            rows = piece if order == "major" else piece.transpose(1, 2)
            watch.observe(rows.reshape(2, -1, 5))
        both = torch.stack([x, x * 0.5 + 1])
        assert torch.equal(watch.frame_minimum, both.amin(dim=(0, 1, 3)))
        assert torch.equal(watch.frame_maximum, both.amax(dim=(0, 1, 3)))
        for row, frame in zip(watch.rows, watch.row_frames, strict=True):
            assert bool((both[:, :, frame] == row).all(dim=-1).any())

    def test_convolution_ranges_per_frame_hold_the_padding(self):
        x = torch.rand(6, 3, 4, 4) + torch.tensor([1.0, -3.0, -0.5]).view(1, 3, 1, 1)
        watch = InputObserver(nn.Conv2d(3, 2, 3, padding=1), torch.Generator(), clock(500.0, 2, 3), "major")
        watch.observe(x)
        whole = F.pad(x, [1] * 4).view(2, 3, 3, 6, 6)
        assert torch.equal(watch.frame_minimum, whole.amin(dim=(0, 3, 4)))
        assert torch.equal(watch.frame_maximum, whole.amax(dim=(0, 3, 4)))

    def test_images_know_their_frame(self):
        x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 5, 5)
        watch = InputObserver(nn.Conv2d(1, 1, 3), torch.Generator().manual_seed(0), clock(500.0, 2, 3), "major")
        for _ in range(30):
            watch.observe(x)
        assert torch.equal(watch.row_frames, watch.rows[:, 0].long() % 3) and len(watch.row_frames.unique()) == 3

    @pytest.mark.parametrize("order", ["major", "minor"])
    def test_another_number_of_frames_ends_the_scales_per_frame(self, order):
        hours = clock(500.0, 1, 3)
        watch = InputObserver(nn.Linear(5, 2), torch.Generator(), hours, order)
        watch.observe(torch.randn(1, 6, 5))
        assert watch.frame_minimum is not None
        set_clock(hours, 500.0, 1, 2)
        watch.observe(torch.randn(1, 6, 5))
        assert watch.frame_order is watch.frame_minimum is watch.frame_maximum is None
        set_clock(hours, 500.0, 1, 3)
        watch.observe(torch.randn(1, 6, 5))
        assert watch.frame_minimum is None and watch.count == 18

    def test_rows_that_are_no_whole_frames_end_them_too(self):
        watch = InputObserver(nn.Linear(5, 2), torch.Generator(), clock(500.0, 2, 3), "major")
        watch.observe(torch.randn(7, 5))
        assert watch.frame_order is None and set(watch.row_frames.tolist()) == {-1}


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_an_empty_input_is_no_input(shape):
    watch = observer(nn.Linear(5, 2))
    watch.observe(torch.zeros(shape))
    assert watch.count == 0 and watch.memory_bytes() == 0
    watch.observe(torch.ones(1, 5))
    watch.observe(torch.zeros(shape))
    assert watch.count == 1 and torch.equal(watch.minimum, torch.ones(5))
