"""Observers: streaming statistics of one layer input, over prompts, steps, tokens and both guidance branches.

What an observer keeps does not grow with the run: two ranges per channel and timestep bucket, and a fixed number of
sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core.clock import SamplingClock
from qvd_core.ops.backend import output_size
from qvd_core.spec import MOST_BUCKETS

ROWS_PER_CALL = 64
ROWS_KEPT = 512


@dataclass
class RangeBucket:
    """The range of every channel over some neighbouring timesteps: minimum, maximum float32 [K]."""

    first: float
    last: float
    minimum: Tensor
    maximum: Tensor

    def widen(self, other: RangeBucket) -> None:
        """Take in another bucket."""
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)


class BucketedRanges:
    """Ranges per timestep; beyond `MOST_BUCKETS` timesteps, the two that are nearest in time share a bucket. [O]"""

    def __init__(self) -> None:
        self.buckets: list[RangeBucket] = []  # by timestep, ascending

    def observe(self, timestep: float, minimum: Tensor, maximum: Tensor) -> None:
        """Take in the range of one input, minimum and maximum [K]."""
        seen = RangeBucket(timestep, timestep, minimum, maximum)
        home = next((bucket for bucket in self.buckets if bucket.first <= timestep <= bucket.last), None)
        if home is not None:
            home.widen(seen)
            return
        self.buckets.append(seen)
        self.buckets.sort(key=lambda bucket: bucket.first)
        if len(self.buckets) > MOST_BUCKETS:
            gaps = [right.first - left.last for left, right in zip(self.buckets, self.buckets[1:], strict=False)]
            index = gaps.index(min(gaps))
            self.buckets[index].widen(self.buckets.pop(index + 1))


_KEPT = ("frame_minimum", "frame_maximum", "total", "_rows", "_origins", "_keys")


class InputObserver:
    """Per-channel min and max (with the zeros of a padding) per timestep bucket, the mean, and a uniform sample of the
    rows a layer multiplies.

    For a linear, rows are tokens [K]; for a convolution they are unfolded patches [C * taps].
    frame_order: how the rows run through the video frames ("major" or "minor", see `SamplingClock`); with it, ranges
        are kept per frame too, as long as every call has the same number of frames.
    """

    def __init__(
        self,
        module: nn.Module,
        generator: torch.Generator,
        clock: SamplingClock,
        frame_order: str | None = None,
    ):
        self.module = module
        self.generator = generator
        self.clock = clock
        self.frame_order = frame_order
        self.ranges = BucketedRanges()
        self.frame_minimum: Tensor | None = None  # [F, K]
        self.frame_maximum: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0
        self._rows: Tensor | None = None
        self._origins: Tensor | None = None  # [S, 2]: timestep and frame of each row
        self._keys: Tensor | None = None  # reservoir sampling: the rows with the largest random keys stay

    def observe(self, x: Tensor) -> None:
        """Take in one input [..., K] (linear) or [B, C, (T,) H, W] (convolution)."""
        x = x.detach()
        if x.numel() == 0:
            return
        low, high = self._channel_ranges(x)
        timestep = 0.0 if self.clock.timestep is None else float(self.clock.timestep)
        self.ranges.observe(timestep, low.amin(dim=0), high.amax(dim=0))
        if self.frame_order is not None:
            self._observe_frames(low, high)
        pixels = _channels_last(x, self.module)
        total = pixels.sum(dim=0, dtype=torch.float64) if pixels.device.type != "mps" else pixels.float().sum(dim=0)
        self.total = total if self.total is None else self.total + total
        self.count += len(pixels)
        self._sample(x, timestep)

    @property
    def minimum(self) -> Tensor:
        """float32 [K], over all timesteps."""
        return torch.stack([bucket.minimum for bucket in self.ranges.buckets]).amin(dim=0)

    @property
    def maximum(self) -> Tensor:
        """float32 [K], over all timesteps."""
        return torch.stack([bucket.maximum for bucket in self.ranges.buckets]).amax(dim=0)

    @property
    def mean(self) -> Tensor:
        """float32 [K]."""
        assert self.total is not None
        return (self.total / self.count).float()

    @property
    def rows(self) -> Tensor:
        """float32 [S, K * taps], S <= 512, on the CPU."""
        assert self._rows is not None
        return self._rows

    @property
    def row_timesteps(self) -> Tensor:
        """float32 [S]: the timestep each row comes from."""
        assert self._origins is not None
        return self._origins[:, 0].contiguous()

    @property
    def row_frames(self) -> Tensor:
        """int64 [S]: the video frame each row comes from; -1 where that is not known."""
        assert self._origins is not None
        return self._origins[:, 1].long()

    def memory_bytes(self) -> int:
        """Bytes of everything kept."""
        kept = [self.frame_minimum, self.frame_maximum, self.total, self._rows, self._origins, self._keys]
        kept += [tensor for bucket in self.ranges.buckets for tensor in (bucket.minimum, bucket.maximum)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything seen so far: tensors, and what JSON can hold. Nothing is copied."""
        tensors = {name: getattr(self, name) for name in _KEPT if getattr(self, name) is not None}
        buckets = self.ranges.buckets
        if buckets:
            tensors["bucket_minimum"] = torch.stack([bucket.minimum for bucket in buckets])
            tensors["bucket_maximum"] = torch.stack([bucket.maximum for bucket in buckets])
        times = [[bucket.first, bucket.last] for bucket in buckets]
        return tensors, {"count": self.count, "frame_order": self.frame_order, "bucket_times": times}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a `state`; ranges and sums are taken to `device`, where the inputs to come are."""
        on_device = {name: tensor.to(device) for name, tensor in tensors.items() if not name.startswith("_")}
        for name in _KEPT:
            setattr(self, name, on_device.get(name, tensors.get(name)))
        self.count, self.frame_order = values["count"], values["frame_order"]
        self.ranges.buckets = [
            RangeBucket(first, last, on_device["bucket_minimum"][index], on_device["bucket_maximum"][index])
            for index, (first, last) in enumerate(values["bucket_times"])
        ]

    def _channel_ranges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges [R, K] of each row (linear) or image (convolution)."""
        if not isinstance(self.module, nn.Conv2d | nn.Conv3d):
            rows = x.reshape(-1, x.shape[-1])
            if self.frame_order is None:
                return rows.amin(dim=0, keepdim=True).float(), rows.amax(dim=0, keepdim=True).float()
            return rows.float(), rows.float()
        low, high = x.flatten(2).amin(dim=2).float(), x.flatten(2).amax(dim=2).float()
        if any(self.module._reversed_padding_repeated_twice):  # the padding is quantized with the image
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        return low, high

    def _observe_frames(self, low: Tensor, high: Tensor) -> None:
        assert self.frame_order is not None
        frame = self.clock.frame_of_rows(len(low), self.frame_order, low.device)
        changed = self.frame_minimum is not None and len(self.frame_minimum) != self.clock.frames
        if frame is None or changed:  # no scale per frame for a layer that does not see the same frames every time
            self.frame_order = self.frame_minimum = self.frame_maximum = None
            return
        shape = (self.clock.frames, low.shape[1])
        index = frame.unsqueeze(1).expand(-1, shape[1])
        lowest = low.new_full(shape, torch.inf).scatter_reduce(0, index, low, "amin")
        highest = high.new_full(shape, -torch.inf).scatter_reduce(0, index, high, "amax")
        if self.frame_minimum is None or self.frame_maximum is None:
            self.frame_minimum, self.frame_maximum = lowest, highest
        else:
            self.frame_minimum = torch.minimum(self.frame_minimum, lowest)
            self.frame_maximum = torch.maximum(self.frame_maximum, highest)

    def _sample(self, x: Tensor, timestep: float) -> None:
        rows, frames = self._some_rows(x)
        rows = rows.cpu()
        origins = torch.stack([torch.full((len(rows),), timestep), frames.float()], dim=1)
        keys = torch.rand(len(rows), generator=self.generator)
        if self._rows is not None and self._keys is not None and self._origins is not None:
            rows, keys = torch.cat([self._rows, rows]), torch.cat([self._keys, keys])
            origins = torch.cat([self._origins, origins])
        if len(keys) > ROWS_KEPT:
            keys, best = keys.topk(ROWS_KEPT)
            rows, origins = rows[best], origins[best]
        self._rows, self._keys, self._origins = rows, keys, origins

    def _some_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `ROWS_PER_CALL` rows float32, and their frames int64 (-1: unknown)."""
        if isinstance(self.module, nn.Conv2d | nn.Conv3d):
            image = int(torch.randint(len(x), (1,), generator=self.generator))
            rows = _patches(x[image : image + 1].float(), self.module, self._choose)
            return rows, self._frames_of(len(x))[image].expand(len(rows))
        flat = x.reshape(-1, x.shape[-1])
        chosen = self._choose(len(flat))
        return flat[chosen.to(flat.device)].float(), self._frames_of(len(flat))[chosen]

    def _frames_of(self, rows: int) -> Tensor:
        frame = None if self.frame_order is None else self.clock.frame_of_rows(rows, self.frame_order)
        return torch.full((rows,), -1) if frame is None else frame

    def _choose(self, count: int) -> Tensor:
        if count <= ROWS_PER_CALL:
            return torch.arange(count)
        return torch.randint(count, (ROWS_PER_CALL,), generator=self.generator)


def _channels_last(x: Tensor, module: nn.Module) -> Tensor:
    """[rows, channels] of a layer input."""
    pixels = x.movedim(1, -1) if isinstance(module, nn.Conv2d | nn.Conv3d) else x
    return pixels.reshape(-1, pixels.shape[-1])


def _patches(image: Tensor, module: nn.Conv2d | nn.Conv3d, choose: Callable[[int], Tensor]) -> Tensor:
    """Chosen patches [P, C * taps] of one image [1, C, *space], as the convolution sees them."""
    pixels = F.pad(image[0], module._reversed_padding_repeated_twice).movedim(0, -1)
    size = output_size(pixels.shape[:-1], module.kernel_size, module.stride, module.dilation)
    chosen = choose(math.prod(size)).to(image.device)
    index = []
    for axis, place in enumerate(torch.unravel_index(chosen, size)):
        taps = torch.arange(module.kernel_size[axis], device=image.device) * module.dilation[axis]
        along_axis = [-1 if other == axis else 1 for other in range(len(size))]
        index.append((place.unsqueeze(1) * module.stride[axis] + taps).view(len(chosen), *along_axis))
    return pixels[tuple(index)].movedim(-1, 1).flatten(1)  # [P, *kernel, C] before


class FeatureObserver:
    """The distinct inputs of the temporal projections, one per timestep in the order they came."""

    def __init__(self) -> None:
        self.features: dict[float, Tensor] = {}

    def observe(self, timestep: float, x: Tensor) -> None:
        """Keep the first row of x [..., C] seen at this timestep."""
        if timestep not in self.features:
            self.features[timestep] = x.detach().reshape(-1, x.shape[-1])[0].float().cpu()
