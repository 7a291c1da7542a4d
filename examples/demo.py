"""The whole story on a miniature video model, on a CPU: calibrate, quantize, compare, save, load again.

    python -m examples.demo           # the Wan miniature
    python -m examples.demo unet      # the AnimateDiff miniature
    python -m examples.demo wan --stressed    # with the channel ranges of large models, see moving_digits/stress.py

Writes compare.gif, compare.png, report.html, scales.safetensors and the quantized pipeline to out/ (or --out).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from examples.moving_digits import sampling
from examples.moving_digits.pictures import write_comparison_gif, write_comparison_png
from examples.moving_digits.stress import save_stressed
from qvd_core.layers import QuantizedLayer
from qvd_core.quality import psnr, ssim
from qvd_core.report import THEMES, frame_strip, write_report
from qvd_core.scales import Scales
from qvd_diffusers import QVDConfig, calibrate
from qvd_diffusers.cli_report import report_of_folder

COMPARED_CLIPS = 4
ROUNDS = 2  # of sampling them all with every pipeline, for the median time of a step
DENOISER = {"wan": "transformer", "unet": "unet"}


@dataclass(frozen=True)
class Sampled:
    """Clips float32 [N, 3, T, H, W] in [0, 1], and the median seconds of one denoising step."""

    video: Tensor
    seconds_per_step: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("miniature", nargs="?", default="wan", choices=sampling.MINIATURES)
    parser.add_argument("--stressed", action="store_true", help="give it the scattered channel ranges of large models")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.miniature, args.out, args.stressed)


def run(name: str, out: Path, stressed: bool = False) -> None:
    """Run every step on the miniature `name`, saying what happens."""
    folder = sampling.miniature(name)
    call = sampling.load_call(folder)
    title = f"{'stressed ' if stressed else ''}{name} miniature"
    if stressed:
        folder = save_stressed(name, out / f"{name}_stressed")

    print(f"1. Load the {title} in full precision and calibrate it on 16 prompts.")
    full = sampling.load_pipeline(folder)
    scales = calibrate(full, sampling.calibration_prompts(), cache=out / "scale_cache", **call)
    scales_file = scales.save(out / "scales.safetensors")

    print(
        "2. Load it again, quantized: DiffusionPipeline.from_pretrained(..., quantization_config=QVDConfig(scales=...))"
    )
    quantized = sampling.load_pipeline(folder, quantization_config=QVDConfig(scales=scales_file))

    print(f"3. Sample {COMPARED_CLIPS} clips with both, from the same noise.")
    prompts = sampling.held_out_prompts(COMPARED_CLIPS)
    reference, int8 = sample_interleaved([full, quantized], prompts, call)

    print("4. Save the quantized pipeline, load it plainly, and sample once more.")
    saved = out / f"{name}_int8"
    shutil.rmtree(saved, ignore_errors=True)
    quantized.save_pretrained(saved)
    (again,) = sample_interleaved([sampling.load_pipeline(saved)], prompts, call)
    identical = torch.equal(again.video, int8.video)

    figures = [
        *weight_figures(folder / DENOISER[name], saved / DENOISER[name], getattr(quantized, DENOISER[name])),
        *quality_figures(reference, int8, scales),
        ("frames after save and reload", "identical" if identical else "DIFFERENT"),
    ]
    print()
    print_table(figures)
    png = write_comparison_png(out / "compare.png", reference.video, int8.video, prompts)
    gif = write_comparison_gif(out / "compare.gif", reference.video, int8.video)
    report = write_demo_report(
        out / "report.html", f"QVD on the {title}", saved / DENOISER[name], scales, reference, int8
    )
    print(f"\nLook at {gif}, {png} and {report}; the quantized pipeline is in {saved}.")
    if not identical:
        raise SystemExit("the reloaded pipeline gave other frames than the one that was saved")


def sample_interleaved(
    pipes: Sequence[DiffusionPipeline], prompts: Sequence[str], call: dict[str, Any]
) -> list[Sampled]:
    """Sample all prompts, as one batch, with every pipeline in turn: a busy machine slows all of them alike."""
    videos: list[Tensor] = [torch.empty(0) for _ in pipes]
    seconds: list[list[float]] = [[] for _ in pipes]
    seeds = sampling.held_out_seeds(len(prompts))
    for _ in range(ROUNDS):
        for index, pipe in enumerate(pipes):
            clock = StepClock()
            timed = {**call, "callback_on_step_end": clock}
            videos[index] = sampling.sample_video(pipe, list(prompts), list(seeds), timed)
            seconds[index] += clock.seconds()
    return [Sampled(video, statistics.median(times)) for video, times in zip(videos, seconds, strict=True)]


class StepClock:
    """A pipeline callback that notes when each denoising step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.times.append(time.perf_counter())
        return tensors

    def seconds(self) -> list[float]:
        """Durations of all steps but the first, whose start is not seen."""
        return [end - start for start, end in zip(self.times, self.times[1:], strict=False)]


