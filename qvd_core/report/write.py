"""Writing a report: the page, its JSON beside it, and the pictures as files of their own."""

from __future__ import annotations

from pathlib import Path

from qvd_core.errors import QVDError
from qvd_core.files import write_bytes
from qvd_core.report.canvas import ThemeName
from qvd_core.report.data import Report
from qvd_core.report.figures import FIGURES, summary_picture
from qvd_core.report.page import Pictures, render_page

SUMMARY = "summary"


def write_report(path: str | Path, report: Report, title: str = "", pictures: Pictures | None = None) -> Path:
    """Write the page to `path` and the JSON beside it (report.html, report.json); returns `path`.

    pictures: caption -> PNG or GIF bytes, or one for each theme, shown below the summary. Files are whole or not there.
    Raises QVDError when a picture is neither, or a file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise QVDError(f"the report {path} must be a .html file; its JSON is written beside it.")
    page = render_page(report, title, pictures)
    write_bytes(path.with_suffix(".json"), (report.to_json() + "\n").encode())
    return write_bytes(path, page.encode())


def write_pictures(folder: str | Path, report: Report, theme: ThemeName = "light") -> list[Path]:
    """Write the overview and every figure that has something to show as PNG files; returns them.

    Raises QVDError when matplotlib is missing or a file cannot be written.
    """
    drawn = {SUMMARY: summary_picture(report, theme), **{item.name: item.draw(report, theme) for item in FIGURES}}
    return [write_bytes(Path(folder) / f"{name}.png", png) for name, png in drawn.items() if png is not None]
