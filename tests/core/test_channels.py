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
    _HEADROOM,
    Choice,
    InputStatistics,
    Member,
    Transform,
    candidates,
    choose,
    full_output,
    measure,
    quantized_output,
)
from qvd_core.ops.semantics import code_limit, encode
from qvd_core.steps import static_steps
from qvd_core.weights import quantize_weight

STATIC = QuantSpec(activation="static", range="minmax")
activations = pytest.mark.parametrize("activation", ["token", "static"])


def statistics(rows: Tensor, taps: int = 1) -> InputStatistics:
    per_channel = rows.reshape(len(rows), -1, taps).transpose(1, 2).flatten(0, 1)
    return InputStatistics(per_channel.amin(dim=0), per_channel.amax(dim=0), per_channel.mean(dim=0), rows)


def linear(outputs: int, inputs: int, seed: int = 0) -> Member:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return Member(weight, torch.randn(outputs, generator=generator))


def scattered(seed: int = 0, rows: int = 200, channels: int = 32) -> Tensor:
    """Channels of ranges from 0.1 to 10, each off centre by twice its range."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.logspace(-1, 1, channels)
    return (torch.randn(rows, channels, generator=generator) + 2) * width


def untouched(found: InputStatistics, spec: QuantSpec, transform: Transform | None = None) -> Choice:
    """A transform (default: none) with the static steps that hold everything seen."""
    transform = transform or Transform.identity(found.channels)
    return Choice(transform, static_steps(found, transform, spec.activation_bits, spec.buckets))


def relative_error(found: InputStatistics, members: list[Member], choice: Choice, spec: QuantSpec) -> float:
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
        scale=st.sampled_from(["search", "threshold", "smooth", "none"]),
        rotate=st.booleans(),
    )
    def test_respect_the_spec(self, seed, shift, scale, rotate):
        spec = QuantSpec(shift=shift, scale=scale, rotate=rotate)
        found = statistics(scattered(seed))
        every = list(candidates(found, [linear(8, 32)], spec))
        assert every[0].name == "none" and len({candidate.name for candidate in every}) == len(every)
        for candidate in every:
            assert candidate.shift.shape == candidate.scale.shape == (32,)
            assert candidate.shift.dtype == candidate.scale.dtype == torch.float32
            assert candidate.shift.isfinite().all() and candidate.scale.isfinite().all() and (candidate.scale > 0).all()
        assert any(candidate.rotation for candidate in every) == rotate
        assert any(candidate.shift.any() for candidate in every) == shift
        assert any((candidate.scale != 1).any() for candidate in every) == (scale != "none")
        assert any("threshold" in candidate.name for candidate in every) == (scale in ("search", "threshold"))
        assert any("smooth" in candidate.name for candidate in every) == (scale in ("search", "smooth"))

    def test_mid_shift_centres_and_thresholds_bring_wide_channels_to_one_range(self):
        """METHOD 3.3: s = max(1, a / t) leaves narrow channels alone and takes wide ones to exactly [-t, t]."""
        found = statistics(scattered())
        every = {candidate.name: candidate for candidate in candidates(found, [linear(8, 32)], QuantSpec())}
        middle = every["mid+threshold 0.25"]
        low, high = ((extreme - middle.shift) / middle.scale for extreme in (found.minimum, found.maximum))
        torch.testing.assert_close(low, -high)
        half = (found.maximum - found.minimum) / 2
        limit = half.mean() + 0.25 * (half.max() - half.mean())
        torch.testing.assert_close(high, half.clamp(max=limit))
        assert (middle.scale == 1).any() and (middle.scale > 1).any()

    def test_smooth_scales_are_free_of_units(self):
        """Scaling the input or the weight as a whole changes no smooth scale."""
        found, member = statistics(scattered()), linear(8, 32)
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
        member = linear(8, 32)
        member.weight[:, 5] = 0.0
        for candidate in candidates(statistics(rows), [member], QuantSpec()):
            assert candidate.scale.isfinite().all() and (candidate.scale > 0).all(), candidate.name
        chosen = choose(statistics(rows), [member], STATIC)
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
        spec = QuantSpec(*bits, activation=activation, range="minmax", bias_correction=correction)
        found = statistics(scattered(seed, rows=60))
        group = [linear(8, 32, seed + index) for index in range(members)]
        chosen = choose(found, group, spec).transform
        errors, handicapped = {}, {}
        for each in candidates(found, group, spec):
            errors[each.name] = relative_error(found, group, untouched(found, spec, each), spec)
            handicapped[each.name] = errors[each.name] * (1 + 0.05 * each.parts)
        assert handicapped[chosen.name] == min(handicapped.values()) and errors[chosen.name] <= errors["none"]

    def test_one_sided_input_gets_a_shift(self):
        rows = F.gelu(torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * 2)
        found, member = statistics(rows), linear(16, 32)
        chosen = choose(found, [member], STATIC)
        assert (chosen.transform.shift > 0.5).all()
        with_shift = measure(found, member, chosen, STATIC).sqnr_db
        without = max(
            measure(found, member, untouched(found, STATIC, each), STATIC).sqnr_db
            for each in candidates(found, [member], QuantSpec(activation="static", shift=False))
        )
        assert with_shift > without + 2

    def test_constant_input_is_exact(self):
        rows = torch.linspace(-3.0, 5.0, 12).expand(50, 12).contiguous()
        found, member = statistics(rows), linear(8, 12)
        chosen = choose(found, [member], STATIC)
        assert measure(found, member, chosen, STATIC).sqnr_db > 100

    def test_all_zero_input(self):
        found, member = statistics(torch.zeros(20, 12)), linear(8, 12)
        chosen = choose(found, [member], STATIC)
        assert chosen.transform.parts == 0 and (chosen.steps.step > 0).all()
        assert torch.equal(quantized_output(found, member, chosen, STATIC)[0], member.bias.expand(20, 8))

    def test_only_what_is_allowed_is_judged_and_chosen(self):
        """A restriction that drops the scale: the best shift is found, not the best pair with its scale cut off."""
        found, group = statistics(scattered()), [linear(8, 32)]

        def without_scale(transform: Transform) -> Transform:
            return Transform(transform.name, transform.shift, torch.ones(32))

        chosen = choose(found, group, STATIC, without_scale).transform
        assert torch.equal(chosen.scale, torch.ones(32)) and chosen.shift.any()
        same = choose(found, group, QuantSpec(activation="static", range="minmax", scale="none")).transform
        assert torch.equal(chosen.shift, same.shift)
        assert choose(found, group, STATIC, Transform.without_effect).transform.parts == 0

    def test_a_channel_that_towers_over_its_block_is_rotated(self):
        """The outlier is symmetric and, behind a weight of the others' size, no scale pays: rotation does."""
        rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
        rows[:, 5] *= 60.0 * (torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.05)
        spec = QuantSpec(8, 4, activation="static", range="minmax", scale="none", shift=False, rotate=True)
        found, member = statistics(rows), linear(16, 32)
        chosen = choose(found, [member], spec)
        assert chosen.transform.rotation == 32
        plain = measure(found, member, untouched(found, spec), spec)
        assert measure(found, member, chosen, spec).sqnr_db > plain.sqnr_db + 2


