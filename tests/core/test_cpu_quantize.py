"""The C quantizer against the operators' semantics, written out below in plain PyTorch: equal bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qvd_core import QVDError
from qvd_core.ops.cpu import CpuBackend, isa_name, library, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKEND = CpuBackend()


pytestmark = pytest.mark.usefixtures("kernels")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformed(x: Tensor, shift: Tensor | None, scale: Tensor | None, rotation: int) -> Tensor:
    """x [..., K] as it is before rounding."""
    x = x.float()
    x = x if shift is None else x - shift
    x = x if scale is None else x * (1 / scale)
    if rotation < 2:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, rotation)
    distance = 1
    while distance < rotation:
        partner = torch.arange(rotation) ^ distance
        is_second = (torch.arange(rotation) & distance).bool()
        blocks = torch.where(is_second, blocks[..., partner] - blocks, blocks + blocks[..., partner])
        distance *= 2
    return (blocks / math.sqrt(rotation)).flatten(-2)


def dynamic_step(x: Tensor, bits: int) -> Tensor:
    """One step for each row of x [..., K]."""
    return (x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=1e-20)


def encoded(x: Tensor, step: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return (x * (1 / step)).round().clamp(-limit, limit).to(torch.int8)


def check_rows(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    static_step: Tensor | None = None,
    bits: int = 8,
    rotation: int = 0,
) -> None:
    result = quantize.quantize_rows(x, shift, scale, static_step, bits, rotation)
    assert result is not None, "the C kernels left out what they should do"
    codes, step = result
    rows = transformed(x, shift, scale, rotation)
    expected_step = dynamic_step(rows, bits) if static_step is None else static_step
    assert torch.equal(step, expected_step)
    assert torch.equal(codes, encoded(rows, expected_step, bits))
    assert codes.is_contiguous()


def check_images(
    x: Tensor,
    padding: list[int],
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    static_step: Tensor | None = None,
    bits: int = 8,
    rotation: int = 0,
) -> None:
    result = quantize.quantize_images(x, shift, scale, static_step, bits, rotation, padding)
    assert result is not None, "the C kernels left out what they should do"
    codes, step = result
    padded = F.pad(x, padding).movedim(1, -1)
    pixels = transformed(padded, shift, scale, rotation)
    expected_step = dynamic_step(pixels.flatten(1), bits) if static_step is None else static_step
    per_image = expected_step.view(-1, *[1] * (x.dim() - 1))
    assert torch.equal(step, expected_step)
    assert torch.equal(codes, encoded(pixels, per_image, bits))
    assert codes.is_contiguous()


def factors(channels: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Shift and scale, each there or not."""
    shift, scale = randn(channels, seed=1), randn(channels, seed=2).abs() + 0.1
    return [(None, None), (shift, None), (None, scale), (shift, scale)]


@pytest.mark.usefixtures("isa")
class TestRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 129), (2, 2048), (2, 2049), (2, 16384 + 24)])
    def test_every_step_and_transform(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x = (3 * randn(*shape) + 1).to(dtype)
        for shift, scale in factors(shape[1]):
            for static_step in (None, torch.tensor([0.03]), randn(shape[0], 1, seed=3).abs() + 0.01):
                check_rows(x, shift, scale, static_step)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_bits(self, bits: int) -> None:
        check_rows(randn(5, 40), bits=bits)
        check_rows(randn(5, 40), static_step=torch.tensor([0.5]), bits=bits)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rotation", [1, 2, 4, 8, 16, 32, 64, 128])
    def test_rotation(self, dtype: torch.dtype, rotation: int) -> None:
        for blocks in (1, 3, 129):  # 129 * 128 channels: longer than what a row keeps
            shift, scale = factors(blocks * rotation)[-1]
            x = randn(3, blocks * rotation).to(dtype)
            check_rows(x, shift, scale, rotation=rotation)
            check_rows(x, static_step=torch.tensor([0.1]), rotation=rotation)

    def test_ties_round_to_even(self) -> None:
        x = torch.arange(-128.0, 129.0) / 2
        codes, _ = quantize.quantize_rows(x[None], None, None, torch.ones(1), 8, 0) or (None, None)
        assert codes is not None
        assert codes[0].tolist() == [round(value) for value in x.tolist()]  # Python rounds half to even

    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 1e-22, 3e38])
    def test_extreme_rows(self, value: float) -> None:
        x = torch.full((2, 19), value)
        x[1, 7] = -value
        check_rows(x)
        check_rows(x, static_step=torch.tensor([1e-3]))

    @given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(2, 8), st.integers(0, 7))
    @settings(max_examples=30)
    def test_any_shape(self, rows: int, channels: int, dtype: torch.dtype, bits: int, seed: int) -> None:
        shift, scale = factors(channels)[seed % 4]
        check_rows((randn(rows, channels, seed=seed) * 10 ** (seed - 5)).to(dtype), shift, scale, bits=bits)

    def test_strided_rows(self) -> None:
        x = randn(6, 40)
        check_rows(x[::2, 3:20])
        check_rows(x.t())
        check_rows(x[:1].expand(4, 40))
        check_rows(randn(3, 9), shift=randn(18)[::2], scale=randn(18, seed=2).abs()[::2] + 1)

    @pytest.mark.parametrize("bad", [math.nan, -math.nan])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_marks_its_row_only(self, dtype: torch.dtype, bad: float) -> None:
        x = randn(4, 37).to(dtype)
        x[2, 36] = bad
        codes, step = quantize.quantize_rows(x, None, None, None, 8, 0) or (None, None)
        assert codes is not None and step is not None
        assert step.isnan().flatten().tolist() == [False, False, True, False]
        rest = torch.tensor([0, 1, 3])
        assert torch.equal(codes[rest], encoded(x[rest].float(), dynamic_step(x[rest].float(), 8), 8))

    @pytest.mark.parametrize("static_step", [torch.tensor([0.1]), torch.full((4, 1), 0.1)])
    def test_nan_marks_all_static_steps(self, static_step: Tensor) -> None:
        x = randn(4, 3000)
        x[1, 2500] = math.nan
        _, step = quantize.quantize_rows(x, None, None, static_step, 8, 0) or (None, None)
        assert step is not None and step.isnan().all() and step.shape == static_step.shape
        assert not static_step.isnan().any(), "the caller's steps were written"

    def test_static_steps_are_copies(self) -> None:
        static_step = torch.ones(1)
        _, step = quantize.quantize_rows(randn(2, 3), None, None, static_step, 8, 0) or (None, None)
        assert step is not None and step.data_ptr() != static_step.data_ptr()

    def test_infinity(self) -> None:
        x = randn(3, 21)
        x[0, 3], x[1, 4] = math.inf, -math.inf
        codes, step = quantize.quantize_rows(x, None, None, None, 8, 0) or (None, None)
        assert step is not None and step.isinf().flatten().tolist() == [True, True, False]
        codes, step = quantize.quantize_rows(x, None, None, torch.ones(1), 8, 0) or (None, None)
        assert codes is not None and step is not None
        assert [int(codes[0, 3]), int(codes[1, 4]), float(step)] == [127, -127, 1.0]

    def test_infinities_that_rotate_into_nan(self) -> None:
        x = torch.full((1, 8), math.inf)
        _, step = quantize.quantize_rows(x, None, None, None, 8, 8) or (None, None)
        assert step is not None and step.isnan().all()


