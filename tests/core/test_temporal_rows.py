"""Equal rows, found without ever taking two different ones for equal, and the table of what was computed from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvd_core import temporal_rows
from qvd_core.temporal_rows import RowTable, distinct_rows, row_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bits_of(rows: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row.contiguous().view(torch.uint8).tolist()) for row in rows]


few_values = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-7, -3.5, float("nan"), float("inf")])


@given(
    rows=st.lists(st.lists(few_values, min_size=3, max_size=3), min_size=1, max_size=40), dtype=st.sampled_from(DTYPES)
)
@settings(max_examples=60)
def test_equal_means_equal_bits(rows: list[list[float]], dtype: torch.dtype) -> None:
    x = torch.tensor(rows, dtype=dtype)
    first, inverse = distinct_rows(x)
    assert bits_of(x[first][inverse]) == bits_of(x)
    assert len(first) == len(set(bits_of(x)))
    assert all(int(index) == bits_of(x).index(bits_of(x)[int(index)]) for index in first)
    keys = row_keys(x, dtype)
    assert [keys.index(key) for key in keys] == first[inverse].tolist()


def test_a_view_of_other_memory() -> None:
    x = torch.randn(4, 6).T.repeat(2, 1)
    first, inverse = distinct_rows(x)
    assert sorted(first.tolist()) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(x[first][inverse], x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 8])
def test_a_slice_at_any_offset(dtype: torch.dtype, channels: int) -> None:
    for offset in range(4):
        x = torch.arange(offset + 3 * channels).to(dtype)[offset:].view(3, channels)[[0, 1, 2, 1]].flatten()
        rows = torch.cat([torch.zeros(offset, dtype=dtype), x])[offset:].view(4, channels)
        first, inverse = distinct_rows(rows)
        assert len(first) == 3 and torch.equal(rows[first][inverse], rows)


def test_large_inputs_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 5)[torch.randint(7, (100,), generator=torch.Generator().manual_seed(0))]
    whole = distinct_rows(x)
    monkeypatch.setattr(temporal_rows, "_CHUNK_ELEMENTS", 16)
    chunked = distinct_rows(x)
    assert torch.equal(whole[0], chunked[0]) and torch.equal(whole[1], chunked[1])


def test_a_collision_of_the_hash_is_no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporal_rows, "_hashes", lambda bits, chunk: torch.zeros(len(bits), dtype=torch.long))
    assert distinct_rows(torch.randn(5, 3)) is None
    assert distinct_rows(torch.ones(5, 3)) is not None


def test_keys_tell_dtypes_apart() -> None:
    row = torch.randn(1, 4)
    assert row_keys(row, torch.float32) != row_keys(row, torch.bfloat16)


def filled(capacity: int, rows: int) -> tuple[RowTable, list]:
    table, keys = RowTable(capacity), row_keys(torch.arange(float(rows))[:, None], torch.float32)
    for index, key in enumerate(keys):
        table.add(key, torch.full((2,), float(index)))
    return table, keys


class TestRowTable:
    def test_the_least_recently_used_leaves(self) -> None:
        table, keys = filled(3, 3)
        assert table.get(keys[0]).tolist() == [0.0, 0.0]
        table.add((b"new", torch.float32, torch.device("cpu")), torch.zeros(2))
        assert [key in table for key in keys] == [True, False, True]
        assert table.get(keys[1]) is None and len(table) == 3

    def test_never_holds_more_than_it_may(self) -> None:
        table, keys = filled(4, 50)
        assert len(table) == 4 and table.nbytes() == 4 * 2 * 4
        assert [table.get(key) is not None for key in keys[-4:]] == [True] * 4
