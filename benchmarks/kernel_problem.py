"""The data of one measured layer, and the judge: what it should compute, at a sample of its outputs, in float64.

Inputs are normal with mean 1, weights uniform, as in a freshly made layer: flat weights are what makes sums of 8-bit
products large, and so what shows an integer kernel that saturates. All numbers are exact in bfloat16, so that every
precision starts from the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_shapes import Shape

POSITIONS = 512  # outputs (rows, pixels) that are judged, all channels of each; their sums are made in float64
SEED = 0


@dataclass(frozen=True)
class IntegerCase:
    """Codes at the limits of their bits, and the integer sums that they give.

    codes: int8 [M, K] or [B, *padded space, C]. weight: int8 [N, K] or [N, C, *kernel].
    sums: float32 [P, N] at the judged positions, the exact integers rounded once.
    """

    codes: Tensor
    weight: Tensor
    sums: Tensor


class Problem:
    """One layer with its input: x [M, K] or [B, C, *space], weight [N, K] or [N, C, *kernel], bias [N], float32."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(SEED)
        self.x = self._normal((shape.batch, shape.inputs, *shape.space)).add_(1).bfloat16().float()
        bound = shape.terms**-0.5
        self.weight = self._uniform((shape.outputs, shape.inputs, *shape.kernel), bound).bfloat16().float()
        self.bias = self._uniform((shape.outputs,), bound).bfloat16().float()
        count = min(POSITIONS, shape.rows)
        self.positions = torch.linspace(0, shape.rows - 1, count, dtype=torch.float64, device=device).long()

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type that the device multiplies fast."""
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 0):
            return torch.float16
        return torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs and outputs of a quantized layer: what the rest of the model computes in on this device."""
        return self.half if self.device.type == "cuda" else torch.float32

    @cached_property
    def input(self) -> Tensor:
        """x in `dtype`."""
        return self.x.to(self.dtype)

    def weight_codes(self, bits: int = 8) -> tuple[Tensor, Tensor]:
        """Symmetric codes int8 in the weight's shape and their scale float32 [N, 1, ...], one per output channel."""
        limit = 2 ** (bits - 1) - 1
        dims = tuple(range(1, self.weight.dim()))
        scale = self.weight.abs().amax(dim=dims, keepdim=True) / limit
        return (self.weight / scale).round().clamp(-limit, limit).to(torch.int8), scale

    def rows_of(self, source: Tensor) -> Tensor:
        """What the judged outputs are made of: [P, C * taps], in the order of a flattened weight.

        source: [M, K], or channels last and padded [B, *padded space, C].
        """
        shape = self.shape
        if shape.kind == "linear":
            return source[self.positions]
        image, place = self.positions // (shape.rows // shape.batch), self.positions % (shape.rows // shape.batch)
        corner = [index * hop for index, hop in zip(_unravel(place, shape.out_space), shape.stride, strict=True)]
        taps = [
            source[(image, *(start + step for start, step in zip(corner, offset, strict=True)))]
            for offset in product(*map(range, shape.kernel))
        ]
        return torch.stack(taps, dim=-1).flatten(1)

    def judged(self, output: Tensor) -> Tensor:
        """The judged positions [P, N] of an output [M, N] or [B, N, *out]."""
        if self.shape.kind == "linear":
            return output[self.positions]
        image = self.positions // (self.shape.rows // self.shape.batch)
        place = _unravel(self.positions % (self.shape.rows // self.shape.batch), self.shape.out_space)
        return output.movedim(1, -1)[(image, *place)]

    @cached_property
    def reference(self) -> Tensor:
        """float64 [P, N]: the layer without any quantization."""
        return self._rows.double() @ self.weight.flatten(1).double().T + self.bias.double()

    @cached_property
    def quantized_reference(self) -> Tensor:
        """float64 [P, N]: the layer with 8-bit weights per channel and 8-bit inputs per token (image), exactly."""
        codes, scale = self.weight_codes()
        step = self._steps / 127
        rows = (self._rows / step).round().clamp(-127, 127)
        total = rows.double() @ codes.flatten(1).double().T
        return total * step.double() * scale.flatten().double() + self.bias.double()

    def integer_case(self, weight_bits: int = 8) -> IntegerCase:
        """Codes of -128 and +-127, weights at both ends of their range: the largest sums of either sign.

        Half of the rows (images) and of the weight's channels hold one value only, so that sums of neighbours go to
        the limit; the others are random, so that a wrong place shows. 4-bit weights have no -8.
        """
        shape = self.shape
        size = (shape.batch, *shape.padded_space, shape.inputs)
        codes = self._pick(size, (-128, -127, 127))
        codes[: shape.batch // 4], codes[shape.batch // 4 : shape.batch // 2] = 127, -128
        limit = 2 ** (weight_bits - 1) - 1
        low = -limit - 1 if weight_bits == 8 else -limit
        weight = self._pick((shape.outputs, shape.inputs, *shape.kernel), (low, -limit, limit))
        weight[::4], weight[1::4] = limit, low
        sums = self.rows_of(codes).double() @ weight.flatten(1).double().T  # exact: far below 2^53
        return IntegerCase(codes, weight, sums.float())

    @cached_property
    def _rows(self) -> Tensor:
        if self.shape.kind == "linear":
            return self.rows_of(self.x)
        return self.rows_of(F.pad(self.x, self.shape.low_high_padding).movedim(1, -1))

    @cached_property
    def _steps(self) -> Tensor:
        """The largest magnitude of each judged token, or of its image: float32 [P, 1]."""
        if self.shape.kind == "linear":
            return self._rows.abs().amax(dim=1, keepdim=True)
        largest = self.x.abs().flatten(1).amax(dim=1)
        return largest[self.positions // (self.shape.rows // self.shape.batch)].unsqueeze(1)

    def _normal(self, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def _uniform(self, size: tuple[int, ...], bound: float) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.device).mul_(2 * bound).sub_(bound)

    def _pick(self, size: tuple[int, ...], values: tuple[int, int, int]) -> Tensor:
        """Random int8 out of `values`, none of which is 0, 1 or 2; in one byte per element, for large inputs."""
        drawn = torch.randint(3, size, generator=self.generator, device=self.device, dtype=torch.int8)
        for number, value in enumerate(values):
            drawn.masked_fill_(drawn == number, value)
        return drawn


def _unravel(index: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Coordinates of flat indices into an array of `sizes`, the last dimension running fastest."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(index % size)
        index = index // size
    return coordinates[::-1]
