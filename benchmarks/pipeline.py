"""Whole denoisers: seconds per step and memory in full precision and in int8, beside what the linear layers allow.

    python -m benchmarks.pipeline                                   # on a CPU: 4 layers of Wan 1.3B, and the miniatures
    python -m benchmarks.pipeline --sizes 1.3b 14b --device cuda    # all layers, 81 frames of 832x480
    python -m benchmarks.pipeline --layers 8 --latents 5x32x32 --no-miniatures

Writes benchmarks/results/pipeline-<machine>.json after every case, and the table (.md) beside it; the next run measures
what is missing. Wan has random weights. A step is one call of the denoiser for one clip without guidance. The ceilings
are Amdahl's: "all linear layers free" from their share of the time in full precision, "with the measured gain" from
that share and how much faster they became. Memory is the denoiser's weights and what one step needs beyond them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.kernel_tables import table_line
from benchmarks.model_speed import (
    SIZES,
    Cases,
    Shares,
    make_wan,
    profile_shares,
    quantized,
    stored_bytes,
    tokens_of,
    wan_inputs,
)
from benchmarks.timing import clock_for, interleave, peak_memory

RESULTS = Path("benchmarks/results")
LATENTS = {"cpu": "3x24x24", "cuda": "21x60x104"}  # the latter: 81 frames of 832x480
CPU_LAYERS = 4
MINIATURE_CLIPS = 4
FULL, INT8 = "full precision", "int8"
HEADINGS = ("denoiser", "s per step", "int8, s", "× full precision", "linear layers", "their gain")
CEILINGS = ("ceiling with that gain", "ceiling, linear layers free", "memory (MiB)", "int8 (MiB)")


@dataclass(frozen=True)
class Figures:
    """One denoiser. linear_share: of the time in full precision; linear_gain: how many times as fast they became."""

    tokens: int
    seconds: float
    seconds_int8: float
    speed: float
    linear_share: float
    linear_gain: float
    shares: dict[str, float]
    shares_int8: dict[str, float]
    memory_bytes: int | None
    memory_bytes_int8: int | None


def ceiling(share: float, gain: float = float("inf")) -> float:
    """Amdahl's law: times as fast when `share` of the time becomes `gain` times as fast."""
    rest = 1 - share + share / gain
    return 1 / rest if rest > 0 else float("inf")


@torch.no_grad()
def measure(
    size: str, layers: int | None, latents: tuple[int, int, int], backend: str, device: torch.device, rounds: int
) -> Figures:
    """Full precision and int8 of one denoiser, in turn."""
    full = make_wan(size, layers, device)
    inputs = wan_inputs(full, *latents)
    models: dict[str, nn.Module] = {FULL: full, INT8: quantized(full, backend)}
    calls: dict[str, Callable[[], Any]] = {name: partial(model, **inputs) for name, model in models.items()}
    samples = interleave(calls, clock_for(device), rounds, limit=float("inf"))
    profiles = {name: profile_shares(call, device) for name, call in calls.items()}
    memory = {name: _memory(models[name], call, device) for name, call in calls.items()}
    return Figures(
        tokens=tokens_of(*latents),
        seconds=samples.median(FULL),
        seconds_int8=samples.median(INT8),
        speed=samples.speed(INT8, FULL),
        linear_share=profiles[FULL].linear / profiles[FULL].whole,
        linear_gain=linear_gain(profiles[FULL], profiles[INT8]),
        shares=profiles[FULL].to_dict(),
        shares_int8=profiles[INT8].to_dict(),
        memory_bytes=memory[FULL],
        memory_bytes_int8=memory[INT8],
    )


def linear_gain(full: Shares, int8: Shares) -> float:
    """How many times as fast the linear layers became, the quantizing of their inputs included."""
    return full.linear / max(int8.linear, 1e-12)


def _memory(model: nn.Module, call: Callable[[], Any], device: torch.device) -> int | None:
    working = peak_memory(call, device)
    return None if working is None else stored_bytes(model) + working


