"""The yardstick of the miniatures: a small video classifier, and the Fréchet distance on its features.

The network reads a clip and answers: which digit, which way does it set off, and which flaws does the clip have
(played backwards, noisy, blurred). The flaws are there for the distance: features that know only digit and direction
learn to look past noise and blur, and reversed clips look to them like clips of other directions.

    network = load_metric()
    network.classify(video)                                # video [B, 3, T, 32, 32] in [-1, 1] -> (digit, direction)
    frechet_video_distance(real, generated, network)       # compare with noise_floor(count=128, frames=9)

    python -m examples.moving_digits.metric train --minutes 20   # writes metric/weights.safetensors and facts.json
    python -m examples.moving_digits.metric facts                # measures metric/facts.json again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.moving_digits.data import CANVAS, DIGIT_WORDS, DIRECTION_WORDS, Clips, MovingDigits
from examples.moving_digits.training import TrainingOptions, train
from qvd_core.quality import frechet_distance

FEATURES = 64
DETAIL_GAIN = 8.0  # a second input shows fine detail enlarged: beside a bright digit, weak noise would go unnoticed
FOLDER = Path(__file__).with_suffix("")
WEIGHTS = FOLDER / "weights.safetensors"
FACTS = FOLDER / "facts.json"
CHECKPOINT = Path("out/training/metric/checkpoint.safetensors")

BATCH = 32
FRAME_COUNTS = (8, 9)  # the UNet miniature makes 8 frames, the Wan miniature 9
FLAWS = ("played backwards", "noisy", "blurred")
FLOOR_COUNTS = (64, 128, 256, 512)
TEST_CLIPS = 2048


class SpaceThenTime(nn.Module):
    """R(2+1)D block: a strided 3x3 convolution within each frame, then a convolution over three frames."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.space = nn.Conv3d(
            inputs, outputs, (1, kernel, kernel), stride=(1, 2, 2), padding=(0, kernel // 2, kernel // 2)
        )
        self.space_norm = nn.GroupNorm(8, outputs)
        self.time = nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0))
        self.time_norm = nn.GroupNorm(8, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H/2, W/2]."""
        hidden = F.silu(self.space_norm(self.space(hidden)))
        return F.silu(self.time_norm(self.time(hidden)))


class MetricNetwork(nn.Module):
    """Clips [B, 3, T, 32, 32] in [-1, 1] -> 64 features -> digit, initial direction and flaws."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(SpaceThenTime(2, 24, kernel=5), SpaceThenTime(24, 48), SpaceThenTime(48, 96))
        # Two bins per axis keep what a global average forgets: where the digit was in the first and the second half.
        self.pool = nn.AdaptiveAvgPool3d((2, 2, 2))
        self.project = nn.Linear(96 * 8, FEATURES)
        self.digit = nn.Linear(FEATURES, len(DIGIT_WORDS))
        self.direction = nn.Linear(FEATURES, len(DIRECTION_WORDS))
        self.flaws = nn.Linear(FEATURES, len(FLAWS))

    def features(self, video: Tensor) -> Tensor:
        """[B, 3, T, 32, 32] in [-1, 1] -> float32 [B, 64]; colours are averaged to grey."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (CANVAS, CANVAS):
            raise ValueError(f"expected a video [B, 3, T, {CANVAS}, {CANVAS}], got {list(video.shape)}")
        grey = video.float().mean(dim=1, keepdim=True)
        detail = torch.tanh(DETAIL_GAIN * (grey - blurred(grey)))
        return self.project(self.pool(self.blocks(torch.cat([grey, detail], dim=1))).flatten(1))

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the digit [B, 10], of the direction [B, 4] and of each flaw [B, 3]."""
        features = self.features(video)
        return self.digit(features), self.direction(features), self.flaws(features)

    @torch.inference_mode()
    def classify(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest digit and direction, int64 [B] each."""
        digit, direction, _ = self(video)
        return digit.argmax(dim=1), direction.argmax(dim=1)


def load_metric() -> MetricNetwork:
    """The trained network in evaluation mode."""
    network = MetricNetwork()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def extract_features(video: Tensor, network: MetricNetwork, batch: int = 64) -> Tensor:
    """Features [N, 64] of any number of clips [N, 3, T, 32, 32], a batch at a time."""
    return torch.cat([network.features(part) for part in video.split(batch)])


def frechet_video_distance(video_a: Tensor, video_b: Tensor, network: MetricNetwork) -> float:
    """Fréchet distance between two sets of clips [N, 3, T, 32, 32] in [-1, 1]; compare at equal N only."""
    return frechet_distance(extract_features(video_a, network), extract_features(video_b, network))


@cache
def load_facts() -> dict[str, Any]:
    """What was measured about the network: accuracy, reactions and noise floor."""
    return json.loads(FACTS.read_text())


def noise_floor(count: int, frames: int) -> float:
    """Mean Fréchet distance between two independent sets of `count` real clips: below this, a distance is noise.

    The floor falls like 1 / count, so an unmeasured count takes `floor * count` from the nearest measured one.
    """
    measured = load_facts()["noise_floor"].get(str(frames))
    if measured is None:
        raise ValueError(f"the noise floor is known for {FRAME_COUNTS} frames, not for {frames}")
    nearest = min((int(known) for known in measured), key=lambda known: abs(known - count))
    return measured[str(nearest)]["mean"] * nearest / count


def train_metric(options: TrainingOptions) -> MetricNetwork:
    """Train on the train split, on clean and on flawed clips."""
    torch.manual_seed(options.seed)
    network = MetricNetwork()
    source = MovingDigits("train")

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        clips = source.sample(BATCH, FRAME_COUNTS[step % 2], generator)
        flaws = torch.rand(BATCH, len(FLAWS), generator=generator) < torch.tensor([0.4, 0.25, 0.25])
        digit, direction, flaws_seen = network(_flawed(_slanted(clips.video, generator), flaws, generator))
        forwards = ~flaws[:, 0]  # a reversed clip sets off where the last bounce sent it: no label says where
        return (
            F.cross_entropy(digit, clips.digit)
            + F.cross_entropy(direction[forwards], clips.direction[forwards])
            + F.binary_cross_entropy_with_logits(flaws_seen, flaws.float())
        )

    train(network, loss_of_step, options, CHECKPOINT, "metric")
    return network.eval()


def _flawed(video: Tensor, flaws: Tensor, generator: torch.Generator) -> Tensor:
    """Apply to each clip of [B, 3, T, 32, 32] the flaws that bool [B, 3] names."""
    backwards, noisy, blurry = flaws.view(*flaws.shape, 1, 1, 1, 1).unbind(1)
    video = torch.where(backwards, video.flip(2), video)
    video = torch.where(blurry, blurred(video), video)
    strength = torch.empty(len(video), 1, 1, 1, 1).uniform_(0.03, 0.15, generator=generator)
    return torch.where(noisy, video + strength * torch.randn(video.shape, generator=generator), video)


def blurred(video: Tensor) -> Tensor:
    """Average each pixel of [B, C, T, H, W] with its neighbours in the frame."""
    return F.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)


def _slanted(video: Tensor, generator: torch.Generator) -> Tensor:
    """Each clip slightly turned, scaled and sheared: 1437 scans are few, and this makes more handwriting of them."""
    count, frames = len(video), video.shape[2]
    matrix = torch.eye(2) + (torch.rand(count, 2, 2, generator=generator) * 2 - 1) * 0.12
    affine = torch.cat([matrix, torch.zeros(count, 2, 1)], dim=2)
    grid = F.affine_grid(affine, [count, 1, CANVAS, CANVAS], align_corners=False)
    grey = video[:, 0] + 1.0  # [B, T, H, W]: frames as channels share the grid; zero is the black background
    turned = F.grid_sample(grey, grid, align_corners=False) - 1.0
    return turned.unsqueeze(1).expand(count, 3, frames, CANVAS, CANVAS)


def measure(network: MetricNetwork) -> dict[str, Any]:
    """Accuracy, reactions and noise floor on the test split, for 8 and for 9 frames."""
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters()), "test_clips": TEST_CLIPS}
    source = MovingDigits("test")
    for key in ("accuracy", "frechet_reaction", "noise_floor"):
        facts[key] = {}
    for frames in FRAME_COUNTS:
        clips, others = (source.sample(TEST_CLIPS, frames, torch.Generator().manual_seed(seed)) for seed in (1, 2))
        features, other_features = (extract_features(half.video, network) for half in (clips, others))
        facts["accuracy"][str(frames)] = _accuracy(network, clips, features)
        facts["frechet_reaction"][str(frames)] = _reactions(network, features[:512], others.video[:512])
        facts["noise_floor"][str(frames)] = _floors(torch.cat([features, other_features]))
    return facts


@torch.inference_mode()
def _accuracy(network: MetricNetwork, clips: Clips, features: Tensor) -> dict[str, float]:
    """Share of right answers on clean clips; the arrow of time is asked of each clip in both directions."""
    mirrored = extract_features(clips.video.flip(2), network)
    right = {
        "digit": network.digit(features).argmax(1) == clips.digit,
        "direction": network.direction(features).argmax(1) == clips.direction,
        "arrow_of_time": torch.cat([network.flaws(features)[:, 0] < 0, network.flaws(mirrored)[:, 0] > 0]),
    }
    return {name: round(float(answers.float().mean()), 4) for name, answers in right.items()}


def _reactions(network: MetricNetwork, real: Tensor, others: Tensor) -> dict[str, float]:
    """Fréchet distance from features `real` to clips `others`, intact and damaged in one way each."""
    generator = torch.Generator().manual_seed(3)

    def shuffled(video: Tensor) -> Tensor:
        return torch.stack([clip[:, torch.randperm(clip.shape[1], generator=generator)] for clip in video])

    damage: dict[str, Callable[[Tensor], Tensor]] = {
        "intact": lambda video: video,
        "blur_3x3": blurred,
        "frozen_first_frame": lambda video: video[:, :, :1].expand_as(video),
        "shuffled_frames": shuffled,
        "noise_0.1": lambda video: video + 0.1 * torch.randn(video.shape, generator=generator),
        "time_reversed": lambda video: video.flip(2),
    }
    damaged = {name: extract_features(apply(others), network) for name, apply in damage.items()}
    return {name: round(frechet_distance(real, features), 3) for name, features in damaged.items()}


def _floors(features: Tensor, draws: int = 16) -> dict[str, dict[str, float]]:
    """Distance between disjoint random halves of `2 * count` real clips out of features [N, 64], over several draws."""
    generator = torch.Generator().manual_seed(4)
    floors = {}
    for count in FLOOR_COUNTS:
        pairs = (torch.randperm(len(features), generator=generator)[: 2 * count].chunk(2) for _ in range(draws))
        found = [frechet_distance(features[a], features[b]) for a, b in pairs]
        floors[str(count)] = {"mean": round(sum(found) / draws, 3), "max": round(max(found), 3)}
    return floors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.moving_digits.metric", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the network, then measure it")
    TrainingOptions.add_arguments(training, minutes=20.0, learning_rate=2e-3)
    commands.add_parser("facts", help="measure the trained network again")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if args.command == "train":
        network = train_metric(TrainingOptions.from_arguments(args))
        save_file(network.state_dict(), WEIGHTS)
    facts = measure(load_metric())
    FACTS.write_text(json.dumps(facts, indent=2) + "\n")
    print(FACTS.read_text(), end="")


if __name__ == "__main__":
    main()
