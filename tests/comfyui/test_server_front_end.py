"""ComfyUI's own front end opens every example workflow and sends the prompt that the other tests run."""

from typing import Any

import pytest

from tests.comfyui import front_end, object_info, twins
from tests.comfyui.server import Server

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def opened(server: Server) -> dict[str, dict[str, Any]]:
    """Every workflow as the browser shows it."""
    if front_end.lacking():
        pytest.skip(f"no browser test: {front_end.lacking()} is missing")
    if not server.alive():
        server.restart()
    return front_end.open_all(server)


@pytest.mark.parametrize("name", twins.names())
class TestWorkflowInTheBrowser:
    def test_sends_the_prompt_of_its_twin(self, name, opened):
        recorded = object_info.recorded()
        expected = {
            key: (node["class_type"], node["inputs"])
            for key, node in twins.load(name).items()
            if not node["_meta"].get("muted")
        }
        sent = {}
        for key, node in opened[name]["prompt"].items():
            spec = recorded[node["class_type"]]["inputs"]
            # Inputs that ComfyUI hides are sent too.
            inputs = {name: value for name, value in node["inputs"].items() if name in spec or "." in name}
            sent[key] = (node["class_type"], inputs)
        assert sent == expected

    def test_has_no_overlapping_nodes_and_no_errors(self, name, opened):
        assert not opened[name]["overlaps"]
        assert not opened[name]["complaints"]
        assert not [node["type"] for node in opened[name]["nodes"] if node["missing"]]
