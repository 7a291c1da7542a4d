"""Hands the tensors of a memory-mapped checkpoint to diffusers' loader one at a time.

A page of a mapped file that was read counts as the process's memory until the mapping goes, and safetensors keeps one
mapping for all tensors of a file. Here every tensor gets a mapping of its own, which goes with the tensor.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MAPS = Path("/proc/self/maps")


class OneByOne(dict[str, Tensor]):
    """A state dict that is gone through once, by `items()`: it gives placeholders, and `[name]` the tensor itself.

    The placeholders are on the meta device, so that casting one costs nothing: diffusers casts every tensor before a
    quantizer sees it, and what is quantized must not be cast. After its turn a tensor is forgotten.
    """

    def __init__(self, state_dict: dict[str, Tensor]):
        super().__init__(state_dict)
        self._mappings = _file_mappings()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as stored; where it is mapped from a file, through a mapping of its own."""
        tensor = super().__getitem__(name)
        return _mapped_alone(tensor, self._mappings) if self._mappings else tensor

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]  # a loader only goes through it
        """Name and placeholder of every tensor, in order."""
        for name in list(self):
            stored = super().__getitem__(name)
            yield name, torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            self.pop(name, None)


@dataclass(frozen=True)
class _Mapping:
    """A part [start, end) of this process's addresses, where `path` is mapped from `offset` on."""

    start: int
    end: int
    offset: int
    path: str


def _file_mappings() -> list[_Mapping]:
    """This process's private file mappings in ascending order; empty where the system does not list them."""
    try:
        lines = _MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, access, offset, device, inode, *path = line.split(maxsplit=5)
        if path and access.endswith("p") and inode != "0" and _is_file(path[0], device, int(inode)):
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(_Mapping(start, end, int(offset, 16), path[0]))
    return found


def _is_file(path: str, device: str, inode: int) -> bool:
    """Whether `path` still names the file that was mapped, and is a checkpoint at all."""
    if not path.endswith(".safetensors"):
        return False
    try:
        status = os.stat(path)
    except OSError:
        return False
    major, minor = (int(number, 16) for number in device.split(":"))
    return status.st_ino == inode and (os.major(status.st_dev), os.minor(status.st_dev)) == (major, minor)


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
            pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=position - before)
    except (OSError, ValueError):
        return tensor
    own = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=before)
    return own.view(tensor.shape)
