"""Where a real ComfyUI checkout is, for what needs one: the folder that the environment variable COMFYUI_PATH names.

The checkout goes to the end of the import path: it has a package called `tests` of its own. So do not put it into
PYTHONPATH.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

VARIABLE = "COMFYUI_PATH"


def find_checkout() -> Path | None:
    """The checkout's folder; None where there is none."""
    path = Path(os.environ.get(VARIABLE, ""))
    return path.resolve() if (path / "comfy").is_dir() and os.environ.get(VARIABLE) else None


def comfyui(module: str) -> Any:
    """A module of ComfyUI ("ldm.wan.model" for comfy.ldm.wan.model), which thinks that there is only a CPU."""
    path = find_checkout()
    if path is None:
        raise RuntimeError(f"set {VARIABLE} to the folder of a ComfyUI checkout")
    if str(path) not in sys.path:
        sys.path.append(str(path))
        importlib.import_module("comfy.cli_args").args.cpu = True
        _register_layers(importlib.import_module("comfy.ops"))
        torch.set_num_threads(1)
    return importlib.import_module(f"comfy.{module}")


def _register_layers(operations: Any) -> None:
    """Let QVD take ComfyUI's layers for what they are, as its nodes do."""
    from qvd_core.layer_kinds import register_layer_class

    for kinds in (operations.disable_weight_init, operations.manual_cast):
        register_layer_class(kinds.Linear, "linear")
        register_layer_class(kinds.Conv2d, "conv2d")
        register_layer_class(kinds.Conv3d, "conv3d")
