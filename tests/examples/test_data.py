"""Moving digits: seeded, in range, and moving where the caption says."""

import torch

from examples.moving_digits.data import CANVAS, DIRECTION_WORDS, MovingDigits, all_captions


def _centres(video: torch.Tensor) -> torch.Tensor:
    """Centre of brightness (x, y) of every frame: video [B, 3, T, H, W] in [-1, 1] -> [B, T, 2]."""
    light = video[:, 0] + 1.0
    axis = torch.arange(CANVAS, dtype=torch.float32)
    total = light.sum(dim=(-2, -1))
    return torch.stack([(light.sum(dim=-2) * axis).sum(-1) / total, (light.sum(dim=-1) * axis).sum(-1) / total], dim=-1)


def test_the_same_seed_gives_the_same_clips() -> None:
    first, second = (MovingDigits("train").sample(8, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.video, second.video) and first.captions == second.captions


def test_clips_have_the_promised_shape_and_range() -> None:
    video = MovingDigits("test").sample(4, 8, torch.Generator().manual_seed(0)).video
    assert video.shape == (4, 3, 8, 32, 32) and video.dtype == torch.float32
    assert video.min() >= -1.0 and video.max() <= 1.0 + 1e-6 and video.max() > 0.5


def test_digits_start_out_in_the_captioned_direction() -> None:
    clips = MovingDigits("train").sample(256, 2, torch.Generator().manual_seed(1))
    centres = _centres(clips.video)
    step = centres[:, 1] - centres[:, 0]
    angle = torch.atan2(step[:, 1], step[:, 0]) / (torch.pi / 2)
    assert torch.equal(angle.round().long() % 4, clips.direction)


def test_digits_never_leave_the_canvas() -> None:
    video = MovingDigits("train").sample(64, 40, torch.Generator().manual_seed(2)).video + 1.0
    light = video[:, 0].sum(dim=(-2, -1))
    spread = (light.amax(dim=1) - light.amin(dim=1)) / light.mean(dim=1)
    assert spread.max() < 0.05  # sub-pixel sampling changes a digit's brightness by a little, a wall would by a lot


def test_train_and_test_scans_are_disjoint() -> None:
    train, test = MovingDigits("train").sprites.flatten(1), MovingDigits("test").sprites.flatten(1)
    assert len(train) + len(test) == 1797
    assert torch.cdist(test, train).amin() > 0


def test_captions_name_every_digit_and_direction_once() -> None:
    assert len(set(all_captions())) == 10 * len(DIRECTION_WORDS)
    assert "a seven moving left" in all_captions()
