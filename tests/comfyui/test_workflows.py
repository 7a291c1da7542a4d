"""The example workflows: what the front end opens and what the server runs are the same graph. Needs no ComfyUI."""

import itertools
import json
from typing import Any

import pytest

from tests.comfyui import build_workflows, object_info, twins

NAMES = sorted(build_workflows.WORKFLOWS)
NOTES = {"Note", "MarkdownNote"}
PICTURE_BYTES = 150_000
INFO = object_info.recorded()


def ui(name: str) -> dict[str, Any]:
    return dict(json.loads((build_workflows.EXAMPLES / f"{name}.json").read_text()))


def read_prompt(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The prompt that the front end would send for a workflow, muted nodes too; written without the builder."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for key, entry in INFO[node["type"]]["inputs"].items():
            if entry.get("widget"):
                inputs[key] = next(values)
                if entry.get("control_after_generate") or entry.get("image_upload"):
                    next(values)
        assert not list(values), f"{node['type']} has too many widget values"
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                number, source, source_slot, target, target_slot, kind = links[socket["link"]]
                assert (target, target_slot, kind) == (node["id"], slot, socket["type"]), f"link {number}"
                inputs[socket["name"]] = [str(source), source_slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "muted": node["mode"] == 2}
    return prompt


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - 30, x + width, y + height


@pytest.mark.parametrize("name", NAMES)
class TestWorkflow:
    def test_is_what_the_builder_writes(self, name):
        flow = build_workflows.build(name)
        assert ui(name) == flow.ui(), "run python -m tests.comfyui.build_workflows"
        assert twins.load(name) == flow.api(), "run python -m tests.comfyui.build_workflows"

    def test_and_its_twin_are_the_same_graph(self, name):
        prompt = {
            key: {
                "class_type": node["class_type"],
                "inputs": node["inputs"],
                "muted": node["_meta"].get("muted", False),
            }
            for key, node in twins.load(name).items()
        }
        assert read_prompt(ui(name)) == prompt

    def test_fits_the_inputs_of_every_node(self, name):
        for key, node in twins.load(name).items():
            spec = INFO[node["class_type"]]["inputs"]
            grown = {
                f"{base}.{entry['prefix']}{i}" for base, entry in spec.items() if entry.get("grows") for i in range(16)
            }
            assert set(node["inputs"]) <= set(spec) | grown, f"node {key}"
            for base, entry in spec.items():
                value = node["inputs"].get(base)
                if entry.get("grows"):
                    count = sum(name.startswith(f"{base}.") for name in node["inputs"])
                    assert entry["min"] <= count <= entry["max"], f"node {key}"
                elif entry["required"]:
                    assert value is not None, f"node {key} lacks {base}"
                if isinstance(value, int | float) and not isinstance(value, bool):
                    assert entry.get("min", value) <= value <= entry.get("max", value), f"node {key}: {base}"
                if "options" in entry and value is not None:
                    assert value in entry["options"], f"node {key}: {base}"

    def test_connects_outputs_to_inputs_of_their_type(self, name):
        prompt = twins.load(name)
        for socket in (socket for node in ui(name)["nodes"] for socket in node["inputs"] if socket["link"] is not None):
            link = next(link for link in ui(name)["links"] if link[0] == socket["link"])
            source = prompt[str(link[1])]["class_type"]
            assert INFO[source]["outputs"][link[2]][1] == socket["type"]

    def test_has_every_node_in_view_and_apart_from_the_others(self, name):
        workflow = ui(name)
        for one, other in itertools.combinations(workflow["nodes"], 2):
            (left, top, right, bottom), (left2, top2, right2, bottom2) = box(one), box(other)
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{one['type']} overlaps {other['type']}"
        for one, other in itertools.combinations([group["bounding"] for group in workflow["groups"]], 2):
            x, y, width, height = one
            x2, y2, width2, height2 = other
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y

    def test_says_what_it_is_for_and_uses_native_nodes_and_ours_alone(self, name):
        kinds = {node["type"] for node in ui(name)["nodes"]}
        assert kinds & NOTES
        ours = {kind for kind in kinds if kind.startswith("QVD")}
        assert ours
        assert kinds - ours - NOTES <= set(object_info.STOCK)

    def test_gives_every_loader_a_way_to_its_file(self, name):
        for node in ui(name)["nodes"]:
            files = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
            if files and not node["type"].startswith("QVD"):
                named = {model["name"]: model for model in node["properties"]["models"]}
                assert set(files) == set(named)
                assert all(model["url"].endswith("/" + file) for file, model in named.items())

    def test_has_a_small_picture(self, name):
        picture = build_workflows.EXAMPLES / f"{name}.jpg"
        assert picture.is_file()
        assert picture.read_bytes()[:2] == b"\xff\xd8"
        assert picture.stat().st_size <= PICTURE_BYTES

    def test_runs_on_the_tiny_models_with_the_same_nodes_of_ours(self, name):
        whole, tiny = twins.load(name), twins.for_tiny_models(twins.load(name), muted=True)
        for key, node in whole.items():
            if node["class_type"].startswith("QVD"):
                assert tiny[key]["class_type"] == node["class_type"]
        known = set(tiny)
        links = [value for node in tiny.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert all(link[0] in known for link in links)
        assert not any(node["class_type"].startswith(("CLIP", "DualCLIP")) for node in tiny.values())


def test_the_top_of_examples_holds_no_other_json():
    assert sorted(path.stem for path in build_workflows.EXAMPLES.glob("*.json")) == NAMES


def test_every_workflow_has_a_twin():
    assert twins.names() == NAMES
