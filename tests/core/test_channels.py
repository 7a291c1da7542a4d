"""SCRI: the candidates, the choice among them, static grids and coverage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qvd_core import QuantSpec
from qvd_core.channels import (
    InputStatistics,
    Member,
    Transform,
    candidates,
    choose_transform,
    full_output,
    measure,
    quantized_output,
    static_step,
)
from qvd_core.ops.semantics import code_limit, encode, transform
from qvd_core.weights import quantize_weight

STATIC = QuantSpec(activation="static")
activations = pytest.mark.parametrize("activation", ["token", "static"])


def statistics(rows: Tensor, taps: int = 1) -> InputStatistics:
    per_channel = rows.reshape(len(rows), -1, taps).transpose(1, 2).flatten(0, 1)
    return InputStatistics(per_channel.amin(dim=0), per_channel.amax(dim=0), per_channel.mean(dim=0), rows)


def linear(outputs: int, inputs: int, seed: int = 0) -> Member:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return Member(weight, torch.randn(outputs, generator=generator))


def scattered(seed: int = 0, rows: int = 200, channels: int = 24) -> Tensor:
    """Channels of ranges from 0.1 to 10, each off centre by twice its range."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.logspace(-1, 1, channels)
    return (torch.randn(rows, channels, generator=generator) + 2) * width


def relative_error(found: InputStatistics, members: list[Member], choice: Transform, spec: QuantSpec) -> float:
    error = 0.0
    for member in members:
        target = full_output(found, member)
        error += float(
            (quantized_output(found, member, choice, spec)[0] - target).square().sum() / target.square().sum()
        )
    return error


class TestCandidates:
    @settings(max_examples=25)
    @given(
        seed=st.integers(0, 999),
        shift=st.booleans(),
        scale=st.sampled_from(["search", "smooth", "none"]),
        portable=st.booleans(),
    )
    def test_respect_the_spec(self, seed, shift, scale, portable):
        spec = QuantSpec(shift=shift, scale=scale, portable=portable)
        found = statistics(scattered(seed))
        every = list(candidates(found, [linear(8, 24)], spec))
        assert every[0].name == "none" and len({candidate.name for candidate in every}) == len(every)
        for candidate in every:
            assert candidate.shift.shape == candidate.scale.shape == (24,)
            assert candidate.shift.dtype == candidate.scale.dtype == torch.float32
            assert candidate.shift.isfinite().all() and candidate.scale.isfinite().all() and (candidate.scale > 0).all()
        assert any(candidate.shift.any() for candidate in every) == (shift and not portable)
        assert any((candidate.scale != 1).any() for candidate in every) == (scale != "none" and not portable)
        assert any("threshold" in candidate.name for candidate in every) == (scale == "search" and not portable)
        assert any("smooth" in candidate.name for candidate in every) == (scale != "none" and not portable)

    def test_mid_shift_centres_and_thresholds_bring_wide_channels_to_one_range(self):
        """METHOD 3.3: s = max(1, a / t) leaves narrow channels alone and takes wide ones to exactly [-t, t]."""
        found = statistics(scattered())
        every = {candidate.name: candidate for candidate in candidates(found, [linear(8, 24)], QuantSpec())}
        middle = every["mid+threshold 0.25"]
        low, high = ((extreme - middle.shift) / middle.scale for extreme in (found.minimum, found.maximum))
        torch.testing.assert_close(low, -high)
        half = (found.maximum - found.minimum) / 2
        limit = half.mean() + 0.25 * (half.max() - half.mean())
        torch.testing.assert_close(high, half.clamp(max=limit))
        assert (middle.scale == 1).any() and (middle.scale > 1).any()

    def test_smooth_scales_are_free_of_units(self):
        """Scaling the input or the weight as a whole changes no smooth scale."""
        found, member = statistics(scattered()), linear(8, 24)
        larger = statistics(scattered() * 64)
        heavier = Member(member.weight * 8, None)
        for one, two in zip(
            candidates(found, [member], QuantSpec(shift=False, scale="smooth")),
            candidates(larger, [heavier], QuantSpec(shift=False, scale="smooth")),
            strict=True,
        ):
            torch.testing.assert_close(one.scale, two.scale, rtol=1e-4, atol=0)

    def test_equal_centred_ranges_get_no_scale(self):
        rows = torch.rand(300, 16) * 2 - 1
        rows[0], rows[1] = 1.0, -1.0
        for candidate in candidates(statistics(rows), [linear(8, 16)], QuantSpec(shift=False)):
            assert "threshold" not in candidate.name or (candidate.scale == 1).all()

    @pytest.mark.parametrize("value", [0.0, 5.0])
    def test_dead_channels_stay_finite(self, value):
        rows = scattered()
        rows[:, 3] = value
        member = linear(8, 24)
        member.weight[:, 5] = 0.0
        for candidate in candidates(statistics(rows), [member], QuantSpec()):
            assert candidate.scale.isfinite().all() and (candidate.scale > 0).all(), candidate.name
        chosen = choose_transform(statistics(rows), [member], STATIC)
        assert measure(statistics(rows), member, chosen, STATIC).sqnr_db > 35


