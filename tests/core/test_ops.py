"""The int8 operators against integer and float64 references, on every backend, and their torch.library contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec, QVDError, quantize_model
from qvd_core.layers import QuantLinear
from qvd_core.ops import (
    available_backends,
    int8_conv,
    int8_linear,
    quantize_activation,
    quantize_image,
    weight_only_linear,
)
from qvd_core.ops.backend import output_size
from qvd_core.packing import pack_int4

backends = pytest.mark.parametrize("backend", available_backends("cpu"))
ONE = torch.ones(1)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def integer_conv(codes: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """int64 [B, N, *out] of codes [B, *space, C] and weight [N, C, *kernel], tap by tap."""
    kernel = weight.shape[2:]
    size = output_size(codes.shape[1:-1], kernel, stride, dilation)
    total = torch.zeros(len(codes), *size, len(weight), dtype=torch.int64)
    for tap in product(*map(range, kernel)):
        window = tuple(
            slice(place * gap, place * gap + (extent - 1) * hop + 1, hop)
            for place, gap, hop, extent in zip(tap, dilation, stride, size, strict=True)
        )
        total += codes[(slice(None), *window)].long() @ weight[(slice(None), slice(None), *tap)].long().T
    return total.movedim(-1, 1)


@backends
class TestInt8Linear:
    @staticmethod
    def integer_sum(codes: Tensor, weight: Tensor, backend: str) -> Tensor:
        """What is left of the operator with steps of one: the integer sum as float32."""
        return int8_linear(codes, ONE, weight, torch.ones(len(weight), 1), None, torch.float32, backend=backend)

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
        out = int8_linear(codes, step, weight, scale, bias, torch.float32, backend=backend)
        torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounds_to_the_output_type_once(self, backend, dtype):
        codes, weight = random_codes(4, 33), random_codes(5, 33, seed=1)
        arguments = (codes, ONE * 1e-3, weight, torch.ones(5, 1), torch.ones(5, dtype=dtype))
        out = int8_linear(*arguments, dtype, backend=backend)
        assert out.dtype == dtype
        assert torch.equal(out, int8_linear(*arguments, torch.float32, backend=backend).to(dtype))

    def test_no_rows(self, backend):
        arguments = (random_codes(0, 8), ONE, random_codes(3, 8), torch.ones(3, 1), None, torch.float32)
        out = int8_linear(*arguments, backend=backend)
        assert out.shape == (0, 3)

    @pytest.mark.parametrize("terms", [1, 7, 64, 1025])
    def test_four_bit_weights(self, backend, terms):
        codes = random_codes(5, terms)
        weight = torch.randint(-7, 8, (6, terms), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
        packed = self.integer_sum(codes, pack_int4(weight), backend)
        assert torch.equal(packed, (codes.long() @ weight.long().T).float())

    @pytest.mark.parametrize("gates", [1, 2, 6])
    def test_gate_and_residual(self, backend, gates):
        """residual + gate * (product + bias), the gate of each run of rows its own."""
        codes, weight, scale = random_codes(6, 33), random_codes(5, 33, seed=1), torch.rand(5, 1)
        residual, gate, bias = torch.randn(6, 5), torch.randn(gates, 5), torch.randn(5)
        arguments = (codes, torch.rand(6, 1), weight, scale, bias, torch.float32)
        plain = int8_linear(*arguments, backend=backend)
        out = int8_linear(*arguments, residual=residual, gate=gate, backend=backend)
        assert torch.equal(out, residual + plain * gate.repeat_interleave(6 // gates, dim=0))

    def test_exact_under_autocast(self, backend):
        codes, weight = random_codes(3, 1500), random_codes(4, 1500, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.integer_sum(codes, weight, backend)
        assert torch.equal(out, (codes.long() @ weight.long().T).float())


@backends
class TestInt8Conv:
    @staticmethod
    def sums(codes: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], backend: str) -> Tensor:
        scale = torch.ones(len(weight), *[1] * (weight.dim() - 1))
        return int8_conv(
            codes, ONE, weight, scale, None, weight.shape[2:], stride, dilation, torch.float32, backend=backend
        )

    @pytest.mark.parametrize(
        ("images", "weights", "stride", "dilation"),
        [
            ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (1, 1)),
            ((2, 7, 6, 3), (4, 3, 3, 3), (1, 1), (1, 1)),
            ((1, 9, 8, 5), (2, 5, 3, 2), (2, 3), (1, 1)),
            ((1, 9, 9, 4), (3, 4, 3, 3), (1, 2), (2, 3)),
            ((1, 4, 4, 115), (2, 115, 3, 3), (1, 1), (1, 1)),  # 1035 terms: just above what float32 holds
            ((1, 2, 3, 1500), (2, 1500, 1, 1), (1, 1), (1, 1)),
            ((1, 40, 40, 2), (1, 2, 40, 40), (1, 1), (1, 1)),  # more taps in one channel than float32 holds
            ((2, 5, 3, 4, 16), (3, 16, 3, 1, 1), (1, 1, 1), (1, 1, 1)),
            ((1, 5, 7, 6, 3), (4, 3, 3, 2, 3), (1, 2, 1), (2, 1, 2)),
            ((1, 4, 8, 8, 130), (5, 130, 1, 2, 2), (1, 2, 2), (1, 1, 1)),
            ((2, 5, 6, 5, 1), (16, 1, 1, 1, 3), (1, 1, 3), (1, 1, 1)),  # one channel: its stride says nothing
            ((16, 11, 5, 1), (4, 1, 5, 3), (1, 3), (1, 1)),
        ],
    )
    @pytest.mark.parametrize("extreme", [False, True])
    def test_integer_sum(self, backend, images, weights, stride, dilation, extreme):
        codes, weight = random_codes(*images), random_codes(*weights, seed=1)
        if extreme:
            codes = torch.where(codes > -100, -128, -127).to(torch.int8)
            weight = torch.where(weight > -100, -128, 127).to(torch.int8)
        out = self.sums(codes, weight, stride, dilation, backend)
        assert out.is_contiguous() and torch.equal(out, integer_conv(codes, weight, stride, dilation).float())

    @pytest.mark.parametrize("weights", [(4, 3, 3, 3), (5, 4, 3, 1, 2)])
    def test_four_bit_weights(self, backend, weights):
        kernel = weights[2:]
        codes = random_codes(2, *[5] * len(kernel), weights[1])
        weight = torch.randint(-7, 8, weights, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
        ones = [1] * len(kernel)
        scale, step = torch.rand(len(weight), 1, *ones), torch.rand(2, 1)
        sizes = (kernel, ones, ones, torch.float32, backend)
        packed = int8_conv(codes, step, pack_int4(weight), scale, None, *sizes)
        assert torch.equal(packed, int8_conv(codes, step, weight, scale, None, *sizes))

    def test_one_step_per_image(self, backend):
        codes, weight = random_codes(2, 5, 5, 3), random_codes(4, 3, 3, 3, seed=1)
        step, scale = torch.tensor([[0.5], [2.0]]), torch.linspace(0.1, 1.0, 4).view(4, 1, 1, 1)
        bias = torch.linspace(-1.0, 1.0, 4)
        total = integer_conv(codes, weight, (1, 1), (1, 1)).double()
        expected = total * step.double().view(2, 1, 1, 1) * scale.double().view(1, 4, 1, 1) + bias.view(1, 4, 1, 1)
        out = int8_conv(codes, step, weight, scale, bias, (3, 3), (1, 1), (1, 1), torch.float32, backend)
        torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)

    def test_exact_under_autocast(self, backend):
        codes, weight = random_codes(1, 4, 4, 115), random_codes(2, 115, 3, 3, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.sums(codes, weight, (1, 1), (1, 1), backend)
        assert torch.equal(out, integer_conv(codes, weight, (1, 1), (1, 1)).float())

    def test_exact_without_onednn(self, backend):
        """What PyTorch takes instead computes 3 x 3 kernels of many images by Winograd's method, in fractions."""
        codes, weight = random_codes(16, 12, 12, 64), random_codes(8, 64, 3, 3, seed=1)
        with torch.backends.mkldnn.flags(enabled=False):
            out = self.sums(codes, weight, (1, 1), (1, 1), backend)
        assert torch.equal(out, integer_conv(codes, weight, (1, 1), (1, 1)).float())


