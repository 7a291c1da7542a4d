"""The report as one HTML page: no network, light and dark, narrow and wide, on screen and on paper."""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from qvd_core.errors import QVDError
from qvd_core.report.canvas import ThemeName
from qvd_core.report.data import LayerReport, Report
from qvd_core.report.figures import FIGURES, Figure
from qvd_core.report.panels import in_bytes
from qvd_core.report.style import STYLE
from qvd_core.report.words import Line, bits, changed_settings, headline, kinds, label, memory, speedup, value

ROWS_OPEN = 12  # a longer table starts folded
MEDIA_TYPES = {b"\x89PNG": "image/png", b"GIF8": "image/gif"}
Pictures = Mapping[str, "bytes | Mapping[ThemeName, bytes]"]


def render_page(report: Report, title: str = "", pictures: Pictures | None = None) -> str:
    """The page, a whole HTML document.

    title: instead of the model's name. pictures: caption -> PNG or GIF, or one for each theme, shown below the summary
        (frames, mostly).
    Without matplotlib the page has its tables and says what is missing. Raises QVDError for other kinds of pictures.
    """
    heading, subtitle, figures = headline(report)
    heading = title or heading
    drawn, missing = _figures(report)
    sections = [
        f'<header><h1>{_text(heading)}</h1><p class="faint">{_text(subtitle)}</p>{_tiles(figures)}</header>',
        _section("summary", "Summary", _summary(report)),
        *(_picture(caption, data) for caption, data in (pictures or {}).items()),
        f'<p role="note">{_text(missing)}</p>' if missing else "",
        f'<div class="figures">{"".join(drawn)}</div>' if drawn else "",
        _section("sensitive", "The most sensitive layers first", _sensitivity(report)),
        _section("layers", "Every quantized layer", _layers(report)),
        _section("temporal", "Temporal features in numbers", _temporal(report)),
        _section("settings", "Settings and calibration", _settings(report)),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_text(heading)}</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)


def _section(name: str, title: str, body: str) -> str:
    """A section with a heading; nothing for an empty body."""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}</section>' if body else ""


def _tiles(figures: Sequence[Line]) -> str:
    tiles = "".join(f"<div><dd>{_text(number)}</dd><dt>{_text(what)}</dt></div>" for what, number in figures)
    return f'<dl class="tiles">{tiles}</dl>'


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, numbers: Sequence[int], folds: bool = True
) -> str:
    """A table that scrolls inside its own box, also by keyboard; numbers: the columns that hold them."""
    kinds_of = [' class="number"' if index in numbers else "" for index in range(len(header))]
    head = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for kind, cell in zip(kinds_of, header, strict=True))
    lines = []
    for row in rows:
        first = f'<th scope="row">{_text(row[0])}</th>'
        rest = (f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds_of[1:], row[1:], strict=True))
        lines.append(f"<tr>{first}{''.join(rest)}</tr>")
    table = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    if len(rows) <= ROWS_OPEN or not folds:
        return table
    return f"<details><summary>{_text(caption)}: {len(rows)} rows</summary>{table}</details>"


def _summary(report: Report) -> str:
    lines: list[Line] = [("model", report.model)]
    if report.family:
        lines.append(("family", report.family))
    lines.append(("bits", f"{bits(report)} (weights and activations)"))
    lines.append(("quantized layers", f"{len(report.layers)} ({kinds(report)})"))
    lines.append(("kept in full precision", f"{len(report.kept)} layers" if report.kept else "not recorded"))
    lines += [("memory", text) for text in [memory(report)] if text]
    lines += [("speed of a denoising step", f"{text} as fast") for text in [speedup(report)] if text]
    lines += [(label(name), value(name, figure)) for name, figure in {**report.quality, **report.speed}.items()]
    for what, name, unit in (("mean output SQNR of a layer", "sqnr_db", "dB"), ("mean coverage", "coverage", "%")):
        before, after = report.mean(f"{name}_before"), report.mean(name)
        if after is not None:
            ends = [f"{end * 100:.1f}" if unit == "%" else f"{end:.1f}" for end in (before, after) if end is not None]
            lines.append(
                (f"{what}, {'before → after SCRI' if len(ends) > 1 else 'with SCRI'}", f"{' → '.join(ends)} {unit}")
            )
    table = _table(("figure", "value"), lines, "Summary", (), folds=False)
    return f'<div class="halves"><div>{table}</div><div>{_bars(report)}{_kept(report)}</div></div>'


def _bars(report: Report) -> str:
    """The memory before and after as two bars, in plain HTML."""
    if not report.float_bytes or not report.int8_bytes:
        return ""
    largest = max(report.float_bytes, report.int8_bytes)
    rows = "".join(
        f'<div class="bar {kind}" style="width:{100 * size / largest:.1f}%"></div>'
        f'<p class="faint">{_text(kind)}: {_text(in_bytes(size))}</p>'
        for kind, size in (("before", report.float_bytes), ("after", report.int8_bytes))
    )
    return f'<h3>Memory</h3><div class="bars" role="img" aria-label="Memory: {_text(memory(report))}">{rows}</div>'


def _figures(report: Report) -> tuple[list[str], str]:
    """Every figure that has something to show; and what is missing, in words."""
    drawn = []
    try:
        for figure in FIGURES:
            light, dark = figure.draw(report, "light"), figure.draw(report, "dark")
            if light and dark:
                drawn.append(_figure(figure, {"light": light, "dark": dark}))
    except QVDError as error:
        return drawn, str(error)
    return drawn, ""


