"""The plot of the kernels: how many times as fast as float32 every row is, one dot per shape."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_results import Entry
from benchmarks.kernel_rows import FULL_PRECISION
from benchmarks.kernel_tables import order_of

# Okabe and Ito's colours, told apart with every common colour blindness.
COLOURS = {"float": "#000000", "qvd": "#0072B2", "torch": "#E69F00", "peer": "#009E73"}
LABELS = {"float": "floating point", "qvd": "QVD", "torch": "PyTorch", "peer": "peer (hollow: not exact)"}
PANEL_WIDTH, LINE_HEIGHT, MARGIN = 5.6, 0.28, 1.3  # inches
DOTS_PER_INCH = 110


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write the plot (opaque, so that it reads in light and dark surroundings) to `path`; nothing without speeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [e for e in entries if e.row != FULL_PRECISION and e.figures.get("speed") is not None]
    kinds = [kind for kind in ("linear", "conv") if any(entry.layer_kind == kind for entry in shown)]
    if not kinds:
        return
    names = sorted({entry.row for entry in shown}, key=lambda row: (order_of(row), row))
    size = (PANEL_WIDTH * len(kinds) + MARGIN, LINE_HEIGHT * len(names) + MARGIN)
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=size, squeeze=False, sharey=True, layout="constrained", facecolor="white"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        _panel(axis, [entry for entry in shown if entry.layer_kind == kind], names)
        axis.set_title({"linear": "linear layers", "conv": "convolutions"}[kind], fontsize=10)
    figure.legend(handles=_legend(shown), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    pyplot.close(figure)


def _panel(axis: Any, entries: Sequence[Entry], names: Sequence[str]) -> None:
    for entry in entries:
        colour = COLOURS[entry.kind]
        face = colour if entry.exact is not False else "white"
        axis.plot(
            entry.figures["speed"],
            names.index(entry.row),
            marker="o",
            markersize=4,
            color=colour,
            markerfacecolor=face,
            linestyle="none",
        )
    for place, name in enumerate(names):
        own = [value for e in entries if e.row == name and (value := e.figures["speed"]) is not None]
        if own:
            axis.plot([statistics.median(own)] * 2, [place - 0.35, place + 0.35], color="#555555", linewidth=1.5)
    axis.axvline(1.0, color="#999999", linewidth=1.0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("times as fast as float32 (bar: median)", fontsize=8)
    axis.grid(color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)


def _legend(entries: Sequence[Entry]) -> list[Any]:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in COLOURS if any(entry.kind == kind for entry in entries)]
    return [Line2D([], [], color=COLOURS[k], marker="o", linestyle="none", label=LABELS[k]) for k in kinds]
