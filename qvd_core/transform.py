"""A SCRI transform of a layer's input: shift, scale, and a rotation of the channels. METHOD section 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.ops import semantics


@dataclass(frozen=True)
class Transform:
    """x~ = (x - shift) / scale, then a Hadamard rotation of every `rotation` neighbouring channels (0: none).

    shift, scale: float32 [K]. name: which candidate of the search it was.
    """

    name: str
    shift: Tensor
    scale: Tensor
    rotation: int = 0

    @property
    def parts(self) -> int:
        """How many of shift, scale and rotation do something: 0 to 3."""
        return int(bool((self.shift != 0).any())) + int(bool((self.scale != 1).any())) + int(self.rotation > 0)

    @classmethod
    def identity(cls, channels: int, device: torch.device | str = "cpu") -> Transform:
        return cls("none", torch.zeros(channels, device=device), torch.ones(channels, device=device))

    def without_effect(self) -> Transform:
        """The identity on as many channels."""
        return Transform.identity(len(self.shift), self.shift.device)

    def same(self, other: Transform) -> bool:
        """Whether the two compute the same."""
        equal = torch.equal(self.shift, other.shift) and torch.equal(self.scale, other.scale)
        return equal and self.rotation == other.rotation

    def to(self, device: torch.device | str) -> Transform:
        return Transform(self.name, self.shift.to(device), self.scale.to(device), self.rotation)

    def apply(self, rows: Tensor, taps: int = 1) -> Tensor:
        """Transformed rows, float32 [S, K * taps]; taps: elements of a row per channel (kh * kw of a convolution)."""
        if taps == 1:
            return semantics.transform(rows, self.shift, self.scale, self.rotation)
        pixels = rows.reshape(len(rows), len(self.shift), taps).transpose(1, 2)  # [S, taps, K]
        moved = semantics.transform(pixels, self.shift, self.scale, self.rotation)
        return moved.transpose(1, 2).flatten(1)
