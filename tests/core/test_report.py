"""The report's page is one file that needs no network, holds what it was given, and escapes what it must."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from qvd_core.errors import QVDError
from qvd_core.report import FIGURES, Report, collect, render_page, summary_picture, write_pictures, write_report
from qvd_core.report.canvas import THEMES, shortened
from qvd_core.report.data import RangeDrift, TemporalQuantizerReport, TemporalReport
from qvd_core.report.matrices import as_matrix
from qvd_core.report.panels import sqnr_grid
from tests.core.report_cases import HOSTILE, PLAN, SHAPES, SPEC, scales

PNG = b"\x89PNG\r\n\x1a\n"
EMPTY_ELEMENTS = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """The elements of a page, and whether they are properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def report() -> Report:
    found = collect(
        PLAN,
        SPEC,
        SHAPES,
        scales(),
        family_name="Toy & Co",
        model_name="ToyTransformer",
        kept={'proj_out "<last>"': "the family <keeps> it"},
        float_bytes=4_000_000,
        int8_bytes=1_000_000,
        quality={"psnr_db": float("inf"), "my_own_figure": 0.5},
        speed={"seconds_per_step_float": 0.3, "seconds_per_step_int8": 0.2},
    )
    steps, distances = (900.0, 500.0, 100.0), (0.5, 0.9, 0.4)
    tried = (
        TemporalQuantizerReport("uniform", False, 0.5, 0.9, 0.8, 0.1, (0.4, 0.9, 0.2)),
        TemporalQuantizerReport("power", True, 0.6, 1.0, 1.0, 0.0, distances),
    )
    temporal = TemporalReport(("time_proj",), 8, 0.6, steps, distances, tried)
    return replace(found, temporal=(temporal,), drift=(RangeDrift("blocks.0.to_q", (100.0, 900.0), (0.3, 1.0)),))


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_page(report, pictures={"Frames <1>": PNG})


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    for attributes in Page(page).of("img", "source", "script", "link", "iframe", "a"):
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_names_and_captions_are_escaped(page: str) -> None:
    parsed = Page(page)
    assert not parsed.of("script", "last", "keeps")
    assert HOSTILE in parsed.words and 'proj_out "<last>"' in parsed.words and "<keeps>" in parsed.words
    assert "a <b>cat</b>" in parsed.words  # a prompt of the calibration
    assert any(attributes.get("alt") == "Frames <1>" for attributes in parsed.of("img"))


