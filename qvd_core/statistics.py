"""What calibration knows about one layer input when the search for its transform and scales begins."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qvd_core.observe import InputObserver

QUANTILE = 0.005  # share of a channel's sampled values left out on either side by range="quantile"


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one input: minimum, maximum, mean float32 [K]; rows float32 [S, K * taps], a sample.

    bucket_times [B, 2], bucket_minimum, bucket_maximum [B, K]: the ranges per timestep bucket, ascending in time.
    frame_minimum, frame_maximum [F, K]: the ranges per video frame, for layers that know their frames.
    row_timesteps float32 [S], row_frames int64 [S] (-1: unknown): where each sampled row comes from.
    """

    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    rows: Tensor
    bucket_times: Tensor | None = None
    bucket_minimum: Tensor | None = None
    bucket_maximum: Tensor | None = None
    frame_minimum: Tensor | None = None
    frame_maximum: Tensor | None = None
    row_timesteps: Tensor | None = None
    row_frames: Tensor | None = None

    @classmethod
    def of(cls, observer: InputObserver, device: torch.device | str = "cpu") -> InputStatistics:
        """Everything an observer has seen, on `device`."""
        buckets = observer.ranges.buckets
        statistics = cls(
            minimum=observer.minimum,
            maximum=observer.maximum,
            mean=observer.mean,
            rows=observer.rows,
            bucket_times=torch.tensor([[bucket.first, bucket.last] for bucket in buckets]),
            bucket_minimum=torch.stack([bucket.minimum for bucket in buckets]),
            bucket_maximum=torch.stack([bucket.maximum for bucket in buckets]),
            frame_minimum=observer.frame_minimum,
            frame_maximum=observer.frame_maximum,
            row_timesteps=observer.row_timesteps,
            row_frames=observer.row_frames,
        )
        moved: dict[str, Any] = {}
        for item in fields(cls):
            tensor = getattr(statistics, item.name)
            moved[item.name] = None if tensor is None else tensor.to(device)
        return cls(**moved)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def taps(self) -> int:
        """Elements of a row per channel: 1 for a linear, kh * kw for a convolution."""
        return self.rows.shape[1] // self.channels

    def channel_rows(self) -> Tensor:
        """The sampled values of every channel, float32 [S * taps, K]."""
        return self.rows.reshape(len(self.rows), self.channels, -1).transpose(1, 2).flatten(0, 1)

    def quantiles(self) -> tuple[Tensor, Tensor]:
        """Two-sided quantiles of every channel over the sample, float32 [K] each, never wider than the true range."""
        values = self.channel_rows().sort(dim=0).values
        cut = int(QUANTILE * len(values))
        return values[cut], values[len(values) - 1 - cut]
