"""Moving digits: real handwritten digits that move and bounce over a few frames, captioned in words.

The digits are the 1797 scans bundled with scikit-learn (`load_digits`, 8x8, grey). Every fifth scan is held out,
so a test clip never shows a digit that training has seen. Nothing is downloaded.

    clips = MovingDigits("train").sample(16, frames=9, generator=torch.Generator().manual_seed(0))
    clips.video      # float32 [16, 3, 9, 32, 32] in [-1, 1]
    clips.captions   # ["a seven moving left", ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

CANVAS = 32  # pixels; a sprite is half of it
SPRITE = 16
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTION_WORDS = ("right", "down", "left", "up")  # index k = angle k * 90 degrees, y axis pointing down
SPEED_RANGE = (1.0, 2.5)  # pixels per frame
ANGLE_JITTER = 0.2  # radians to either side of the named direction


@dataclass(frozen=True)
class Clips:
    """A batch of clips: `video` float32 [B, 3, T, 32, 32] in [-1, 1]; `digit` and `direction` int64 [B]."""

    video: Tensor
    digit: Tensor
    direction: Tensor

    @property
    def captions(self) -> list[str]:
        return [caption(d, m) for d, m in zip(self.digit.tolist(), self.direction.tolist(), strict=True)]


def caption(digit: int, direction: int) -> str:
    """The sentence a clip is captioned with, for example "a seven moving left"."""
    return f"a {DIGIT_WORDS[digit]} moving {DIRECTION_WORDS[direction]}"


def all_captions() -> list[str]:
    """All 40 captions, digit by digit."""
    return [caption(d, m) for d in range(len(DIGIT_WORDS)) for m in range(len(DIRECTION_WORDS))]


class MovingDigits:
    """An endless, seeded source of clips made from one split of the scans."""

    def __init__(self, split: Literal["train", "test"]):
        scans = load_digits()
        held_out = torch.arange(len(scans.target)) % 5 == 0
        chosen = held_out if split == "test" else ~held_out
        images = torch.from_numpy(scans.images).float()[chosen].unsqueeze(1) / 16.0
        self.sprites = F.interpolate(images, size=(SPRITE, SPRITE), mode="bilinear", align_corners=False)
        self.labels = torch.from_numpy(scans.target)[chosen].long()

    def sample(self, count: int, frames: int, generator: torch.Generator) -> Clips:
        """Draw `count` clips of `frames` frames. The same generator state gives the same clips."""
        index = torch.randint(len(self.labels), (count,), generator=generator)
        direction = torch.randint(len(DIRECTION_WORDS), (count,), generator=generator)
        path = _bouncing_path(direction, frames, generator)
        return Clips(_render(self.sprites[index], path), self.labels[index], direction)


def _bouncing_path(direction: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Top-left sprite corners [B, T, 2] as (x, y): straight flight, mirrored at the walls.

    Along its direction a clip starts in the near half of the canvas, so that every caption is visible before a bounce.
    """
    count = len(direction)
    room = float(CANVAS - SPRITE)
    jitter = (torch.rand(count, generator=generator) * 2 - 1) * ANGLE_JITTER
    angle = direction * (torch.pi / 2) + jitter
    speed = SPEED_RANGE[0] + torch.rand(count, generator=generator) * (SPEED_RANGE[1] - SPEED_RANGE[0])
    step = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [B, 2]
    anywhere = torch.rand(count, 2, generator=generator) * room
    near_half = torch.where(step > 0, anywhere * 0.5, room - anywhere * 0.5)
    along = step.abs() > 0.5
    start = torch.where(along, near_half, anywhere)
    time = torch.arange(frames, dtype=torch.float32)
    straight = start[:, None] + time[None, :, None] * (speed[:, None] * step)[:, None]
    return room - (straight.remainder(2 * room) - room).abs()  # triangle wave: reflection at both walls


def _render(sprites: Tensor, path: Tensor) -> Tensor:
    """Draw sprites [B, 1, S, S] at sub-pixel corners [B, T, 2]; returns [B, 3, T, 32, 32] in [-1, 1]."""
    count, frames, _ = path.shape
    pixel = torch.arange(CANVAS, dtype=torch.float32)
    x = pixel[None, None, None, :] - path[..., 0, None, None]
    y = pixel[None, None, :, None] - path[..., 1, None, None]
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # sprite pixel under each canvas pixel
    grid = (grid + 0.5) * (2.0 / SPRITE) - 1.0
    repeated = sprites.repeat_interleave(frames, dim=0)
    canvas = F.grid_sample(repeated, grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False)
    video = canvas.view(count, frames, 1, CANVAS, CANVAS).permute(0, 2, 1, 3, 4)
    return (video * 2.0 - 1.0).expand(-1, 3, -1, -1, -1).contiguous()
