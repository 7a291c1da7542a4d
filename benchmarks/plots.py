"""The plot: PSNR of every method, one panel per model and bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Entry
from benchmarks.rows import BITS, GRANULARITIES, ROWS
from benchmarks.subjects import MODELS

# Okabe and Ito's colours, told apart with every common colour blindness; the marker says the granularity.
COLOURS = {"baseline": "#E69F00", "qvd": "#0072B2", "peer": "#009E73"}
MARKERS = dict(zip(GRANULARITIES, ("o", "s", "^", "D"), strict=True))
PANEL_WIDTH, LINE_HEIGHT, MARGIN = 5.2, 0.2, 1.0  # inches
DOTS_PER_INCH = 110


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write the plot (opaque, so that it reads in light and dark surroundings) to `path`; nothing without rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [entry for entry in entries if entry.bits in BITS and entry.figures.get("psnr_mean") is not None]
    models = [model for model in MODELS if any(entry.model == model for entry in shown)]
    columns = [bits for bits in BITS if any(entry.bits == bits for entry in shown)]
    if not shown:
        return
    names = {bits: _names(shown, bits) for bits in columns}
    height = LINE_HEIGHT * max(map(len, names.values())) + MARGIN
    size = (PANEL_WIDTH * len(columns), height * len(models) + MARGIN)
    figure, axes = pyplot.subplots(
        len(models), len(columns), figsize=size, squeeze=False, layout="constrained", facecolor="white"
    )
    for row, model in enumerate(models):
        for column, bits in enumerate(columns):
            panel = [entry for entry in shown if (entry.model, entry.bits) == (model, bits)]
            _panel(axes[row][column], panel, names[bits], f"{model}, {bits}")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=len(COLOURS) + len(MARKERS), frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def _names(entries: Sequence[Entry], bits: str) -> list[str]:
    """The rows of a column of panels, in the order of the table."""
    present = {entry.name for entry in entries if entry.bits == bits}
    return [row.name for row in ROWS if row.name in present]


def _panel(axis: Any, entries: Sequence[Entry], names: Sequence[str], title: str) -> None:
    for entry in entries:
        colour = COLOURS[entry.kind]
        axis.plot(
            entry.figures["psnr_mean"],
            names.index(entry.name),
            marker=MARKERS[entry.granularity],
            color=colour,
            markerfacecolor=colour if entry.comparable else "white",
            linestyle="none",
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("PSNR to full precision (dB)", fontsize=8)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    kinds = {"baseline": "baseline", "qvd": "QVD", "peer": "peer (hollow: does not compete)"}
    colours = [Line2D([], [], color=COLOURS[kind], marker="o", linestyle="none", label=kinds[kind]) for kind in kinds]
    shapes = [
        Line2D([], [], color="#555555", marker=marker, linestyle="none", label=granularity)
        for granularity, marker in MARKERS.items()
    ]
    return [*colours, *shapes]
