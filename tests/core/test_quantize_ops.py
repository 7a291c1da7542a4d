"""Quantizing activations and images, on every backend, against float64 and against the formula bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qvd_core.ops import available_backends, int8_linear, quantize_activation, quantize_image
from qvd_core.ops.semantics import MINIMUM_STEP, code_limit, transform

backends = pytest.mark.parametrize("backend", available_backends("cpu"))
ONE = torch.ones(1)
WEIGHT = torch.randint(-128, 128, (4, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@backends
class TestQuantizeActivation:
    @settings(max_examples=40)
    @given(
        seed=st.integers(0, 2**31),
        bits=st.integers(4, 8),
        magnitude=st.sampled_from([1e-12, 1e-3, 1.0, 1e4, 1e30]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        static=st.booleans(),
        transformed=st.booleans(),
    )
    def test_against_float64(self, backend, seed, bits, magnitude, dtype, static, transformed):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(5, 17, generator=generator) * magnitude).to(dtype)
        shift = torch.randn(17, generator=generator) * magnitude if transformed else None
        scale = torch.rand(17, generator=generator) + 0.5 if transformed else None
        static_step = torch.tensor([magnitude / 100]) if static else None
        codes, step = quantize_activation(x, shift, scale, static_step, bits, backend=backend)
        exact = x.double() if shift is None or scale is None else (x.double() - shift.double()) / scale.double()
        limit = code_limit(bits)
        if static_step is None:
            wanted = (exact.abs().amax(dim=1, keepdim=True) / limit).clamp(min=MINIMUM_STEP)
            torch.testing.assert_close(step.double(), wanted, rtol=1e-5, atol=0.0)
        else:
            assert torch.equal(step, static_step)
        ideal = (exact / step.double()).clamp(-limit, limit)
        assert codes.dtype == torch.int8 and codes.abs().max() <= limit
        assert (codes.double() - ideal).abs().max() <= 0.5 + 1e-4 * limit

    def test_half_goes_to_even(self, backend):
        codes, _ = quantize_activation(
            torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]), None, None, ONE, 8, backend=backend
        )
        assert codes.tolist() == [[-2, -2, 0, 0, 2, 2]]

    @pytest.mark.parametrize("bits", range(4, 9))
    def test_clips_symmetrically(self, backend, bits):
        codes, _ = quantize_activation(
            torch.tensor([[-1e30, 1e30, -torch.inf, torch.inf]]), None, None, ONE, bits, backend=backend
        )
        assert codes.tolist() == [[-code_limit(bits), code_limit(bits)] * 2]

    def test_rows_have_steps_of_their_own(self, backend):
        x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3e38, -1.0], [1e-30, 0.0]])
        codes, step = quantize_activation(x, None, None, None, 8, backend=backend)
        assert codes.tolist() == [[64, -127], [0, 0], [127, 0], [0, 0]]
        assert step[:, 0].tolist() == pytest.approx([2 / 127, 1e-20, 3e38 / 127, 1e-20])

    def test_input_is_left_alone(self, backend):
        x = torch.randn(3, 4)
        before, step = x.clone(), torch.ones(1)
        _, returned = quantize_activation(x, None, None, step, 8, backend=backend)
        assert torch.equal(x, before) and returned.data_ptr() != step.data_ptr()

    @pytest.mark.parametrize("static_step", [None, ONE])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_reaches_the_output(self, backend, static_step, bad):
        """A code cannot say NaN; the step must. (Infinity is clipped by a static grid, as any large value is.)"""
        x = torch.randn(3, 8)
        x[1, 2] = bad
        codes, step = quantize_activation(x, None, None, static_step, 8, backend=backend)
        out = int8_linear(codes, step, WEIGHT, torch.ones(4, 1), None, torch.float32, backend=backend)
        if static_step is None:
            assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()
        else:
            assert out[1].isnan().all() == (bad is torch.nan)

    @pytest.mark.parametrize("rotation", [0, 1, 8, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("static", [False, True])
    def test_same_bits_as_the_semantics(self, backend, rotation, dtype, static):
        """Codes and steps of every backend are those of the formula in float32, bit for bit."""
        torch.manual_seed(0)
        x = (torch.randn(33, 192) * torch.logspace(-3, 3, 33)[:, None]).to(dtype)
        shift, scale = torch.randn(192), torch.rand(192) + 0.1
        static_step = torch.rand(33, 1) + 0.01 if static else None
        arguments = (x, shift, scale, static_step, 8, rotation)
        codes, step = quantize_activation(*arguments, backend=backend)
        expected_codes, expected_step = quantize_activation(*arguments, backend="reference")
        assert torch.equal(step, expected_step) and torch.equal(codes, expected_codes)


@backends
class TestQuantizeImage:
    @pytest.mark.parametrize("static_step", [None, torch.tensor([0.05]), torch.tensor([[0.05], [0.1]])])
    @pytest.mark.parametrize(
        ("shape", "padding"), [((2, 5, 7, 6), (1, 2, 0, 3)), ((2, 8, 3, 4, 5), (0, 0, 1, 1, 2, 0))]
    )
    def test_is_the_rows_of_the_padded_image(self, backend, static_step, shape, padding):
        torch.manual_seed(0)
        x, shift, scale = torch.randn(shape), torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
        codes, step = quantize_image(x, shift, scale, static_step, 8, 0, padding, backend)
        pixels = F.pad(x, padding).movedim(1, -1)
        moved = transform(pixels, shift, scale).flatten(1)
        wanted = moved.abs().amax(dim=1, keepdim=True) / 127 if static_step is None else static_step
        assert torch.equal(step, wanted)
        ideal = (moved * wanted.reciprocal()).round().clamp(-127, 127).view(pixels.shape)
        assert codes.is_contiguous() and torch.equal(codes, ideal.to(torch.int8))

    def test_strides_do_not_matter(self, backend):
        x = torch.randn(2, 6, 5, 4)
        expected = quantize_image(x, None, None, None, 8, 2, (1, 1, 1, 1), backend)
        for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., :4]):
            codes, step = quantize_image(other, None, None, None, 8, 2, (1, 1, 1, 1), backend)
            assert torch.equal(codes, expected[0]) and torch.equal(step, expected[1])

    @pytest.mark.parametrize("static_step", [None, ONE])
    def test_nan_reaches_the_step(self, backend, static_step):
        x = torch.randn(2, 3, 4, 4)
        x[1, 2, 3, 1] = torch.nan
        _, step = quantize_image(x, None, None, static_step, 8, backend=backend)
        assert step[-1].isnan() and (static_step is not None or not step[0].isnan())
