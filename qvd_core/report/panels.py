"""What a report's pictures are made of: each function draws one thing onto matplotlib axes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from qvd_core.report.canvas import HEAT, Theme, colour_bar, heat_map, label_axes, legend, shortened, style
from qvd_core.report.data import ChannelRanges, LayerReport, RangeDrift, Report, TemporalReport
from qvd_core.report.places import in_depth_order

MOST_NUMBERS = 130  # cells of a heat map that still have room for their numbers
MOST_NUMBERED_COLUMNS = 12
MOST_TICKS = 24
RANGES_PITCH = 3.7  # height of a layer's row of ranges, each of which reaches from -1 to 1
DASHES: Sequence[Any] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)))


def sqnr_grid(report: Report) -> tuple[list[str], list[str], list[list[float]]]:
    """Blocks, parts, and the smallest output SQNR (dB) of the layers that are that part of that block, NaN for none."""
    cells: dict[tuple[str, str], float] = defaultdict(lambda: math.inf)
    measured = [layer for layer in report.layers if layer.sqnr_db is not None]
    for layer in measured:
        place = layer.part, layer.block
        cells[place] = min(cells[place], layer.sqnr_db or 0.0)
    blocks = in_depth_order(layer.block for layer in measured)
    parts = list(dict.fromkeys(layer.part for layer in measured))  # in the order of the model, where that is known
    return blocks, parts, [[cells.get((part, block), math.nan) for block in blocks] for part in parts]


def draw_sqnr_map(figure: Any, axes: Any, report: Report, theme: Theme, label_length: int = 30) -> None:
    """Heat map of the layers' output SQNR over depth (columns) and part of the block (rows)."""
    blocks, parts, grid = sqnr_grid(report)
    image = axes.imshow(grid, cmap=heat_map(HEAT, theme.missing), aspect="auto", interpolation="nearest")
    style(axes, theme)
    axes.set_yticks(range(len(parts)), [shortened(part, label_length) for part in parts])
    _label_blocks(axes, blocks, theme)
    colour_bar(figure, axes, image, "output SQNR (dB)", theme)
    if len(blocks) * len(parts) <= MOST_NUMBERS and len(blocks) <= MOST_NUMBERED_COLUMNS:
        low, high = image.get_clim()
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    dark_cell = value < (low + high) / 2
                    colour = "#ffffff" if dark_cell else "#111111"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)


def _label_blocks(axes: Any, blocks: Sequence[str], theme: Theme) -> None:
    """Block numbers below the columns and, once per run of them, the name they count."""
    stems = [block.rpartition(".")[0] or block for block in blocks]
    numbers = [block.rpartition(".")[2] if "." in block else "" for block in blocks]
    every = max(1, math.ceil(len(blocks) / MOST_TICKS))
    ticks = [index for index in range(len(blocks)) if index % every == 0]
    axes.set_xticks(ticks, [numbers[index] for index in ticks])
    start = 0
    for index in range(1, len(blocks) + 1):
        if index < len(blocks) and stems[index] == stems[start]:
            continue
        if start:
            axes.axvline(start - 0.5, color=theme.paper, linewidth=2)
        room = max(8, round(60 * (index - start) / len(blocks)))
        name = shortened(stems[start] or "other", room)
        axes.annotate(
            name,
            ((start + index - 1) / 2, 0),
            (0, -20),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            color=theme.faint,
            fontsize=10,
        )
        start = index


def draw_worst_layers(axes: Any, layers: Sequence[LayerReport], theme: Theme, label_length: int = 34) -> None:
    """For each layer, the share of levels its mean channel uses, before and after SCRI, and its SQNR in words."""
    rows = range(len(layers))
    for row, layer in zip(rows, layers, strict=True):
        before, after = layer.coverage_before or 0.0, layer.coverage or 0.0
        axes.plot([before, after], [row, row], color=theme.line, linewidth=3, zorder=1, solid_capstyle="round")
        gained = "" if layer.sqnr_db_before is None else f"{layer.sqnr_db_before:.1f} → "
        axes.text(1.03, row, f"{gained}{layer.sqnr_db or 0.0:.1f} dB", va="center", color=theme.ink, fontsize=9.5)
    untouched = [layer.coverage_before or 0.0 for layer in layers]
    axes.scatter(
        untouched, rows, 34, marker="o", facecolor=theme.paper, edgecolor=theme.before, linewidth=1.6, zorder=2
    )
    axes.scatter([layer.coverage or 0.0 for layer in layers], rows, 40, marker="D", color=theme.after, zorder=3)
    style(axes, theme, grid="x")
    axes.set_yticks(rows, [shortened(layer.name, label_length) for layer in layers])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    label_axes(axes, theme, "levels the mean channel uses: ○ before, ◆ after; output SQNR on the right")


def draw_td_scores(axes: Any, temporal: TemporalReport, theme: Theme) -> None:
    """A bar of TDScore per quantizer beside the line of full precision; what a bar cannot show, in words."""
    quantizers = temporal.quantizers
    rows = range(len(quantizers))
    colours = [theme.after if quantizer.deployed else theme.line for quantizer in quantizers]
    scores = [quantizer.td_score for quantizer in quantizers]
    bars = axes.barh(rows, scores, color=colours, height=0.62, edgecolor=theme.faint, linewidth=0.5)
    for bar, quantizer in zip(bars, quantizers, strict=True):
        if quantizer.deployed:
            bar.set_hatch("///")
    axes.axvline(temporal.td_score, color=theme.before, linewidth=1.6, linestyle="--", label="full precision")
    style(axes, theme, grid="x")
    axes.set_yticks(rows, [f"{item.name}{' (used)' if item.deployed else ''}" for item in quantizers])
    axes.set_ylim(len(quantizers) - 0.4, -0.6)
    right = max([temporal.td_score, *scores]) * 1.04
    axes.set_xlim(0, right)
    for row, item in zip(rows, quantizers, strict=True):
        words = f"TDR {item.tdr:.4f}  TDC {item.tdc:.4f}  COL {item.col:.1%}"
        axes.text(right * 1.02, row, words, va="center", color=theme.ink, fontsize=9)
    label_axes(axes, theme, f"TDScore at {temporal.bits} bits; dashed: full precision, {temporal.td_score:.3f}")