@pytest.mark.usefixtures("isa")
class TestImages:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "padding"),
        [
            ((2, 3, 5, 7), [0, 0, 0, 0]),
            ((2, 4, 5, 7), [0, 1, 2, 3]),
            ((1, 33, 9, 31), [1, 1, 1, 1]),  # more pixels than a tile
            ((2, 130, 1, 1), [1, 1, 1, 1]),
            ((2, 16, 3, 4, 5), [0, 0, 0, 0, 1, 1]),  # temporal: lines and planes follow each other
            ((1, 20, 3, 4, 5), [1, 0, 2, 1, 0, 3]),
            ((1, 5, 2, 3, 700), [0, 0, 1, 1, 0, 0]),
        ],
    )
    def test_every_step_and_transform(self, dtype: torch.dtype, shape: tuple[int, ...], padding: list[int]) -> None:
        x = (3 * randn(*shape) + 1).to(dtype)
        for shift, scale in factors(shape[1]):
            for static_step in (None, torch.tensor([0.03]), randn(shape[0], 1, seed=3).abs() + 0.01):
                check_images(x, padding, shift, scale, static_step)

    @pytest.mark.parametrize("padding", [[0, 0, 0, 0], [1, 1, 1, 1]])
    def test_any_strides(self, padding: list[int]) -> None:
        for channels in (3, 18):
            x = randn(2, channels, 6, 10)
            shift, scale = factors(channels)[-1]
            for view in (
                x.to(memory_format=torch.channels_last),
                x.transpose(-1, -2).contiguous().transpose(-1, -2),
                torch.cat([x, x], dim=-1)[..., 3:13],
                x[..., ::2],
                x[:, :, ::3],
                x[:1].expand(3, -1, -1, -1),
                x[:, :1].expand(-1, channels, -1, -1),
                x[..., :1],
            ):
                check_images(view, padding, shift, scale)
                check_images(view, padding, shift, scale, torch.tensor([0.02]))

    def test_channels_last_video(self) -> None:
        x = randn(2, 24, 3, 5, 6).to(memory_format=torch.channels_last_3d)
        check_images(x, [1, 1, 1, 1, 2, 0], *factors(24)[-1])

    @pytest.mark.parametrize("rotation", [2, 4, 16, 128])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_rotation(self, rotation: int, memory_format: torch.memory_format) -> None:
        channels = max(3 * rotation, 20)
        x = randn(2, channels, 5, 9).to(memory_format=memory_format)
        check_images(x, [1, 1, 1, 1], *factors(channels)[-1], rotation=rotation)
        check_images(x, [1, 1, 1, 1], *factors(channels)[-1], torch.tensor([0.1]), rotation=rotation)

    def test_many_channels_and_long_lines(self) -> None:
        check_images(randn(1, 2100, 2, 3), [1, 1, 0, 0], *factors(2100)[-1])
        check_images(randn(1, 2100, 2, 3).to(memory_format=torch.channels_last), [1, 1, 0, 0], *factors(2100)[-1])
        check_images(randn(1, 2, 3, 5000), [1, 1, 1, 1])

    def test_more_images_than_the_cache_holds(self) -> None:
        check_images(randn(5, 8, 300, 320), [1, 1, 1, 1])

    def test_the_border_may_hold_the_largest_value(self) -> None:
        shift = torch.tensor([50.0, 0.0])
        x = torch.stack([50 + randn(4, 4), randn(4, 4, seed=1)])[None]
        check_images(x, [1, 0, 0, 0], shift)
        check_images(x, [0, 0, 0, 0], shift)

    def test_nan_marks_its_image_only(self) -> None:
        x = randn(3, 20, 6, 7)
        x[1, 19, 5, 6] = math.nan
        codes, step = quantize.quantize_images(x, None, None, None, 8, 0, [1, 1, 1, 1]) or (None, None)
        assert codes is not None and step is not None
        assert step.isnan().flatten().tolist() == [False, True, False]

    @pytest.mark.parametrize("where", ["image", "border"])
    def test_nan_marks_all_static_steps(self, where: str) -> None:
        x, shift = randn(3, 20, 6, 7), torch.zeros(20)
        (x if where == "image" else shift).view(-1)[11] = math.nan
        static_step = torch.full((3, 1), 0.1)
        _, step = quantize.quantize_images(x, shift, None, static_step, 8, 0, [1, 1, 1, 1]) or (None, None)
        assert step is not None and step.isnan().all() and not static_step.isnan().any()


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bytes() -> None:
    rows, images = randn(200, 300), randn(3, 70, 40, 41)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            [
                *BACKEND.quantize_rows(rows, None, None, None, 8, 4),
                *BACKEND.quantize_images(images, None, None, None, 8, 2, [1, 1, 1, 1]),
                *BACKEND.quantize_images(images, None, None, torch.ones(1), 8, 0, [1, 1, 1, 1]),
            ]
        )
    check_rows(rows, rotation=4)
    check_images(images, [1, 1, 1, 1], rotation=2)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_an_unknown_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isa_name() == isa
    monkeypatch.setenv("QVD_CPU_ISA", "sse9")
    library.isa.cache_clear()
    with pytest.raises(QVDError, match=r"QVD_CPU_ISA='sse9'.*use avx2"):
        quantize.quantize_rows(randn(2, 3), None, None, None, 8, 0)


