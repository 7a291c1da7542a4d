"""The Triton kernels under Triton's interpreter, on CPU tensors.

`test_triton.py` runs this file in a process of its own: the interpreter has to be chosen before triton is imported, and
it would stay chosen for every other test.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qvd_core.errors import QVDError
from qvd_core.ops.emulated import INT32_TERMS, Emulated
from qvd_core.ops.fronts import FRONTS, apply_front
from qvd_core.ops.int_mm import IntMM
from qvd_core.ops.reference import Reference
from qvd_core.ops.triton import TritonBackend, gemm, missing
from qvd_core.ops.triton.launch import interpreted
from qvd_core.ops.triton.tiles import Tile, tiles
from qvd_core.packing import pack_int4, unpack_int4

EMULATED, REFERENCE, TRITON = Emulated(), Reference(), TritonBackend()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    assert interpreted(), "these tests are run by test_triton.py"
    torch.manual_seed(0)


def codes_of(*shape: int) -> Tensor:
    """Random codes with long runs of the extremes, whose sums are the largest there are."""
    codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    return torch.where(torch.rand(shape) < 0.5, torch.where(torch.rand(shape) < 0.7, 127, -128), codes).to(torch.int8)


def steps_of(kind: str, count: int) -> Tensor | None:
    return {"dynamic": None, "static": torch.tensor([0.03]), "per row": torch.rand(count, 1) * 0.05 + 1e-3}[kind]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Codes and steps, bit for bit, NaN included."""
    (codes, step), (right_codes, right_step) = actual, expected
    assert codes.dtype == torch.int8 and codes.is_contiguous() and step.dtype == torch.float32
    torch.testing.assert_close(step, right_step, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(codes, right_codes, rtol=0, atol=0)


class TestRows:
    @pytest.mark.parametrize("steps", ["dynamic", "static", "per row"])
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("rows", "channels", "rotation"), [(7, 33, 0), (5, 384, 128), (3, 1536, 8), (1, 1, 0)])
    def test_codes_and_steps_are_the_contracts(
        self, rows: int, channels: int, rotation: int, dtype: torch.dtype, steps: str
    ) -> None:
        x = (torch.randn(rows, channels) * 3).to(dtype)
        shift, scale = torch.randn(channels), torch.rand(channels) + 0.3
        for parameters in ((shift, scale), (None, scale), (shift, None)):
            arguments = (x, *parameters, steps_of(steps, rows), 8, rotation)
            assert_same(TRITON.quantize_rows(*arguments), EMULATED.quantize_rows(*arguments))

    @pytest.mark.parametrize("bits", [2, 4, 6])
    def test_fewer_bits(self, bits: int) -> None:
        x = torch.randn(6, 40)
        arguments = (x, None, None, None, bits, 0)
        assert_same(TRITON.quantize_rows(*arguments), EMULATED.quantize_rows(*arguments))

    @pytest.mark.parametrize("steps", ["dynamic", "static"])
    def test_rows_too_long_for_registers(self, steps: str) -> None:
        x = torch.randn(2, 16640)
        arguments = (x, torch.randn(16640), torch.rand(16640) + 0.3, steps_of(steps, 2), 8, 64)
        assert_same(TRITON.quantize_rows(*arguments), EMULATED.quantize_rows(*arguments))

    def test_rows_of_a_wider_matrix(self) -> None:
        x = torch.randn(6, 100)[:, 10:58]
        arguments = (x, None, None, None, 8, 0)
        assert_same(TRITON.quantize_rows(*arguments), EMULATED.quantize_rows(*arguments))

    def test_halves_go_to_the_even_code_and_infinity_to_the_last(self) -> None:
        x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, float("inf"), -float("inf")]])
        codes, _ = TRITON.quantize_rows(x, None, None, torch.ones(1), 8, 0)
        assert codes.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, 127, -127]]

    def test_a_row_of_zeros(self) -> None:
        codes, step = TRITON.quantize_rows(torch.zeros(2, 16), None, None, None, 8, 0)
        assert not codes.any()
        assert torch.equal(step, torch.full((2, 1), 1e-20))

    def test_nan_makes_its_rows_dynamic_step_nan(self) -> None:
        x = torch.randn(6, 1600)
        x[1, 3] = x[4, 1599] = torch.nan
        _, step = TRITON.quantize_rows(x, None, None, None, 8, 0)
        assert step.isnan().flatten().tolist() == [False, True, False, False, True, False]

    @pytest.mark.parametrize("channels", [1600, 17000])
    @pytest.mark.parametrize("steps", ["static", "per row"])
    def test_nan_makes_every_static_step_nan_but_not_the_callers(self, steps: str, channels: int) -> None:
        x = torch.randn(9, channels)
        x[7, channels - 1] = torch.nan
        static = steps_of(steps, 9)
        _, step = TRITON.quantize_rows(x, None, None, static, 8, 0)
        assert static is not None and static.isfinite().all()
        assert step.shape == static.shape and step.isnan().all()

    @pytest.mark.parametrize("x", [torch.randn(3, 8, dtype=torch.float64), torch.empty(0, 8)], ids=["float64", "empty"])
    def test_what_no_kernel_reads_is_emulated(self, x: Tensor) -> None:
        assert_same(TRITON.quantize_rows(x, None, None, None, 8, 0), EMULATED.quantize_rows(x, None, None, None, 8, 0))


