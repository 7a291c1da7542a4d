"""The `torch._int_mm` backend. On a CPU without VNNI the product is slow, and as exact as everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvd_core.ops import int_mm
from qvd_core.ops.emulated import INT32_TERMS
from qvd_core.ops.int_mm import IntMM, integer_product, padded, usable
from qvd_core.ops.reference import Reference
from qvd_core.packing import pack_int4

BACKEND, REFERENCE = IntMM(), Reference()


def codes_of(*shape: int) -> Tensor:
    """Random codes, half of them extremes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    extreme = torch.rand(shape, generator=generator) < 0.5
    return torch.where(extreme, torch.where(codes < 60, 127, -128), codes).to(torch.int8)


@pytest.mark.parametrize(("rows", "outputs", "terms"), [(1, 1, 1), (5, 3, 7), (40, 24, 100)])
def test_sums_are_exact(rows: int, outputs: int, terms: int) -> None:
    codes, weight = codes_of(rows, terms), codes_of(outputs, terms)
    total = integer_product(codes, weight)
    assert total.dtype == torch.int32
    assert torch.equal(total.long(), codes.long() @ weight.long().T)


def test_sums_that_int32_cannot_hold_are_emulated() -> None:
    codes = torch.full((1, INT32_TERMS), -128, dtype=torch.int8)
    assert BACKEND.integer_linear(codes, codes).item() == 2.0**31


def test_an_empty_input() -> None:
    assert BACKEND.integer_linear(codes_of(0, 8), codes_of(4, 8)).shape == (0, 4)


@pytest.mark.parametrize(("shape", "multiples"), [((1, 3, 5), (8, 8)), ((20, 40, 24), (32, 8)), ((16, 64, 64), (8, 8))])
def test_padding_makes_shapes_that_cuda_takes_and_changes_no_sum(
    shape: tuple[int, int, int], multiples: tuple[int, int]
) -> None:
    rows, outputs, terms = shape
    codes, weight = codes_of(rows, terms), codes_of(outputs, terms)
    wide_codes, wide_weight = padded(codes, weight, 17, *multiples)
    assert len(wide_codes) >= 17
    assert len(wide_weight) % multiples[0] == 0 and wide_weight.shape[1] % multiples[1] == 0
    assert wide_codes.shape[1] == wide_weight.shape[1]
    total = wide_codes.long() @ wide_weight.long().T
    assert torch.equal(total[:rows, :outputs], codes.long() @ weight.long().T)


def test_padding_copies_nothing_that_fits() -> None:
    codes, weight = codes_of(32, 16), codes_of(8, 16)
    wide_codes, wide_weight = padded(codes, weight, 17, 8, 8)
    assert wide_codes is codes and wide_weight is weight


@pytest.mark.parametrize("packed", [False, True])
def test_linear_is_the_contracts(packed: bool) -> None:
    codes, weight = codes_of(12, 34), codes_of(20, 34)
    weight = pack_int4(weight.clamp(-7, 7)) if packed else weight
    bias, residual, gate = torch.randn(20).half(), torch.randn(12, 20), torch.randn(3, 20).bfloat16()
    arguments = (torch.rand(12, 1), weight, torch.rand(20, 1), bias, residual, gate, torch.bfloat16)
    assert torch.equal(BACKEND.linear(codes, *arguments), REFERENCE.linear(codes, *arguments))


@pytest.mark.parametrize("window_bytes", [1, 2000, 2**26], ids=["a line", "some images or lines", "everything"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dilation"),
    [
        ((3, 7, 6, 5), [3, 3], [1, 1], [1, 1]),
        ((2, 9, 8, 4), [3, 2], [2, 1], [2, 3]),
        ((2, 6, 5, 4, 3), [3, 1, 2], [2, 1, 1], [1, 1, 2]),
    ],
)
def test_convolutions_in_pieces(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    window_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int_mm, "WINDOW_BYTES", window_bytes)
    codes, weight = codes_of(*shape), codes_of(6, shape[-1], *kernel)
    total = BACKEND.integer_conv(codes, weight, stride, dilation)
    assert torch.equal(total, REFERENCE.integer_conv(codes, weight, stride, dilation))


@pytest.mark.parametrize(
    ("features", "expected"), [({"avx512_vnni": True}, True), ({"avx2": True}, False), ({}, False)]
)
def test_usable_on_a_cpu_with_vnni_only(
    features: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert usable("cpu") is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_usable_from_turing_on(capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert usable("cuda") is expected


def test_usable_nowhere_else() -> None:
    assert not usable("meta")
