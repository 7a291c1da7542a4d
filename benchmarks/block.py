"""One transformer block of Wan: full precision against int8, and where its time goes.

    python -m benchmarks.block                                 # on a CPU: 1.3B's block at 1024, 2048 and 4096 tokens
    python -m benchmarks.block --sizes 1.3b 14b --tokens 4096 --device cuda

Writes benchmarks/results/block-<machine>.json after every case, and the table (.md) beside it; the next run measures
what is missing. Weights are random; the block reads 512 text tokens besides. SQNR is that of what the block adds to its
input, to the same block in full precision (float32 on a CPU, bfloat16 on a GPU).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.kernel_tables import table_line
from benchmarks.model_speed import SIZES, Cases, make_wan, profile_shares, quantized, stored_bytes, wan_inputs
from benchmarks.timing import clock_for, interleave, peak_memory
from qvd_core.quality import sqnr_db

RESULTS = Path("benchmarks/results")
REFERENCE = "full precision"
SIXTEEN_BIT = "bf16"
BACKENDS = ("auto", "emulated")
TOKENS_PER_FRAME = 256  # 16 x 16 patches of 32 x 32 latents

HEADINGS = ("block", "tokens", "", "ms", "× full precision", "SQNR (dB)", "weights", "working (MiB)")
SHARES = ("linear", "quantize", "attention", "rest")


@dataclass(frozen=True)
class Figures:
    """One version of the block. speed: times as fast as full precision; weights: share of its bytes; shares of time."""

    seconds: float
    speed: float
    sqnr: float | None
    weights: float
    memory_bytes: int | None
    shares: dict[str, float]


@torch.no_grad()
def measure(size: str, tokens: int, device: torch.device, rounds: int, limit: float) -> dict[str, dict[str, Any]]:
    """Every version of the block of Wan `size` on `tokens` tokens."""
    model = make_wan(size, 1, device)
    arguments = block_arguments(model, wan_inputs(model, tokens // TOKENS_PER_FRAME, 32, 32))
    blocks: dict[str, nn.Module] = {REFERENCE: _block(model)}
    for backend in BACKENDS:
        blocks[f"int8 {backend}"] = _block(quantized(model, backend))
    calls: dict[str, Callable[[], Tensor]] = {name: partial(block, *arguments) for name, block in blocks.items()}
    if device.type == "cpu":
        blocks[SIXTEEN_BIT] = _block(make_wan(size, 1, device)).to(torch.bfloat16)
        calls[SIXTEEN_BIT] = partial(blocks[SIXTEEN_BIT], *(_to_half(argument) for argument in arguments))
    before, reference = arguments[0], calls[REFERENCE]()
    updates = {name: call().to(before.dtype) - before for name, call in calls.items()}
    samples = interleave(calls, clock_for(device), rounds, limit, always=(REFERENCE,))
    found = {}
    for name, call in calls.items():
        figures = Figures(
            seconds=samples.median(name),
            speed=samples.speed(name, REFERENCE),
            sqnr=None if name == REFERENCE else sqnr_db(reference - before, updates[name]),
            weights=stored_bytes(blocks[name]) / stored_bytes(blocks[REFERENCE]),
            memory_bytes=peak_memory(call, device),
            shares=profile_shares(call, device).to_dict(),
        )
        found[name] = asdict(figures)
    return found


def block_arguments(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the first block is called with when the model is called with `inputs`."""
    caught: list[tuple[Any, ...]] = []
    handle = _block(model).register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return caught[0]


def _block(model: nn.Module) -> nn.Module:
    return model.get_submodule("blocks.0")


def _to_half(argument: Any) -> Any:
    """The block's inputs in bfloat16; the angles of the rotary embedding stay as they are."""
    return argument.to(torch.bfloat16) if isinstance(argument, Tensor) else argument


def markdown(known: dict[str, str], cases: dict[str, dict[str, Any]]) -> str:
    """All cases in one table, and where the time goes in another."""
    facts = ", ".join(f"{name} {value}" for name, value in known.items() if name != "device")
    head = (
        f"# One block of Wan on {known.get('device', '?')}\n\n{(__doc__ or '').split('Writes')[-1].partition('. ')[2]}"
    )
    speeds = [table_line(HEADINGS), table_line(["---"] * len(HEADINGS))]
    shares = [table_line(["block", "tokens", "share of the time", *SHARES]), table_line(["---"] * (3 + len(SHARES)))]
    for case, rows in cases.items():
        size, tokens = case.split()
        for name, row in rows.items():
            decibels = "-" if row["sqnr"] is None else f"{row['sqnr']:.1f}"
            memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.0f}"
            figures = [f"{1e3 * row['seconds']:.1f}", f"{row['speed']:.2f}", decibels, f"{row['weights']:.3f}", memory]
            speeds.append(table_line([size, tokens, name, *figures]))
            parts = [f"{100 * row['shares'][part]:.1f} %" for part in SHARES]
            shares.append(table_line([size, tokens, name, *parts]))
    note = '"linear" holds "quantize", the quantizing of its inputs.'
    return "\n".join([head, f"\nMeasured with {facts}.\n", *speeds, "", *shares, "", note, ""])


def main(argv: Sequence[str] | None = None) -> None:
    cli = argparse.ArgumentParser(
        prog="python -m benchmarks.block", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    cli.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1.3b", "14b"] if cuda else ["1.3b"])
    cli.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096], help="multiples of 256")
    cli.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    cli.add_argument("--rounds", type=int, default=9, help="the most rounds per case (default: 9)")
    cli.add_argument("--limit", type=float, default=120.0, help="about so many seconds of timing per case")
    cli.add_argument("--again", action="store_true", help="measure the chosen cases anew")
    cli.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results, named by the machine)")
    args = cli.parse_args(argv)
    if any(tokens < TOKENS_PER_FRAME or tokens % TOKENS_PER_FRAME for tokens in args.tokens):
        cli.error(f"--tokens must be multiples of {TOKENS_PER_FRAME}, got {args.tokens}")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    known = {**machine.facts(device), "clock": clock_for(device).meaning}
    cases = Cases(args.out or RESULTS / f"block-{machine.slug(device)}.json", known)
    waiting = [(f"{size} {tokens}", size, tokens) for size in args.sizes for tokens in args.tokens]
    for case, size, tokens in tqdm([w for w in waiting if args.again or w[0] not in cases.known], disable=None):
        cases.put(case, measure(size, tokens, device, args.rounds, args.limit))
    table = cases.path.with_suffix(".md")
    table.write_text(markdown(cases.machine, cases.known))
    print(table.read_text())


if __name__ == "__main__":
    main()