class TestImages:
    @pytest.mark.parametrize("steps", ["dynamic", "static", "per row"])
    @pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
    @pytest.mark.parametrize(
        ("shape", "padding", "rotation"),
        [
            ((2, 5, 7, 9), [1, 1, 1, 1], 0),
            ((1, 32, 2, 3, 18), [1, 0, 1, 0, 0, 1], 32),
            ((2, 40, 3, 3), [0, 0, 0, 0], 8),
        ],
    )
    def test_codes_and_steps_are_the_contracts(
        self, shape: tuple[int, ...], padding: list[int], rotation: int, layout: str, steps: str
    ) -> None:
        x = torch.randn(shape)
        if layout == "channels last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "strided":
            x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
        # A shift far from zero makes the border's codes the largest.
        shift, scale = torch.randn(shape[1]) * 5, torch.rand(shape[1]) + 0.3
        arguments = (x, shift, scale, steps_of(steps, shape[0]), 8, rotation, padding)
        assert_same(TRITON.quantize_images(*arguments), EMULATED.quantize_images(*arguments))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bit_images(self, dtype: torch.dtype) -> None:
        x = torch.randn(1, 6, 3, 70).to(dtype)
        arguments = (x, None, None, None, 8, 0, [1, 1, 0, 0])
        assert_same(TRITON.quantize_images(*arguments), EMULATED.quantize_images(*arguments))

    def test_nan_makes_its_images_dynamic_step_nan(self) -> None:
        x = torch.randn(3, 4, 5, 5)
        x[1, 2, 3, 4] = torch.nan
        _, step = TRITON.quantize_images(x, None, None, None, 8, 0, [1, 1, 1, 1])
        assert step.isnan().flatten().tolist() == [False, True, False]

    def test_nan_makes_every_static_step_nan(self) -> None:
        x = torch.randn(3, 4, 5, 5)
        x[1, 2, 3, 4] = torch.nan
        _, step = TRITON.quantize_images(x, None, None, torch.ones(3, 1), 8, 0, [0, 0, 0, 0])
        assert step.shape == (3, 1) and step.isnan().all()


class TestFronts:
    @staticmethod
    def affine(front: str, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """A gain per two rows and an offset per three, for norms."""
        return (torch.randn(3, channels), torch.randn(2, channels)) if FRONTS[front].norm else (None, None)

    @pytest.mark.parametrize("front", FRONTS)
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize(("channels", "rotation"), [(48, 0), (192, 64)])
    def test_codes_are_those_of_the_two_operations(
        self, front: str, dtype: torch.dtype, channels: int, rotation: int
    ) -> None:
        x = (torch.randn(6, 2 * channels if FRONTS[front].gated else channels) * 2).to(dtype)
        gain, offset = self.affine(front, channels)
        rest = (torch.randn(channels), torch.rand(channels) + 0.5, None, 8, rotation)
        codes, step = TRITON.quantize_fused(x, front, gain, offset, 1e-6, *rest)
        right_codes, right_step = EMULATED.quantize_rows(apply_front(x, front, gain, offset, 1e-6), *rest)
        torch.testing.assert_close(step, right_step, rtol=1e-5, atol=0)
        difference = (codes.int() - right_codes.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.005  # at ties only

    def test_a_norm_of_rows_too_long_for_registers_is_emulated(self) -> None:
        x = torch.randn(2, 16400)
        codes, _ = TRITON.quantize_fused(x, "layer_norm", None, None, 1e-6, None, None, None, 8)
        expected, _ = EMULATED.quantize_rows(apply_front(x, "layer_norm"), None, None, None, 8, 0)
        assert torch.equal(codes, expected)

    def test_an_activation_of_long_rows(self) -> None:
        x = torch.randn(2, 2 * 16400)
        codes, _ = TRITON.quantize_fused(x, "gelu_mul", None, None, 0.0, None, None, None, 8)
        expected, _ = EMULATED.quantize_rows(apply_front(x, "gelu_mul"), None, None, None, 8, 0)
        assert (codes.int() - expected.int()).abs().max() <= 1

    def test_unknown_front(self) -> None:
        with pytest.raises(QVDError, match="unknown fused front 'swish'"):
            TRITON.quantize_fused(torch.randn(2, 4), "swish", None, None, 0.0, None, None, None, 8)


DISTINCT_TILES = {
    (rule.block_m, rule.block_n, rule.block_k): rule for kinds in tiles().values() for rule in kinds["linear"]
}.values()
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 33, 130), (70, 40, 256)]


