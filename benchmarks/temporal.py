"""HTDQ alone: every temporal quantizer on the real temporal features of the trained miniatures.

    python -m benchmarks.temporal            # prints the tables, writes benchmarks/results/temporal.json and .md

Codebooks are fitted without data, on the grid of all training timesteps, and judged at the steps of the miniature's own
sampler. "Elsewhere" is the projected error at half-integer timesteps, which lie between those of the grid.
"uniform, clipped" is the uniform quantizer at the best share of the range: the strongest uniform baseline. PSNR is that
of a few clips sampled with these features quantized and all else in full precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.moving_digits import sampling
from examples.moving_digits.evaluate import table_line
from qvd_core.families import family_or_generic
from qvd_core.quality import psnr
from qvd_core.temporal import (
    AMPLITUDE_SHARES,
    QUANTIZER_NAMES,
    TemporalQuantizer,
    collision_rate,
    fit_temporal_quantizer,
    power_quantizer,
    td_correlation,
    td_ratio,
    uniform_quantizer,
)
from qvd_core.temporal_fit import embed_timesteps, grid_features, stack_features
from qvd_diffusers.sampling import find_denoiser

OUT = Path("benchmarks/results/temporal.json")
BITS = (8, 6, 4)
HEADINGS = ("quantizer", "TDR", "TDC", "COL", "projected error", "elsewhere", "PSNR (dB)")
CLIPS = 4


@dataclass(frozen=True)
class Figures:
    """One quantizer at one bit-width on one miniature; goals: tdr 1, tdc 1, col 0, errors 0."""

    miniature: str
    bits: int
    quantizer: str
    tdr: float
    tdc: float
    col: float
    projected_error: float
    elsewhere: float
    psnr: float

    def markdown(self) -> str:
        shares = [f"{self.tdr:.4f}", f"{self.tdc:.4f}", f"{self.col:.4f}"]
        errors = [f"{self.projected_error:.1e}", f"{self.elsewhere:.1e}"]
        return table_line([self.quantizer, *shares, *errors, f"{self.psnr:.1f}"])


class Sampler:
    """Samples a miniature with its temporal features quantized, and nothing else."""

    def __init__(self, name: str):
        folder = sampling.miniature(name)
        self.call = sampling.load_call(folder)
        self.pipe = sampling.load_pipeline(folder)
        self.model = find_denoiser(self.pipe).requires_grad_(False)
        self.family = family_or_generic(self.model)
        self.projections = [part for key, part in self.model.named_modules() if self.family.is_temporal(key)]
        self.reference = self._sample()

    def psnr(self, quantizer: TemporalQuantizer) -> float:
        """Mean over clips, in dB, to full precision from the same noise."""

        def quantize(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            return quantizer(inputs[0]).to(inputs[0].dtype)

        hooks = [part.register_forward_pre_hook(quantize) for part in self.projections]
        try:
            return float(psnr(self._sample(), self.reference).mean())
        finally:
            for hook in hooks:
                hook.remove()

    def _sample(self) -> Tensor:
        prompts, seeds = sampling.held_out_prompts(CLIPS), sampling.held_out_seeds(CLIPS)
        return sampling.sample_video(self.pipe, prompts, seeds, self.call)


@dataclass(frozen=True)
class Features:
    """Temporal features of one miniature, float32 [T, C], and the stacked weights [N, C] of what reads them."""

    grid: Tensor
    own: Tensor
    between: Tensor
    projection: Tensor

    @classmethod
    def of(cls, sampler: Sampler) -> Features:
        model, family = sampler.model, sampler.family
        sampler.pipe.scheduler.set_timesteps(sampler.call["num_inference_steps"])
        weights = [module.weight for module in sampler.projections]
        return cls(
            grid=stack_features(grid_features(model, family)),
            own=embed_timesteps(model, family, sampler.pipe.scheduler.timesteps),
            between=embed_timesteps(model, family, torch.arange(1000) + 0.5),
            projection=torch.cat([weight.detach().float() for weight in weights]),
        )

    def error(self, quantizer: TemporalQuantizer, features: Tensor) -> float:
        """||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||² in float64."""
        rows, weight = features.double(), self.projection.double()
        noise = (quantizer(features).double() - rows) @ weight.T
        return float(noise.square().sum() / ((rows - rows.mean(dim=0)) @ weight.T).square().sum())

    def clipped_uniform(self, bits: int) -> TemporalQuantizer:
        """The better of both uniform forms, symmetric and between the limits, at the best share of the range."""
        largest = float(self.grid.abs().max())
        options = [power_quantizer(share * largest, 1.0, bits) for share in AMPLITUDE_SHARES]
        options += [uniform_quantizer(share * self.grid, bits) for share in AMPLITUDE_SHARES]
        return min(options, key=lambda option: self.error(option, self.grid))


def measure(name: str) -> Iterator[Figures]:
    """Every quantizer at every bit-width on the miniature `name`."""
    sampler = Sampler(name)
    features = Features.of(sampler)
    for bits in BITS:
        options = {"uniform, clipped": features.clipped_uniform(bits)}
        for kind in (*QUANTIZER_NAMES, "auto"):
            quantizer = fit_temporal_quantizer(features.grid, features.projection, bits, kind).quantizer
            options[f"auto: {quantizer.name}" if kind == "auto" else kind] = quantizer
        for label, quantizer in options.items():
            quantized = quantizer(features.own)
            yield Figures(
                name,
                bits,
                label,
                td_ratio(features.own, quantized),
                td_correlation(features.own, quantized),
                collision_rate(features.own, quantized),
                features.error(quantizer, features.own),
                features.error(quantizer, features.between),
                sampler.psnr(quantizer),
            )


def markdown(figures: list[Figures]) -> str:
    """One table per miniature and bit-width."""
    parts = ["# HTDQ on the temporal features of the miniatures", "", "Printed by `python -m benchmarks.temporal`.", ""]
    for name in sampling.MINIATURES:
        for bits in BITS:
            rows = [entry.markdown() for entry in figures if (entry.miniature, entry.bits) == (name, bits)]
            parts += [
                f"## {name}, {bits} bits",
                "",
                table_line(HEADINGS),
                table_line(["---"] * len(HEADINGS)),
                *rows,
                "",
            ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file to write; tables go beside it ({OUT})")
    args = parser.parse_args()
    figures = [entry for name in sampling.MINIATURES for entry in measure(name)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(entry) for entry in figures], indent=2) + "\n")
    tables = markdown(figures)
    args.out.with_suffix(".md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    main()
