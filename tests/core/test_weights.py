"""Weight codes and the exact SCRI fold, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qvd_core.ops.semantics import code_limit
from qvd_core.weights import fold_transform, per_input_channel, quantize_weight, sum_over_inputs

all_bits = pytest.mark.parametrize("bits", range(4, 9))
shapes = pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3, 2)])


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    """Output channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(shape, generator=generator) * sizes


def grid_weight(*shape: int, bits: int, seed: int = 0) -> Tensor:
    """A weight that b-bit codes hold exactly: integers that reach the limit, times powers of two."""
    generator = torch.Generator().manual_seed(seed)
    limit = code_limit(bits)
    codes = torch.randint(-limit, limit + 1, shape, generator=generator).float()
    codes.flatten(1)[:, 0] = limit
    return codes * 2.0 ** torch.arange(-2, shape[0] - 2).view(-1, *[1] * (len(shape) - 1))


class TestQuantizeWeight:
    @all_bits
    @shapes
    def test_shapes_types_and_limits(self, bits, shape):
        quantized = quantize_weight(random_weight(*shape), bits)
        assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == shape
        assert quantized.scale.dtype == torch.float32
        assert quantized.scale.shape == (shape[0], *[1] * (len(shape) - 1))
        assert quantized.codes.abs().max() <= code_limit(bits)

    @settings(max_examples=40)
    @given(st.integers(0, 2**31), st.sampled_from([(5, 9), (3, 4, 3, 3)]), st.sampled_from([1e-30, 1.0, 1e30]))
    def test_8_bit_error_is_half_a_step(self, seed, shape, magnitude):
        weight = random_weight(*shape, seed=seed) * magnitude
        quantized = quantize_weight(weight, 8)
        error = (quantized.codes.double() * quantized.scale.double() - weight.double()).abs()
        assert (error <= quantized.scale.double() * (0.5 + 1e-5)).all()
        assert (quantized.codes.abs().flatten(1).amax(dim=1) == 127).all()

    @pytest.mark.parametrize("bits", range(4, 8))
    def test_clip_is_never_worse_than_no_clip(self, bits):
        weight = random_weight(8, 200)
        weight[:, 0] *= 4  # an outlier each
        error = (quantize_weight(weight, bits).dequantize() - weight).square().sum(dim=1)
        step = weight.abs().amax(dim=1, keepdim=True) / code_limit(bits)
        unclipped = ((weight / step).round() * step - weight).square().sum(dim=1)
        assert (error <= unclipped * (1 + 1e-5)).all()
        assert bits > 5 or (error / unclipped).mean() < 0.95

    @all_bits
    @shapes
    def test_grid_weights_are_exact(self, bits, shape):
        weight = grid_weight(*shape, bits=bits)
        assert torch.equal(quantize_weight(weight, bits).dequantize(), weight)

    @all_bits
    def test_zero_channel(self, bits):
        weight = random_weight(4, 8)
        weight[2] = 0
        quantized = quantize_weight(weight, bits)
        assert quantized.scale[2].item() == 1.0 and not quantized.codes[2].any()

    def test_smallest_numbers_have_finite_codes(self):
        weight = torch.tensor([[1e-45, 0.0], [1e-40, -1e-40]])
        quantized = quantize_weight(weight, 8)
        assert (quantized.scale > 0).all()
        assert (quantized.dequantize() - weight).abs().max() <= 1e-40

    def test_more_bits_are_better(self):
        weight = random_weight(8, 200)
        errors = [float((quantize_weight(weight, bits).dequantize() - weight).square().sum()) for bits in range(4, 9)]
        assert errors == sorted(errors, reverse=True) and errors[0] > 50 * errors[-1]


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """float64 output [S, N] (or [S, N, H, W]) of a linear or an unpadded convolution."""
    return F.linear(x, weight.double()) if weight.dim() == 2 else F.conv2d(x, weight.double())


def inputs(weight: Tensor) -> Tensor:
    """float64 inputs far off zero."""
    generator = torch.Generator().manual_seed(3)
    size = (7, weight.shape[1]) if weight.dim() == 2 else (7, weight.shape[1], 4, 5)
    return torch.randn(size, generator=generator).double() * 3 + 20


def transformed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    view = (1, -1, *[1] * (x.dim() - 2))
    return (x - shift.double().view(view)) / scale.double().view(view)


class TestFold:
    @all_bits
    @shapes
    @pytest.mark.parametrize("with_mean", [False, True])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_exact_when_weights_are_not_rounded(self, bits, shape, with_mean, with_bias):
        """codes * scale == W diag(s): then y = x~ (W s)^T + b^ is the layer itself, mean or no mean."""
        scale = 2.0 ** (torch.arange(10) % 5 - 2)
        weight = grid_weight(*shape, bits=bits) / per_input_channel(scale, torch.empty(shape))
        bias = torch.linspace(-5.0, 5.0, shape[0]) if with_bias else None
        shift = torch.linspace(-30.0, 30.0, 10)
        mean = torch.linspace(10.0, 25.0, 10) if with_mean else None
        quantized, folded = fold_transform(weight, bias, shift, scale, mean, bits)
        assert torch.equal(quantized.dequantize(), weight * per_input_channel(scale, weight))
        x = inputs(weight)
        per_output = (1, -1, *[1] * (x.dim() - 2))
        out = apply(quantized.dequantize(), transformed(x, shift, scale)) + folded.double().view(per_output)
        expected = apply(weight, x) + (0.0 if bias is None else bias.double().view(per_output))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    @pytest.mark.parametrize("bits", [4, 8])
    @shapes
    def test_bias_correction_makes_the_mean_error_zero(self, bits, shape):
        torch.manual_seed(0)
        weight, shift, scale = torch.randn(shape), torch.randn(10) * 10, torch.rand(10) + 0.5
        x = inputs(weight)
        mean = x.mean(dim=0) if x.dim() == 2 else x.mean(dim=(0, 2, 3))
        if x.dim() == 4:  # a constant image, so that every window has the channels' mean
            x = x * 0 + mean.view(1, -1, 1, 1)

        def mean_error(used_mean: Tensor | None) -> float:
            quantized, folded = fold_transform(weight, None, shift, scale, used_mean, bits)
            out = apply(quantized.dequantize(), transformed(x, shift, scale)).transpose(1, -1) + folded.double()
            return float((out - apply(weight, x).transpose(1, -1)).flatten(0, -2).mean(dim=0).abs().max())

        size = float(apply(weight, x).abs().max())
        assert mean_error(mean.float()) < 1e-5 * size
        assert mean_error(None) > 1e-3 * size

    def test_bias_is_added_once(self):
        weight, bias = random_weight(4, 6), torch.linspace(-1.0, 1.0, 4)
        zeros, ones, mean = torch.zeros(6), torch.ones(6), torch.full((6,), 2.0)
        for center in (None, mean):
            _, without = fold_transform(weight, None, zeros, ones, center, 8)
            _, with_bias = fold_transform(weight, bias, zeros, ones, center, 8)
            torch.testing.assert_close(with_bias - without, bias, rtol=0, atol=1e-5)

    def test_sum_over_inputs_in_float64(self):
        weight, values = random_weight(5, 1000), torch.linspace(1e6, 1e6 + 1, 1000)
        total = sum_over_inputs(weight, values)
        assert total.dtype == torch.float64
        torch.testing.assert_close(total, (weight.double() * values.double()).sum(dim=1), rtol=1e-12, atol=0)