@backends
class TestHardTensors:
    """Tensors whose memory is not what they say: a pending negation, a subclass, nothing at all."""

    def test_pending_negation(self, backend):
        x, codes = torch.randn(3, 8), random_codes(3, 8)
        weight, scale = random_codes(4, 8, seed=1), torch.rand(4, 1)
        negated, plain = quantize_activation(torch._neg_view(x), None, None, None, 8, backend=backend), -x
        assert torch.equal(negated[0], quantize_activation(plain, None, None, None, 8, backend=backend)[0])
        arguments = (codes, ONE, weight)
        out = int8_linear(*arguments, torch._neg_view(scale), None, torch.float32, backend=backend)
        assert torch.equal(out, int8_linear(*arguments, -scale, None, torch.float32, backend=backend))

    def test_a_subclass_in_any_place(self, backend):
        class Own(Tensor):
            pass

        codes, weight, scale = random_codes(3, 8), random_codes(4, 8, seed=1), torch.rand(4, 1)
        expected = int8_linear(codes, ONE, weight, scale, None, torch.float32, backend=backend)
        out = int8_linear(codes, ONE, weight.as_subclass(Own), scale, None, torch.float32, backend=backend)
        assert torch.equal(out.as_subclass(Tensor), expected)

    def test_weight_on_meta(self, backend):
        arguments = (torch.ones(4, 1), None, torch.float32)
        with pytest.raises(QVDError, match="still on the meta device: load the checkpoint"):
            int8_linear(random_codes(3, 8), ONE, random_codes(4, 8).to("meta"), *arguments, backend=backend)
        model = quantize_model(nn.Sequential(nn.Linear(64, 64)), QuantSpec(backend=backend))
        model[0].weight = nn.Parameter(model[0].weight.to("meta"), requires_grad=False)
        with pytest.raises(QVDError, match="still on the meta device"):
            model(torch.randn(2, 64))