class TestRange:
    def test_search_clips_rare_outliers(self):
        rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
        rows[7, 3] = 8.0
        found, member = statistics(rows), linear(16, 32)
        spec = QuantSpec(activation_bits=4, activation="static", shift=False, scale="none")
        searched = choose(found, [member], spec)
        everything = untouched(found, spec)
        share = float(searched.steps.step / everything.steps.step)
        assert 0.3 <= share < 0.7
        assert measure(found, member, searched, spec).sqnr_db > measure(found, member, everything, spec).sqnr_db + 2

    @settings(max_examples=8)
    @given(seed=st.integers(0, 9999), bits=st.integers(4, 8))
    def test_search_takes_a_share_of_least_weighted_input_error(self, seed, bits):
        """In float64: every channel's squared error weighs as much as its squared weights. Eight bits get room."""
        rows = torch.randn(80, 32, generator=torch.Generator().manual_seed(seed)) ** 3
        found, member = statistics(rows), linear(8, 32, seed)
        spec = QuantSpec(activation_bits=bits, activation="static", shift=False, scale="none")
        chosen = float(choose(found, [member], spec).steps.step)
        energy = quantize_weight(member.weight, 8).dequantize().double().square().sum(dim=0)
        full, limit = float(rows.abs().max()) / code_limit(bits), code_limit(bits)
        errors = {}
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            step = full * share
            error = (rows.double() / step).round().clamp(-limit, limit) * step - rows.double()
            errors[share] = float((error.square() * energy).sum())
        best = min(errors, key=lambda share: abs(full * share * _HEADROOM.get(bits, 1.0) - chosen))
        assert chosen == pytest.approx(full * best * _HEADROOM.get(bits, 1.0), rel=1e-5)
        neighbours = [errors[share] for share in errors if abs(share - best) < 0.11]
        assert errors[best] <= min(neighbours) * 1.0001 and errors[best] <= 1.1 * min(errors.values())

    @pytest.mark.parametrize("activation", ["static", "token"])
    def test_minmax_keeps_everything_and_dynamic_layers_search_nothing(self, activation):
        found, member = statistics(scattered()), linear(8, 32)
        range_of = {"static": "minmax", "token": "search"}[activation]
        chosen = choose(found, [member], QuantSpec(activation=activation, range=range_of))
        whole = static_steps(found, chosen.transform, 8, 8)
        assert torch.equal(chosen.steps.step, whole.step)


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
        out, codes = quantized_output(
            found, Member(weight, None), untouched(found, spec, Transform("t", shift, scale)), spec
        )

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
        found, spec = statistics(rows), QuantSpec()
        _, codes = quantized_output(found, Member(torch.randn(5, 4, 1, 1), None), untouched(found, spec), spec)
        assert torch.equal(codes, encode(rows, rows.abs().max() / 127, 8))


