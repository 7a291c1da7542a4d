"""A saved pipeline that imports QVD by itself, for the Hub: diffusers runs a file of the repository, if it may."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvd_core.errors import QVDError
from qvd_diffusers.config import QVDMethod

MODULE = "qvd_model"
LIBRARIES = ("diffusers", "transformers")

_CONTENT = '''"""Run by diffusers with trust_remote_code=True: the weights beside this file are quantized by QVD."""

import qvd_diffusers  # registers the quantization method
from {library} import {class_name}
'''


def write_import_hook(folder: str | Path) -> list[str]:
    """Let a saved pipeline load without `import qvd_diffusers`; returns the components that got the file.

    Beside the weights of each quantized component comes a `qvd_model.py`, and `model_index.json` names it. From then on
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` is all there is to write, with the qvd package
    installed. Without that flag a current diffusers refuses the folder and says why, even after `import qvd_diffusers`.

    Raises QVDError when the folder is no saved pipeline, or no component of it is quantized by QVD.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    components = {name: _source(folder, name, entry) for name, entry in index.items()}
    quantized = {name: source for name, source in components.items() if source is not None}
    if not quantized:
        raise QVDError(f"{folder} has no component that was quantized by QVD: save the quantized pipeline first.")
    for name, (library, class_name) in quantized.items():
        if library == MODULE:  # done before
            continue
        _write(folder / name / f"{MODULE}.py", _CONTENT.format(library=library, class_name=class_name))
        index[name] = [MODULE, class_name]
    _write(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    return list(quantized)


def _source(folder: Path, name: str, entry: Any) -> tuple[str, str] | None:
    """Library and class of a component that QVD quantized, None for another one."""
    if not (isinstance(entry, list) and len(entry) == 2 and (folder / name / "config.json").is_file()):
        return None
    recorded = _read_json(folder / name / "config.json").get("quantization_config")
    if not isinstance(recorded, Mapping) or recorded.get("quant_method") != QVDMethod.QVD:
        return None
    library, class_name = entry
    if library == MODULE:
        return library, class_name
    if library not in LIBRARIES or not str(class_name).isidentifier():
        raise QVDError(
            f"model_index.json: {name} is {entry!r}; only classes of diffusers and transformers can be named."
        )
    return library, class_name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise QVDError(f"{path} cannot be read ({error}): give the folder of a saved pipeline.") from error
    if not isinstance(content, dict):
        raise QVDError(f"{path} is no table of settings: give the folder of a saved pipeline.")
    return content


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise QVDError(f"cannot write {path}: {error}; the folder must be writable.") from error
