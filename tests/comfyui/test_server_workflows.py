"""Every example workflow runs on the real server, which knows our nodes as recorded and offers their help."""

import json
import urllib.request
from typing import Any

import pytest
from PIL import Image

from tests.comfyui import object_info, twins
from tests.comfyui.client import Client
from tests.comfyui.runs import succeed
from tests.comfyui.server import ROOT, Server

pytestmark = pytest.mark.comfyui
NODES = {
    *("QVDQuantizeModel", "QVDQuantizeSettings", "QVDCalibrate", "QVDCalibrateTwoExperts", "QVDLoadScales"),
    *("QVDSaveScales", "QVDSaveCheckpoint", "QVDLoadDiffusionModel", "QVDReport", "QVDCompare"),
}
LANGUAGES = ("en", "de", "zh")


@pytest.fixture
def image(server: Server) -> None:
    """The picture that the SVD workflow loads."""
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(server.folder("input") / "example.png")


@pytest.mark.parametrize("name", twins.names())
def test_runs_to_the_end(name: str, client: Client, server: Server, image: None, figure: Any) -> None:
    result = succeed(client, twins.for_tiny_models(twins.load(name)))
    figure("seconds", round(result.seconds, 1))
    outputs = {key for key, node in result_nodes(name).items() if object_info.recorded()[node]["output_node"]}
    assert outputs <= set(result.outputs)
    for output in result.outputs.values():
        for entry in (*output.get("images", []), *output.get("qvd_files", [])):
            path = server.folder(entry["type"]) / entry["subfolder"] / entry["filename"]
            assert path.stat().st_size > 0, path


def result_nodes(name: str, *, muted: bool = False) -> dict[str, str]:
    """Id and type of the nodes that run."""
    whole = twins.load(name)
    return {key: node["class_type"] for key, node in whole.items() if muted or not node["_meta"].get("muted")}


def test_what_one_run_saves_the_next_loads(client: Client, server: Server, figure: Any) -> None:
    name = "qvd_save_and_load"
    for path in (server.folder("output") / "diffusion_models").glob("wan2.1_1.3B_*"):
        path.unlink()
    succeed(client, twins.for_tiny_models(twins.load(name)))
    result = succeed(client, twins.for_tiny_models(twins.load(name), muted=True))
    loader = twins.find(twins.load(name), "QVDLoadDiffusionModel")
    assert result.outputs[loader]["qvd"][0]["layers"] > 0
    figure("seconds", round(result.seconds, 1))


class TestServer:
    def test_lists_our_nodes_and_no_others_of_ours(self, client):
        own = {name for name in client.object_info() if name.startswith("QVD") and not name.startswith("QVDTest")}
        assert own == NODES

    def test_describes_the_nodes_as_recorded(self, client):
        now = object_info.reduce(client.object_info())
        recorded = object_info.recorded()
        own = {name: node for name, node in now.items() if name in NODES}
        assert own == {name: node for name, node in recorded.items() if name in NODES}, (
            "python -m tests.comfyui.object_info"
        )
        for name in object_info.STOCK:
            assert list(now[name]["inputs"]) == list(recorded[name]["inputs"]), f"{name} of ComfyUI has changed"
            assert now[name]["outputs"] == recorded[name]["outputs"]

    def test_every_input_has_a_tooltip_and_every_node_a_description(self, client):
        info = client.object_info()
        for name in NODES:
            assert info[name]["description"], name
            assert info[name]["category"].split("/")[0] == "QVD"
            for part in ("required", "optional"):
                for key, spec in (info[name]["input"].get(part) or {}).items():
                    assert spec[1].get("tooltip") or "template" in spec[1], f"{name}.{key}"

    def test_offers_the_workflows_with_their_pictures(self, client):
        templates = client.get("/workflow_templates")
        own = next(names for pack, names in templates.items() if set(twins.names()) & set(names))
        assert sorted(own) == twins.names()
        pack = next(pack for pack, names in templates.items() if names == own)
        for name in own:
            for ending in ("json", "jpg"):
                with urllib.request.urlopen(f"{client.url}/api/workflow_templates/{pack}/{name}.{ending}") as response:
                    assert response.status == 200

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_has_texts_for_every_node(self, client, language):
        texts = client.get("/i18n").get(language, {}).get("nodeDefs", {})
        assert set(texts) >= NODES
        recorded = object_info.recorded()
        for name in NODES:
            assert set(texts[name].get("inputs", {})) >= set(recorded[name]["inputs"]), f"{language}: {name}"

    @pytest.mark.parametrize("node", sorted(NODES))
    def test_serves_the_help_page(self, client, node):
        with urllib.request.urlopen(f"{client.url}/extensions/qvd/docs/{node}.md") as response:
            assert response.read() == (ROOT / "web" / "docs" / f"{node}.md").read_bytes()

    def test_serves_the_front_end_extension(self, client):
        scripts = [path for path in client.get("/extensions") if path.startswith("/extensions/qvd/")]
        assert scripts
        for path in scripts:
            with urllib.request.urlopen(f"{client.url}{path}") as response:
                assert response.status == 200

    def test_starts_without_a_complaint_about_the_pack(self, server):
        log = server.log
        assert "custom_nodes/qvd\n" in log or "custom_nodes/qvd " in log
        assert "IMPORT FAILED" not in log
        assert "Cannot import" not in log

    def test_answers_in_json_throughout(self, client):
        json.dumps(client.object_info(), allow_nan=False)
