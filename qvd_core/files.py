"""Files that are whole or not there: write to a temporary name, then rename; read with one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qvd_core.errors import QVDError

METADATA_KEY = "qvd"


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write tensors and a JSON description as one safetensors file, atomically. Raises QVDError when it cannot.

    What JSON has no type for is written as its `repr`. metadata: further entries of the file's own, of other programs.
    """
    own = {"format": "pt", METADATA_KEY: json.dumps(description, sort_keys=True, default=repr)}
    with _whole(path) as partial:
        save_file(_owning_their_memory(tensors), partial, {**(metadata or {}), **own})
    return Path(path)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file of any kind, atomically. Raises QVDError when it cannot."""
    with _whole(path) as partial:
        partial.write_bytes(content)
    return Path(path)


@contextmanager
def _whole(path: str | Path) -> Iterator[Path]:
    """The temporary file to write, which takes the name `path` at the end. Raises QVDError when that cannot be done."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and not path.is_file():
            raise QVDError(f"cannot write {path}: it is a folder or a device; give the path of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise QVDError(f"cannot write {path}: {error}; choose a folder that is writable and has room.") from error
    finally:
        with suppress(OSError):  # not there in the first place, or in a folder that never was
            partial.unlink()


def _owning_their_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; copies of those that share memory, as statistics of one input may: no file can."""
    owned: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in memory or storage.nbytes() != tensor.nbytes
        owned[name] = tensor.clone() if shared else tensor
        memory.add(owned[name].untyped_storage().data_ptr())
    return owned


def read_tensors(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `write_tensors`; returns its tensors and its description.

    `what` names the expected content in errors. Raises QVDError when the file is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise QVDError(f"{what} file {path} does not exist: check the path, or calibrate to make one.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise QVDError(f"{what} file {path} is damaged or no safetensors file ({error}): make it again.") from error
    try:
        description = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise QVDError(f"{path} is a safetensors file but not a {what} file of QVD.") from error
    if not isinstance(description, dict):
        raise QVDError(f"{path} is a safetensors file but not a {what} file of QVD.")
    return tensors, description
