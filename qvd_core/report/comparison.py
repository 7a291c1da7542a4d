"""Two videos side by side: PSNR and SSIM of every frame, the amplified difference, a chart and a strip of frames.

Videos are [T, H, W, C] with values in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.quality import SSIM_WINDOW, psnr, ssim
from qvd_core.report.canvas import THEMES, ThemeName, label_axes, legend, new_figure, style, to_png

DIFFERENCE_GAIN = 8.0
STRIP_FRAMES = 6
STRIP_FRAME_WIDTH = 150  # CSS pixels
SMALLEST_SPAN_DB = 2.0  # of the chart's axis


@dataclass(frozen=True)
class VideoComparison:
    """How far a video is from its reference, frame by frame.

    psnr_db: None for a frame that is identical. ssim: None where frames are smaller than its window (11 px).
    whole_psnr_db: of the mean squared error over all frames, None for identical videos.
    """

    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...] | None
    whole_psnr_db: float | None

    @property
    def identical(self) -> bool:
        return self.whole_psnr_db is None

    @property
    def worst_frame(self) -> int | None:
        """Index of the frame with the lowest PSNR; None for identical videos."""
        if self.identical:
            return None
        return min(range(len(self.psnr_db)), key=lambda index: _or_infinite(self.psnr_db[index]))

    def figures(self) -> dict[str, Any]:
        """Everything in a few JSON-safe figures; psnr_db_mean is the mean over the frames that differ."""
        different = [value for value in self.psnr_db if value is not None]
        found: dict[str, Any] = {
            "frames": len(self.psnr_db),
            "identical_frames": len(self.psnr_db) - len(different),
            "psnr_db": self.whole_psnr_db,
            "psnr_db_mean": sum(different) / len(different) if different else None,
            "psnr_db_min": min(different) if different else None,
            "worst_frame": self.worst_frame,
            "text": self.text(),
        }
        if self.ssim is not None:
            found |= {"ssim_mean": sum(self.ssim) / len(self.ssim), "ssim_min": min(self.ssim)}
        return found

    def text(self) -> str:
        """One line."""
        if self.identical:
            return f"identical in all {len(self.psnr_db)} frames"
        worst = self.worst_frame
        assert worst is not None
        line = f"PSNR {self.whole_psnr_db:.1f} dB (lowest {_or_infinite(self.psnr_db[worst]):.1f} dB in frame {worst})"
        if self.ssim is not None:
            line += f", SSIM {sum(self.ssim) / len(self.ssim):.4f} (lowest {min(self.ssim):.4f})"
        return line


def compare_videos(reference: Tensor, test: Tensor) -> VideoComparison:
    """Compare two videos [T, H, W, C], values in [0, 1]. Raises QVDError for different or impossible ones."""
    check_videos(reference, test)
    large_enough = min(reference.shape[1:3]) >= SSIM_WINDOW
    decibels: list[float | None] = []
    similarities: list[float] = []
    squared_error = 0.0
    for one, other in zip(reference, test, strict=True):  # one at a time: float64 copies of a long video are large
        pair = [frame.permute(2, 0, 1)[None, :, None] for frame in (one, other)]  # [1, C, 1, H, W]
        frame_psnr = float(psnr(*pair))
        decibels.append(frame_psnr if math.isfinite(frame_psnr) else None)
        squared_error += 10.0 ** (-frame_psnr / 10.0)
        if large_enough:
            similarities.append(float(ssim(*pair)))
    mean = squared_error / len(decibels)
    whole = -10.0 * math.log10(mean) if mean > 0.0 else None
    return VideoComparison(tuple(decibels), tuple(similarities) if large_enough else None, whole)


def side_by_side(reference: Tensor, test: Tensor, gain: float = DIFFERENCE_GAIN) -> Tensor:
    """float32 [T, H, 3W, C]: reference | test | their difference times `gain`, black where they are equal."""
    check_videos(reference, test)
    difference = ((reference.float() - test.float()).abs() * gain).clamp(max=1.0)
    return torch.cat([reference.float().clamp(0, 1), test.float().clamp(0, 1), difference], dim=2)


def comparison_chart(comparison: VideoComparison, theme: ThemeName = "light") -> bytes:
    """PSNR and, where there is one, SSIM over the frames, as PNG (640 px wide)."""
    colours = THEMES[theme]
    rows = 2 if comparison.ssim is not None else 1
    figure = new_figure(640, 60 + 190 * rows, colours)
    axes = figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0].tolist()
    frames = range(len(comparison.psnr_db))
    style(axes[0], colours, "PSNR per frame (dB)", grid="y")
    axes[0].plot(frames, [_or_nan(value) for value in comparison.psnr_db], "o-", color=colours.after, ms=4)
    if comparison.identical:
        axes[0].set_yticks([])
        axes[0].text(0.5, 0.5, "identical", transform=axes[0].transAxes, ha="center", color=colours.ink, fontsize=14)
    worst = comparison.worst_frame
    if worst is not None:
        lowest = _or_infinite(comparison.psnr_db[worst])
        words = f"lowest: {lowest:.1f} dB, frame {worst}"
        axes[0].plot([worst], [lowest], "D", color=colours.before, ms=8, label=words)
        legend(axes[0], colours)
        low, high = axes[0].get_ylim()
        room = max(0.0, SMALLEST_SPAN_DB - (high - low)) / 2  # noise must not look like a cliff
        axes[0].set_ylim(low - room, high + room)
    if comparison.ssim is not None:
        style(axes[1], colours, "SSIM per frame", grid="y")
        axes[1].plot(frames, comparison.ssim, "s-", color=colours.after, ms=4)
    label_axes(axes[-1], colours, "frame")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlim(-0.5, len(comparison.psnr_db) - 0.5)
    return to_png(figure)


def frame_strip(
    reference: Tensor,
    test: Tensor,
    theme: ThemeName = "light",
    gain: float = DIFFERENCE_GAIN,
    frames: int = STRIP_FRAMES,
) -> bytes:
    """Frames spread over the clip in three rows (full precision, quantized, amplified difference), as PNG."""
    check_videos(reference, test)
    colours = THEMES[theme]
    chosen = torch.linspace(0, len(reference) - 1, min(frames, len(reference))).round().long().tolist()
    height, width = reference.shape[1:3]
    column_height = STRIP_FRAME_WIDTH * height / width
    figure = new_figure(40 + STRIP_FRAME_WIDTH * len(chosen), 30 + 3 * column_height, colours)
    axes = figure.subplots(3, len(chosen), squeeze=False)
    difference = ((reference.float() - test.float()).abs() * gain).clamp(max=1.0)
    rows = (("full precision", reference), ("quantized", test), (f"difference ×{gain:g}", difference))
    for row, (name, video) in enumerate(rows):
        for column, frame in enumerate(chosen):
            place = axes[row, column]
            place.imshow(_picture(video[frame]), interpolation="nearest" if width <= STRIP_FRAME_WIDTH else "auto")
            place.set_xticks([])
            place.set_yticks([])
            for spine in place.spines.values():
                spine.set_color(colours.line)
            if not row:
                place.set_title(f"frame {frame}", color=colours.faint, fontsize=10)
        axes[row, 0].set_ylabel(name, color=colours.ink, fontsize=11)
    return to_png(figure, faithful=True)


def check_videos(reference: Tensor, test: Tensor) -> None:
    """Raise QVDError unless both are videos [T, H, W, C] of one size and length, without NaN."""
    for name, video in (("first", reference), ("second", test)):
        if video.dim() != 4 or video.numel() == 0:
            raise QVDError(f"the {name} video has shape {list(video.shape)}, expected [T, H, W, C], not empty.")
        if not bool(torch.isfinite(video).all()):
            raise QVDError(f"the {name} video holds NaN or infinite values: sample it again in float32 or bfloat16.")
    if reference.shape != test.shape:
        one, other = (f"{len(video)} frames of {video.shape[2]}x{video.shape[1]}" for video in (reference, test))
        if reference.shape[3] != test.shape[3] and one == other:
            one, other = f"{reference.shape[3]} channels", f"{test.shape[3]}"
        raise QVDError(f"the videos differ in size, {one} and {other}: compare two of one length and size.")


def _picture(frame: Tensor) -> Any:
    """A frame [H, W, C] as matplotlib takes it: RGB, or grey as RGB, values in [0, 1]."""
    pixels = frame.float().clamp(0, 1).cpu()
    channels = pixels.shape[-1]
    return pixels[..., :3].numpy() if channels >= 3 else pixels[..., :1].expand(-1, -1, 3).numpy()


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
