"""Weight codes and the exact SCRI fold, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qvd_core.errors import QVDError
from qvd_core.ops.semantics import code_limit
from qvd_core.rotation import hadamard
from qvd_core.weights import QuantizedWeight, fold_transform, per_input_channel, quantize_weight, sum_over_inputs

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


def correlated_rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows [count, width] whose columns share a few strong directions, far off zero."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(width, width, generator=generator) * torch.linspace(0, 5, width).neg().exp().unsqueeze(1)
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return rows @ directions + 0.02 * rows.roll(1, dims=1)


class TestQuantizeWeightForInputs:
    @all_bits
    @pytest.mark.parametrize("shape", [(6, 36), (6, 4, 3, 3)])
    def test_less_output_error_on_other_rows(self, bits, shape):
        weight, rows, held_out = random_weight(*shape), correlated_rows(300, 36), correlated_rows(300, 36, seed=1)
        nearest, compensated = quantize_weight(weight, bits), quantize_weight(weight, bits, rows)
        assert compensated.codes.shape == shape and compensated.codes.dtype == torch.int8
        assert compensated.scale.shape == nearest.scale.shape and compensated.codes.abs().max() <= code_limit(bits)

        def error(quantized: QuantizedWeight, on: Tensor) -> Tensor:
            return (on @ (quantized.dequantize() - weight).flatten(1).T).square().sum(dim=0)

        assert (error(compensated, rows) <= error(nearest, rows) * (1 + 1e-4)).all()
        assert (error(compensated, held_out) / error(nearest, held_out)).mean() < 0.5

    def test_8_bit_scales_stay(self):
        weight = random_weight(6, 36)
        assert torch.equal(quantize_weight(weight, 8, correlated_rows(99, 36)).scale, quantize_weight(weight, 8).scale)

    @all_bits
    @shapes
    def test_grid_weights_stay_exact(self, bits, shape):
        weight = grid_weight(*shape, bits=bits)
        quantized = quantize_weight(weight, bits, correlated_rows(50, weight[0].numel()))
        assert torch.equal(quantized.dequantize(), weight)

    def test_zero_channel(self):
        weight = random_weight(4, 8)
        weight[2] = 0
        quantized = quantize_weight(weight, 4, correlated_rows(50, 8))
        assert not quantized.codes[2].any() and quantized.dequantize().isfinite().all()


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


class TestFoldWithRotation:
    """x~ = H (x - shift) / scale along the input channels; 16 of them."""

    shapes = pytest.mark.parametrize("shape", [(6, 16), (6, 16, 3, 2)])
    shift = torch.linspace(-30.0, 30.0, 16)
    scale = 2.0 ** (torch.arange(16) % 5 - 2)

    def rotated_inputs(self, x: Tensor, rotation: int) -> Tensor:
        return hadamard(transformed(x, self.shift, self.scale), rotation, dim=1)

    @shapes
    @pytest.mark.parametrize("rotation", [0, 1, 4, 16])
    @pytest.mark.parametrize("with_mean", [False, True])
    @pytest.mark.parametrize("with_rows", [False, True])
    def test_exact_when_weights_are_not_rounded(self, shape, rotation, with_mean, with_rows):
        """Powers of four keep a grid weight exact in float32: W = (grid H) / scale folds back into the grid."""
        grid = grid_weight(*shape, bits=6)
        weight = hadamard(grid, rotation, dim=1) / per_input_channel(self.scale, grid)
        bias = torch.linspace(-5.0, 5.0, 6)
        mean = torch.linspace(10.0, 25.0, 16) if with_mean else None
        rows = correlated_rows(40, grid[0].numel()) if with_rows else None
        quantized, folded = fold_transform(weight, bias, self.shift, self.scale, mean, 6, rows, rotation)
        assert torch.equal(quantized.dequantize(), grid) and quantized.codes.is_contiguous()
        x = inputs(weight)
        per_output = (1, -1, *[1] * (x.dim() - 2))
        out = apply(grid, self.rotated_inputs(x, rotation)) + folded.double().view(per_output)
        expected = apply(weight, x) + bias.double().view(per_output)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    @shapes
    @pytest.mark.parametrize("rotation", [2, 8])
    def test_8_bit_output_is_close_for_every_block(self, shape, rotation):
        weight, x = torch.randn(shape, generator=torch.Generator().manual_seed(1)), inputs(torch.empty(shape))
        mean = x.mean(dim=[dim for dim in range(x.dim()) if dim != 1]).float()
        quantized, folded = fold_transform(weight, None, self.shift, self.scale, mean, 8, rotation=rotation)
        out = apply(quantized.dequantize(), self.rotated_inputs(x, rotation)).transpose(1, -1) + folded.double()
        expected = apply(weight, x).transpose(1, -1)
        assert (out - expected).square().mean() < 1e-3 * expected.var()

    @shapes
    @pytest.mark.parametrize("with_rows", [False, True])
    def test_bias_correction_makes_the_mean_error_zero(self, shape, with_rows):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        mean = torch.linspace(10.0, 25.0, 16)
        rows = correlated_rows(40, weight[0].numel()) if with_rows else None
        quantized, folded = fold_transform(weight, None, self.shift, self.scale, mean, 4, rows, rotation=8)
        x = mean.double().view(1, -1, *[1] * (weight.dim() - 2)).expand(1, 16, *weight.shape[2:])
        out = apply(quantized.dequantize(), self.rotated_inputs(x, 8)).flatten() + folded.double()
        expected = apply(weight, x).flatten()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_refuses_a_block_that_does_not_divide(self):
        ones = torch.ones(12)
        with pytest.raises(QVDError, match="blocks of 8"):
            fold_transform(torch.ones(3, 12), None, ones, ones, None, 8, rotation=8)


class TestFoldForInputs:
    """Rows of x~ make the rounding error-compensating."""

    @pytest.mark.parametrize("shape", [(12, 36), (12, 4, 3, 3)])
    def test_rounding_is_for_the_spread_around_the_mean(self, shape):
        """Two samples that differ by their mean alone give one weight once bias correction knows the mean."""
        weight, channels = torch.randn(shape, generator=torch.Generator().manual_seed(0)), shape[1]
        rows, offset = correlated_rows(400, 36), torch.linspace(-9.0, 9.0, channels)
        per_column = offset.repeat_interleave(36 // channels)
        zeros, ones = torch.zeros(channels), torch.ones(channels)
        near, _ = fold_transform(weight, None, zeros, ones, zeros, 4, rows)
        far, _ = fold_transform(weight, None, zeros, ones, offset, 4, rows + per_column)
        uncorrected, _ = fold_transform(weight, None, zeros, ones, None, 4, rows + per_column)
        assert (far.codes == near.codes).float().mean() > 0.98
        assert (uncorrected.codes == near.codes).float().mean() < 0.98

    @pytest.mark.parametrize("rotation", [0, 4])
    @pytest.mark.parametrize("with_mean", [False, True])
    def test_less_error_on_other_inputs(self, rotation, with_mean):
        weight, shift = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)), torch.linspace(-3.0, 3.0, 32)
        scale = torch.linspace(0.5, 2.0, 32)
        seen, unseen = correlated_rows(400, 32) + 5, correlated_rows(400, 32, seed=1) + 5

        def error(rows: Tensor | None) -> float:
            mean = seen.mean(dim=0) if with_mean else None
            quantized, bias = fold_transform(weight, None, shift, scale, mean, 4, rows, rotation)
            x = hadamard((unseen - shift) / scale, rotation)
            return float((F.linear(x, quantized.dequantize(), bias) - F.linear(unseen, weight)).square().sum())

        assert error(hadamard((seen - shift) / scale, rotation)) < 0.4 * error(None)

    @pytest.mark.parametrize("with_mean", [False, True])
    def test_refuses_rows_of_another_layer(self, with_mean):
        ones = torch.ones(4)
        with pytest.raises(QVDError, match=r"\[S, 36\], got \[9, 4\]"):
            fold_transform(torch.ones(3, 4, 3, 3), None, ones, ones, ones if with_mean else None, 4, torch.ones(9, 4))
