"""The HTML report of a quantization: one file, no network, readable in light and dark."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from qvd_core.errors import QVDError
from qvd_core.sensitivity import END_EFFECT

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4477aa; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: inline-block; height: .7em; background: var(--bar); margin-left: .5em; }
img { max-width: 100%; image-rendering: pixelated; background: #000; }
"""
_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif"}
_BAR_EM_PER_DB = 0.08


def write_report(
    path: str | Path,
    title: str,
    summary: Sequence[tuple[str, str]],
    layers: Mapping[str, Mapping[str, float]],
    pictures: Mapping[str, str | Path],
    kept: Collection[str] = (),
) -> Path:
    """Write the report to `path` (temporary file, then rename) and return it.

    summary: (what, value) lines. layers: the report of `Scales` (layer -> figures).
    pictures: caption -> PNG or GIF file. kept: the layers that stay in full precision for their sensitivity.
    Raises QVDError when a picture cannot be read or the report cannot be written.
    """
    path = Path(path)
    try:
        body = "\n".join(
            [
                f"<h1>{html.escape(title)}</h1>",
                _summary_table(summary),
                *(_picture(caption, Path(file)) for caption, file in pictures.items()),
                _sensitivity_table(layers, kept),
                _gemm_table(layers),
                _temporal_table(layers),
            ]
        )
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_page(title, body), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise QVDError(
            f"cannot write the report {path}: {error}; choose a folder that is writable and has room."
        ) from error
    return path


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary_table(summary: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(what)}</th><td class="number">{html.escape(value)}</td></tr>'
        for what, value in summary
    )
    return f"<table>{rows}</table>"


def _picture(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    source = f"data:{_MEDIA_TYPES[file.suffix]};base64,{data}"
    return f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" src="{source}">'


def _sensitivity_table(layers: Mapping[str, Mapping[str, float]], kept: Collection[str]) -> str:
    """Layers by what they, quantized alone, do to the model's output; those that `kept` names are marked."""
    measured = {name: figures[END_EFFECT] for name, figures in layers.items() if END_EFFECT in figures}
    if not measured:
        return ""
    rows = [
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td class="number">{decibels:.1f}</td>'
        f"<td>{'kept in full precision' if name in kept else 'quantized'}</td></tr>"
        for name, decibels in sorted(measured.items(), key=lambda item: item[1])
    ]
    head = "<tr><th>layer</th><th>SQNR of the model's output (dB)</th><th></th></tr>"
    return f'<h2>Layers, most sensitive first</h2>\n<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _gemm_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    """Layers by their own output's SQNR, the worst first; coverage is the share of levels the mean channel uses."""
    rows = []
    for name, figures in sorted(layers.items(), key=lambda item: item[1].get("sqnr_db", float("inf"))):
        if "sqnr_db" not in figures:
            continue
        bar = f'<span class="bar" style="width:{max(0.0, figures["sqnr_db"]) * _BAR_EM_PER_DB:.2f}em"></span>'
        rows.append(
            f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
            f'<td class="number">{figures["sqnr_db_before"]:.1f}</td>'
            f"<td>{figures['sqnr_db']:.1f}{bar}</td>"
            f'<td class="number">{figures["coverage_before"]:.0%} → {figures["coverage"]:.0%}</td></tr>'
        )
    if not rows:
        return ""
    head = "<tr><th>layer</th><th>SQNR (dB) before SCRI</th><th>after</th><th>levels used</th></tr>"
    return f'<h2>Layers, largest error first</h2>\n<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _temporal_table(layers: Mapping[str, Mapping[str, float]]) -> str:
    """Temporal projections: how well their features can still be told apart."""
    rows = [
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
        + "".join(f'<td class="number">{figures[key]:.5g}</td>' for key in ("td_score", "tdr", "tdc", "col"))
        + "</tr>"
        for name, figures in layers.items()
        if "tdr" in figures
    ]
    if not rows:
        return ""
    head = "<tr><th>temporal projection</th><th>TDScore</th><th>kept (TDR)</th><th>TDC</th><th>collisions</th></tr>"
    return f'<h2>Temporal features</h2>\n<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
