"""What int8 costs: the miniatures in int8 beside full precision, from the same prompts and the same noise.

    python -m examples.moving_digits.evaluate both
    python -m examples.moving_digits.evaluate wan --clips 256 --json out/wan.json

Prints one Markdown table per miniature. PSNR and SSIM compare clip by clip with the full-precision clip from the same
noise; "agreement" is the share of clips that the classifier reads alike (digit and direction); "digit" and "direction"
are the shares that show what the caption asks for; a Fréchet distance compares whole sets of clips.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.moving_digits import sampling
from examples.moving_digits.data import MovingDigits
from examples.moving_digits.metric import MetricNetwork, extract_features, load_metric, noise_floor
from qvd_core.quality import frechet_distance, psnr, ssim
from qvd_diffusers import QVDConfig, calibrate

REAL_SEED = 77
REAL_SETS = 8  # the distance to real clips is a mean over this many sets: a single one may be off by a third
HEADINGS = (
    "model",
    "PSNR mean (dB)",
    "PSNR min (dB)",
    "SSIM",
    "agreement",
    "digit",
    "direction",
    "Fréchet to full precision",
    "Fréchet to real clips",
)


@dataclass(frozen=True)
class Row:
    """One line of the table. PSNR is None, not infinite, for clips equal to the reference: JSON has no infinity."""

    model: str
    psnr_mean: float | None
    psnr_min: float | None
    ssim: float
    agreement: float
    digit: float
    direction: float
    frechet_to_full_precision: float
    frechet_to_real: float

    def markdown(self) -> str:
        decibels = [_decimals(self.psnr_mean, 1), _decimals(self.psnr_min, 1), _decimals(self.ssim, 4)]
        shares = [f"{100 * share:.1f} %" for share in (self.agreement, self.digit, self.direction)]
        distances = [_decimals(self.frechet_to_full_precision, 2), _decimals(self.frechet_to_real, 2)]
        return table_line([self.model, *decibels, *shares, *distances])


@dataclass(frozen=True)
class Evaluation:
    """The table of one miniature; `noise_floor` is the Fréchet distance between two sets of `clips` real clips."""

    miniature: str
    clips: int
    prompts: int
    noise_floor: float
    rows: list[Row]

    def markdown(self) -> str:
        table = [table_line(HEADINGS), table_line(["---"] * len(HEADINGS)), *(row.markdown() for row in self.rows)]
        note = (
            f"PSNR and SSIM over {self.prompts} held-out prompts, all else over {self.clips} clips. "
            f"Noise floor: two sets of {self.clips} real clips are {self.noise_floor:.1f} apart."
        )
        return "\n".join([f"### {self.miniature}", "", *table, "", note])


class Judge:
    """Compares sets of clips, all made from the same prompts, with those of the full-precision model."""

    def __init__(self, reference: Tensor, captions: Sequence[str], prompts: int, network: MetricNetwork):
        """reference: clips [N, 3, T, H, W] in [0, 1]; the first `prompts` of them count for PSNR and SSIM."""
        self.network, self.prompts, self.reference = network, prompts, reference
        self.asked = sampling.labels_of(captions)
        clips, frames = len(reference), reference.shape[2]
        real = MovingDigits("test").sample(REAL_SETS * clips, frames, torch.Generator().manual_seed(REAL_SEED))
        self.real_features = extract_features(real.video, network).chunk(REAL_SETS)
        self.features, self.seen = self._look_at(reference)

    def _look_at(self, video: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        signed = video * 2 - 1
        return extract_features(signed, self.network), self.network.classify(signed)

    def row(self, model: str, video: Tensor) -> Row:
        """Judge the clips [N, 3, T, H, W] in [0, 1] of one model."""
        features, (digit, direction) = self._look_at(video)
        first, same = video[: self.prompts], self.reference[: self.prompts]
        decibels = psnr(first, same)
        agrees = (digit == self.seen[0]) & (direction == self.seen[1])
        return Row(
            model=model,
            psnr_mean=_finite(decibels.mean()),
            psnr_min=_finite(decibels.min()),
            ssim=float(ssim(first, same).mean()),
            agreement=_share(agrees),
            digit=_share(digit == self.asked[0]),
            direction=_share(direction == self.asked[1]),
            frechet_to_full_precision=frechet_distance(features, self.features),
            frechet_to_real=statistics.fmean(frechet_distance(features, real) for real in self.real_features),
        )


def evaluate(name: str, clips: int, prompts: int) -> Evaluation:
    """Sample and judge the miniature `name` in full precision and in int8."""
    folder = sampling.miniature(name)
    call = sampling.load_call(folder)
    captions = sampling.held_out_prompts(clips)

    def sample(model: str, first_seed: int = sampling.HELD_OUT_SEED, **options: Any) -> Tensor:
        pipe = sampling.load_pipeline(folder, **options)
        seeds = sampling.held_out_seeds(clips, first_seed)
        return sampling.sample_video(pipe, captions, seeds, call, describe=f"{name}: {model}")

    reference = sample("full precision")
    judge = Judge(reference, captions, prompts, load_metric())
    other_noise = sample("other noise", first_seed=sampling.HELD_OUT_SEED + clips)
    rows = [judge.row("full precision", reference), judge.row("full precision, other noise", other_noise)]
    for model, config in int8_configs(folder, call):
        rows.append(judge.row(model, sample(model, quantization_config=config)))
    return Evaluation(name, clips, prompts, noise_floor(clips, reference.shape[2]), rows)


def int8_configs(folder: Path, call: dict[str, Any]) -> Iterator[tuple[str, QVDConfig]]:
    """The int8 variants to judge; calibrated ones see captions and noise that no clip behind PSNR and SSIM uses."""
    yield "int8, data-free, per token", QVDConfig()
    pipe = sampling.load_pipeline(folder)
    for activation, words in (("token", "per token"), ("static", "static")):
        config = QVDConfig(activation=activation)
        prompts = sampling.calibration_prompts()
        scales = calibrate(pipe, prompts, config=config, seed=sampling.CALIBRATION_SEED, cache=False, **call)
        yield f"int8, calibrated, {words}", QVDConfig(activation=activation, scales=scales)


def store(path: Path, result: Evaluation) -> None:
    """Write `result` to a JSON file of evaluations, in place of an older one of the same miniature."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [entry for entry in read_evaluations(path) if entry.miniature != result.miniature]
    entries = [asdict(entry) for entry in (*kept, result)]
    path.write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n")


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluations in a JSON file written by `store`; none when there is no such file."""
    entries = json.loads(path.read_text()) if path.exists() else []
    return [Evaluation(**{**entry, "rows": [Row(**row) for row in entry["rows"]]}) for entry in entries]


def _share(answers: Tensor) -> float:
    return float(answers.double().mean())


def _finite(value: Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _decimals(value: float | None, digits: int) -> str:
    return "∞" if value is None else f"{value:.{digits}f}"


def table_line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("miniature", choices=[*sampling.MINIATURES, "both"])
    parser.add_argument("--prompts", type=int, default=16, help="clips for PSNR and SSIM")
    parser.add_argument("--clips", type=int, default=128, help="clips for everything else")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="also put the numbers into this file")
    args = parser.parse_args()
    if not 1 <= args.prompts <= args.clips:
        parser.error(f"--prompts must be between 1 and --clips ({args.clips}), got {args.prompts}")
    torch.set_num_threads(args.threads)
    names = sampling.MINIATURES if args.miniature == "both" else (args.miniature,)
    for name in names:
        result = evaluate(name, args.clips, args.prompts)
        print(result.markdown(), end="\n\n", flush=True)
        if args.json:
            store(args.json, result)


if __name__ == "__main__":
    main()
