"""Hands the tensors of a memory-mapped checkpoint to diffusers' loader one at a time.

A page of a mapped file that was read counts as the process's memory until the mapping goes, and safetensors keeps one
mapping for all tensors of a file. Here every tensor gets a mapping of its own, which goes with the tensor.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qvd_core.errors import QVDError

_MAPS = Path("/proc/self/maps")


class OneByOne(dict[str, Tensor]):
    """A state dict that is gone through once, by `items()`: it gives placeholders, and `[name]` the tensor itself.

    The placeholders are on the meta device, so that casting one costs nothing: diffusers casts every tensor before a
    quantizer sees it, and what is quantized must not be cast. After its turn a tensor is forgotten.

    begun: until this is True, it is an ordinary dict, in which tensors can be renamed.
    """

    def __init__(self, state_dict: dict[str, Tensor], begun: bool = True):
        super().__init__(state_dict)
        self.begun = begun
        self._mappings = _file_mappings(state_dict.values())

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as stored; where it is mapped from a file, through a mapping of its own.

        Raises QVDError when the file was written to since: what would be read then belongs to no checkpoint at all.
        """
        tensor = super().__getitem__(name)
        return _mapped_alone(tensor, self._mappings) if self.begun and self._mappings else tensor

    def items(self) -> Iterable[tuple[str, Tensor]]:  # type: ignore[override]  # a loader only goes through it
        """Name and placeholder of every tensor, in order."""
        return self._placeholders() if self.begun else super().items()

    def _placeholders(self) -> Iterator[tuple[str, Tensor]]:
        for name in list(self):
            stored = super().__getitem__(name)
            yield name, torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            self.pop(name, None)


@dataclass(frozen=True)
class _Mapping:
    """A part [start, end) of this process's addresses, where `path` is mapped from `offset` on.

    file: its device and inode. written: its size and the time it was last written to.
    """

    start: int
    end: int
    offset: int
    path: str
    file: tuple[int, int]
    written: tuple[int, int] = (0, 0)


def _file_mappings(tensors: Iterable[Tensor]) -> list[_Mapping]:
    """This process's private mappings of files that hold one of `tensors`, in ascending order.

    Empty where the system does not list mappings. What the files are called does not matter: the cache of the Hub names
    them by their hash.
    """
    try:
        lines = _MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    known = [mapping for line in lines if (mapping := _parsed(line)) is not None]
    starts = [mapping.start for mapping in known]
    places = {bisect_right(starts, tensor.data_ptr()) - 1 for tensor in tensors if tensor.device.type == "cpu"}
    return [found for place in sorted(places) if place >= 0 and (found := _as_written(known[place])) is not None]


def _parsed(line: str) -> _Mapping | None:
    """One line of the system's list; None for memory that is no file, or shared with other processes."""
    addresses, access, offset, device, inode, *path = line.split(maxsplit=5)
    if not path or not access.endswith("p") or inode == "0":
        return None
    start, end = (int(address, 16) for address in addresses.split("-"))
    major, minor = (int(number, 16) for number in device.split(":"))
    return _Mapping(start, end, int(offset, 16), path[0], (os.makedev(major, minor), int(inode)))


def _as_written(mapping: _Mapping) -> _Mapping | None:
    """`mapping` with what its file is like now; None when its path names another file by now, or none."""
    try:
        status = os.stat(mapping.path)
    except OSError:
        return None
    return replace(mapping, written=_written(status)) if _file(status) == mapping.file else None


def _file(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _mapped_alone(tensor: Tensor, mappings: list[_Mapping]) -> Tensor:
    """The same part of the same file, mapped for this tensor only; the tensor itself where that is not possible."""
    address, size = tensor.data_ptr(), tensor.nbytes
    index = bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1
    if index < 0 or not size or not tensor.is_contiguous() or address + size > mappings[index].end:
        return tensor
    mapping = mappings[index]
    position = mapping.offset + address - mapping.start
    before = position % mmap.ALLOCATIONGRANULARITY
    if before % tensor.element_size():
        return tensor
    try:
        with open(mapping.path, "rb") as file:
            status = os.fstat(file.fileno())
            if _file(status) != mapping.file:  # replaced: the old file lives on where it is mapped
                return tensor
            _refuse_written(mapping, status)
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=position - before)
    except OSError:
        return tensor
    own = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=before)
    return own.view(tensor.shape)


def _refuse_written(mapping: _Mapping, status: os.stat_result) -> None:
    """Raise QVDError when the file changed since: reading what was cut off would end the process."""
    if _written(status) != mapping.written:
        raise QVDError(f"{mapping.path} was written to while it was being loaded: load it again.")
