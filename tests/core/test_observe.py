"""Observers: streamed statistics equal those of the whole tensor; samples are bounded and are what the layer sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.observe import ROWS_KEPT, ROWS_PER_CALL, FeatureObserver, InputObserver
from qvd_core.temporal_fit import stack_features


def observer(module: nn.Module, seed: int = 0) -> InputObserver:
    return InputObserver(module, torch.Generator().manual_seed(seed))


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
