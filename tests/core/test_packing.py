"""Two 4-bit codes per byte, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.packing import pack_int4, unpack_int4

shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


def random_codes(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@settings(max_examples=60)
@given(shapes, st.integers(0, 2**31))
def test_round_trip(shape, seed):
    codes = random_codes(shape, seed)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], (codes[0].numel() + 1) // 2)
    restored = unpack_int4(packed, codes.shape)
    assert restored.dtype == torch.int8 and restored.is_contiguous() and torch.equal(restored, codes)


def test_every_pair_of_codes():
    values = torch.arange(-7, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(values, values)
    assert torch.equal(unpack_int4(pack_int4(codes), codes.shape), codes)


def test_the_layout_of_bytes():
    codes = torch.tensor([[1, -1, 7, -7, 3]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0xF1, 0x97, 0x03]]


def test_strided_codes_pack_like_contiguous_ones():
    codes = random_codes((6, 9)).T
    assert torch.equal(pack_int4(codes), pack_int4(codes.contiguous()))


def test_no_codes():
    codes = torch.zeros(3, 0, dtype=torch.int8)
    assert pack_int4(codes).shape == (3, 0)
    assert unpack_int4(pack_int4(codes), codes.shape).shape == (3, 0)


def test_runs_on_meta():
    packed = pack_int4(torch.empty(4, 5, 3, 3, dtype=torch.int8, device="meta"))
    assert packed.is_meta and packed.shape == (4, 23)
    assert unpack_int4(packed, torch.Size((4, 5, 3, 3))).shape == (4, 5, 3, 3)


def test_compiles_without_graph_breaks():
    codes = random_codes((4, 7))
    packed = torch.compile(pack_int4, backend="eager", fullgraph=True)(codes)
    assert torch.equal(packed, pack_int4(codes))
    unpack = torch.compile(unpack_int4, backend="eager", fullgraph=True)
    assert torch.equal(unpack(packed, codes.shape), codes)


@pytest.mark.parametrize("code", [-128, -8, 8, 127])
def test_refuses_codes_beyond_4_bits(code):
    codes = torch.zeros(2, 4, dtype=torch.int8)
    codes[1, 2] = code
    with pytest.raises(QVDError, match=str(code)):
        pack_int4(codes)


def test_refuses_what_is_not_int8():
    with pytest.raises(QVDError, match="float32"):
        pack_int4(torch.zeros(2, 4))
    with pytest.raises(QVDError, match=r"\[4\]"):
        pack_int4(torch.zeros(4, dtype=torch.int8))


@pytest.mark.parametrize("packed", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8)])
def test_refuses_to_unpack_into_another_shape(packed):
    with pytest.raises(QVDError, match=r"\[2, 7\].*\[2, 4\]"):
        unpack_int4(packed, torch.Size((2, 7)))