class TestLinear:
    @pytest.mark.parametrize(("rows", "outputs", "terms"), SHAPES)
    def test_integer_sums_are_exact(self, rows: int, outputs: int, terms: int) -> None:
        codes, weight = codes_of(rows, terms), codes_of(outputs, terms)
        one = torch.ones(outputs, 1)
        total = TRITON.linear(codes, torch.ones(1), weight, one, None, None, None, torch.float32)
        assert torch.equal(total, (codes.long() @ weight.long().T).float())

    def test_the_longest_sums_of_the_extremes(self) -> None:
        codes = torch.full((1, INT32_TERMS - 1), -128, dtype=torch.int8)
        weight = torch.cat([codes, codes + 255])
        total = TRITON.linear(codes, torch.ones(1), weight, torch.ones(2, 1), None, None, None, torch.float32)
        assert torch.equal(total, (codes.long() @ weight.long().T).float())

    def test_sums_beyond_int32_are_emulated(self) -> None:
        codes = torch.full((1, INT32_TERMS), -128, dtype=torch.int8)
        total = TRITON.linear(codes, torch.ones(1), codes, torch.ones(1, 1), None, None, None, torch.float32)
        assert total.item() == 2.0**31

    @pytest.mark.parametrize(("rows", "outputs", "terms"), SHAPES)
    @pytest.mark.parametrize("in_kernel", [True, False])
    def test_packed_weights(
        self, rows: int, outputs: int, terms: int, in_kernel: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gemm, "IN_KERNEL_ROWS", 10**6 if in_kernel else 0)
        codes, weight = codes_of(rows, terms), torch.randint(-7, 8, (outputs, terms), dtype=torch.int8)
        scale = torch.rand(outputs, 1)
        arguments = (torch.rand(rows, 1), pack_int4(weight), scale, None, None, None, torch.float32)
        assert torch.equal(TRITON.linear(codes, *arguments), REFERENCE.linear(codes, *arguments))

    @pytest.mark.parametrize("nibble", range(16))
    def test_every_nibble_is_unpacked(self, nibble: int) -> None:
        packed = torch.full((2, 5), nibble | (15 - nibble) << 4, dtype=torch.uint8)
        assert torch.equal(gemm.unpack_weight(packed, 9), unpack_int4(packed, torch.Size((2, 9))))

    @pytest.mark.parametrize("extras", ["none", "bias", "residual", "gate"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("steps", ["static", "per row"])
    def test_epilogue_is_the_contracts(self, extras: str, dtype: torch.dtype, steps: str) -> None:
        codes, weight = codes_of(12, 48), codes_of(20, 48)
        bias = torch.randn(20, dtype=torch.bfloat16) if extras != "none" else None
        residual = torch.randn(12, 30).half()[:, 5:25] if extras in ("residual", "gate") else None
        gate = torch.randn(3, 20) if extras == "gate" else None
        arguments = (steps_of(steps, 12), weight, torch.rand(20, 1) * 1e-3, bias, residual, gate, dtype)
        assert torch.equal(TRITON.linear(codes, *arguments), REFERENCE.linear(codes, *arguments))

    @pytest.mark.parametrize("tile", DISTINCT_TILES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}x{tile.block_k}")
    @pytest.mark.parametrize("packed", [False, True])
    def test_every_tile_computes_the_same(self, tile: Tile, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gemm, "find_tile", lambda *shape: tile)
        codes, weight = codes_of(140, 160), codes_of(300, 160)
        weight = pack_int4(weight.clamp(-7, 7)) if packed else weight
        residual, gate = torch.randn(140, 300), torch.randn(2, 300)
        arguments = (torch.rand(140, 1), weight, torch.rand(300, 1), torch.randn(300), residual, gate, torch.float32)
        assert torch.equal(TRITON.linear(codes, *arguments), REFERENCE.linear(codes, *arguments))

    def test_bfloat16_output(self) -> None:
        codes, weight = codes_of(12, 48), codes_of(20, 48)
        arguments = (torch.rand(12, 1), weight, torch.rand(20, 1), None, None, None, torch.bfloat16)
        out = TRITON.linear(codes, *arguments)
        assert out.dtype == torch.bfloat16
        # The interpreter truncates where a GPU rounds to the nearest.
        torch.testing.assert_close(out, REFERENCE.linear(codes, *arguments), rtol=2**-7, atol=0)

    def test_nan_steps_reach_their_rows(self) -> None:
        step = torch.tensor([[1.0], [torch.nan], [torch.inf]])
        out = TRITON.linear(codes_of(3, 16), step, codes_of(4, 16), torch.ones(4, 1), None, None, None, torch.float32)
        assert out[0].isfinite().all() and out[1].isnan().all() and not out[2].isfinite().any()

    def test_epilogue_of_another_librarys_sums(self) -> None:
        codes, weight = codes_of(20, 48), codes_of(20, 48)
        residual, gate = torch.randn(20, 20), torch.randn(4, 20)
        arguments = (torch.rand(20, 1), weight, torch.rand(20, 1), torch.randn(20), residual, gate, torch.float32)
        assert torch.equal(IntMM().linear(codes, *arguments), REFERENCE.linear(codes, *arguments))


class TestConv:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("shape", "kernel", "stride", "dilation"),
        [
            ((2, 6, 7, 5), [3, 3], [1, 1], [1, 1]),
            ((1, 8, 9, 33), [3, 2], [2, 1], [1, 2]),
            ((1, 4, 5, 64), [1, 1], [1, 1], [1, 1]),
            ((2, 5, 5, 6, 3), [3, 1, 2], [1, 2, 1], [2, 1, 1]),
            ((1, 3, 4, 4, 70), [3, 3, 3], [1, 1, 1], [1, 1, 1]),
        ],
    )
    def test_codes_are_convolved_exactly(
        self, shape: tuple[int, ...], kernel: list[int], stride: list[int], dilation: list[int], packed: bool
    ) -> None:
        codes = codes_of(*shape)
        weight = codes_of(19, shape[-1], *kernel)
        weight = pack_int4(weight.clamp(-7, 7)) if packed else weight
        scale = torch.rand(19, *[1] * (len(kernel) + 1)) * 1e-3  # sums within the range of float16
        step, bias = torch.rand(shape[0], 1) * 1e-2, torch.randn(19).half()
        for arguments in (
            (step, weight, scale, bias, kernel, stride, dilation, torch.float32),
            (step[:1, 0], weight, scale, None, kernel, stride, dilation, torch.float16),
        ):
            out = TRITON.conv(codes, *arguments)
            assert out.is_contiguous()
            assert torch.equal(out, REFERENCE.conv(codes, *arguments))


class TestWeightOnly:
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cannot multiply bfloat16
    @pytest.mark.parametrize(("rows", "outputs", "terms"), [(1, 5, 7), (2, 40, 300), (20, 33, 64)])
    def test_products_are_summed_in_float32(
        self, rows: int, outputs: int, terms: int, dtype: torch.dtype, packed: bool
    ) -> None:
        x, weight = torch.randn(rows, terms).to(dtype), torch.randint(-7, 8, (outputs, terms), dtype=torch.int8)
        scale, bias = torch.rand(outputs, 1), torch.randn(outputs)
        out = TRITON.weight_only_linear(x, pack_int4(weight) if packed else weight, scale, bias, dtype)
        expected = F.linear(x.double(), weight.double() * scale.double(), bias.double())
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_kernels_run_here() -> None:
    assert missing(torch.device("cpu")) is None
    assert missing(torch.device("meta")) == "it has no meta kernels"
