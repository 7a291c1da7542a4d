"""Refresh the model card: draw the sample grids, and copy the measured numbers into README.md.

    python -m examples.moving_digits.evaluate both --clips 64 --json examples/moving_digits/evaluation.json
    python -m examples.moving_digits.card

Numbers come from `metric/facts.json` and `evaluation.json`; what is missing keeps the text it has.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from examples.moving_digits import sampling
from examples.moving_digits.data import DIGIT_WORDS, DIRECTION_WORDS, caption
from examples.moving_digits.evaluate import read_evaluations, table_line
from examples.moving_digits.metric import load_facts

HERE = Path(__file__).parent
README = HERE / "README.md"
EVALUATION = HERE / "evaluation.json"
ZOOM = 2  # screen pixels per pixel of a clip
LABEL_WIDTH = 140
GAP = 4


def draw_grid(video: Tensor, labels: Sequence[str]) -> Image.Image:
    """One row per clip of [N, 3, T, H, W] in [0, 1]: its label, then its frames from left to right."""
    count, _, frames, height, width = video.shape
    pixels = (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()  # [N, T, H, W, 3]
    cell_width, cell_height = width * ZOOM + GAP, height * ZOOM + GAP
    grid = Image.new("L", (LABEL_WIDTH + frames * cell_width, count * cell_height), color=255)
    pen = ImageDraw.Draw(grid)
    for row, (clip, label) in enumerate(zip(pixels, labels, strict=True)):
        pen.text((GAP, (row + 0.5) * cell_height), label, fill=0, anchor="lm")
        for column, frame in enumerate(clip):
            image = Image.fromarray(frame).convert("L").resize((width * ZOOM, height * ZOOM), Image.Resampling.NEAREST)
            grid.paste(image, (LABEL_WIDTH + column * cell_width, row * cell_height))
    return grid


def draw_samples(name: str) -> Path:
    """Sample every digit once, in turning directions, from the miniature `name`; returns the PNG written."""
    folder = sampling.miniature(name)
    prompts = [caption(digit, digit % len(DIRECTION_WORDS)) for digit in range(len(DIGIT_WORDS))]
    seeds = sampling.held_out_seeds(len(prompts))
    video = sampling.sample_video(sampling.load_pipeline(folder), prompts, seeds, sampling.load_call(folder))
    path = HERE / f"samples_{name}.png"
    draw_grid(video, prompts).save(path, optimize=True)
    return path


def metric_section(facts: Mapping[str, Any]) -> str:
    """Accuracy, reactions and noise floor from `metric/facts.json`, a column per frame count."""
    percent, plain = "{:.1%}".format, "{:.2f}".format
    accuracy = _columns("on held-out clips", facts["accuracy"], percent)
    reaction = _columns("Fréchet distance, 512 clips", facts["frechet_reaction"], plain)
    floors = {frames: {n: f["mean"] for n, f in column.items()} for frames, column in facts["noise_floor"].items()}
    return "\n\n".join([accuracy, reaction, _columns("noise floor at this many clips", floors, plain)])


def _columns(title: str, columns: Mapping[str, Mapping[str, float]], write: Callable[[float], str]) -> str:
    """A Markdown table with a column for each frame count of `columns` and a row for each of their entries."""
    lines = [table_line([title, *(f"{frames} frames" for frames in columns)]), table_line(["---"] * (len(columns) + 1))]
    for name in next(iter(columns.values())):
        cells = [write(column[name]) for column in columns.values()]
        lines.append(table_line([name.replace("_", " "), *cells]))
    return "\n".join(lines)


def replace_section(text: str, name: str, body: str) -> str:
    """Put `body` between the markers `<!-- begin name -->` and `<!-- end name -->` of a Markdown text."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"README.md has no section between {begin!r} and {end!r}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), flags=re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--no-samples", action="store_true", help="keep the sample grids, refresh the numbers only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = replace_section(README.read_text(), "metric", metric_section(load_facts()))
    if results := read_evaluations(EVALUATION):
        text = replace_section(text, "evaluation", "\n\n".join(result.markdown() for result in results))
    README.write_text(text)
    print(README)
    if not args.no_samples:
        for name in sampling.MINIATURES:
            print(draw_samples(name))


if __name__ == "__main__":
    main()
