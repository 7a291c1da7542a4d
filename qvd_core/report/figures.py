"""The pictures of a report: each function takes a `Report` and gives a PNG, or None where it has nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qvd_core.report.canvas import (
    CHANGE,
    HEAT,
    THEMES,
    Theme,
    ThemeName,
    heat_map,
    new_figure,
    shortened,
    style,
    to_png,
)
from qvd_core.report.data import Report, TemporalReport
from qvd_core.report.panels import (
    draw_drift,
    draw_memory,
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
SMALLEST_CHANGE = 1e-3  # the colours of changed distances do not magnify less than this


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
    _titled(left, "Output SQNR of every layer", colours)
    _draw_or_say(
        left,
        bool(report.worst(1)),
        lambda axes: draw_sqnr_map(left, axes, report, colours, 26),
        "Quantized without calibration:\nno layer's error was measured.",
        colours,
    )
    _titled(right, f"The {min(WORST_SHOWN, len(report.worst(WORST_SHOWN)))} layers with the largest error", colours)
    _draw_or_say(
        right,
        bool(report.worst(1)),
        lambda axes: draw_worst_layers(axes, report.worst(WORST_SHOWN), colours, 36),
        "",
        colours,
    )
    left, right = lower.subfigures(1, 2, width_ratios=(1.25, 1))
    _titled(left, "Temporal features", colours)
    _draw_or_say(
        left,
        bool(report.temporal),
        lambda axes: draw_td_scores(axes, report.temporal[0], colours),
        "No codebook was fitted to temporal features.",
        colours,
    )
    _titled(right, "Memory of the model", colours)
    _draw_or_say(
        right,
        report.float_bytes > 0,
        lambda axes: draw_memory(axes, report, colours),
        "Not known from scales alone.",
        colours,
    )
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
    colours = THEMES[theme]
    figure = new_figure(HALF_WIDTH, 40 + 118 * len(report.ranges), colours)
    coverage = {layer.name: (layer.coverage_before, layer.coverage) for layer in report.layers}
    for row, ranges in zip(_rows(figure, len(report.ranges), 2), report.ranges, strict=True):
        used = coverage.get(ranges.layer, (None, None))
        bands = (("before", ranges.before, colours.before), ("after", ranges.after, colours.after))
        for axes, share, (when, band, colour) in zip(row, used, bands, strict=True):
            draw_ranges(axes, band, colour, colours)
            rotated = ", then rotated" if ranges.rotated and when == "after" else ""
            levels = "" if share is None else f": {share:.0%} of the levels used"
            axes.set_title(f"{when}{levels}{rotated}", loc="left", color=colours.faint, fontsize=10)
        row[0].set_ylabel(shortened(ranges.layer, 22), color=colours.ink, fontsize=9)
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
    colours = THEMES[theme]
    figure = new_figure(FULL_WIDTH, 400, colours)
    quantizers = [quantizer for quantizer in shown.quantizers if quantizer.distances]
    changes = [
        abs(after - before)
        for quantizer in quantizers
        for before, after in zip(shown.distances, quantizer.distances, strict=True)
    ]
    limit = max([SMALLEST_CHANGE, *changes])
    columns = (len(quantizers) + 2) // 2
    panels = [axes for row in _rows(figure, 2, columns) for axes in row]
    whole = _matrix(shown, shown.distances)
    top = max(max(row) for row in whole)
    distance = panels[0].imshow(whole, cmap=heat_map(HEAT, colours.missing), vmin=0, vmax=top)
    _label_matrix(panels[0], "full precision", shown, colours)
    change = None
    for axes, quantizer in zip(panels[1:], quantizers, strict=False):
        after = _matrix(shown, quantizer.distances)
        axes.imshow(_half(after, lower=True), cmap=heat_map(HEAT, "none"), vmin=0, vmax=top)
        moved = [[b - a for a, b in zip(*rows, strict=True)] for rows in zip(whole, after, strict=True)]
        change = axes.imshow(_half(moved, lower=False), cmap=heat_map(CHANGE, "none"), vmin=-limit, vmax=limit)
        _label_matrix(axes, f"{quantizer.name}{' (used)' if quantizer.deployed else ''}", shown, colours)
    for axes in panels[1 + len(quantizers) :]:
        axes.set_axis_off()
    for image, label in ((distance, "distance"), (change, "its change (above the diagonal)")):
        if image is not None:
            bar = figure.colorbar(image, ax=panels, fraction=0.02, pad=0.01)
            bar.ax.tick_params(colors=colours.faint, labelcolor=colours.ink, labelsize=9)
            bar.outline.set_visible(False)
            bar.set_label(label, color=colours.faint, fontsize=10)
    return to_png(figure)


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
        "that fills the height uses all levels of a scale per tensor.",
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
        wide=True,
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


def _titled(figure: Any, title: str, theme: Theme) -> None:
    figure.suptitle(title, x=0.02, ha="left", color=theme.ink, fontsize=13, fontweight="bold")


def _draw_or_say(figure: Any, there: bool, draw: Callable[[Any], None], otherwise: str, theme: Theme) -> None:
    axes = figure.subplots()
    if there:
        draw(axes)
        return
    axes.set_axis_off()
    axes.text(0.5, 0.5, otherwise, ha="center", va="center", color=theme.faint, fontsize=12)


def _matrix(temporal: TemporalReport, distances: Sequence[float]) -> list[list[float]]:
    """Symmetric [T, T] from its upper triangle, row by row; zeros on the diagonal."""
    count = len(temporal.timesteps)
    matrix = [[0.0] * count for _ in range(count)]
    values = iter(distances)
    for first in range(count):
        for second in range(first + 1, count):
            matrix[first][second] = matrix[second][first] = next(values)
    return matrix


def _half(matrix: Sequence[Sequence[float]], lower: bool) -> list[list[float]]:
    """The part below (with the diagonal) or above the diagonal, NaN elsewhere."""
    nan = float("nan")
    return [
        [value if (column <= row) == lower else nan for column, value in enumerate(values)]
        for row, values in enumerate(matrix)
    ]


def _label_matrix(axes: Any, title: str, temporal: TemporalReport, theme: Theme) -> None:
    style(axes, theme)
    axes.set_title(title, color=theme.ink, fontsize=11)
    ends = (0, len(temporal.timesteps) - 1)
    labels = [f"{temporal.timesteps[index]:.0f}" for index in ends]
    axes.set_xticks(ends, labels)
    axes.set_yticks(ends, labels)
