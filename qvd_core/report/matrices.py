"""Distance matrices of temporal features, before and after each quantizer, as one picture on one pair of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qvd_core.report.canvas import CHANGE, HEAT, Theme, colour_bar, heat_map
from qvd_core.report.data import TemporalReport

SMALLEST_CHANGE = 1e-3  # the colours of changed distances do not magnify less than this
COLUMNS = 3
NAN = math.nan

Matrix = list[list[float]]


def draw_distances(figure: Any, axes: Any, temporal: TemporalReport, theme: Theme) -> None:
    """Full precision first; of each quantizer the distances below the diagonal, their change above it."""
    count = len(temporal.timesteps)
    quantizers = [quantizer for quantizer in temporal.quantizers if quantizer.distances]
    before = as_matrix(temporal.distances, count)
    changes = [
        [[after - was for was, after in zip(*rows, strict=True)] for rows in zip(before, matrix, strict=True)]
        for matrix in (as_matrix(quantizer.distances, count) for quantizer in quantizers)
    ]
    panels = [("full precision", before, [[NAN] * count] * count)]
    for quantizer, change in zip(quantizers, changes, strict=True):
        name = f"{quantizer.name}{' (used)' if quantizer.deployed else ''}"
        matrix = as_matrix(quantizer.distances, count)
        panels.append((name, _half(matrix, lower=True), _half(change, lower=False)))
    top = max(max(row) for row in before) or 1.0
    limit = max([SMALLEST_CHANGE, *(abs(value) for change in changes for row in change for value in row)])
    columns, rows = min(COLUMNS, len(panels)), math.ceil(len(panels) / COLUMNS)
    gap = max(1, round(0.32 * count))
    distances, moved = (_canvas(rows, columns, count, gap) for _ in range(2))
    for index, (name, lower, upper) in enumerate(panels):
        row, column = divmod(index, columns)
        top_edge, left = gap + row * (count + gap), column * (count + gap)
        _paste(distances, lower, top_edge, left)
        _paste(moved, upper, top_edge, left)
        axes.text(left - 0.5, top_edge - 0.9, name, color=theme.ink, fontsize=11, va="bottom")
        for step, place in ((0, 0), (count - 1, count - 1)):
            label = f"{temporal.timesteps[step]:.0f}"
            axes.text(left - 0.8, top_edge + place, label, color=theme.faint, fontsize=9, ha="right", va="center")
    image = axes.imshow(distances, cmap=heat_map(HEAT, "none"), vmin=0, vmax=top, interpolation="nearest")
    colour_bar(figure, axes, image, "distance", theme)
    if quantizers:
        image = axes.imshow(moved, cmap=heat_map(CHANGE, "none"), vmin=-limit, vmax=limit, interpolation="nearest")
        colour_bar(figure, axes, image, "its change (above the diagonal)", theme)
    axes.set_xlim(-0.14 * count - 0.5, len(distances[0]) - gap - 0.5)
    axes.set_anchor("W")
    axes.set_axis_off()


def as_matrix(distances: Sequence[float], count: int) -> Matrix:
    """Symmetric [T, T] from its upper triangle, row by row; zeros on the diagonal."""
    matrix = [[0.0] * count for _ in range(count)]
    values = iter(distances)
    for first in range(count):
        for second in range(first + 1, count):
            matrix[first][second] = matrix[second][first] = next(values)
    return matrix


def _half(matrix: Matrix, lower: bool) -> Matrix:
    """The part below (with the diagonal) or above the diagonal, NaN elsewhere."""
    return [
        [value if (column <= row) == lower else NAN for column, value in enumerate(values)]
        for row, values in enumerate(matrix)
    ]


def _canvas(rows: int, columns: int, count: int, gap: int) -> Matrix:
    return [[NAN] * (columns * (count + gap)) for _ in range(rows * (count + gap))]


def _paste(canvas: Matrix, matrix: Matrix, top: int, left: int) -> None:
    for row, values in enumerate(matrix):
        canvas[top + row][left : left + len(values)] = values
