"""The node pack as ComfyUI sees it: its nodes, its folders, and what the front end asks the server for."""

from __future__ import annotations

from typing import Any

from qvd_core import __version__
from qvd_nodes._comfy import ComfyExtension, PromptServer, io
from qvd_nodes.nodes.calibrate import Calibrate, CalibrateTwoExperts
from qvd_nodes.nodes.files import LoadDiffusionModel, LoadScales, SaveCheckpoint, SaveScales
from qvd_nodes.nodes.quantize import QuantizeModel, QuantizeSettings
from qvd_nodes.nodes.report import Compare, Report
from qvd_nodes.scale_cache import cache_folder, choose_cache_folder, default_cache_folder, register_folders

NODES: list[type[io.ComfyNode]] = [
    QuantizeModel,
    QuantizeSettings,
    Calibrate,
    CalibrateTwoExperts,
    LoadScales,
    SaveScales,
    SaveCheckpoint,
    LoadDiffusionModel,
    Report,
    Compare,
]
SETTINGS_ROUTE = "/qvd/settings"


class QVDExtension(ComfyExtension):
    """QVD's nodes."""

    async def on_load(self) -> None:
        register_folders()
        _register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> QVDExtension:
    """What ComfyUI calls after importing the pack."""
    return QVDExtension()


def _register_routes() -> None:
    """`GET` and `POST /qvd/settings`: what the settings page of the front end shows and changes."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get(SETTINGS_ROUTE)
    async def get_settings(_request: Any) -> Any:
        return web.json_response(_settings())

    @server.routes.post(SETTINGS_ROUTE)
    async def set_settings(request: Any) -> Any:
        try:
            values = await request.json()
        except ValueError:
            values = None
        folder = values.get("cache_folder") if isinstance(values, dict) else None
        if not isinstance(folder, str) or "\0" in folder:
            return web.json_response({"error": "cache_folder must be the path of a folder"}, status=400)
        choose_cache_folder(folder)
        return web.json_response(_settings())


def _settings() -> dict[str, str]:
    return {
        "cache_folder": str(cache_folder()),
        "default_cache_folder": str(default_cache_folder()),
        "version": __version__,
    }
