"""The pictures of a report: each function takes a `Report` and gives a PNG, or None where it has nothing to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qvd_core.report.canvas import THEMES, Theme, ThemeName, new_figure, shortened, to_png
from qvd_core.report.data import Report
from qvd_core.report.matrices import COLUMNS, draw_distances
from qvd_core.report.panels import (
    draw_drift,
    draw_kept,
    draw_memory,
    draw_memory_by_part,
    draw_ranges,
    draw_sqnr_map,
    draw_td_scores,
    draw_worst_layers,
    sqnr_grid,
)
from qvd_core.report.words import headline

WORST_SHOWN = 10
HALF_WIDTH, FULL_WIDTH = 570, 1170
SUMMARY_SIZE = (1200, 900)


@dataclass(frozen=True)
class Figure:
    """One picture of the page.

    name: of its file. title, caption: what it shows and how to read it. draw: PNG bytes, or None for nothing to show.
    wide: it needs the whole width of the page.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Report, ThemeName], bytes | None]
    wide: bool = False


def summary_picture(report: Report, theme: ThemeName = "light") -> bytes:
    """One overview, 1200 x 900 px: header figures, SQNR map, worst layers, TDScore and memory, as PNG."""
    colours = THEMES[theme]
    figure = new_figure(*SUMMARY_SIZE, colours)
    header, upper, lower = figure.subfigures(3, 1, height_ratios=(1.2, 4.5, 4.5), hspace=0.02)
    for part in (header, upper, lower):
        part.set_facecolor(colours.paper)
    _draw_header(header, report, colours)
    left, right = upper.subfigures(1, 2, width_ratios=(1, 1.1))
    worst = report.worst(WORST_SHOWN)
    if worst:
        draw_sqnr_map(left, _panel(left, "Output SQNR of every layer", colours), report, colours, 26)
        draw_worst_layers(_panel(right, f"The {len(worst)} layers with the largest error", colours), worst, colours, 36)
    else:  # without data
        draw_memory_by_part(_panel(left, "Where the quantized bytes are", colours), report, colours, WORST_SHOWN)
        draw_kept(_panel(right, "Kept in full precision", colours), report, colours)
    left, right = lower.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = _panel(left, "Temporal features", colours)
    if report.temporal:
        draw_td_scores(axes, report.temporal[0], colours)
    else:
        _say(axes, "Without calibration, nothing was measured.", colours)
    axes = _panel(right, "Memory of the model", colours)
    if report.float_bytes:
        draw_memory(axes, report, colours)
    else:
        _say(axes, "Not known from scales alone.", colours)
    return to_png(figure, zoom=1.0)


def sqnr_map(report: Report, theme: ThemeName = "light") -> bytes | None:
    """Heat map of every layer's output SQNR over depth and part."""
    if not report.worst(1):
        return None
    blocks, parts, _ = sqnr_grid(report)
    wide = len(blocks) > 16
    figure = new_figure(FULL_WIDTH if wide else HALF_WIDTH, max(230, 90 + 24 * len(parts)), THEMES[theme])
    draw_sqnr_map(figure, figure.subplots(), report, THEMES[theme])
    return to_png(figure)


def worst_layers(report: Report, theme: ThemeName = "light") -> bytes | None:
    """Coverage and SQNR before and after SCRI of the ten layers with the largest error."""
    layers = report.worst(WORST_SHOWN)
    if not layers:
        return None
    figure = new_figure(HALF_WIDTH, 90 + 26 * len(layers), THEMES[theme])
    draw_worst_layers(figure.subplots(), layers, THEMES[theme])
    return to_png(figure)


def channel_ranges(report: Report, theme: ThemeName = "light") -> bytes | None:
    """Bands of every channel's range before and after SCRI, of the layers with the largest error."""
    if not report.ranges:
        return None
    figure = new_figure(HALF_WIDTH, 20 + 126 * len(report.ranges), THEMES[theme])
    coverage = {layer.name: (layer.coverage_before, layer.coverage) for layer in report.layers}
    used = [coverage.get(ranges.layer, (None, None)) for ranges in report.ranges]
    draw_ranges(figure.subplots(), report.ranges, used, THEMES[theme])
    return to_png(figure)