class TestChoice:
    @settings(max_examples=8)
    @given(
        seed=st.integers(0, 9999),
        activation=st.sampled_from(["token", "static"]),
        bits=st.sampled_from([(8, 8), (6, 6), (4, 8)]),
        correction=st.booleans(),
        members=st.integers(1, 3),
    )
    def test_never_worse_than_none_on_its_sample(self, seed, activation, bits, correction, members):
        spec = QuantSpec(*bits, activation=activation, bias_correction=correction)
        found = statistics(scattered(seed, rows=60))
        group = [linear(8, 24, seed + index) for index in range(members)]
        chosen = choose_transform(found, group, spec)
        errors = {each.name: relative_error(found, group, each, spec) for each in candidates(found, group, spec)}
        assert errors[chosen.name] == min(errors.values()) <= errors["none"]

    def test_one_sided_input_gets_a_shift(self):
        rows = F.gelu(torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * 2)
        found, member = statistics(rows), linear(16, 32)
        chosen = choose_transform(found, [member], STATIC)
        assert (chosen.shift > 0.5).all()
        with_shift = measure(found, member, chosen, STATIC).sqnr_db
        without = max(
            measure(found, member, each, STATIC).sqnr_db
            for each in candidates(found, [member], QuantSpec(activation="static", shift=False))
        )
        assert with_shift > without + 2

    def test_constant_input_is_exact(self):
        rows = torch.linspace(-3.0, 5.0, 12).expand(50, 12).contiguous()
        found, member = statistics(rows), linear(8, 12)
        chosen = choose_transform(found, [member], STATIC)
        assert measure(found, member, chosen, STATIC).sqnr_db > 100

    def test_all_zero_input(self):
        found, member = statistics(torch.zeros(20, 12)), linear(8, 12)
        chosen = choose_transform(found, [member], STATIC)
        assert not chosen.shift.any() and torch.equal(chosen.scale, torch.ones(12))
        assert torch.equal(quantized_output(found, member, chosen, STATIC)[0], member.bias.expand(20, 8))

    def test_portable_chooses_none(self):
        chosen = choose_transform(statistics(scattered()), [linear(8, 24)], QuantSpec(portable=True))
        assert torch.equal(chosen.shift, torch.zeros(24)) and torch.equal(chosen.scale, torch.ones(24))


class TestStaticStep:
    @settings(max_examples=30)
    @given(st.integers(0, 9999), st.integers(4, 8))
    def test_just_covers_the_range(self, seed, bits):
        rows = scattered(seed)
        found = statistics(rows)
        torch.manual_seed(seed)
        choice = Transform("any", torch.randn(24) * 5, torch.rand(24) + 0.5)
        step = static_step(found.minimum, found.maximum, choice, bits)
        ratio = transform(rows, choice.shift, choice.scale).double().abs().max() / step.double()
        assert step.shape == (1,) and float(ratio) == pytest.approx(code_limit(bits), rel=1e-5)

    def test_constant_input_has_a_positive_step(self):
        assert static_step(torch.ones(3), torch.ones(3), Transform("mid", torch.ones(3), torch.ones(3)), 8).item() > 0