def weight_figures(full: Path, quantized: Path, model: nn.Module) -> list[tuple[str, str]]:
    """Sizes of the weight files, and how many layers are int8."""
    before, after = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (full, quantized))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
    int8 = sum(isinstance(module, QuantizedLayer) for module in layers)
    return [
        ("denoiser weights, full precision", f"{before / 1e6:.2f} MB"),
        ("denoiser weights, int8", f"{after / 1e6:.2f} MB ({after / before:.3f} of it)"),
        ("layers in int8 / kept", f"{int8} / {len(layers) - int8}"),
    ]


def quality_figures(reference: Sampled, int8: Sampled, scales: Scales) -> list[tuple[str, str]]:
    """Speed, closeness to full precision, and what SCRI and HTDQ did."""
    decibels = psnr(int8.video, reference.video)
    similarity = ssim(int8.video, reference.video)
    summary = scales.summary()
    return [
        ("seconds per step, full precision", f"{reference.seconds_per_step:.3f}"),
        ("seconds per step, int8", f"{int8.seconds_per_step:.3f}"),
        ("PSNR to full precision, mean (min)", f"{float(decibels.mean()):.1f} dB ({float(decibels.min()):.1f} dB)"),
        ("SSIM to full precision, mean (min)", f"{float(similarity.mean()):.4f} ({float(similarity.min()):.4f})"),
        ("TDScore of temporal features kept (TDR)", f"{summary['tdr']:.4f}"),
        (
            "mean coverage of levels, before → after SCRI",
            f"{summary['coverage_before']:.1%} → {summary['coverage']:.1%}",
        ),
        ("mean layer SQNR, before → after SCRI", f"{summary['sqnr_db_before']:.1f} → {summary['sqnr_db']:.1f} dB"),
    ]


def write_demo_report(path: Path, title: str, folder: Path, scales: Scales, reference: Sampled, int8: Sampled) -> Path:
    """The report of the quantized folder, with what was measured and the frames of the first clip."""
    decibels, similarity = psnr(int8.video, reference.video), ssim(int8.video, reference.video)
    quality = {
        "psnr_db_mean": float(decibels.mean()),
        "ssim_mean": float(similarity.mean()),
        "psnr_db_min": float(decibels.min()),
        "ssim_min": float(similarity.min()),
    }
    speed = {
        "seconds_per_step_float": reference.seconds_per_step,
        "seconds_per_step_int8": int8.seconds_per_step,
    }
    first, second = (video[0].permute(1, 2, 3, 0) for video in (reference.video, int8.video))  # [T, H, W, 3]
    themes = {theme: frame_strip(first, second, theme) for theme in THEMES}
    strip = {"Frames: full precision, int8 and their difference": themes}
    report = report_of_folder(folder, scales, quality=quality, speed=speed)
    return write_report(path, report, title, strip)


def print_table(figures: Sequence[tuple[str, str]]) -> None:
    """Two aligned columns."""
    width = max(len(what) for what, _ in figures)
    for what, value in figures:
        print(f"  {what:<{width}}  {value}")


if __name__ == "__main__":
    main()
