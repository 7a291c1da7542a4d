"""The int8 operators against integer and float64 references, on every backend, and their torch.library contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, quantize_model
from qvd_core.layers import QuantLinear
from qvd_core.ops import _BACKENDS, int8_conv2d, int8_linear, quantize_activation, resolve_backend
from qvd_core.ops.semantics import MINIMUM_STEP, code_limit

backends = pytest.mark.parametrize("backend", sorted(_BACKENDS))
ONE = torch.ones(1)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def integer_conv2d(codes: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """int64, tap by tap."""
    height = (codes.shape[2] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    width = (codes.shape[3] - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    total = torch.zeros(len(codes), len(weight), height, width, dtype=torch.int64)
    for y in range(weight.shape[2]):
        for x in range(weight.shape[3]):
            rows = slice(y * dilation[0], y * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(x * dilation[1], x * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            window = codes[:, :, rows, columns].long()
            total += (window[:, None] * weight[None, :, :, y, x, None, None].long()).sum(dim=2)
    return total


@backends
class TestInt8Linear:
    @staticmethod
    def integer_sum(codes: Tensor, weight: Tensor, backend: str) -> Tensor:
        """What is left of the operator with steps of one: the integer sum as float32."""
        return int8_linear(codes, ONE, weight, torch.ones(len(weight), 1), None, torch.float32, backend)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (1, 1024, 3), (5, 1025, 2), (2, 3073, 3), (17, 64, 33)])
    def test_random_codes(self, backend, shape):
        rows, terms, outputs = shape
        codes, weight = random_codes(rows, terms), random_codes(outputs, terms, seed=1)
        assert torch.equal(self.integer_sum(codes, weight, backend), (codes.long() @ weight.long().T).float())

    @pytest.mark.parametrize("terms", [1023, 1024, 1025, 2048, 2049, 5000])
    @pytest.mark.parametrize(("a", "b"), [(127, 127), (-128, -128), (-128, 127), (127, -127)])
    def test_extreme_codes(self, backend, terms, a, b):
        """One odd product among the largest: it is lost wherever a partial sum passes 2^24."""
        codes = torch.full((2, terms), a, dtype=torch.int8)
        weight = torch.full((3, terms), b, dtype=torch.int8)
        codes[1, terms // 2], weight[2, -1] = 1, 3
        assert torch.equal(self.integer_sum(codes, weight, backend), (codes.long() @ weight.long().T).float())

    def test_epilogue(self, backend):
        codes, weight = random_codes(4, 33), random_codes(5, 33, seed=1)
        step = torch.tensor([[0.5], [1e-20], [3.0], [1e-3]])
        scale, bias = torch.linspace(0.01, 2.0, 5)[:, None], torch.linspace(-3.0, 3.0, 5)
        expected = (codes.double() @ weight.double().T) * step.double() * scale.double().T + bias.double()
        out = int8_linear(codes, step, weight, scale, bias, torch.float32, backend)
        torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounds_to_the_output_type_once(self, backend, dtype):
        codes, weight = random_codes(4, 33), random_codes(5, 33, seed=1)
        arguments = (codes, ONE * 1e-3, weight, torch.ones(5, 1), torch.ones(5, dtype=dtype))
        out = int8_linear(*arguments, dtype, backend)
        assert out.dtype == dtype
        assert torch.equal(out, int8_linear(*arguments, torch.float32, backend).to(dtype))

    def test_no_rows(self, backend):
        out = int8_linear(random_codes(0, 8), ONE, random_codes(3, 8), torch.ones(3, 1), None, torch.float32, backend)
        assert out.shape == (0, 3)

    def test_exact_under_autocast(self, backend):
        codes, weight = random_codes(3, 1500), random_codes(4, 1500, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.integer_sum(codes, weight, backend)
        assert torch.equal(out, (codes.long() @ weight.long().T).float())


@backends
class TestInt8Conv2d:
    @pytest.mark.parametrize(
        ("images", "weights", "stride", "dilation"),
        [
            ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (1, 1)),
            ((2, 3, 7, 6), (4, 3, 3, 3), (1, 1), (1, 1)),
            ((1, 5, 9, 8), (2, 5, 3, 2), (2, 3), (1, 1)),
            ((1, 4, 9, 9), (3, 4, 3, 3), (1, 2), (2, 3)),
            ((1, 115, 4, 4), (2, 115, 3, 3), (1, 1), (1, 1)),  # 1035 terms: just above what float32 holds
            ((1, 1500, 2, 3), (2, 1500, 1, 1), (1, 1), (1, 1)),
            ((1, 2, 40, 40), (1, 2, 40, 40), (1, 1), (1, 1)),  # more taps in one channel than float32 holds
        ],
    )
    @pytest.mark.parametrize("extreme", [False, True])
    def test_integer_sum(self, backend, images, weights, stride, dilation, extreme):
        codes, weight = random_codes(*images), random_codes(*weights, seed=1)
        if extreme:
            codes = torch.where(codes > -100, torch.full_like(codes, -128), torch.full_like(codes, -127))
            weight = torch.where(
                weight > -100, torch.full_like(codes[:1, :1, :1, :1], -128), torch.full_like(weight, 127)
            )
        scale = torch.ones(len(weight), 1, 1, 1)
        out = int8_conv2d(codes, ONE, weight, scale, None, stride, dilation, torch.float32, backend)
        assert torch.equal(out, integer_conv2d(codes, weight, stride, dilation).float())

    def test_one_step_per_image(self, backend):
        codes, weight = random_codes(2, 3, 5, 5), random_codes(4, 3, 3, 3, seed=1)
        step, scale = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1), torch.linspace(0.1, 1.0, 4).view(4, 1, 1, 1)
        bias = torch.linspace(-1.0, 1.0, 4)
        total = integer_conv2d(codes, weight, (1, 1), (1, 1)).double()
        expected = total * step.double() * scale.double().view(1, 4, 1, 1) + bias.double().view(1, 4, 1, 1)
        out = int8_conv2d(codes, step, weight, scale, bias, (1, 1), (1, 1), torch.float32, backend)
        torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)

    def test_exact_under_autocast(self, backend):
        codes, weight = random_codes(1, 115, 4, 4), random_codes(2, 115, 3, 3, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = int8_conv2d(codes, ONE, weight, torch.ones(2, 1, 1, 1), None, (1, 1), (1, 1), torch.float32, backend)
        assert torch.equal(out, integer_conv2d(codes, weight, (1, 1), (1, 1)).float())


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
    def test_against_float64(self, seed, bits, magnitude, dtype, static, transformed):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(5, 17, generator=generator) * magnitude).to(dtype)
        shift = torch.randn(17, generator=generator) * magnitude if transformed else None
        scale = torch.rand(17, generator=generator) + 0.5 if transformed else None
        static_step = torch.tensor([magnitude / 100]) if static else None
        codes, step = quantize_activation(x, shift, scale, static_step, bits)
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

    def test_half_goes_to_even(self):
        codes, _ = quantize_activation(torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]), None, None, ONE, 8)
        assert codes.tolist() == [[-2, -2, 0, 0, 2, 2]]

    @pytest.mark.parametrize("bits", range(4, 9))
    def test_clips_symmetrically(self, bits):
        codes, _ = quantize_activation(torch.tensor([[-1e30, 1e30, -torch.inf, torch.inf]]), None, None, ONE, bits)
        assert codes.tolist() == [[-code_limit(bits), code_limit(bits)] * 2]

    def test_rows_have_steps_of_their_own(self):
        x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3e38, -1.0], [1e-30, 0.0]])
        codes, step = quantize_activation(x, None, None, None, 8)
        assert codes.tolist() == [[64, -127], [0, 0], [127, 0], [0, 0]]
        assert step[:, 0].tolist() == pytest.approx([2 / 127, 1e-20, 3e38 / 127, 1e-20])

    def test_input_is_left_alone(self):
        x = torch.randn(3, 4)
        before, step = x.clone(), torch.ones(1)
        _, returned = quantize_activation(x, None, None, step, 8)
        assert torch.equal(x, before) and returned.data_ptr() != step.data_ptr()

    @pytest.mark.parametrize("static_step", [None, ONE])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_reaches_the_output(self, static_step, bad):
        """A code cannot say NaN; the step must. (Infinity is clipped by a static grid, as any large value is.)"""
        x = torch.randn(3, 8)
        x[1, 2] = bad
        codes, step = quantize_activation(x, None, None, static_step, 8)
        out = int8_linear(codes, step, random_codes(4, 8), torch.ones(4, 1), None, torch.float32)
        if static_step is None:
            assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()
        else:
            assert out[1].isnan().all() == (bad is torch.nan)


class TestLibrary:
    samples = (
        ("quantize_activation", (torch.randn(5, 8), torch.randn(8), torch.rand(8) + 1, None, 8, 0)),
        ("quantize_activation", (torch.randn(2, 5, 8).bfloat16(), None, None, torch.ones(1), 6, 0)),
        ("quantize_activation", (torch.randn(5, 16), torch.randn(16), None, torch.rand(5, 1), 4, 8)),
        ("int8_linear", (random_codes(5, 8), torch.ones(5, 1), random_codes(3, 8), torch.ones(3, 1), torch.ones(3))),
        ("int8_linear", (random_codes(5, 8), torch.ones(1), random_codes(3, 8), torch.ones(3, 1), None)),
        (
            "int8_conv2d",
            (
                random_codes(2, 3, 9, 7),
                torch.ones(1),
                random_codes(4, 3, 3, 2),
                torch.ones(4, 1, 1, 1),
                None,
                [2, 1],
                [1, 2],
            ),
        ),
    )

    @pytest.mark.parametrize(("name", "arguments"), samples)
    def test_opcheck(self, name, arguments):
        if name != "quantize_activation":
            arguments = (*arguments, torch.bfloat16, "emulated")
        torch.library.opcheck(getattr(torch.ops.qvd, name).default, arguments)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiles_without_graph_breaks(self, backend):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
        assert isinstance(model[2], QuantLinear)
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            assert torch.equal(compiled(x), model(x))


class TestBackendChoice:
    def test_auto(self, monkeypatch):
        monkeypatch.delenv("QVD_BACKEND", raising=False)
        assert resolve_backend() in _BACKENDS and resolve_backend("reference") == "reference"

    def test_every_spec_choice_resolves(self):
        from qvd_core.spec import _CHOICES

        assert {resolve_backend(name) for name in _CHOICES["backend"]} == set(_BACKENDS)

    def test_environment_wins(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "reference")
        assert resolve_backend("emulated") == resolve_backend() == "reference"

    def test_empty_environment_is_unset(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "")
        assert resolve_backend("reference") == "reference"

    def test_environment_reaches_the_layers(self, monkeypatch):
        model = quantize_model(nn.Sequential(nn.Linear(64, 64)), QuantSpec(backend="emulated"))
        called = []
        original = _BACKENDS["reference"].integer_linear
        monkeypatch.setattr(_BACKENDS["reference"], "integer_linear", lambda *a: called.append(1) or original(*a))
        monkeypatch.setenv("QVD_BACKEND", "reference")
        with torch.no_grad():
            model(torch.randn(2, 64))
        assert called

    def test_unknown_name(self, monkeypatch):
        monkeypatch.setenv("QVD_BACKEND", "cutlass")
        with pytest.raises(QVDError, match="unknown int8 backend 'cutlass'"):
            int8_linear(random_codes(1, 2), ONE, random_codes(1, 2), torch.ones(1, 1), None, torch.float32)
