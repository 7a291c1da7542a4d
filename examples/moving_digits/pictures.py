"""Pictures that put two sets of clips side by side: full precision | int8 | their difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.moving_digits.card import draw_grid

DIFFERENCE_GAIN = 8
ZOOM = 4
FRAME_MILLISECONDS = 180


def amplified_difference(reference: Tensor, other: Tensor) -> Tensor:
    """|a - b| * 8, clipped to 1: black where the clips are equal; [N, 3, T, H, W] in [0, 1]."""
    return ((reference - other).abs() * DIFFERENCE_GAIN).clamp(max=1.0)


def write_comparison_png(path: Path, reference: Tensor, other: Tensor, labels: Sequence[str]) -> Path:
    """Three rows per clip (full precision, int8, difference x8), one column per frame."""
    rows = torch.stack([reference, other, amplified_difference(reference, other)], dim=1).flatten(0, 1)
    kinds = ("full precision", "int8", f"difference x{DIFFERENCE_GAIN}")
    names = [f"{label}\n{kind}" for label in labels for kind in kinds]
    draw_grid(rows, names).save(path, optimize=True)
    return path


def write_comparison_gif(path: Path, reference: Tensor, other: Tensor) -> Path:
    """One row per clip, three columns: full precision | int8 | difference x8; plays forever."""
    columns = torch.cat([reference, other, amplified_difference(reference, other)], dim=-1)  # [N, 3, T, H, 3W]
    stacked = columns.permute(2, 0, 3, 4, 1).flatten(1, 2)  # [T, N*H, 3W, 3]
    frames = [
        Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).numpy()).resize(
            (frame.shape[1] * ZOOM, frame.shape[0] * ZOOM), Image.Resampling.NEAREST
        )
        for frame in stacked
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0)
    return path
