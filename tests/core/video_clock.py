"""A sampling clock set by hand, and scales whose steps differ by timestep or frame: for tests of both."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qvd_core import Scales
from qvd_core.clock import SamplingClock
from qvd_core.families import Family

VIDEO = Family("video", (), (), frames_dim=2)


class Model(nn.Module):
    """What a clock wants to know of a model: the names of its forward's arguments."""

    def forward(self, hidden_states: Tensor, timestep: object = None) -> Tensor:
        return hidden_states


def clock(timestep: float | None = None, batch: int = 0, frames: int = 0) -> SamplingClock:
    found = SamplingClock(Model(), VIDEO)
    set_clock(found, timestep, batch, frames)
    return found


def set_clock(found: SamplingClock, timestep: float | None, batch: int = 0, frames: int = 0) -> None:
    found.timestep = None if timestep is None else torch.tensor(timestep)
    found.batch, found.frames = batch, frames


def with_buckets(scales: Scales, factors: tuple[float, ...], boundaries: tuple[float, ...]) -> Scales:
    """The same scales with steps per range of timesteps, as multiples of the layer's step."""
    layers = {
        name: replace(
            layer, bucket_steps=layer.static_step * torch.tensor(factors), bucket_boundaries=torch.tensor(boundaries)
        )
        for name, layer in scales.layers.items()
    }
    return replace(scales, layers=layers)


def with_frames(scales: Scales, factors: tuple[float, ...]) -> Scales:
    """The same scales with steps per frame, as multiples of the layer's step, where the layer knows its frames."""
    layers = {
        name: replace(layer, frame_steps=layer.static_step * torch.tensor(factors)) if layer.frame_order else layer
        for name, layer in scales.layers.items()
    }
    return replace(scales, layers=layers)