CODES, WEIGHT, SCALE = random_codes(6, 8), random_codes(4, 8), torch.ones(4, 1)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": torch.ones(6)}, r"step is torch.float32 \[6\], expected float32 \[1\] or \[6, 1\]"),
            ({"codes": CODES.int()}, "codes is torch.int32"),
            ({"weight": WEIGHT[:, :7]}, r"weight is torch.int8 \[4, 7\], expected int8 \[N, 8\]"),
            ({"weight": torch.zeros(4, 5, dtype=torch.uint8)}, r"4-bit codes uint8 \[N, 4\]"),
            ({"weight_scale": torch.ones(3, 1)}, "weight_scale"),
            ({"bias": torch.ones(5)}, "bias"),
            ({"residual": torch.ones(5, 4)}, "residual"),
            ({"gate": torch.ones(4, 4)}, "gate .* G a divisor of 6"),
            ({"gate": torch.ones(0, 4)}, "gate"),
        ],
    )
    def test_linear(self, change, message):
        arguments = {"codes": CODES, "step": ONE, "weight": WEIGHT, "weight_scale": SCALE, "bias": None} | change
        with pytest.raises(QVDError, match=message):
            int8_linear(**arguments, dtype=torch.float32)

    @pytest.mark.parametrize(
        ("kernel", "stride", "dilation"), [((5, 5), (1, 1), (1, 1)), ((3, 3), (0, 1), (1, 1)), ((3, 3), (1, 1), (9, 1))]
    )
    def test_conv(self, kernel, stride, dilation):
        codes, weight, scale = random_codes(1, 6, 6, 2), random_codes(3, 2, 3, 3), torch.ones(3, 1, 1, 1)
        with pytest.raises(QVDError, match="int8 operators"):
            int8_conv(codes, ONE, weight, scale, None, kernel, stride, dilation, torch.float32)

    def test_quantize(self):
        for x, bits in (
            (torch.randn(3), 8),
            (torch.randn(2, 0), 8),
            (torch.ones(2, 3).int(), 8),
            (torch.randn(2, 3), 9),
        ):
            with pytest.raises(QVDError, match="int8 operators"):
                quantize_activation(x, None, None, None, bits)
        with pytest.raises(QVDError, match="padding is"):
            quantize_image(torch.randn(1, 2, 3, 3), None, None, None, 8, 0, (1, 1))


