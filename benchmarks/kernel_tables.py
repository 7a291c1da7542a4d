"""The kernel report in Markdown: a summary, speeds by shape and row, every figure, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.kernel_results import Entry
from benchmarks.kernel_rows import FULL_PRECISION, ROWS

Format = Callable[[float], str]


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _decibels(value: float) -> str:
    return f"{value:.1f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("seconds", "ms", lambda value: f"{1e3 * value:.3g}"),
    ("speed", "× fp32", _times),
    ("speed_16", "× 16-bit", _times),
    ("spread", "±", _percent),
    ("sqnr", "SQNR (dB)", _decibels),
    ("sqnr_int8", "to exact int8 (dB)", _decibels),
    ("weight_bytes", "weight (MiB)", _mebibytes),
    ("memory_bytes", "working (MiB)", _mebibytes),
    ("quantize_share", "quantizing", _percent),
    ("quantize_bandwidth", "of copying", _percent),
)
"""Figure, heading, format."""

PREAMBLE = """# Speed of the kernels on {device}

Written by `python -m benchmarks.kernels`; do not edit. {facts}.

One layer at a time, from the model's floating-point input to its output: quantizing the input, multiplying and
dequantizing, with the bias. All rows of a shape run in turn in one process ({clock}); **× fp32** is how many times as
fast as PyTorch's float32 layer a row is (the median over rounds), **× 16-bit** the same to its {half} layer, ± half the
distance between the quartiles. Milliseconds depend on what else the machine does: compare the quotients.

Exact: the integer sums of codes of −128 and ±127 are compared bit by bit with float64 sums, which hold every integer
that occurs, at up to 512 outputs × all channels ("yes", "**NO**"). Rows that take no codes are judged by their output:
"≈" if its error is at most 3 dB above that of exact int8 arithmetic, else "**NO**". SQNR is that of the output to
float64 without any quantization; "to exact int8" to float64 with 8-bit weights per channel and 8-bit inputs per token
(image). "weight" is what the row keeps; "working" what one call needs beyond that and its input, its output included.
"quantizing": share of its time; "of copying": bytes per second that quantizing reads and writes, to those of a copy.
"""


def markdown(machine: dict[str, str], entries: Sequence[Entry], plot: str = "") -> str:
    """The whole report; plot: file name of the picture, relative to it."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "clock", "half"))
    clock, half = machine.get("clock", "?"), machine.get("half", "16-bit")
    parts = [PREAMBLE.format(device=machine.get("device", "?"), facts=facts, clock=clock, half=half)]
    if plot:
        parts.append(f"![How many times as fast as float32 every row is]({plot})\n")
    for kind, heading in (("linear", "Linear layers"), ("conv", "Convolutions")):
        own = [entry for entry in entries if entry.layer_kind == kind]
        if any(entry.finished for entry in own):
            parts += [f"## {heading}\n", summary(own), speeds(own)]
    parts += [missing(entries), "## All figures\n", *(details(name, entries) for name in _shapes(entries))]
    return "\n".join(part for part in parts if part)


def summary(entries: Sequence[Entry]) -> str:
    """One line per row: median and range of its speed over the shapes, and its worst figures."""
    headings = ["", "× fp32, median", "lowest", "highest", "× 16-bit", "exact", "SQNR, lowest (dB)", "weight of fp32"]
    lines = [table_line([*headings, "shapes"]), _rule(len(headings) + 1)]
    weights = {e.shape: e.figures.get("weight_bytes") for e in entries if e.row == FULL_PRECISION}
    for name in _rows(entries):
        own = [entry for entry in entries if entry.row == name and entry.finished]
        speed, half = _values(own, "speed"), _values(own, "speed_16")
        share = [(e.figures["weight_bytes"] or 0) / full for e in own if (full := weights.get(e.shape)) and e.figures]
        cells = [f"{pick(speed):.2f}×" if speed else "-" for pick in (statistics.median, min, max)]
        cells.append(f"{statistics.median(half):.2f}×" if half else "-")
        worst = next((entry for entry in own if entry.exact is False), own[0])
        cells += [exactness(worst), f"{min(_values(own, 'sqnr'), default=0):.1f}"]
        cells += [f"{statistics.median(share):.3f}" if share else "-", str(len(own))]
        lines.append(table_line([name, *cells]))
    return "\n".join(lines) + "\n"


def speeds(entries: Sequence[Entry]) -> str:
    """× fp32: one line per shape, one column per row; the fastest exact one bold."""
    rows = [name for name in _rows(entries) if name != FULL_PRECISION]
    lines = [table_line(["× fp32", *rows]), _rule(len(rows) + 1)]
    known = {entry.key: entry for entry in entries if entry.finished}
    for shape in _shapes(entries):
        found = [known.get((shape, name)) for name in rows]
        right = [value for e in found if e and e.exact is not False and (value := e.figures.get("speed")) is not None]
        best = max(right, default=None)
        lines.append(table_line([shape, *(_speed_cell(entry, best) for entry in found)]))
    return "\n".join(lines) + "\n"


def _speed_cell(entry: Entry | None, best: float | None) -> str:
    value = entry.figures.get("speed") if entry else None
    if entry is None or value is None:
        return "-"
    text = f"{value:.2f}" if entry.exact is not False else f"({value:.2f})"
    return f"**{text}**" if value == best and entry.exact is not False else text


def details(shape: str, entries: Sequence[Entry]) -> str:
    """Every figure of one shape."""
    shown = [entry for entry in entries if entry.shape == shape and entry.finished]
    if not shown:
        return ""
    lines = [f"### {shape}\n", table_line(["", "exact", *(heading for _, heading, _ in COLUMNS), ""])]
    lines.append(_rule(len(COLUMNS) + 3))
    for entry in sorted(shown, key=_place):
        cells = [_cell(entry, figure, shown_as) for figure, _, shown_as in COLUMNS]
        lines.append(table_line([entry.row, exactness(entry), *cells, entry.note]))
    return "\n".join(lines) + "\n"


def missing(entries: Sequence[Entry]) -> str:
    """What could not be measured, and why, once per row and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in sorted((entry for entry in entries if entry.error), key=_place):
        reasons.setdefault((entry.row, entry.error), []).append(entry.shape)
    if not reasons:
        return ""
    total = len(_shapes(entries))
    lines = [
        f"- {row}: {error}" + ("" if len(shapes) == total else f" ({len(shapes)} shapes, such as {shapes[0]})")
        for (row, error), shapes in reasons.items()
    ]
    return "\n".join(["## Not measured\n", *lines]) + "\n"


def exactness(entry: Entry) -> str:
    """The cell of the column "exact"."""
    if entry.exact is None:
        return "-"
    if not entry.exact:
        return "**NO**"
    return "yes" if entry.judged_by == "bits" else "≈"


def table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return table_line(["---"] * columns)


def _cell(entry: Entry, figure: str, shown_as: Format) -> str:
    value = entry.figures.get(figure)
    return "-" if value is None else shown_as(value)


def _values(entries: Iterable[Entry], figure: str) -> list[float]:
    return [value for entry in entries if (value := entry.figures.get(figure)) is not None]


def _place(entry: Entry) -> tuple[int, str]:
    return order_of(entry.row), entry.row


def order_of(row: str) -> int:
    """Its place in the tables: QVD's rows first, peers last."""
    return next((number for number, known in enumerate(ROWS) if known.name == row), len(ROWS))


def _rows(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(e.row for e in sorted((e for e in entries if e.finished), key=_place)))


def _shapes(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.shape for entry in entries))