class TestMeasure:
    def test_coverage_grows_on_scattered_channels(self):
        found, member = statistics(scattered()), linear(8, 32)
        before = measure(found, member, untouched(found, STATIC), STATIC)
        after = measure(found, member, choose(found, [member], STATIC), STATIC)
        assert after.coverage > 2 * before.coverage and after.sqnr_db > before.sqnr_db
        assert 0 <= before.coverage <= after.coverage <= 1

    def test_full_and_empty_coverage(self):
        rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        found = statistics(rows)
        quality = measure(found, linear(3, 2), untouched(found, STATIC), STATIC)
        assert quality.coverage == pytest.approx((254 / 255 + 0) / 2)

    def test_sqnr_against_float64(self):
        found, member = statistics(scattered()), linear(8, 32)
        noisy, _ = quantized_output(found, member, untouched(found, STATIC), STATIC)
        exact = full_output(found, member).double()
        expected = 10 * torch.log10(exact.square().sum() / (noisy.double() - exact).square().sum())
        assert measure(found, member, untouched(found, STATIC), STATIC).sqnr_db == pytest.approx(
            float(expected), abs=1e-3
        )


def test_shift_and_scale_must_be_worth_their_cost():
    """Equal, centred channels: nothing is gained by more than chance, so nothing is applied."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 32, generator=generator).clamp(-3, 3)
    edge = torch.full((32,), 3.0)
    statistics = InputStatistics(-edge, edge, rows.mean(dim=0), rows)
    member = Member(torch.randn(16, 32, generator=generator).sign(), None)
    assert choose(statistics, [member], QuantSpec()).transform.parts == 0
