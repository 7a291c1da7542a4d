"""Markdown of measured rows: one table per model and bits, and the ablations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.results import Entry
from benchmarks.rows import ABLATIONS, BITS, FULL_PRECISION, GRANULARITIES, ROWS
from benchmarks.subjects import MODELS
from examples.moving_digits.evaluate import table_line

Format = Callable[[float], str]


def _decimals(digits: int) -> Format:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("psnr_mean", "PSNR mean (dB)", _decimals(2)),
    ("psnr_min", "PSNR min (dB)", _decimals(2)),
    ("ssim", "SSIM", _decimals(4)),
    ("cosine", "cosine", _decimals(5)),
    ("frechet_to_full_precision", "Fréchet to FP", _decimals(2)),
    ("frechet_to_real", "Fréchet to real", _decimals(2)),
    ("agreement", "agreement", _percent),
    ("digit", "digit", _percent),
    ("direction", "direction", _percent),
    ("tdr", "TDR", _decimals(4)),
    ("tdc", "TDC", _decimals(4)),
    ("col", "COL", _decimals(4)),
    ("kilobytes", "kB", _decimals(0)),
)
"""Figure, heading, format."""

_INFINITE = ("psnr_mean", "psnr_min")  # None there means that nothing differs; elsewhere, that nothing was measured
_BEST = {"psnr_mean": max, "frechet_to_full_precision": min}
_ORDER = {row.name: number for number, row in enumerate(ROWS)}

PREAMBLE = """# Quality of quantized video models

Written by `python -m benchmarks.quality`; do not edit. Every row samples the same prompts from the same noise as full
precision (FP). PSNR and SSIM compare clip by clip with FP, over {prompts} prompts; all else is over {clips} clips. The
cosine is that of the clips less the mean FP clip. A Fréchet distance compares sets of clips by the features of a small
video classifier; "agreement" is the share of clips it reads like their FP twin, "digit" and "direction" the shares that
show what the prompt asks for. TDR and TDC (goal 1) are measured on what the temporal projections put out, COL (goal 0)
is that of the calibrated temporal codes. kB is the whole denoiser as stored; QVD keeps 5 to 7-bit codes in bytes.

**Bold**: the best at equal bits and equal granularity. In (parentheses): rows that do not compete, because they leave
layers in floating point, use more bits, or finer weight scales; the notes below each table say which.
"""


def markdown(entries: Sequence[Entry], plot: str = "") -> str:
    """The whole report; plot: file name of the picture, relative to it."""
    parts = [PREAMBLE.format(prompts=_counts(entries, "prompts"), clips=_counts(entries, "clips"))]
    if plot:
        parts.append(f"![PSNR of every method, one panel per model and bits]({plot})\n")
    for model in [name for name in MODELS if any(entry.model == name for entry in entries)]:
        own = [entry for entry in entries if entry.model == model]
        parts += [f"## {model}\n", noise_floor(own)]
        parts += [table(model, bits, own) for bits in BITS if any(entry.bits == bits for entry in own)]
        parts += [ablation(chain, names, own) for chain, names in ABLATIONS.items()]
    parts.append(versions(entries))
    return "\n".join(part for part in parts if part)


def noise_floor(entries: Iterable[Entry]) -> str:
    """How far two full-precision sets from different noise are apart: a smaller Fréchet distance is noise."""
    other = next((entry for entry in entries if entry.bits == FULL_PRECISION and "other noise" in entry.name), None)
    if other is None or other.error:
        return ""
    distance, real = other.figures["frechet_to_full_precision"], other.figures["frechet_to_real"]
    assert distance is not None and real is not None
    return (
        f"Noise floor: FP from other noise is {distance:.2f} (Fréchet) from FP and {real:.2f} from real clips; "
        f"it agrees with FP in {_percent(other.figures['agreement'] or 0.0)} of the clips.\n"
    )


def table(model: str, bits: str, entries: Sequence[Entry]) -> str:
    """One table, grouped by granularity, its failures and notes below it."""
    lines = [f"### {model}, {bits}\n", table_line(["activations", "method", *(heading for _, heading, _ in COLUMNS)])]
    lines.append(table_line(["---"] * (len(COLUMNS) + 2)))
    shown = [entry for entry in entries if entry.bits == bits]
    for granularity in GRANULARITIES:
        group = sorted((e for e in shown if e.granularity == granularity and e.finished), key=_place)
        best = {figure: _best(group, figure) for figure in _BEST}
        lines += [_line(entry, best) for entry in group]
    failures = [f"- {entry.name}: {entry.error}" for entry in sorted(shown, key=_place) if entry.error]
    notes = [f"- {entry.name}: {entry.note}" for entry in sorted(shown, key=_place) if entry.note and entry.finished]
    if failures:
        lines += ["", "Not measured:", "", *failures]
    if notes:
        lines += ["", "Notes:", "", *notes]
    return "\n".join(lines) + "\n"


def _place(entry: Entry) -> int:
    return _ORDER.get(entry.name, len(_ORDER))


def _best(group: Sequence[Entry], figure: str) -> float | None:
    values = [value for entry in group if entry.comparable and (value := entry.figures.get(figure)) is not None]
    return _BEST[figure](values) if len(values) > 1 else None


def _line(entry: Entry, best: dict[str, float | None]) -> str:
    cells = [entry.granularity, entry.name if entry.comparable else f"({entry.name})"]
    for figure, _, shown in COLUMNS:
        value = entry.figures.get(figure)
        if value is None:
            cells.append("∞" if figure in _INFINITE and figure in entry.figures else "-")
        else:
            text = shown(value)
            cells.append(f"**{text}**" if entry.comparable and value == best.get(figure) else text)
    return table_line(cells)


def ablation(chain: str, names: Sequence[str], entries: Sequence[Entry]) -> str:
    """PSNR of each step of a chain, and its gain over the last measured step before it; one column per bits."""
    found = {(entry.bits, entry.name): entry.figures.get("psnr_mean") for entry in entries if entry.finished}
    columns = [bits for bits in BITS if sum((bits, name) in found for name in names) > 1]
    if not columns:
        return ""
    lines = [f"#### Ablation, {chain}: PSNR in dB (gain over the step before)\n", table_line(["step", *columns])]
    lines.append(table_line(["---"] * (len(columns) + 1)))
    before: dict[str, float] = {}
    for name in names:
        cells = [name]
        for bits in columns:
            value = found.get((bits, name))
            gain = "" if value is None or bits not in before else f" ({value - before[bits]:+.2f})"
            cells.append("-" if value is None else f"{value:.2f}{gain}")
            if value is not None:
                before[bits] = value
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


def versions(entries: Iterable[Entry]) -> str:
    """What computed the rows, and how long a row took."""
    entries = list(entries)
    pairs = sorted({f"{name} {version}" for entry in entries for name, version in entry.versions.items()})
    times = {
        model: statistics.median(seconds)
        for model in MODELS
        if (seconds := [e.seconds for e in entries if e.model == model and e.finished and e.kind != "reference"])
    }
    took = ", ".join(f"{model} {seconds:.0f} s" for model, seconds in times.items())
    return f"Computed with {', '.join(pairs)}. Median time of a row: {took}.\n"


def _counts(entries: Sequence[Entry], name: str) -> str:
    return " or ".join(str(count) for count in sorted({getattr(entry, name) for entry in entries})) or "no"