def _figure(figure: Figure, themes: Mapping[ThemeName, bytes]) -> str:
    alternative = f"{figure.title}. {figure.caption}"
    return _framed("wide" if figure.wide else "half", figure.title, alternative, themes, figure.caption)


def _picture(caption: str, picture: bytes | Mapping[ThemeName, bytes]) -> str:
    themes: Mapping[ThemeName, bytes] = {"light": picture} if isinstance(picture, bytes) else picture
    return _framed("wide", caption, caption, themes, "")


def _framed(kind: str, title: str, alternative: str, themes: Mapping[ThemeName, bytes], caption: str) -> str:
    size = _size(themes["light"]) if caption else None
    attributes = f' width="{size[0]}" height="{size[1]}"' if size else ""
    image = f'<img{attributes} alt="{_text(alternative)}" src="{_data(themes["light"])}">'
    if "dark" in themes:
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(themes["dark"])}">'
        image = f"<picture>{source}{image}</picture>"
    return (
        f'<figure class="{kind}"><h2>{_text(title)}</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Picture: {_text(title)}">{image}</div>'
        f"{f'<figcaption>{_text(caption)}</figcaption>' if caption else ''}</figure>"
    )


def _size(png: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG in CSS pixels: figures are drawn at twice their size."""
    if png[:4] != b"\x89PNG" or len(png) < 24:
        return None
    return int.from_bytes(png[16:20], "big") // 2, int.from_bytes(png[20:24], "big") // 2


def _data(picture: bytes) -> str:
    kind = MEDIA_TYPES.get(picture[:4])
    if kind is None:
        raise QVDError(f"a picture of the report starts with {picture[:4]!r}: give PNG or GIF bytes.")
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _kept(report: Report) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in report.kept.items():
        reasons[why].append(name)
    heading = "<h3>Kept in full precision, and why</h3>" if reasons else ""
    return heading + "".join(
        f"<details{' open' if len(names) <= ROWS_OPEN else ''}><summary>{len(names)} &times; {_text(why)}</summary>"
        f"<ul>{''.join(f'<li><code>{_text(name)}</code></li>' for name in names)}</ul></details>"
        for why, names in reasons.items()
    )


def _sensitivity(report: Report) -> str:
    measured = sorted((layer.end_sqnr_db, layer.name) for layer in report.layers if layer.end_sqnr_db is not None)
    rows = [(name, f"{decibels:.1f}") for decibels, name in measured]
    header = ("layer", "SQNR of the model's output with it alone quantized (dB)")
    return _table(header, rows, "Layers by their effect on the output", (1,)) if rows else ""


def _layers(report: Report) -> str:
    ordered = sorted(report.layers, key=lambda layer: (layer.sqnr_db is None, layer.sqnr_db or 0.0))
    measured = any(layer.sqnr_db is not None for layer in ordered)
    header = ["layer", "kind", "weight", "bits", "activation", "size"]
    if measured:
        header += ["SQNR before", "after (dB)", "levels used before", "after"]
    rows = [[*_shape_cells(layer), *(_figure_cells(layer) if measured else ())] for layer in ordered]
    caption = "Layers, the largest error first" if measured else "Layers"
    return _table(header, rows, caption, range(5, len(header))) if rows else ""


def _shape_cells(layer: LayerReport) -> list[str]:
    shape = "×".join(map(str, layer.shape)) or "-"
    size = in_bytes(layer.bytes) if layer.bytes else "-"
    return [layer.name, layer.kind or "-", shape, str(layer.weight_bits), layer.activation, size]


def _figure_cells(layer: LayerReport) -> list[str]:
    decibels = ("-" if figure is None else f"{figure:.1f}" for figure in (layer.sqnr_db_before, layer.sqnr_db))
    shares = ("-" if figure is None else f"{figure:.0%}" for figure in (layer.coverage_before, layer.coverage))
    return [*decibels, *shares]


def _temporal(report: Report) -> str:
    tables = []
    for temporal in report.temporal:
        rows = [("full precision", f"{temporal.td_score:.4f}", "1", "1", "0")]
        rows += [
            (
                f"{item.name}{' (used)' if item.deployed else ''}",
                f"{item.td_score:.4f}",
                f"{item.tdr:.5f}",
                f"{item.tdc:.5f}",
                f"{item.col:.2%}",
            )
            for item in temporal.quantizers
        ]
        read_by = f"Read by {len(temporal.layers)} projection{'s' * (len(temporal.layers) != 1)}"
        first = f", the first is <code>{_text(temporal.layers[0])}</code>" if temporal.layers else ""
        header = ("quantizer", "TDScore", "TDR (goal 1)", "TDC (goal 1)", "collisions (goal 0)")
        tables.append(f"<p>{read_by}{first}; {temporal.bits} bits.</p>")
        tables.append(_table(header, rows, "Temporal quantizers", range(1, 5)))
    return "".join(tables)


def _settings(report: Report) -> str:
    rows = [(name, _plain(setting)) for name, setting in report.settings.items()]
    parts = [f"<p>Different from the defaults: <code>{_text(changed_settings(report) or 'nothing')}</code>.</p>"]
    parts.append(_table(("setting", "value"), rows, "All settings", ()))
    if report.calibrated_on:
        rows = [(name, _plain(origin)) for name, origin in report.calibrated_on.items()]
        parts.append(_table(("calibrated on", ""), rows, "Calibration", ()))
    return "".join(parts)


def _plain(setting: object) -> str:
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)
