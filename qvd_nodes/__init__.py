"""QVD's node pack for ComfyUI, thin over `qvd_core`; importing it needs a running ComfyUI."""

from pathlib import Path

from qvd_nodes.extension import comfy_entrypoint

_HERE = Path(__file__).resolve().parent
WEB_DIRECTORY = str(
    next((folder for folder in (_HERE / "web", _HERE.parent / "web") if folder.is_dir()), _HERE / "web")
)
"""The front end's files: beside this package in a clone, inside it when pip-installed."""

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