def test_weight_only_linear():
    """The input stays as it is, the weight is decoded: for few rows, and where int8 units are slow."""
    torch.manual_seed(0)
    x, weight, scale, bias = torch.randn(3, 10), random_codes(4, 10), torch.rand(4, 1), torch.randn(4)
    out = weight_only_linear(x, weight, scale, bias, torch.float32)
    torch.testing.assert_close(out, F.linear(x, weight.float() * scale, bias))
    codes = torch.randint(-7, 8, (4, 10), dtype=torch.int8)
    packed = weight_only_linear(x, pack_int4(codes), scale, None, torch.bfloat16)
    torch.testing.assert_close(packed.float(), F.linear(x, codes.float() * scale), rtol=0.05, atol=0.5)


class TestLibrary:
    samples = (
        ("quantize_activation", (torch.randn(5, 8), torch.randn(8), torch.rand(8) + 1, None, 8, 0)),
        ("quantize_activation", (torch.randn(5, 8).bfloat16(), None, None, torch.ones(1), 6, 0)),
        ("quantize_activation", (torch.randn(5, 16), torch.randn(16), None, torch.rand(5, 1), 4, 8)),
        ("quantize_fused", (torch.randn(4, 8), "gelu_mul", None, None, 0.0, torch.randn(4), None, None, 8, 0)),
        (
            "quantize_fused",
            (torch.randn(4, 8), "layer_norm", torch.randn(2, 8), torch.randn(1, 8), 1e-6, None, None, ONE, 8, 0),
        ),
        ("quantize_image", (torch.randn(2, 3, 5, 4), torch.randn(3), None, None, 8, 0, [1, 0, 2, 1])),
        ("quantize_image", (torch.randn(2, 4, 3, 5, 4), None, torch.rand(4) + 1, torch.ones(1), 8, 2, [0] * 6)),
        ("int8_linear", (random_codes(5, 8), torch.ones(5, 1), random_codes(3, 8), torch.ones(3, 1), *[None] * 3)),
        (
            "int8_linear",
            (
                random_codes(6, 8),
                torch.ones(1),
                torch.zeros(3, 4, dtype=torch.uint8),
                torch.ones(3, 1),
                torch.ones(3),
                torch.randn(6, 3),
                torch.randn(2, 3),
            ),
        ),
        (
            "int8_conv",
            (
                random_codes(2, 9, 7, 3),
                torch.ones(1),
                random_codes(4, 3, 3, 2),
                torch.ones(4, 1, 1, 1),
                None,
                [3, 2],
                [2, 1],
                [1, 2],
            ),
        ),
        ("weight_only_linear", (torch.randn(2, 8), random_codes(3, 8), torch.ones(3, 1), torch.ones(3))),
    )

    @backends
    @pytest.mark.parametrize(("name", "arguments"), samples)
    def test_opcheck(self, backend, name, arguments):
        arguments = (*arguments, backend) if name.startswith("quantize") else (*arguments, torch.bfloat16, backend)
        torch.library.opcheck(getattr(torch.ops.qvd, name).default, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_exports(self, dynamic):
        """One graph for any batch and length, with the operators in it."""
        torch.manual_seed(0)
        model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))).eval()
        sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) if dynamic else None
        program = torch.export.export(model, (torch.randn(2, 30, 64),), dynamic_shapes=sizes)
        called = [str(node.target) for node in program.graph.nodes if "qvd" in str(node.target)]
        assert called == ["qvd.quantize_activation.default", "qvd.int8_linear.default"] * 2
        x = torch.randn(*((3, 41) if dynamic else (2, 30)), 64)
        with torch.no_grad():
            assert torch.equal(program.module()(x), model(x))

    @pytest.mark.parametrize(
        "module", [nn.Conv2d(64, 64, 3, padding=1), nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0))]
    )
    def test_compiled_convolutions(self, module):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = quantize_model(nn.Sequential(module))
        x = torch.randn(1, 64, *[5] * (module.weight.dim() - 2))
        with torch.no_grad():
            assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))

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
