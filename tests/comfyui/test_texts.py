"""Help pages and translations cover every node and input that was recorded from the real server. Needs no ComfyUI."""

import json
import re
from typing import Any

import pytest

from tests.comfyui import object_info

NODES = {name: node for name, node in object_info.recorded().items() if name.startswith("QVD")}
PAGES = object_info.LOCALES.parent / "web" / "docs"
LANGUAGES = sorted(path.name for path in object_info.LOCALES.iterdir())


def texts(language: str) -> dict[str, Any]:
    return dict(json.loads((object_info.LOCALES / language / "nodeDefs.json").read_text()))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_texts_for_every_node_input_and_output(language):
    found = texts(language)
    assert set(found) == set(NODES)
    for name, node in NODES.items():
        assert found[name]["display_name"]
        assert found[name]["description"]
        assert set(found[name]["inputs"]) == set(node["inputs"]), name
        assert all(entry["name"] for entry in found[name]["inputs"].values())
        outputs = {str(slot) for slot in range(len(node["outputs"]))}
        assert set(found[name].get("outputs", {})) == outputs, name


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_a_translation_explains_what_english_explains(language):
    english, found = texts("en"), texts(language)
    for name, node in english.items():
        for key, entry in node["inputs"].items():
            if "tooltip" in entry:
                assert found[name]["inputs"][key]["tooltip"] != entry["tooltip"], f"{name}.{key}"


@pytest.mark.parametrize("name", NODES)
class TestHelpPage:
    def test_opens_with_the_name_of_the_node(self, name):
        assert (PAGES / f"{name}.md").read_text().startswith(f"# {NODES[name]['display_name']}\n")

    def test_names_every_input(self, name):
        page = (PAGES / f"{name}.md").read_text()
        missing = [key for key in NODES[name]["inputs"] if not re.search(rf"\b{re.escape(key)}\b", page)]
        assert not missing

    def test_says_what_to_do_in_trouble(self, name):
        assert "## Troubleshooting" in (PAGES / f"{name}.md").read_text()


def test_there_is_no_page_of_a_node_that_is_not_there():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)