def test_the_page_is_accessible(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == [] and parsed.elements[0] == ("html", {"lang": "en"})
    assert all(attributes.get("alt") for attributes in parsed.of("img"))
    assert len(parsed.of("h1")) == 1 and len(parsed.of("h2")) > 5
    assert all(attributes.get("scope") for attributes in parsed.of("th"))
    scrolling = [attributes for attributes in parsed.of("div") if attributes.get("class") == "scroll"]
    assert scrolling and all(item.get("tabindex") == "0" and item.get("aria-label") for item in scrolling)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 50rem"):
        assert rule in page


def test_every_figure_is_there_in_light_and_dark(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.of("picture")) == len(FIGURES) == len(parsed.of("source"))  # the frames have one theme
    pictures = [item.get("src") or item.get("srcset") for item in parsed.of("img", "source")]
    assert len(set(pictures)) == len(pictures)


def test_own_pictures_may_come_in_both_themes(report: Report) -> None:
    free = collect(PLAN, SPEC, SHAPES)
    parsed = Page(render_page(free, pictures={"Frames": {"light": PNG + b"1", "dark": PNG + b"2"}}))
    assert len(parsed.of("source")) == len(parsed.of("img")) == 1
    assert parsed.of("source")[0]["srcset"] != parsed.of("img")[0]["src"]


def test_the_page_says_the_figures(page: str) -> None:
    words = Page(page).words
    for text in ("W8A8", "4.00 MB → 1.00 MB (25%)", "1.50×", "identical", "my own figure", "power (used)", "25.2"):
        assert text in words, text


def test_layers_are_listed_with_the_largest_error_first_and_sensitive_ones_by_their_effect(report: Report) -> None:
    effects = {"blocks.0.to_q": 31.0, "blocks.0.conv": 52.0}
    layers = tuple(replace(layer, end_sqnr_db=effects.get(layer.name)) for layer in report.layers)
    words = Page(render_page(replace(report, layers=layers))).words
    sensitive = words[words.index("most sensitive layers") : words.index("Every quantized layer")]
    assert sensitive.index("blocks.0.to_q") < sensitive.index("blocks.0.conv") and "blocks.1" not in sensitive
    table = words[words.index("Every quantized layer") :]
    assert table.index("blocks.1.to_q") < table.index("blocks.0.conv") < table.index("blocks.0.to_q")
    assert "most sensitive layers" not in Page(render_page(report)).words  # nothing was measured


def test_without_data_the_page_leaves_out_what_nobody_measured() -> None:
    parsed = Page(render_page(collect(PLAN, SPEC, SHAPES, model_name="Toy", kept={"a": "b"})))
    assert not parsed.of("picture") and "SQNR" not in parsed.words and "Temporal features" not in parsed.words
    assert "data-free" in parsed.words and "blocks.0.conv" in parsed.words and "6×4×3×3" in parsed.words


def test_page_and_json_are_written_side_by_side(report: Report, tmp_path: Path) -> None:
    path = write_report(tmp_path / "new" / "r.html", report, title="T & U")
    assert "<h1>T &amp; U</h1>" in path.read_text(encoding="utf-8")
    assert Report.from_json((tmp_path / "new" / "r.json").read_text(encoding="utf-8")) == report
    assert sorted(item.name for item in path.parent.iterdir()) == ["r.html", "r.json"]


def test_what_cannot_be_written_is_one_clear_error_and_leaves_nothing(report: Report, tmp_path: Path) -> None:
    with pytest.raises(QVDError, match="PNG or GIF"):
        write_report(tmp_path / "r.html", report, pictures={"frames": b"not a picture"})
    with pytest.raises(QVDError, match=r"must be a \.html file"):
        write_report(tmp_path / "r.json", report)
    (tmp_path / "file").write_text("")
    with pytest.raises(QVDError, match="writable"):
        write_report(tmp_path / "file" / "r.html", report)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_the_overview_is_1200_by_900_in_both_themes_with_and_without_data(report: Report) -> None:
    free = collect(PLAN, SPEC, SHAPES, kept={HOSTILE * 9: "why " * 50})
    pictures = [summary_picture(item, theme) for item in (report, free) for theme in ("light", "dark")]
    for png in pictures:
        assert png[:4] == PNG[:4]
        assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (1200, 900)
    assert len(set(pictures)) == 4


def test_pictures_are_drawn_on_exactly_the_pages_paper(report: Report, page: str) -> None:
    for theme in ("light", "dark"):
        png = FIGURES[0].draw(report, theme)
        assert png is not None
        corner = Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0))
        assert "#{:02x}{:02x}{:02x}".format(*corner) == THEMES[theme].paper and THEMES[theme].paper in page


def test_pictures_are_written_as_files(report: Report, tmp_path: Path) -> None:
    written = write_pictures(tmp_path / "png", report)
    assert [path.stem for path in written] == ["summary", *(figure.name for figure in FIGURES)]
    assert all(path.read_bytes()[:4] == PNG[:4] for path in written)


def test_without_matplotlib_the_page_keeps_its_tables_and_pictures_say_what_to_install(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QVDError, match="pip install matplotlib"):
        summary_picture(report)
    parsed = Page(render_page(report))
    assert "pip install matplotlib" in parsed.words and "blocks.0.conv" in parsed.words


def test_the_heat_map_holds_the_worst_layer_of_every_cell(report: Report) -> None:
    same_cell = replace(report.layers[0], name="blocks.0.other", sqnr_db=12.0)
    blocks, parts, grid = sqnr_grid(replace(report, layers=(*report.layers, same_cell)))
    assert blocks == ["blocks.0", "blocks.1"] and parts[:2] == ["to_q", "conv"]
    assert grid[0] == [12.0, 25.25] and grid[1][0] == 33.0 and grid[1][1] != grid[1][1]  # NaN: no such layer


def test_distances_become_a_symmetric_matrix() -> None:
    assert as_matrix((0.1, 0.2, 0.3), 3) == [[0.0, 0.1, 0.2], [0.1, 0.0, 0.3], [0.2, 0.3, 0.0]]


def test_long_names_keep_both_ends() -> None:
    assert shortened("a" * 9, 9) == "a" * 9
    name = shortened("down_blocks.0.attentions.0.proj_in", 16)
    assert len(name) == 16 and name.startswith("down_") and name.endswith("proj_in")
