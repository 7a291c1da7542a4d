"""Drawing clips from a miniature: what the evaluation, the model card and the demo share.

folder = miniature("wan")
pipe = load_pipeline(folder)  # or load_pipeline(folder, quantization_config=QVDConfig())
video = sample_video(pipe, held_out_prompts(16), held_out_seeds(16), load_call(folder))  # [16, 3, 9, 32, 32] in [0, 1]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from examples.moving_digits.data import DIGIT_WORDS, DIRECTION_WORDS, all_captions

MINIATURES = ("wan", "unet")
CALIBRATION_PROMPTS = 16
CALIBRATION_SEED = 0
HELD_OUT_SEED = 10_000  # far from the calibration's, so that no judged clip starts from noise the calibration has seen


def miniature(name: str) -> Path:
    """The pipeline folder of the miniature "wan" or "unet"."""
    folder = Path(__file__).with_name(name)
    if name not in MINIATURES or not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no miniature {name!r} in {folder.parent}; there should be {' and '.join(MINIATURES)}")
    return folder


def load_call(folder: Path) -> dict[str, Any]:
    """Arguments the miniature in `folder` was made for (size, frames, steps, guidance), for the pipeline call."""
    return json.loads((folder / "call.json").read_text())


def load_pipeline(folder: Path, **options: Any) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained`, without a progress bar for every clip."""
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def held_out_prompts(count: int) -> list[str]:
    """`count` captions, each of the 40 about equally often; the first 24 are not among the calibration's."""
    captions = _mixed_captions()
    return [captions[index % len(captions)] for index in range(count)]


def calibration_prompts() -> list[str]:
    """16 captions for calibration."""
    return _mixed_captions()[-CALIBRATION_PROMPTS:]


def held_out_seeds(count: int, first: int = HELD_OUT_SEED) -> range:
    """The seeds of `count` clips that calibration has not seen."""
    return range(first, first + count)


def _mixed_captions() -> list[str]:
    """All 40 captions in an order in which any run of them mixes digits and directions."""
    captions = all_captions()
    stride = 7  # coprime to 40
    return [captions[index * stride % len(captions)] for index in range(len(captions))]


def labels_of(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the captions promise: digit and direction, int64 [N] each."""
    words = [prompt.split() for prompt in prompts]
    digits = torch.tensor([DIGIT_WORDS.index(digit) for _, digit, _, _ in words])
    directions = torch.tensor([DIRECTION_WORDS.index(direction) for _, _, _, direction in words])
    return digits, directions


def sample_video(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: dict[str, Any],
    batch: int = 16,
    describe: str = "sampling",
) -> Tensor:
    """One clip per prompt, float32 [N, 3, T, H, W] in [0, 1].

    Each clip's noise comes from its own seed on the CPU: the same in every batch, precision and device.
    """
    parts = []
    starts = range(0, len(prompts), batch)
    for start in tqdm(starts, desc=describe, unit="batch", mininterval=5, leave=False):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        output = pipe(prompt=list(prompts[start : start + batch]), generator=generators, output_type="np", **call)
        parts.append(torch.as_tensor(output.frames).permute(0, 4, 1, 2, 3))  # [B, T, H, W, C] -> [B, C, T, H, W]
    return torch.cat(parts).float()
