"""Where ComfyUI keeps QVD's files: scales in a folder of models, finished calibrations in a cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qvd_core import __version__
from qvd_core.cache import ScaleCache, cache_key
from qvd_core.fingerprint import structure_fingerprint, weight_probe
from qvd_nodes._comfy import ModelPatcher, folder_paths
from qvd_nodes.weights import PREFIX, denoiser

SCALES_FOLDER = "qvd_scales"
"""Folder of scales: below ComfyUI's models (to put some there) and below its output (where QVD Save Scales writes)."""

_chosen_folder: Path | None = None


def register_folders() -> None:
    """Let ComfyUI list the scales of both folders; called again it changes nothing."""
    for base in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(SCALES_FOLDER, os.path.join(base, SCALES_FOLDER))
    folder_paths.folder_names_and_paths[SCALES_FOLDER][1].add(".safetensors")


def default_cache_folder() -> Path:
    """`$QVD_CACHE`, or a folder beside the user's settings."""
    if "QVD_CACHE" in os.environ:
        return Path(os.environ["QVD_CACHE"])
    return Path(folder_paths.get_user_directory()) / "qvd" / "calibrations"


def cache_folder() -> Path:
    """Where calibrations are cached now."""
    return _chosen_folder or default_cache_folder()


def choose_cache_folder(folder: str) -> None:
    """Cache calibrations elsewhere from now on; an empty string goes back to the default."""
    global _chosen_folder
    _chosen_folder = Path(folder).expanduser() if folder else None


def scale_cache() -> ScaleCache:
    """The cache in the folder chosen now."""
    return ScaleCache(cache_folder())


def calibration_key(patcher: ModelPatcher, settings: Mapping[str, Any]) -> str:
    """One key for everything a calibration depends on: the MODEL's weights and patches, and `settings`."""
    return cache_key({"kind": "comfyui", "qvd": __version__, "model": _content_of_model(patcher), **settings})


def _content_of_model(patcher: ModelPatcher) -> str:
    """A hash of the structure, of samples of every weight, and of all patches; reads some pages of each tensor only."""
    model = denoiser(patcher)
    digest = hashlib.sha256(structure_fingerprint(model).encode())
    for name, parameter in model.named_parameters():
        kept = patcher.backup.get(PREFIX + name)
        tensor = parameter if kept is None else kept.weight
        digest.update(f"|{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(weight_probe(tensor).numpy().tobytes())
    for key in sorted(patcher.patches):
        digest.update(f"|{key}".encode())
        _feed(digest, patcher.patches[key])
    _feed(digest, _sampling_of(patcher))
    _feed(digest, patcher.object_patches)
    _feed(digest, patcher.model_options)
    return digest.hexdigest()[:32]


def _sampling_of(patcher: ModelPatcher) -> list[Any]:
    """What a node like ModelSamplingSD3 has changed: the buffers and numbers of the MODEL's `model_sampling`."""
    sampling = patcher.get_model_object("model_sampling")
    if not isinstance(sampling, nn.Module):
        return []
    numbers = {key: value for key, value in vars(sampling).items() if isinstance(value, (bool, int, float, str))}
    return [type(sampling).__name__, numbers, dict(sampling.named_buffers())]


def _feed(digest: Any, value: Any) -> None:
    """Add tensors by samples, containers and adapters by their parts, all else by its `repr`."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(weight_probe(value).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"|{key}".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "weights"):  # an adapter of ComfyUI: LoRA, LoHa, ...
        digest.update(type(value).__name__.encode())
        _feed(digest, value.weights)
    elif isinstance(value, (bool, int, float, str, type(None))):
        digest.update(f"<{value!r}>".encode())
    elif isinstance(value, nn.Module):
        digest.update(type(value).__name__.encode())
        _feed(digest, dict(value.named_parameters()))
    else:  # a function by its name, others by their type: a repr may hold an address, other in every run
        named = value if hasattr(value, "__qualname__") else type(value)
        digest.update(f"{named.__module__}.{named.__qualname__}".encode())