class TestLeftOut:
    """What the C kernels do not do is None there, and done by the backend all the same."""

    @pytest.mark.parametrize("x", [torch.ones(2, 8, dtype=torch.float64), torch.ones(0, 8)])
    def test_rows(self, x: Tensor) -> None:
        assert quantize.quantize_rows(x, None, None, None, 8, 0) is None
        codes, step = BACKEND.quantize_rows(x, None, None, None, 8, 0)
        assert codes.shape == x.shape and step.shape == (len(x), 1) and (codes == 127).all()

    def test_a_rotation_beyond_128(self) -> None:
        x = randn(2, 256)
        assert quantize.quantize_rows(x, None, None, None, 8, 256) is None
        codes, _ = BACKEND.quantize_rows(x, None, None, None, 8, 256)
        rotated = transformed(x, None, None, 256)
        assert torch.equal(codes, encoded(rotated, dynamic_step(rotated, 8), 8))

    def test_factors_of_other_types_and_sizes(self) -> None:
        x = randn(2, 8)
        assert quantize.quantize_rows(x, torch.zeros(8, dtype=torch.float64), None, None, 8, 0) is None
        assert quantize.quantize_rows(x, torch.zeros(1), None, None, 8, 0) is None
        assert quantize.quantize_rows(x, None, None, torch.ones(3, 1), 8, 0) is None

    def test_padding_that_crops(self) -> None:
        x = randn(1, 3, 4, 5)
        assert quantize.quantize_images(x, None, None, None, 8, 0, [-1, 0, 0, 0]) is None
        codes, _ = BACKEND.quantize_images(x, None, None, None, 8, 0, [-1, 0, 0, 0])
        assert codes.shape == (1, 4, 4, 3)

    def test_other_default_device_and_type(self) -> None:
        """Buffers follow the input, not what new tensors are by default."""
        x = randn(2, 8)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                done = quantize.quantize_rows(x, None, None, None, 8, 0)
                images = quantize.quantize_images(x[None], None, None, None, 8, 0, [1, 1])
        finally:
            torch.set_default_dtype(before)
        assert done is not None and done[0].device == x.device and done[1].dtype == torch.float32
        assert images is not None and images[0].device == x.device and images[1].dtype == torch.float32


def test_missing_library_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", [library.open_library(tmp_path / "none.so")])
    x = randn(2, 8)
    assert quantize.quantize_rows(x, None, None, None, 8, 0) is None
    assert isa_name() == "none"
    codes, step = BACKEND.quantize_rows(x, None, None, None, 8, 0)
    assert torch.equal(step, dynamic_step(x, 8)) and torch.equal(codes, encoded(x, step, 8))
