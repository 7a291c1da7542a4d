"""Observers: streaming statistics of one layer input, over prompts, steps, tokens and both guidance branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS_PER_CALL = 64
ROWS_KEPT = 512


class InputObserver:
    """Per-channel min, max (with the zeros of a padding) and mean of a layer's input, and a uniform sample of the rows
    the layer multiplies.

    For a linear, rows are tokens [K]; for a convolution they are unfolded patches [C * kh * kw].
    """

    def __init__(self, module: nn.Module, generator: torch.Generator):
        self.module = module
        self.generator = generator
        self.minimum: Tensor | None = None
        self.maximum: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0
        self._rows: Tensor | None = None
        self._keys: Tensor | None = None  # reservoir sampling: the rows with the largest random keys stay

    def observe(self, x: Tensor) -> None:
        """Take in one input [..., K] (linear) or [B, C, H, W] (convolution)."""
        x = x.detach()
        pixels = x.permute(0, 2, 3, 1) if isinstance(self.module, nn.Conv2d) else x
        pixels = pixels.reshape(-1, pixels.shape[-1])
        low, high = pixels.amin(dim=0).float(), pixels.amax(dim=0).float()
        if isinstance(self.module, nn.Conv2d) and any(self.module._reversed_padding_repeated_twice):
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # the padding is quantized with the image
        total = pixels.double().sum(dim=0) if pixels.device.type != "mps" else pixels.float().sum(dim=0)
        if self.minimum is None or self.maximum is None or self.total is None:
            self.minimum, self.maximum, self.total = low, high, total
        else:
            self.minimum = torch.minimum(self.minimum, low)
            self.maximum = torch.maximum(self.maximum, high)
            self.total = self.total + total
        self.count += len(pixels)
        self._sample(self._some_rows(x))

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

    def _some_rows(self, x: Tensor) -> Tensor:
        if isinstance(self.module, nn.Conv2d):
            image = int(torch.randint(len(x), (1,), generator=self.generator))
            return _patches(x[image : image + 1].float(), self.module, lambda count: self._choose(count))
        rows = x.reshape(-1, x.shape[-1])
        return rows[self._choose(len(rows)).to(rows.device)].float()

    def _choose(self, count: int) -> Tensor:
        if count <= ROWS_PER_CALL:
            return torch.arange(count)
        return torch.randint(count, (ROWS_PER_CALL,), generator=self.generator)

    def _sample(self, rows: Tensor) -> None:
        rows = rows.cpu()
        keys = torch.rand(len(rows), generator=self.generator)
        if self._rows is not None and self._keys is not None:
            rows, keys = torch.cat([self._rows, rows]), torch.cat([self._keys, keys])
        if len(keys) > ROWS_KEPT:
            keys, best = keys.topk(ROWS_KEPT)
            rows = rows[best]
        self._rows, self._keys = rows, keys


def _patches(image: Tensor, module: nn.Conv2d, choose: Callable[[int], Tensor]) -> Tensor:
    """Chosen patches [P, C * kh * kw] of one image [1, C, H, W], as the convolution sees them."""
    padded = F.pad(image, module._reversed_padding_repeated_twice)
    unfolded = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)[0].T
    return unfolded[choose(len(unfolded)).to(unfolded.device)]


class FeatureObserver:
    """The distinct inputs of the temporal projections, one per timestep in the order they came."""

    def __init__(self) -> None:
        self.features: dict[float, Tensor] = {}

    def observe(self, timestep: float, x: Tensor) -> None:
        """Keep the first row of x [..., C] seen at this timestep."""
        if timestep not in self.features:
            self.features[timestep] = x.detach().reshape(-1, x.shape[-1])[0].float().cpu()
