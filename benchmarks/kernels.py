"""How fast and how exact the int8 operators are, layer by layer, beside everything else that could run them.

    python -m benchmarks.kernels                                       # all shapes and rows; resumable
    python -m benchmarks.kernels --shapes "wan-1.3b*" conv --rows qvd torch --rounds 7 --limit 20
    python -m benchmarks.kernels --isa avx2                            # as on a CPU that has nothing beyond AVX2
    python -m benchmarks.kernels --report-only benchmarks/results/kernels-*.json

Results go to benchmarks/results/kernels-<machine>.json, written after every shape, with the tables (.md) and the plot
(.png) beside it; the next run measures what is missing. Rows whose package is not installed say so, and are tried again
by a run in an environment that has it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.kernel_plots import draw
from benchmarks.kernel_problem import Problem
from benchmarks.kernel_results import Entry, Store, read
from benchmarks.kernel_rows import FULL_PRECISION, HALF_PRECISION, Prepared, Row, RowUnavailable, rows_for
from benchmarks.kernel_shapes import Shape, choose, shapes_for
from benchmarks.kernel_tables import markdown
from benchmarks.timing import Function, Samples, clock_for, interleave, peak_memory
from qvd_core.quality import LARGEST_DECIBELS, sqnr_db

RESULTS = Path("benchmarks/results")
TOLERANCE_DB = 3.0  # an output judged by its error may be that much worse than exact int8 arithmetic
QUANTIZE, COPY = "quantize: ", "copy"


@dataclass
class Candidate:
    """A row that runs on the present problem, and what is known of it before it is timed."""

    row: Row
    prepared: Prepared
    figures: dict[str, float | None] = field(default_factory=dict)
    exact: bool | None = None
    judged_by: str = ""


@torch.no_grad()
def measure(shape: Shape, rows: Sequence[Row], device: torch.device, rounds: int, limit: float) -> list[Entry]:
    """All rows on one shape, one entry each; `limit` bounds the seconds of timing, not those of preparing."""
    try:
        problem = Problem(shape, device)
    except torch.OutOfMemoryError as error:
        return [_entry(shape, row, error=first_line(error)) for row in rows]
    candidates, entries = [], []
    for row in rows:
        try:
            candidates.append(examine(row, problem))
        except RowUnavailable as error:
            entries.append(_entry(shape, row, error=str(error)))
        except Exception as error:  # other projects' code may fail in any way: the row says how, the others go on
            entries.append(_entry(shape, row, error=first_line(error)))
    samples = interleave(_functions(candidates, problem), clock_for(device), rounds, limit, always=(FULL_PRECISION,))
    for candidate in candidates:
        candidate.figures |= speeds(candidate, samples, problem)
        entries.append(_entry(shape, candidate.row, candidate))
    return entries


def examine(row: Row, problem: Problem) -> Candidate:
    """Prepare a row, and judge what it computes and how much memory one call needs."""
    prepared = row.prepare(problem)
    candidate = Candidate(row, prepared)
    output = problem.judged(prepared.run()).double()
    if not output.isfinite().all():
        raise RowUnavailable("its output is not finite")
    candidate.figures["sqnr"] = _decibels(problem.reference, output)
    candidate.figures["weight_bytes"] = float(prepared.weight_bytes)
    candidate.figures["memory_bytes"] = peak_memory(prepared.run, problem.device)
    if row.kind != "float":
        candidate.figures["sqnr_int8"] = _decibels(problem.quantized_reference, output)
        judge(candidate, problem, output)
    return candidate


def judge(candidate: Candidate, problem: Problem, output: Tensor) -> None:
    """Whether the row's arithmetic is exact: by its integer sums where it takes codes, else by its output's error."""
    prepared = candidate.prepared
    if prepared.integer is None:
        exact = _decibels(problem.reference, problem.quantized_reference)
        candidate.judged_by = "sqnr"
        candidate.exact = _decibels(problem.reference, output) > exact - TOLERANCE_DB
        return
    case = problem.integer_case(prepared.weight_bits)
    sums = problem.judged(prepared.integer(case.codes, case.weight))
    candidate.judged_by = "bits"
    candidate.exact = bool(torch.equal(sums, case.sums))


def _decibels(reference: Tensor, output: Tensor) -> float:
    """SQNR, bounded: JSON has no infinity."""
    return min(sqnr_db(reference, output), LARGEST_DECIBELS)


def _functions(candidates: Iterable[Candidate], problem: Problem) -> dict[str, Function]:
    """What is timed: every row, the quantizing part of each that has one, and a copy to compare that with."""
    functions: dict[str, Function] = {}
    for candidate in candidates:
        functions[candidate.row.name] = candidate.prepared.run
        if candidate.prepared.quantize is not None:
            functions[QUANTIZE + candidate.row.name] = candidate.prepared.quantize
    target = torch.empty_like(problem.input)
    functions[COPY] = lambda: target.copy_(problem.input)
    return functions


def speeds(candidate: Candidate, samples: Samples, problem: Problem) -> dict[str, float | None]:
    """The figures that come from timing."""
    name = candidate.row.name
    figures: dict[str, float | None] = {"seconds": samples.median(name), "rounds": float(len(samples.seconds[name]))}
    if FULL_PRECISION in samples.seconds:
        figures["speed"] = samples.speed(name, FULL_PRECISION)
        figures["spread"] = samples.spread(name, FULL_PRECISION)
    if HALF_PRECISION in samples.seconds:
        figures["speed_16"] = samples.speed(name, HALF_PRECISION)
    if candidate.prepared.quantize is not None:
        part = QUANTIZE + name
        figures["quantize_share"] = 1 / samples.speed(part, name)
        figures["quantize_bandwidth"] = samples.speed(part, COPY) * _quantize_bytes(problem) / _copy_bytes(problem)
    return figures


def _quantize_bytes(problem: Problem) -> int:
    """The least that quantizing must move: read the input once, write one code for each (padded) element."""
    x, shape = problem.input, problem.shape
    codes = shape.batch * torch.Size(shape.padded_space).numel() * shape.inputs
    return x.numel() * x.element_size() + codes


def _copy_bytes(problem: Problem) -> int:
    return 2 * problem.input.numel() * problem.input.element_size()


def _entry(shape: Shape, row: Row, candidate: Candidate | None = None, error: str = "") -> Entry:
    own = candidate or Candidate(row, Prepared(torch.Tensor, 0))
    return Entry(
        shape=shape.name,
        row=row.name,
        model=shape.model,
        layer_kind=shape.kind,
        kind=row.kind,
        figures={name: value if value is None else float(f"{value:.6g}") for name, value in own.figures.items()},
        exact=own.exact,
        judged_by=own.judged_by,
        note=own.prepared.note,
        error=error,
        versions={"torch": torch.__version__} | machine.versions([row.package] if row.package else []),
    )


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def run(
    shapes: Sequence[Shape],
    rows: Sequence[Row],
    store: Store,
    device: torch.device,
    rounds: int,
    limit: float,
    again: bool = False,
) -> None:
    """Measure what the store lacks (with `again`: everything) and store it after every shape.

    The floating-point rows run whenever another row does: speeds are quotients of times of one run.
    """
    jobs = [(shape, [row for row in rows if again or not store.finished(shape, row.name)]) for shape in shapes]
    jobs = [(shape, waiting) for shape, waiting in jobs if waiting]
    bar = tqdm(jobs, unit="shape", disable=None)
    for shape, waiting in bar:
        bar.set_description(shape.name)
        needed = [row for row in rows if row.kind == "float" or row in waiting]
        entries = measure(shape, needed, device, rounds, limit)
        store.put(entry for entry in entries if again or not store.finished(shape, entry.row))


def report(known: dict[str, str], entries: Sequence[Entry], path: Path) -> list[Path]:
    """Write the tables and the plot beside the JSON file `path` (.md, .png)."""
    tables, plot = path.with_suffix(".md"), path.with_suffix(".png")
    tables.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(markdown(known, entries, plot.name))
    draw(entries, plot)
    return [tables, plot]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["*"]
    arguments.add_argument("--shapes", nargs="+", default=every, metavar="PATTERN", help="names, models, linear, conv")
    arguments.add_argument("--rows", nargs="+", default=every, metavar="PATTERN", help="names, qvd, torch, peer")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments.add_argument("--rounds", type=int, default=15, help="the most rounds per shape (default: 15)")
    arguments.add_argument("--limit", type=float, default=60.0, help="about so many seconds of timing per shape")
    arguments.add_argument("--isa", choices=["avx2"], help="keep every library to these instructions")
    arguments.add_argument("--again", action="store_true", help="measure the chosen shapes and rows anew")
    arguments.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results, named by the machine)")
    arguments.add_argument("--report-only", nargs="+", type=Path, metavar="JSON", help="only write tables and plots")
    return arguments


def _restart_with(variables: dict[str, str], arguments: Sequence[str]) -> None:
    """Libraries read these variables when they are loaded, so this process is replaced by one that has them."""
    if any(os.environ.get(name) != value for name, value in variables.items()):
        command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
        os.execve(sys.executable, command, {**os.environ, **variables})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    cli = parser()
    args = cli.parse_args(arguments)
    if args.report_only:
        for path in args.report_only:
            print(*report(*read(path), path))
        return
    if args.rounds < 1 or args.threads < 1:
        cli.error("--rounds and --threads must be at least 1")
    if args.isa == "avx2":
        _restart_with(machine.AVX2_ONLY, arguments)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # floating-point convolutions at their best
    device = torch.device(args.device)
    shapes = choose(shapes_for(device.type), args.shapes)
    rows = rows_for(device.type, tuple(args.rows))
    if not shapes:
        models = ", ".join(dict.fromkeys(shape.model for shape in shapes_for(device.type)))
        cli.error(f"no shape matches {args.shapes}; there are linear, conv, {models}")
    known = {**machine.facts(device), "clock": clock_for(device).meaning, "half": str(_half(device))}
    store = Store(args.out or RESULTS / f"kernels-{machine.slug(device)}.json", known)
    run(shapes, rows, store, device, args.rounds, args.limit, args.again)
    print(*report(store.machine, list(store.entries.values()), store.path))


def _half(device: torch.device) -> torch.dtype:
    return Problem(Shape("", "", 1, 1, 1), device).half


if __name__ == "__main__":
    main()