def draw_memory(axes: Any, report: Report, theme: Theme) -> None:
    """Two bars: the model's tensors before and after."""
    sizes = (report.float_bytes, report.int8_bytes)
    axes.barh((0, 1), sizes, color=(theme.before, theme.after), height=0.6)
    style(axes, theme)
    axes.set_yticks((0, 1), ("before", "after"))
    axes.set_ylim(2.4, -1.4)
    axes.set_xlim(0, max(*sizes, 1) * 1.35)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for row, size in enumerate(sizes):
        share = f" ({size / sizes[0]:.0%})" if row and sizes[0] else ""
        axes.text(
            size + max(*sizes, 1) * 0.02, row, f"{in_bytes(size)}{share}", va="center", color=theme.ink, fontsize=11
        )


def draw_memory_by_part(axes: Any, report: Report, theme: Theme, count: int, label_length: int = 30) -> None:
    """Bars of the quantized bytes of the largest parts, summed over all blocks."""
    sizes: dict[str, int] = defaultdict(int)
    for layer in report.layers:
        sizes[layer.part] += layer.bytes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:count]
    top = max([1, *(size for _, size in largest)])
    axes.barh(range(len(largest)), [size for _, size in largest], color=theme.after, height=0.62)
    style(axes, theme)
    axes.set_yticks(range(len(largest)), [shortened(part, label_length) for part, _ in largest])
    axes.set_ylim(max(count, len(largest)) - 0.4, -0.6)
    axes.set_xlim(0, top * 1.25)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    for row, (_, size) in enumerate(largest):
        axes.text(top * 0.015 + size, row, in_bytes(size), va="center", color=theme.ink, fontsize=10)


def draw_kept(axes: Any, report: Report, theme: Theme, lines: int = 11) -> None:
    """What stays in full precision and why, as text."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in report.kept.items():
        reasons[why].append(name)
    text: list[tuple[str, str]] = []
    for why, names in reasons.items():
        text.append((shortened(f"{len(names)}: {why}", 72), theme.ink))
        text += [(f"    {shortened(name, 60)}", theme.faint) for name in names[:4]]
        if len(names) > 4:
            text.append((f"    and {len(names) - 4} more", theme.faint))
    axes.set_axis_off()
    for row, (line, colour) in enumerate(text[:lines]):
        axes.text(0.0, 0.97 - row / lines, line, color=colour, fontsize=11, va="top", transform=axes.transAxes)


def draw_drift(axes: Any, drifts: Sequence[RangeDrift], theme: Theme) -> None:
    """One line per layer: its range over the timesteps, which run from noise to video, left to right."""
    lines = [theme.after, theme.before, theme.ink, theme.faint]
    for index, drift in enumerate(drifts):
        axes.plot(
            drift.timesteps,
            drift.reach,
            color=lines[index % len(lines)],
            linestyle=DASHES[index % len(DASHES)],
            marker="o",
            markersize=3,
            linewidth=1.6,
            label=shortened(drift.layer, 42),
        )
    style(axes, theme, grid="y")
    axes.invert_xaxis()
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    label_axes(axes, theme, "timestep (noise on the left, video on the right)", "range, share of the largest")
    legend(axes, theme, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)


def draw_ranges(
    axes: Any, shown: Sequence[ChannelRanges], used: Sequence[Sequence[float | None]], theme: Theme
) -> None:
    """Bands from minimum to maximum of each channel, the widest on the left: a row per layer, before and after.

    used: of each layer the coverage before and after, for the words.
    """
    axes.set_axis_off()
    for row, (ranges, coverage) in enumerate(zip(shown, used, strict=True)):
        middle = -RANGES_PITCH * row
        axes.text(0, middle + 1.65, ranges.layer, color=theme.ink, fontsize=10.5, va="bottom")
        bands = (("before", ranges.before, theme.before), ("after", ranges.after, theme.after))
        for left, (when, band, colour), share in zip((0.0, 1.06), bands, coverage, strict=True):
            places = [left + index / max(1, len(band) - 1) for index in range(len(band))]
            low, high = [middle + low for low, _ in band], [middle + high for _, high in band]
            axes.fill_between(places, low, high, color=colour, linewidth=0, step="mid")
            for edge in (-1, 0, 1):
                axes.plot(
                    (left, left + 1), (middle + edge,) * 2, color=theme.line if edge else theme.faint, linewidth=0.7
                )
            rotated = ", then rotated" if ranges.rotated and when == "after" else ""
            levels = "" if share is None else f": {share:.0%} of the levels used"
            axes.text(left, middle + 1.12, f"{when}{levels}{rotated}", color=theme.faint, fontsize=10, va="bottom")
    axes.set_xlim(0, 2.06)
    axes.set_ylim(-RANGES_PITCH * (len(shown) - 1) - 1.1, 2.3)


def in_bytes(count: int) -> str:
    """Bytes in words: decimal kilobytes, megabytes or gigabytes."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
