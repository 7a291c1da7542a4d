"""The C matrix products against sums in int64 and the operators' semantics, written out below: equal bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvd_core.ops.cpu import CpuBackend, gemm, library
from qvd_core.packing import pack_int4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKEND = CpuBackend()


pytestmark = pytest.mark.usefixtures("kernels")


def usable_isas() -> list[str]:
    kernels = library.load()
    best = 0 if kernels is None else kernels.qvd_best_isa()
    return [name for name, code in library.ISA_CODES.items() if code <= best]


class Draw:
    """Random operands from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def codes(self, *shape: int, limit: int = 127) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=self.generator, dtype=torch.int8)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def steps(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) + 0.01


def expected_linear(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Of unpacked weight codes; every line rounds to float32 once."""
    total = (codes.double() @ weight.double().t()).long().float()  # exact: far below 2^53; an integer has no -0
    y = total * step
    y = y * weight_scale.view(1, -1)
    if bias is not None:
        y = y + bias.float()
    if gate is not None:
        y = y * gate.float().repeat_interleave(len(codes) // len(gate), dim=0)
    if residual is not None:
        y = residual.float() + y
    return y.to(dtype)


def windows(codes: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Rows [pixels, C * taps] of codes [*space, C], as a flattened weight [C, *kernel] meets them; the output size."""
    size = [
        (extent - gap * (taps - 1) - 1) // hop + 1
        for extent, taps, hop, gap in zip(codes.shape, kernel, stride, dilation, strict=False)
    ]
    rows = []
    for pixel in itertools.product(*map(range, size)):
        index = [
            torch.arange(taps) * gap + at * hop
            for at, taps, hop, gap in zip(pixel, kernel, stride, dilation, strict=True)
        ]
        rows.append(codes[torch.meshgrid(*index, indexing="ij")].movedim(-1, 0).flatten())
    return torch.stack(rows), size


def expected_conv(
    codes: Tensor,
    step: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Image by image, each window a row of a linear layer."""
    images = []
    for image, image_step in zip(codes, step.flatten().expand(len(codes)), strict=True):
        rows, size = windows(image, kernel, stride, dilation)
        y = expected_linear(rows, image_step, weight.flatten(1), weight_scale, bias, dtype=dtype)
        images.append(y.t().reshape(len(weight), *size))
    return torch.stack(images)


def equal_bits(found: Tensor | None, expected: Tensor) -> bool:
    """Equal with the sign of zero and NaN counted."""
    assert found is not None
    same = found.dtype == expected.dtype and found.shape == expected.shape and found.is_contiguous()
    integer = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return same and torch.equal(found.view(integer), expected.contiguous().view(integer))


# ---- linear ----


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 12, 13, 300])
@pytest.mark.parametrize("depth", [1, 63, 64, 65, 130, 1100])
def test_linear_is_exact_at_the_edges_of_tiles(isa: str, rows: int, depth: int) -> None:
    draw = Draw(rows * depth)
    for columns in (1, 17, 33, 290):
        codes, weight = draw.codes(rows, depth), draw.codes(columns, depth)
        step, scale, bias = draw.steps(rows, 1), draw.steps(columns, 1), draw.floats(columns)
        found = gemm.linear(codes, step, weight, scale, bias, None, None, torch.float32)
        assert equal_bits(found, expected_linear(codes, step, weight, scale, bias))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), depth=st.integers(0, 700), packed=st.booleans(),
    row_steps=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_linear_is_exact_for_any_shape(
    rows: int, columns: int, depth: int, packed: bool, row_steps: bool, dtype: torch.dtype, seed: int
) -> None:
    draw = Draw(seed)
    codes, weight = draw.codes(rows, depth), draw.codes(columns, depth, limit=7 if packed else 127)
    step, scale = draw.steps(*((rows, 1) if row_steps else (1,))), draw.steps(columns, 1)
    stored = pack_int4(weight) if packed else weight
    expected = expected_linear(codes, step, weight, scale, dtype=dtype)
    for name in usable_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QVD_CPU_ISA", name)
            assert equal_bits(gemm.linear(codes, step, stored, scale, None, None, None, dtype), expected)


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize(("code", "weight_code"), list(itertools.product([-128, -127, 127], repeat=2)))
def test_extreme_codes_do_not_saturate(isa: str, rows: int, code: int, weight_code: int) -> None:
    """All products of one sign: what vpmaddubsw gets wrong. 131071 is the longest sum, just below 2^31."""
    for depth in (64, 1000, 131071):
        codes = torch.full((rows, depth), code, dtype=torch.int8)
        weight = torch.full((3, depth), weight_code, dtype=torch.int8)
        one = torch.ones(1)
        found = gemm.linear(codes, one, weight, torch.ones(3, 1), None, None, None, torch.float32)
        assert found is not None
        assert torch.equal(found, torch.full((rows, 3), depth * code * weight_code, dtype=torch.int64).float())


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("code", "weight_code"), list(itertools.product([-128, 127], [-8, 7])))
def test_extreme_4_bit_weights_do_not_saturate(isa: str, rows: int, code: int, weight_code: int) -> None:
    nibble = weight_code & 15
    for depth in (64, 1000, 20000):
        codes = torch.full((rows, depth), code, dtype=torch.int8)
        weight = torch.full((3, depth // 2), nibble * 17, dtype=torch.uint8)
        found = gemm.linear(codes, torch.ones(1), weight, torch.ones(3, 1), None, None, None, torch.float32)
        assert found is not None
        assert torch.equal(found, torch.full((rows, 3), depth * code * weight_code, dtype=torch.int64).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("residual_dtype", "gates"),
    [(None, None), *itertools.product(DTYPES, [1, 3, None])],  # a gate row serves an equal share of the rows
)
@pytest.mark.parametrize("rows", [15, 3])
def test_bias_gate_and_residual_in_this_order(
    isa: str, dtype: torch.dtype, residual_dtype: torch.dtype | None, gates: int | None, rows: int
) -> None:
    draw = Draw(gates or 0)
    codes, weight, step, scale = draw.codes(rows, 200), draw.codes(45, 200), draw.steps(rows, 1), draw.steps(45, 1)
    bias = draw.floats(45).to(torch.bfloat16) * 1000
    residual = None if residual_dtype is None else (draw.floats(rows, 45) * 1000).to(residual_dtype)
    gate = None if gates is None else draw.floats(gates, 45).to(torch.float16)
    found = gemm.linear(codes, step, weight, scale, bias, residual, gate, dtype)
    assert equal_bits(found, expected_linear(codes, step, weight, scale, bias, residual, gate, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 9])
def test_steps_that_are_not_finite_reach_the_outputs(isa: str, dtype: torch.dtype, rows: int) -> None:
    """Of their own rows only; and what is too large for the output dtype becomes infinite."""
    codes, weight = torch.ones(rows, 70, dtype=torch.int8), torch.ones(40, 70, dtype=torch.int8)
    step = torch.ones(rows, 1)
    step[0], step[1] = torch.nan, torch.inf
    found = gemm.linear(codes, step, weight, torch.ones(40, 1), None, None, None, dtype)
    assert found is not None
    assert found[0].isnan().all() and found[1].isposinf().all() and (found[2:] == 70).all()
    huge = gemm.linear(codes, torch.tensor([3.3e38]), weight, torch.ones(40, 1), None, None, None, dtype)
    assert huge is not None and huge.isposinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_any_payload_stays_nan(isa: str, dtype: torch.dtype) -> None:
    """All mantissa bits set: rounding such a NaN up to bfloat16 would give -0."""
    codes, weight = torch.zeros(5, 4, dtype=torch.int8), torch.zeros(11, 4, dtype=torch.int8)
    for bits in (0x7FFFFFFF, -1):
        residual = torch.full((5, 11), bits, dtype=torch.int32).view(torch.float32)
        found = gemm.linear(codes, torch.ones(1), weight, torch.ones(11, 1), None, residual, None, dtype)
        assert found is not None and found.isnan().all()


def test_not_contiguous_operands(isa: str) -> None:
    draw = Draw(0)
    codes, weight = draw.codes(300, 20).t(), draw.codes(300, 50).t()
    step, scale = draw.steps(1, 1).expand(20, 1), draw.steps(50, 2)[:, :1]
    residual, bias = draw.floats(50, 20).t(), draw.floats(100)[::2]
    found = gemm.linear(codes, step, weight, scale, bias, residual, None, torch.float32)
    assert equal_bits(found, expected_linear(codes, step, weight, scale, bias, residual))


def test_outputs_without_elements(isa: str) -> None:
    empty = torch.empty(0, 8, dtype=torch.int8)
    full = torch.ones(5, 8, dtype=torch.int8)
    for codes, weight in ((empty, full), (full, empty)):
        scale = torch.ones(len(weight), 1)
        found = gemm.linear(codes, torch.ones(1), weight, scale, None, None, None, torch.float32)
        assert found is not None and found.shape == (len(codes), len(weight))


# ---- convolution ----


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_conv_is_exact_for_any_geometry(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    small = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    kernel, stride, dilation, extra = (data.draw(small) for _ in range(4))
    images, channels, filters = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 30)))
    packed, image_steps, dtype = data.draw(st.tuples(st.booleans(), st.booleans(), st.sampled_from(DTYPES)))
    draw = Draw(data.draw(st.integers(0, 2**31)))
    space = [gap * (taps - 1) + more for taps, gap, more in zip(kernel, dilation, extra, strict=True)]
    codes = draw.codes(images, *space, channels)
    weight = draw.codes(filters, channels, *kernel, limit=7 if packed else 127)
    step, scale = draw.steps(*((images, 1) if image_steps else (1,))), draw.steps(filters, *[1] * (dims + 1))
    bias = draw.floats(filters) if data.draw(st.booleans()) else None
    expected = expected_conv(codes, step, weight, scale, bias, kernel, stride, dilation, dtype)
    stored = pack_int4(weight) if packed else weight
    for name in usable_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QVD_CPU_ISA", name)
            assert equal_bits(gemm.conv(codes, step, stored, scale, bias, kernel, stride, dilation, dtype), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("space", "channels", "filters", "kernel"),
    [
        ([18, 18], 96, 40, [3, 3]),
        ([1, 1], 600, 290, [1, 1]),
        ([6, 5, 7], 64, 20, [3, 1, 1]),
        ([2, 8, 8], 16, 300, [1, 2, 2]),
        ([4, 6, 9], 37, 13, [2, 3, 4]),
        ([20, 20], 3, 8, [3, 3]),
    ],
)
def test_conv_of_real_kinds(
    isa: str, packed: bool, space: list[int], channels: int, filters: int, kernel: list[int]
) -> None:
    """Pointwise, spatial, temporal and patchifying; more than one tile; a tile that spans images."""
    draw = Draw(channels)
    codes, weight = draw.codes(2, *space, channels), draw.codes(filters, channels, *kernel, limit=7 if packed else 127)
    step, scale, bias = draw.steps(2, 1), draw.steps(filters, 1), draw.floats(filters).to(torch.float16)
    ones = [1] * len(kernel)
    expected = expected_conv(codes, step, weight, scale, bias, kernel, ones, ones)
    stored = pack_int4(weight) if packed else weight
    assert equal_bits(gemm.conv(codes, step, stored, scale, bias, kernel, ones, ones, torch.float32), expected)


@pytest.mark.parametrize(("code", "weight_code"), list(itertools.product([-128, 127], [-8, 7])))
def test_extreme_codes_of_a_4_bit_conv_do_not_saturate(isa: str, code: int, weight_code: int) -> None:
    codes = torch.full((1, 5, 5, 128), code, dtype=torch.int8)
    weight = torch.full((6, 128 * 9 // 2), (weight_code & 15) * 17, dtype=torch.uint8)
    one = torch.ones(1)
    found = gemm.conv(codes, one, weight, torch.ones(6, 1), None, [3, 3], [1, 1], [1, 1], torch.float32)
    assert found is not None and (found == 9 * 128 * code * weight_code).all()


def test_a_nan_step_reaches_only_its_image(isa: str) -> None:
    codes, weight = torch.ones(2, 3, 3, 8, dtype=torch.int8), torch.ones(4, 8, 1, 1, dtype=torch.int8)
    step = torch.tensor([[1.0], [torch.nan]])
    found = gemm.conv(codes, step, weight, torch.ones(4, 1), None, [1, 1], [1, 1], [1, 1], torch.bfloat16)
    assert found is not None and (found[0] == 8).all() and found[1].isnan().all()


# ---- threads, refusals, backend ----


@pytest.mark.parametrize(("rows", "columns"), [(3, 400), (40, 600), (600, 40), (300, 300)])
def test_threads_change_nothing(isa: str, threads: None, rows: int, columns: int) -> None:
    draw = Draw(rows)
    codes, weight = draw.codes(rows, 600), draw.codes(columns, 600)
    step, scale = draw.steps(rows, 1), draw.steps(columns, 1)
    expected = expected_linear(codes, step, weight, scale)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert equal_bits(gemm.linear(codes, step, weight, scale, None, None, None, torch.float32), expected)


def test_what_is_not_supported_is_left_to_pytorch() -> None:
    codes, weight = torch.ones(2, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
    step, scale, residual = torch.ones(1), torch.ones(3, 1), torch.ones(2, 3)

    def run(
        codes: Tensor = codes,
        step: Tensor = step,
        weight: Tensor = weight,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        return gemm.linear(codes, step, weight, scale, None, residual, gate, dtype)

    assert run() is not None
    assert run(dtype=torch.float64) is None
    assert run(residual=residual.double()) is None
    assert run(residual=torch.ones(1, 3)) is None  # would have to be broadcast
    assert run(residual=residual, gate=torch.ones(3, 3)) is None  # three gate rows for two rows
    assert run(codes=codes.to(torch.int32)) is None
    assert run(codes=codes[:, :5]) is None  # the weight is longer
    assert run(step=step.expand(3)) is None
    too_long = torch.ones(2, 2**17, dtype=torch.int8)
    assert run(codes=too_long, weight=too_long[:1].expand(3, -1)) is None


def test_backend_serves_what_the_kernels_refuse() -> None:
    codes, weight = torch.ones(2, 2**17, dtype=torch.int8), torch.ones(3, 2**17, dtype=torch.int8)
    found = BACKEND.linear(codes, torch.ones(1), weight, torch.ones(3, 1), None, None, None, torch.float64)
    assert found.dtype == torch.float64 and (found == 2**17).all()


def test_backend_runs_the_kernels() -> None:
    """One linear and one convolution through the class that layers use."""
    draw = Draw(0)
    codes, weight = draw.codes(6, 32), draw.codes(5, 32)
    step, scale = draw.steps(6, 1), draw.steps(5, 1)
    found = BACKEND.linear(codes, step, weight, scale, None, None, None, torch.bfloat16)
    assert equal_bits(found, expected_linear(codes, step, weight, scale, dtype=torch.bfloat16))
    images, filters = draw.codes(1, 4, 4, 8), draw.codes(5, 8, 3, 3)
    arguments = (images, step[:1], filters, scale, None, [3, 3], [1, 1], [1, 1])
    assert equal_bits(BACKEND.conv(*arguments, torch.float32), expected_conv(*arguments))


class TestQuantizedLinear:
    """One call from the floating-point input: the same bits as quantizing first and multiplying then."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rotation", [0, 16])
    @pytest.mark.parametrize("steps", ["token", "layer", "row", "strided"])
    @pytest.mark.parametrize("four_bits", [False, True])
    def test_is_the_two_calls(self, isa, dtype, rotation, steps, four_bits):
        torch.manual_seed(0)
        for rows in (1, 3, 37):
            x = (torch.randn(rows, 160) * 3).to(dtype)[:, :80]  # rows with a gap between them
            shift, scale = torch.randn(80), torch.rand(80) + 0.5
            static = torch.rand(rows, 2) + 0.01
            static_step = {"token": None, "layer": torch.tensor([0.05]), "row": static[:, :1].clone()}.get(
                steps, static[:, :1]
            )
            weight = torch.randint(-7, 8, (33, 80), dtype=torch.int8)
            weight = pack_int4(weight) if four_bits else weight
            weight_scale, bias = torch.rand(33, 1), torch.randn(33).to(dtype)
            how = (shift, scale, static_step, 8, rotation)
            out = gemm.quantized_linear(x, *how, weight, weight_scale, bias, dtype)
            codes, step = BACKEND.quantize_rows(x, *how)
            assert out is not None and torch.equal(
                out, BACKEND.linear(codes, step, weight, weight_scale, bias, None, None, dtype)
            )

    @pytest.mark.parametrize("static_step", [None, torch.ones(1), torch.ones(5, 1)])
    def test_nan_reaches_the_output(self, isa, static_step):
        x = torch.randn(5, 8)
        x[3, 2] = torch.nan
        out = gemm.quantized_linear(
            x, None, None, static_step, 8, 0, torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1), None, torch.float32
        )
        assert out is not None and out[3].isnan().all() and (static_step is not None or not out[:3].isnan().any())

    def test_what_it_leaves_to_others(self):
        weight, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1)
        for x, step in (
            (torch.randn(2, 8).double(), None),
            (torch.randn(0, 8), None),
            (torch.randn(2, 8), torch.ones(3, 1)),
        ):
            assert gemm.quantized_linear(x, None, None, step, 8, 0, weight, scale, None, torch.float32) is None