def temporal_scores(report: Report, theme: ThemeName = "light") -> bytes | None:
    """TDScore bars of every quantizer that was tried on the temporal features."""
    shown = [temporal for temporal in report.temporal if temporal.quantizers]
    if not shown:
        return None
    colours = THEMES[theme]
    figure = new_figure(HALF_WIDTH, sum(80 + 26 * len(temporal.quantizers) for temporal in shown), colours)
    for (axes,), temporal in zip(_rows(figure, len(shown), 1), shown, strict=True):
        draw_td_scores(axes, temporal, colours)
    return to_png(figure)


def temporal_distances(report: Report, theme: ThemeName = "light") -> bytes | None:
    """Distance matrices of the temporal features over the timesteps, in full precision and after each quantizer."""
    shown = next((temporal for temporal in report.temporal if temporal.distances), None)
    if shown is None:
        return None
    rows = math.ceil((1 + len(shown.quantizers)) / COLUMNS)
    figure = new_figure(HALF_WIDTH, 30 + 155 * rows, THEMES[theme])
    draw_distances(figure, figure.subplots(), shown, THEMES[theme])
    return to_png(figure, faithful=True)


def range_drift(report: Report, theme: ThemeName = "light") -> bytes | None:
    """Lines of how the ranges of layer inputs move over the timesteps, where they move most."""
    if not report.drift:
        return None
    figure = new_figure(HALF_WIDTH, 300 + 18 * len(report.drift), THEMES[theme])
    draw_drift(figure.subplots(), report.drift, THEMES[theme])
    return to_png(figure)


FIGURES: tuple[Figure, ...] = (
    Figure(
        "sqnr",
        "Every layer: signal to quantization noise",
        "Output SQNR in dB over depth (columns) and part of the block (rows); dark is the largest error.",
        sqnr_map,
    ),
    Figure(
        "worst-layers",
        "The layers with the largest error",
        "How many of the quantizer's levels the mean channel uses before and after SCRI, and the SQNR it brings.",
        worst_layers,
    ),
    Figure(
        "channel-ranges",
        "Channel ranges before and after SCRI",
        "Each channel's range as a share of the largest value of its tensor, the widest channel on the left. A channel "
        "that fills the height uses all levels of a scale per tensor. Levels used are those of the deployed scales.",
        channel_ranges,
    ),
    Figure(
        "drift",
        "How ranges move while sampling",
        "The range of a layer's input at each timestep, for the layers where it moves most.",
        range_drift,
    ),
    Figure(
        "temporal-scores",
        "Temporal features: can the timesteps still be told apart?",
        "TDScore of the features after each quantizer, each fitted to them. TDR, TDC: goal 1. COL: goal 0.",
        temporal_scores,
    ),
    Figure(
        "temporal-distances",
        "Temporal features: distances between timesteps",
        "Below the diagonal the distances between the features of two timesteps after quantization; above it, what "
        "quantization changed. First: full precision.",
        temporal_distances,
    ),
)


def _rows(figure: Any, rows: int, columns: int) -> list[list[Any]]:
    return figure.subplots(rows, columns, squeeze=False).tolist()


def _draw_header(figure: Any, report: Report, theme: Theme) -> None:
    title, subtitle, figures = headline(report)
    figure.text(0.012, 0.80, shortened(title, 60), color=theme.ink, fontsize=20, fontweight="bold", va="center")
    figure.text(0.012, 0.54, shortened(subtitle, 150), color=theme.faint, fontsize=12, va="center")
    for index, (what, value) in enumerate(figures[:6]):
        left = 0.012 + index * 0.165
        figure.text(left, 0.26, value, color=theme.after, fontsize=16, fontweight="bold", va="center")
        figure.text(left, 0.06, what, color=theme.faint, fontsize=11, va="center")


def _panel(figure: Any, title: str, theme: Theme) -> Any:
    figure.suptitle(title, x=0.02, ha="left", color=theme.ink, fontsize=13, fontweight="bold")
    return figure.subplots()


def _say(axes: Any, text: str, theme: Theme) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=theme.faint, fontsize=12)
