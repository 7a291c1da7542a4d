"""The documents hold together: links lead somewhere, snippets are Python, nothing names one machine or one registry."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from qvd_core.presets import PRESETS
from qvd_core.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
QUICKSTARTS = sorted((ROOT / "docs").glob("quickstart-*.md"))
WRITTEN_BY_A_RUN = {"docs/comfyui-tests.md"}  # by `make test-comfyui`, which needs a checkout of ComfyUI

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|Users|work|mnt|tmp|var|opt)/|\b[A-Z]:\\")
REGISTRY = re.compile(
    r"https?://[\w.-]*(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|download\.pytorch\.org|anaconda\.org|crates\.io)"
)
LARGEST_PICTURE = 120_000  # bytes, of the method's


def identity(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A document without its code."""
    return CODE.sub("``", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no other punctuation, repeats counted."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+?) *$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(document: Path) -> Iterator[str]:
    for target in LINK.findall(prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists():
            if path.is_relative_to(ROOT) and identity(path) in WRITTEN_BY_A_RUN:
                continue
            yield f"{target}: no such file"
        elif fragment and path.suffix == ".md" and fragment not in anchors(path.read_text(encoding="utf-8")):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_relative_links_and_pictures_exist(document: Path) -> None:
    assert list(broken_links(document)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_python_blocks_parse(document: Path) -> None:
    for language, block in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(block, filename=identity(document))


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_no_document_names_a_path_of_one_machine_or_a_package_registry(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert MACHINE_PATH.findall(text) == []
    assert REGISTRY.findall(text) == []


def test_there_are_quickstarts_for_both_faces_and_one_holds_python() -> None:
    assert [path.name for path in QUICKSTARTS] == ["quickstart-comfyui.md", "quickstart-diffusers.md"]
    blocks = FENCE.findall(QUICKSTARTS[1].read_text(encoding="utf-8"))
    assert sum(language == "python" for language, _ in blocks) >= 4


def test_every_document_is_on_the_map() -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {target for target in LINK.findall(text) if target.endswith(".md")}
    others = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert others - linked <= {Path(name).name for name in WRITTEN_BY_A_RUN}


def test_the_settings_name_every_field_every_value_and_every_preset() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text.partition("## Every setting")[2]
    for item in fields(QuantSpec):
        assert f"`{item.name}`" in table, item.name
    for name, changed in PRESETS.items():
        assert f"`{name}`" in table
        for field, value in changed.items():
            written = f'{field}="{value}"' if isinstance(value, str) else f"{field}={value}"
            if (field, value) not in {("activation", "token"), ("shift", True)}:  # the defaults
                assert written in table.replace("\n", " "), written


def test_the_pictures_of_the_method_are_small() -> None:
    pictures = sorted((ROOT / "docs" / "images").glob("method-*.png"))
    assert len(pictures) == 6
    assert all(path.stat().st_size < LARGEST_PICTURE for path in pictures)


@pytest.mark.parametrize(
    ("text", "slug"),
    [("## 2. Can they? A `b` (c)", "2-can-they-a-b-c"), ("### shift, scale", "shift-scale"), ("# A  b", "a--b")],
)
def test_headings_become_the_anchors_of_github(text: str, slug: str) -> None:
    assert anchors(text) == {slug}


def test_broken_links_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One\n[x](#one) [y](#two) [z](b.md) `[q](c.md)` ![p](d.png) [w](https://example.com)\n")
    assert list(broken_links(document)) == ["#two: no such heading", "b.md: no such file", "d.png: no such file"]
