"""What quantization costs in quality: QVD, the usual baselines and other projects, from the same prompts and noise.

    python -m benchmarks.quality                                   # everything: some hours on one core; resumable
    python -m benchmarks.quality --models wan --bits W6A6 --rows "QVD*" min-max --clips 32
    python -m benchmarks.quality --report-only a.json b.json       # tables and plot of what several runs measured

Every finished row is written to the JSON file at once, and the next run goes on with what is missing. Beside the JSON
file it writes the tables (.md) and the plot (.png).
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import diffusers
import torch
from torch import nn

import qvd_core
from benchmarks.measure import figures_of
from benchmarks.peers import PeerUnavailable
from benchmarks.plots import draw
from benchmarks.results import Entry, Key, Store, merge, write_entries
from benchmarks.rows import BITS, FULL_PRECISION, Row, rows_of
from benchmarks.subjects import MODELS, Subject
from benchmarks.tables import markdown
from examples.moving_digits.evaluate import Judge
from examples.moving_digits.metric import load_metric
from examples.moving_digits.sampling import HELD_OUT_SEED
from qvd_core.errors import QVDError

OUT = Path("benchmarks/results/quality.json")
SECONDS_GUESSED = {"wan": 28.0, "unet": 80.0}  # of one row of 64 clips on one core, until there is a measured one


@dataclass(frozen=True)
class Job:
    """One row of one table of one model."""

    model: str
    bits: str
    row: Row
    clips: int

    @property
    def key(self) -> Key:
        return self.model, self.bits, self.row.name, self.clips, HELD_OUT_SEED


class Measure(Protocol):
    """Measures one job; raises QVDError or PeerUnavailable with the reason where it cannot."""

    def __call__(self, job: Job) -> Entry: ...


class Bench:
    """Measures jobs, one model after the other: only the current one is kept in memory."""

    def __init__(self, prompts: int):
        self.prompts = prompts
        self.network = load_metric()
        self._subject: Subject | None = None
        self._judge: Judge | None = None

    def __call__(self, job: Job) -> Entry:
        start = time.monotonic()
        subject, judge = self._open(job)
        scales = None
        if job.row.kind == "reference":
            model: nn.Module = subject.model
            video = subject.full_precision(other_noise=job.row.other_noise)
        else:
            model, scales = subject.quantized(job.row, job.bits)
            video = subject.sample(model)
        return entry_of(
            job,
            self.prompts,
            figures=figures_of(judge, subject, video, model, scales),
            comparable=_comparable(job, subject),
            seconds=round(time.monotonic() - start, 1),
        )

    def _open(self, job: Job) -> tuple[Subject, Judge]:
        if self._subject is None or self._subject.name != job.model or self._judge is None:
            self._subject = self._judge = None  # frees the last model before the next one is loaded
            self._subject = Subject(job.model, job.clips)
            reference = self._subject.full_precision()
            self._judge = Judge(reference, self._subject.captions, self.prompts, self.network)
        return self._subject, self._judge


def entry_of(
    job: Job,
    prompts: int,
    figures: dict[str, float | None] | None = None,
    comparable: bool = True,
    seconds: float = 0.0,
    error: str = "",
) -> Entry:
    """The entry of a job, measured or failed."""
    row, versions = job.row, {"torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"qvd": qvd_core.__version__, "machine": platform.machine()}
    if row.peer is not None and row.peer.version is not None:
        versions[row.peer.package] = row.peer.version
    return Entry(
        model=job.model,
        bits=job.bits,
        name=row.name,
        clips=job.clips,
        seed=HELD_OUT_SEED,
        kind=row.kind,
        granularity=row.granularity,
        prompts=prompts,
        figures=figures or {},
        comparable=comparable,
        note=row.peer.remark if row.peer is not None else "",
        error=error,
        seconds=seconds,
        versions=versions,
    )


def _comparable(job: Job, subject: Subject) -> bool:
    """Whether the row has the bits of its table in all layers that QVD quantizes, with one weight scale per channel."""
    peer = job.row.peer
    if peer is None:
        return job.row.kind != "reference"
    convolutions = any(isinstance(layer, nn.Conv2d) for layer in subject.observation().layers.values())
    return peer.bits == job.bits and not peer.finer_weights and (peer.convolutions or not convolutions)


def jobs_of(models: Sequence[str], bits: Sequence[str], patterns: tuple[str, ...], clips: int) -> list[Job]:
    """All jobs, model by model, the references first."""
    return [
        Job(model, table, row, clips)
        for model in models
        for table in (FULL_PRECISION, *bits)
        for row in rows_of(table, ("reference",) if table == FULL_PRECISION else patterns)
    ]


def run(jobs: Sequence[Job], store: Store, measure: Measure, prompts: int, again: bool = False) -> Iterator[str]:
    """Measure what the store lacks (with `again`: everything), store each row at once and yield a line about it.

    A row that cannot be measured is stored with the reason; the others go on.
    """
    waiting = [job for job in jobs if again or not store.finished(job.key)]
    if len(waiting) < len(jobs):
        yield f"{len(jobs) - len(waiting)} of {len(jobs)} rows are in {store.path} already."
    clock = _Clock(store.entries.values())
    for number, job in enumerate(waiting, start=1):
        try:
            entry = measure(job)
        except (QVDError, PeerUnavailable) as error:
            entry = entry_of(job, prompts, error=str(error).splitlines()[0])
        store.put(entry)
        clock.add(entry)
        yield f"[{number}/{len(waiting)}] {clock.left(waiting[number:])} left  {_said(entry)}"


class _Clock:
    """Guesses how long the rest takes, from the rows of the same model that are done."""

    def __init__(self, entries: Iterable[Entry]):
        self.seconds: dict[tuple[str, int], list[float]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        if entry.finished and entry.kind != "reference":
            self.seconds.setdefault((entry.model, entry.clips), []).append(entry.seconds)

    def left(self, jobs: Sequence[Job]) -> str:
        seconds = sum(self._guess(job) for job in jobs)
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"

    def _guess(self, job: Job) -> float:
        measured = self.seconds.get((job.model, job.clips))
        if measured:
            return sum(measured) / len(measured)
        return SECONDS_GUESSED.get(job.model.split("-")[0], 30.0) * job.clips / 64


def _said(entry: Entry) -> str:
    where = f"{entry.model} {entry.bits} {entry.name}"
    if entry.error:
        return f"{where}: {entry.error}"
    decibels, distance = entry.figures.get("psnr_mean"), entry.figures.get("frechet_to_full_precision")
    shown = "∞" if decibels is None else f"{decibels:.2f}"
    return f"{where}: {shown} dB, Fréchet {distance or 0:.2f}, {entry.seconds:.0f} s"


def report(entries: Sequence[Entry], out: Path) -> list[Path]:
    """Write the tables and the plot of `entries` beside `out` (.md, .png)."""
    tables, plot = out.with_suffix(".md"), out.with_suffix(".png")
    tables.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(markdown(entries, plot.name))
    draw(entries, plot)
    return [tables, plot]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"{MODELS}"
    )
    arguments.add_argument("--bits", nargs="+", choices=list(BITS), default=list(BITS), help="tables to fill")
    arguments.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="names with *, baseline, qvd, peer, headline"
    )
    arguments.add_argument("--clips", type=int, default=64, help="clips per row (Fréchet distance, agreement)")
    arguments.add_argument("--prompts", type=int, default=16, help="of them, clips for PSNR and SSIM")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments.add_argument("--again", action="store_true", help="measure the chosen rows anew")
    arguments.add_argument("--out", type=Path, default=OUT, help="JSON file; tables and plot go beside it")
    arguments.add_argument("--report-only", nargs="*", type=Path, metavar="JSON", help="measure nothing; merge these")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    cli = parser()
    args = cli.parse_args(argv)
    if not 2 <= args.prompts <= args.clips:
        cli.error(f"--prompts must be between 2 and --clips ({args.clips}), got {args.prompts}")
    if args.report_only is not None:
        entries = merge(args.report_only or [args.out])
        if args.report_only:
            write_entries(args.out, entries)
    else:
        torch.set_num_threads(args.threads)
        store = Store(args.out)
        jobs = jobs_of(args.models, args.bits, tuple(args.rows), args.clips)
        for line in run(jobs, store, Bench(args.prompts), args.prompts, args.again):
            print(line, flush=True)
        entries = list(store.entries.values())
    for path in report(entries, args.out):
        print(path)


if __name__ == "__main__":
    main()
