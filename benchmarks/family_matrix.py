"""The table of docs/families.md: every video model class of diffusers, and what works with a quantized one.

    python -m benchmarks.family_matrix [--output docs/families.md] [--no-compile]

Each row is measured on a tiny random model of its class, by the same functions that the tests run. Exit code 1 where a
cell does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import diffusers
import torch

from qvd_core import find_family
from tests.diffusers.matrix import COLUMNS, COMPILE, Subject
from tests.tiny_models import missing_class
from tests.tiny_models.classes import VIDEO_CLASSES

FAILS = "**fails**"
NOT_RUN = "not run"
ENTRY = "registry entry"
TEMPORAL = "temporal features"

_INTRODUCTION = """# Video model classes

What QVD does with each video model class of diffusers. Every cell is measured, on a tiny model with random parameters:
it shows that the class works and that nothing is quantized wrongly, not how good its videos are. Random models are
harsher than trained ones, because every norm, bias and gate is far from its usual place.

- **quantized**: linear and convolution layers that go to int8, of all there are. The rest is kept: embedders, final
  projections, control projections, and convolutions with groups.
- **temporal features**: whether the input of the modulation layers follows from the timestep alone, so that HTDQ needs
  no data, or holds more and needs a calibration; "none" where the class has no such layer.
- **SQNR**: the output of one forward pass against full precision, data-free W8A8 with one scale per token.
- **compile fullgraph**: one graph for the whole model; its output is nearer to the eager one than either is to full
  precision, by at least 3 dB.
- **save**, **sharded save**: reloaded from the folder alone; every tensor is bit for bit the one saved.
- **device_map="auto"**: the saved int8 model, loaded with it.
- A cell that begins with *upstream* names a limit of the model class itself: the unquantized model raises the same.

A class that is not in this table goes through a generic rule, with one line in the log: linear and convolution layers
with at least 64 inputs and outputs, the first and the last one kept.
"""


def rows(class_names: Iterable[str], columns: Iterable[str]) -> dict[str, dict[str, str]]:
    """The cells of each class, measured one class after the other; progress goes to stderr."""
    return {name: _row(name, tuple(columns)) for name in class_names}


def _row(class_name: str, columns: tuple[str, ...]) -> dict[str, str]:
    tiny_name = VIDEO_CLASSES[class_name][0]
    missing = missing_class(tiny_name)
    if missing:
        return dict.fromkeys((ENTRY, TEMPORAL, *COLUMNS), missing)
    cells = {ENTRY: "generic rule", TEMPORAL: "none"}
    family = find_family(class_name)
    if family is not None:
        cells[ENTRY] = family.name
        cells[TEMPORAL] = ("data-free" if family.temporal_features else "calibrated") if family.temporal else "none"
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(tiny_name, Path(folder))
        for column, measure in COLUMNS.items():
            cells[column] = NOT_RUN
            if column in columns:
                try:
                    cells[column] = measure(subject)
                except Exception as error:  # a failing cell must not hide the others
                    cells[column] = f"{FAILS}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    print(f"{class_name}: {', '.join(cells.values())}", file=sys.stderr, flush=True)
    return cells


def table(cells: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page, as Markdown."""
    heads = (ENTRY, TEMPORAL, *COLUMNS)
    lines = [
        _INTRODUCTION,
        f"Measured with diffusers {diffusers.__version__} and torch {torch.__version__.split('+')[0]} on a CPU by "
        "`python -m benchmarks.family_matrix`.",
        "",
        f"| class | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(f"| {name} | {' | '.join(row[head].replace('|', '/') for head in heads)} |" for name, row in cells.items()),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the page, and say which cells do not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("docs/families.md"))
    parser.add_argument("--no-compile", action="store_true", help="leave the slow column out")
    parser.add_argument("--classes", nargs="+", choices=VIDEO_CLASSES, default=list(VIDEO_CLASSES), metavar="CLASS")
    options = parser.parse_args(arguments)
    columns = [column for column in COLUMNS if not (options.no_compile and column == COMPILE)]
    cells = rows(options.classes, columns)
    options.output.write_text(table(cells), encoding="utf-8")
    failures = [name for name, row in cells.items() if any(cell.startswith(FAILS) for cell in row.values())]
    print(f"{options.output}: {len(cells)} classes, {len(failures)} with a cell that does not hold {failures or ''}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
