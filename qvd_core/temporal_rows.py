"""Which rows of a tensor are equal, and a memory of what was computed from them."""

from __future__ import annotations

import ctypes
import hashlib

import torch
from torch import Tensor

Key = tuple[bytes, torch.dtype, torch.device]

_CHUNK_ELEMENTS = 2**22  # products with a large tensor are made 32 MiB at a time
_DIGEST_BYTES = 16  # of a cryptographic hash: no two rows ever share one


class RowTable:
    """Outputs of a function of one row, by row; beyond `capacity` the least recently used leave.

    A key holds the dtype and the device of its output beside the row: what is looked up is exactly what was stored.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: dict[Key, Tensor] = {}  # in the order of their last use

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Key) -> Tensor | None:
        """The output [N] stored under a key, which becomes the most recently used."""
        output = self._rows.pop(key, None)
        if output is not None:
            self._rows[key] = output
        return output

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def add(self, key: Key, output: Tensor) -> None:
        """Store an output [N] under a key that is not there yet."""
        while len(self._rows) >= self.capacity:
            del self._rows[next(iter(self._rows))]
        self._rows[key] = output

    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(output.nbytes for output in self._rows.values())


def row_keys(rows: Tensor, dtype: torch.dtype) -> list[Key]:
    """One key per row of `rows` [M, C] for an output of `dtype` on the same device; equal keys mean equal bits."""
    packed = rows.detach().contiguous().cpu()
    size = packed.shape[1] * packed.element_size()
    start = packed.data_ptr()
    digests = [
        hashlib.blake2b(ctypes.string_at(start + row * size, size), digest_size=_DIGEST_BYTES).digest()
        for row in range(len(packed))
    ]
    return [(digest, dtype, rows.device) for digest in digests]


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """(first, inverse), int64 [U] and [M]: rows[first][inverse] equals `rows` [M, C] bit for bit.

    Sorting whole rows, as `torch.unique(dim=0)` does, costs more than it saves: rows are sorted by an exact integer
    hash, and what the hash calls equal is then compared. None in the improbable case that it was not.
    """
    row_bytes = rows.shape[1] * rows.element_size()
    words = next(dtype for dtype in (torch.int64, torch.int32, torch.int16) if row_bytes % dtype.itemsize == 0)
    packed = rows.detach().contiguous()
    if packed.storage_offset() * packed.element_size() % words.itemsize:
        packed = packed.clone()
    bits = packed.view(words)
    chunk = max(1, _CHUNK_ELEMENTS // bits.shape[1])
    _, inverse = torch.unique(_hashes(bits, chunk), return_inverse=True)
    order = torch.arange(len(bits), device=bits.device)
    count = int(inverse.max()) + 1
    first = torch.full((count,), len(bits), device=bits.device).scatter_reduce(0, inverse, order, "amin")
    for start in range(0, len(bits), chunk):
        part = slice(start, start + chunk)
        if not torch.equal(bits[part], bits[first[inverse[part]]]):
            return None
    return first, inverse


def _hashes(bits: Tensor, chunk: int) -> Tensor:
    """int64 [M] of integer rows [M, C]: a random linear form modulo 2^64, the same in any order of summation."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (bits.shape[1],), generator=generator, device="cpu")
    factors = factors.to(bits.device) | 1  # odd: rows that differ in one word never share a hash
    parts = [(bits[start : start + chunk].long() * factors).sum(dim=1) for start in range(0, len(bits), chunk)]
    return torch.cat(parts)
