"""The pack as ComfyUI loads it: from a folder, under a name of ComfyUI's choice, beside whatever is installed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import folder_paths
import pytest
import stub_control

import qvd_nodes
import qvd_nodes.scale_cache as scale_cache
from qvd_core import __version__
from qvd_nodes.extension import NODES, SETTINGS_ROUTE, comfy_entrypoint

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "tests" / "comfyui_api_stubs"

# What ComfyUI does with a folder in custom_nodes, in a process of its own.
LOAD = """
import importlib.util, json, sys
{before}
path, core = list(sys.path), sys.modules["qvd_core"]
name = "/comfy/custom_nodes/qvd_x_1"
spec = importlib.util.spec_from_file_location(name, {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
import asyncio
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print(json.dumps({{
    "nodes": [node.GET_SCHEMA().node_id for node in nodes if "Load" not in node.__name__],
    "web": module.WEB_DIRECTORY,
    "path": sys.path == path,
    "files": [sys.modules[name].__file__ for name in ("qvd_core", "qvd_nodes")],
    "core": core is sys.modules["qvd_core"],
    "others": [name for name in sys.modules if name.endswith((".qvd_core", ".qvd_nodes"))],
    "mappings": hasattr(module, "NODE_CLASS_MAPPINGS"),
}}))
"""


def load(before: str = "", folder: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(STUBS)}
    code = LOAD.format(root=str(ROOT), before=before)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=folder or ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _attempt(folder: str, then: str) -> str:
    """Import the pack with only what `folder` holds of ComfyUI, then put the whole of it back."""
    return f"""
sys.path.remove({str(STUBS)!r})
sys.path[:0] = [folder for folder in [{folder!r}] if folder]
import importlib.util
spec = importlib.util.spec_from_file_location("first", {str(ROOT / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
    {then}
except ModuleNotFoundError as error:
    assert error.name.startswith("comfy"), error
assert "qvd_nodes" not in sys.modules
for name in [name for name in sys.modules if name.startswith("qvd_nodes.")]:
    del sys.modules[name]  # Python's own: a module that has failed is imported again
sys.path[:] = [folder for folder in sys.path if folder != {folder!r}]
sys.path.insert(0, {str(STUBS)!r})
"""


class TestFolder:
    def test_under_comfyuis_name_with_packages_under_their_own(self, tmp_path: Path) -> None:
        """In one process, as starting one takes long.

        Where there is no ComfyUI it is no node pack: pytest imports every `__init__.py` above a test. Where it cannot
        be imported, nothing is left half done. Then ComfyUI is there, and the core, imported already, is used as it is:
        there must not be a second copy of its classes.
        """
        (tmp_path / "half" / "comfy_api").mkdir(parents=True)
        (tmp_path / "half" / "comfy_api" / "__init__.py").write_text("")
        before = _attempt("", "assert not hasattr(module, 'comfy_entrypoint')")
        before += _attempt(str(tmp_path / "half"), "raise SystemExit('it was imported')")
        found = load(before, tmp_path)
        assert found["files"] == [str(ROOT / name / "__init__.py") for name in ("qvd_core", "qvd_nodes")]
        assert found["core"] and found["path"] and not found["others"] and found["web"] == "./web"
        assert len(found["nodes"]) == len(NODES) - 2

    def test_there_is_no_second_way_in(self) -> None:
        """ComfyUI never calls the entry point of a pack that also has the old API's mappings."""
        assert not hasattr(qvd_nodes, "NODE_CLASS_MAPPINGS")

    def test_the_front_end_is_where_it_says(self) -> None:
        assert (Path(qvd_nodes.WEB_DIRECTORY) / "qvd.js").is_file() or list(Path(qvd_nodes.WEB_DIRECTORY).glob("*.js"))


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The routes of a server that has loaded the pack; answers are (data, status)."""
    web = ModuleType("aiohttp.web")
    web.json_response = lambda data, status=200: (data, status)  # type: ignore[attr-defined]
    aiohttp = ModuleType("aiohttp")
    aiohttp.web = web  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    monkeypatch.setitem(sys.modules, "aiohttp.web", web)
    monkeypatch.setattr(scale_cache, "_chosen_folder", None)
    server = stub_control.start_server()
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    return server.routes.handlers


def request(content: Any) -> Any:
    async def read() -> Any:
        if isinstance(content, Exception):
            raise content
        return content

    return SimpleNamespace(json=read)


class TestEntryPoint:
    def test_loading_twice_adds_nothing_twice(self, comfyui: Path) -> None:
        extension = asyncio.run(comfy_entrypoint())
        for _ in range(2):
            asyncio.run(extension.on_load())
        folders, extensions = folder_paths.folder_names_and_paths["qvd_scales"]
        assert folders == [str(comfyui / "models" / "qvd_scales"), str(comfyui / "output" / "qvd_scales")]
        assert extensions == {".safetensors"}
        assert asyncio.run(extension.get_node_list()) == NODES

    def test_without_a_server_there_are_no_routes(self) -> None:
        asyncio.run(asyncio.run(comfy_entrypoint()).on_load())


class TestSettings:
    def test_are_told(self, routes: Any, comfyui: Path) -> None:
        data, status = asyncio.run(routes["GET", SETTINGS_ROUTE](None))
        assert status == 200 and set(data) == {"cache_folder", "default_cache_folder", "version"}
        assert data["version"] == __version__ and data["cache_folder"] == data["default_cache_folder"]

    def test_the_cache_folder_can_be_changed_and_changed_back(self, routes: Any, tmp_path: Path) -> None:
        change = routes["POST", SETTINGS_ROUTE]
        data, _ = asyncio.run(change(request({"cache_folder": str(tmp_path / "mine")})))
        assert data["cache_folder"] == str(tmp_path / "mine") == str(scale_cache.cache_folder())
        data, _ = asyncio.run(change(request({"cache_folder": ""})))
        assert data["cache_folder"] == data["default_cache_folder"]

    @pytest.mark.parametrize(
        "content", [None, [], "text", {}, {"cache_folder": 5}, {"cache_folder": "a\0b"}, ValueError("no JSON")]
    )
    def test_nonsense_changes_nothing(self, routes: Any, content: Any) -> None:
        before = scale_cache.cache_folder()
        data, status = asyncio.run(routes["POST", SETTINGS_ROUTE](request(content)))
        assert status == 400 and "cache_folder" in data["error"] and scale_cache.cache_folder() == before
