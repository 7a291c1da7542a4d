"""What tests do to the stubs. ComfyUI has no such module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from server import PromptServer


def use_folder(base: Path) -> None:
    """Keep all of ComfyUI's folders below `base`, empty but for `models/diffusion_models`."""
    folder_paths._base = base
    folder_paths.base_path = str(base)
    folder_paths.models_dir = str(base / "models")
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    folder_paths.folder_names_and_paths.clear()
    outputs = base / "output" / "diffusion_models"
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(models), str(outputs)], {".safetensors"})


def start_server() -> PromptServer:
    """A server with a browser that has asked for what is running."""
    server = PromptServer(None)
    server.client_id = "browser"
    return server


def stop_server() -> None:
    if hasattr(PromptServer, "instance"):
        del PromptServer.instance


def messages(event: str) -> list[dict[str, Any]]:
    """What was sent to the browser by that name."""
    return [data for name, data, _ in PromptServer.instance._sent if name == event]


def reset() -> None:
    """Nothing loaded, nobody interrupting, no server, no progress bar."""
    comfy.model_management.unload_all_models()
    comfy.model_management.interrupt_current_processing(False)
    comfy.utils.set_progress_bar_global_hook(None)
    stop_server()