def measure_miniature(name: str) -> dict[str, Any]:
    """Seconds per step of a miniature as `make demo` samples it, in full precision and in int8 without calibration."""
    from examples.demo import sample_interleaved
    from examples.moving_digits import sampling
    from qvd_diffusers import QVDConfig

    folder = sampling.miniature(name)
    pipes = [sampling.load_pipeline(folder), sampling.load_pipeline(folder, quantization_config=QVDConfig())]
    prompts = sampling.held_out_prompts(MINIATURE_CLIPS)
    full, int8 = sample_interleaved(pipes, prompts, sampling.load_call(folder))
    seconds, seconds_int8 = full.seconds_per_step, int8.seconds_per_step
    return {"seconds": seconds, "seconds_int8": seconds_int8, "speed": seconds / seconds_int8}


def markdown(known: dict[str, str], cases: dict[str, dict[str, Any]]) -> str:
    """All cases in one table."""
    facts = ", ".join(f"{name} {value}" for name, value in known.items() if name != "device")
    head = f"# Whole denoisers on {known.get('device', '?')}\n\n{(__doc__ or '').partition('missing. ')[2]}"
    lines = [table_line([*HEADINGS, *CEILINGS]), table_line(["---"] * (len(HEADINGS) + len(CEILINGS)))]
    for case, row in cases.items():
        cells = [case, f"{row['seconds']:.3f}", f"{row['seconds_int8']:.3f}", f"{row['speed']:.2f}"]
        if "linear_share" in row:
            share, gain = row["linear_share"], row["linear_gain"]
            cells += [f"{100 * share:.0f} %", f"{gain:.2f}×", f"{ceiling(share, gain):.2f}×", f"{ceiling(share):.2f}×"]
            cells += [_mebibytes(row["memory_bytes"]), _mebibytes(row["memory_bytes_int8"])]
        else:
            cells += ["-"] * 6
        lines.append(table_line(cells))
    return "\n".join([head, f"Measured with {facts}.\n", *lines, ""])


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _latents(text: str) -> tuple[int, int, int]:
    """frames x height x width of the latents; height and width even."""
    try:
        frames, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not frames x height x width, such as 3x24x24") from None
    if min(frames, height, width) < 1 or height % 2 or width % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: at least one frame, even height and width")
    return frames, height, width


def main(argv: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    cli.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["1.3b", "14b"] if cuda else ["1.3b"])
    cli.add_argument("--layers", type=int, help=f"transformer blocks (default: {CPU_LAYERS} on a CPU, else all)")
    cli.add_argument("--latents", type=_latents, nargs="+", help="frames x height x width of latents")
    cli.add_argument("--backend", default="auto", help="of the int8 model (default: auto)")
    cli.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    cli.add_argument("--rounds", type=int, default=5, help="steps per case (default: 5)")
    cli.add_argument("--no-miniatures", action="store_true", help="leave the miniatures out; they run on the CPU")
    cli.add_argument("--again", action="store_true", help="measure the chosen cases anew")
    cli.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results, named by the machine)")
    args = cli.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    known = {**machine.facts(device), "clock": clock_for(device).meaning}
    cases = Cases(args.out or RESULTS / f"pipeline-{machine.slug(device)}.json", known)
    layers = args.layers or (CPU_LAYERS if device.type == "cpu" else None)
    for case, job in tqdm(_jobs(args, layers, device).items(), disable=None):
        if args.again or case not in cases.known:
            cases.put(case, job())
    table = cases.path.with_suffix(".md")
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(markdown(cases.machine, cases.known))
    print(table.read_text())


def _jobs(
    args: argparse.Namespace, layers: int | None, device: torch.device
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by the name of the case."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    for size in args.sizes:
        for latents in args.latents or [_latents(LATENTS[device.type])]:
            count = layers or SIZES[size]["num_layers"]
            case = f"wan {size}, {count} blocks, {tokens_of(*latents)} tokens, {args.backend}"
            jobs[case] = partial(_wan_job, size, layers, latents, args.backend, device, args.rounds)
    if not args.no_miniatures and device.type == "cpu":
        for name in ("wan", "unet"):
            jobs[f"miniature {name}"] = partial(measure_miniature, name)
    return jobs


def _wan_job(*arguments: Any) -> dict[str, Any]:
    return asdict(measure(*arguments))


if __name__ == "__main__":
    main()
