"""The comparison of two videos: the numbers of `qvd_core.quality`, frame by frame, and what is said of odd inputs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.quality import psnr, ssim
from qvd_core.report import compare_videos, comparison_chart, frame_strip, side_by_side


def videos(frames: int = 5, height: int = 16, width: int = 20, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(frames, height, width, channels, generator=generator)
    noise = torch.randn(reference.shape, generator=generator) * torch.linspace(0.01, 0.05, frames).view(-1, 1, 1, 1)
    return reference, (reference + noise).clamp(0, 1)


def as_clip(video: Tensor) -> Tensor:
    """[1, C, T, H, W]."""
    return video.permute(3, 0, 1, 2).unsqueeze(0)


def test_every_frame_has_the_numbers_of_the_quality_functions() -> None:
    reference, test = videos()
    found = compare_videos(reference, test)
    frames = [(as_clip(one[None]), as_clip(other[None])) for one, other in zip(reference, test, strict=True)]
    assert found.psnr_db == pytest.approx([float(psnr(*pair)) for pair in frames])
    assert found.ssim == pytest.approx([float(ssim(*pair)) for pair in frames])
    assert found.whole_psnr_db == pytest.approx(float(psnr(as_clip(reference), as_clip(test))))
    figures = found.figures()
    assert figures["worst_frame"] == 4 and figures["psnr_db_min"] == min(found.psnr_db)
    assert figures["ssim_mean"] == pytest.approx(float(ssim(as_clip(reference), as_clip(test))))
    assert figures["frames"] == 5 and "PSNR" in figures["text"]


def test_identical_videos_are_said_to_be_and_stay_json_safe() -> None:
    reference, _ = videos()
    found = compare_videos(reference, reference.clone())
    assert found.identical and found.psnr_db == (None,) * 5 and found.worst_frame is None
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert figures["psnr_db"] is None and figures["identical_frames"] == 5 and "identical" in figures["text"]
    assert comparison_chart(found)[:4] == b"\x89PNG"


def test_identical_frames_do_not_count_in_the_mean() -> None:
    reference, test = videos()
    test[2] = reference[2]
    found = compare_videos(reference, test)
    others = [value for value in found.psnr_db if value is not None]
    assert found.psnr_db[2] is None and found.figures()["psnr_db_mean"] == pytest.approx(sum(others) / 4)


def test_frames_smaller_than_the_window_leave_ssim_out() -> None:
    found = compare_videos(*videos(height=10))
    assert found.ssim is None and "ssim_mean" not in found.figures() and "SSIM" not in found.text()
    assert compare_videos(*videos(height=11)).ssim is not None
    assert comparison_chart(found, "dark")[:4] == b"\x89PNG"


def test_side_by_side_shows_both_and_the_amplified_difference() -> None:
    reference, test = videos(channels=1)
    found = side_by_side(reference, test, gain=4.0)
    assert found.shape == (5, 16, 60, 1) and found.dtype == torch.float32
    assert torch.equal(found[:, :, :20], reference) and torch.equal(found[:, :, 20:40], test)
    assert torch.allclose(found[:, :, 40:], ((reference - test).abs() * 4).clamp(max=1.0))


@pytest.mark.parametrize(
    ("reference", "test", "message"),
    [
        (torch.zeros(3, 16, 16, 3), torch.zeros(4, 16, 16, 3), "3 frames of 16x16 and 4 frames of 16x16"),
        (torch.zeros(3, 16, 20, 3), torch.zeros(3, 20, 16, 3), "3 frames of 20x16 and 3 frames of 16x20"),
        (torch.zeros(3, 16, 16, 3), torch.zeros(3, 16, 16, 4), "3 channels and 4"),
        (torch.zeros(16, 16, 3), torch.zeros(16, 16, 3), r"first video has shape \[16, 16, 3\]"),
        (torch.zeros(0, 16, 16, 3), torch.zeros(0, 16, 16, 3), "not empty"),
        (torch.zeros(1, 16, 16, 3), torch.full((1, 16, 16, 3), float("nan")), "second video holds NaN"),
    ],
)
def test_videos_that_cannot_be_compared_are_one_clear_error(reference: Tensor, test: Tensor, message: str) -> None:
    for compare in (compare_videos, side_by_side, frame_strip):
        with pytest.raises(QVDError, match=message):
            compare(reference, test)


@pytest.mark.parametrize("shape", [(1, 12, 12, 1), (9, 9, 40, 3), (3, 40, 9, 4)])
def test_strips_and_charts_take_any_size(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    one, other = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    assert frame_strip(one, other, "dark")[:4] == b"\x89PNG"
    assert comparison_chart(compare_videos(one.half(), other.half()))[:4] == b"\x89PNG"