class TestQuantizedOutput:
    @activations
    @pytest.mark.parametrize("taps", [1, 6])
    def test_is_what_the_formula_says(self, activation, taps):
        """y = int8((x - z) / s) (W~ + noise)^T + b^ in float64, per token, per image (here: the sample) or static."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(50, 4 * taps, generator=generator) + 1
        found = statistics(rows, taps)
        weight = torch.randn(5, 4, 3, 2, generator=generator) if taps > 1 else torch.randn(5, 4, generator=generator)
        shift, scale = torch.randn(4, generator=generator), torch.rand(4, generator=generator) + 0.5
        spec = QuantSpec(activation=activation)
        out, codes = quantized_output(found, Member(weight, None), Transform("t", shift, scale), spec)

        x = (rows.double() - shift.double().repeat_interleave(taps)) / scale.double().repeat_interleave(taps)
        peak = x.abs().amax() if activation == "static" or taps > 1 else x.abs().amax(dim=1, keepdim=True)
        expected_codes = (x / (peak / 127)).round()
        assert ((codes.double() - expected_codes).abs() > 0).float().mean() < 0.01  # float32 at an exact half
        folded = (
            quantize_weight(weight * scale.view(1, 4, *[1] * (weight.dim() - 2)), 8).dequantize().flatten(1).double()
        )
        center = found.mean.double().repeat_interleave(taps)
        bias = weight.flatten(1).double() @ center
        bias = bias + folded @ ((shift.double() - found.mean.double()) / scale.double()).repeat_interleave(taps)
        torch.testing.assert_close(out.double(), (codes.double() * peak / 127) @ folded.T + bias, rtol=1e-4, atol=1e-4)

    def test_a_1x1_convolution_has_one_step_like_any_convolution(self):
        rows = torch.randn(50, 4) * torch.logspace(-2, 2, 50)[:, None]
        _, codes = quantized_output(
            statistics(rows), Member(torch.randn(5, 4, 1, 1), None), Transform.identity(4), QuantSpec()
        )
        assert torch.equal(codes, encode(rows, rows.abs().max() / 127, 8))


class TestMeasure:
    def test_coverage_grows_on_scattered_channels(self):
        found, member = statistics(scattered()), linear(8, 24)
        before = measure(found, member, Transform.identity(24), STATIC)
        after = measure(found, member, choose_transform(found, [member], STATIC), STATIC)
        assert after.coverage > 2 * before.coverage and after.sqnr_db > before.sqnr_db
        assert 0 <= before.coverage <= after.coverage <= 1

    def test_full_and_empty_coverage(self):
        rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        quality = measure(statistics(rows), linear(3, 2), Transform.identity(2), STATIC)
        assert quality.coverage == pytest.approx((254 / 255 + 0) / 2)

    def test_sqnr_against_float64(self):
        found, member = statistics(scattered()), linear(8, 24)
        noisy, _ = quantized_output(found, member, Transform.identity(24), STATIC)
        exact = full_output(found, member).double()
        expected = 10 * torch.log10(exact.square().sum() / (noisy.double() - exact).square().sum())
        assert measure(found, member, Transform.identity(24), STATIC).sqnr_db == pytest.approx(
            float(expected), abs=1e-3
        )


def test_shift_and_scale_must_be_worth_their_cost():
    """Equal, centred channels: nothing is gained by more than chance, so nothing is applied."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 32, generator=generator).clamp(-3, 3)
    edge = torch.full((32,), 3.0)
    statistics = InputStatistics(-edge, edge, rows.mean(dim=0), rows)
    member = Member(torch.randn(16, 32, generator=generator).sign(), None)
    assert choose_transform(statistics, [member], QuantSpec()).parts == 0
