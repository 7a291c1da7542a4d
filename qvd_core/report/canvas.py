"""Figures as PNG: two themes, one look for all axes, and matplotlib, which is imported only when something is drawn.

Lengths are in CSS pixels: a font size of 12 is as large as 12 px text on the page that shows the figure.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from qvd_core.errors import QVDError

ThemeName = Literal["light", "dark"]

PIXELS_PER_INCH = 72  # one CSS pixel is one point
COLOURS = 256  # of a PNG's palette
HEAT = "cividis"  # ordered by lightness alone, made for colour-blind readers
CHANGE = "PuOr"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure. before, after: the two of a comparison (Okabe and Ito's, told apart by anyone)."""

    paper: str
    ink: str
    faint: str
    line: str
    before: str
    after: str
    missing: str


THEMES: dict[ThemeName, Theme] = {
    "light": Theme("#ffffff", "#1b1f24", "#57606a", "#d8dce1", before="#d55e00", after="#0072b2", missing="#eef0f2"),
    "dark": Theme("#181b20", "#e8eaed", "#a3abb5", "#3a4048", before="#f0a04b", after="#56b4e9", missing="#24282e"),
}


def new_figure(width: float, height: float, theme: Theme) -> Any:
    """An empty matplotlib figure of that many CSS pixels. Raises QVDError when matplotlib is missing.

    Without pyplot: no global state, so that figures can be drawn in any thread of a program that uses pyplot itself.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QVDError(
            f"pictures of a report need matplotlib ({error}): pip install matplotlib, or read its JSON."
        ) from None
    size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
    return Figure(figsize=size, dpi=PIXELS_PER_INCH, facecolor=theme.paper, layout="constrained")


def to_png(figure: Any, zoom: float = 2.0, faithful: bool = False) -> bytes:
    """The figure as PNG bytes, `zoom` pixels to a CSS pixel, in a palette of its colours.

    faithful: also to colours that are rare in it; this takes longer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(PIXELS_PER_INCH * zoom)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    picture = Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")
    method = Image.Quantize.MEDIANCUT if faithful else Image.Quantize.FASTOCTREE
    reduced = picture.quantize(COLOURS, method, dither=Image.Dither.NONE)
    _restore_paper(reduced, picture)
    buffer = io.BytesIO()
    reduced.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _restore_paper(reduced: Any, picture: Any) -> None:
    """Give the colour of the corner, which the palette only comes near, its exact value: the page goes on in it."""
    palette, place = reduced.getpalette(), 3 * reduced.getpixel((0, 0))
    palette[place : place + 3] = picture.getpixel((0, 0))
    reduced.putpalette(palette)


def style(axes: Any, theme: Theme, title: str = "", grid: Literal["x", "y", ""] = "") -> None:
    """Give axes the theme's colours, a title on the left and, at most, grid lines across one of their directions."""
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=10, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)
    if title:
        axes.set_title(title, loc="left", color=theme.ink, fontsize=12, fontweight="bold")
    if grid:
        axes.grid(axis=grid, color=theme.line, linewidth=0.6)
        axes.set_axisbelow(True)


def legend(axes: Any, theme: Theme, **place: Any) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=10, **place)


def label_axes(axes: Any, theme: Theme, x: str = "", y: str = "") -> None:
    axes.set_xlabel(x, color=theme.faint, fontsize=10)
    axes.set_ylabel(y, color=theme.faint, fontsize=10)


def colour_bar(figure: Any, axes: Any, image: Any, text: str, theme: Theme) -> None:
    """The scale of an image's colours, on its right."""
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
    bar.ax.tick_params(colors=theme.faint, labelcolor=theme.ink, labelsize=9)
    bar.outline.set_visible(False)
    bar.set_label(text, color=theme.faint, fontsize=10)


def shortened(text: str, length: int) -> str:
    """`text`, without its middle where it is longer than `length`: both ends of a layer's name say something."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def heat_map(name: str, missing: str) -> Any:
    """A colour map of matplotlib with a colour of its own for missing values."""
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=missing)
