"""Where a denoiser's float weights are when they are not simply in its layers: with an offloading hook, or in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.weight_source import WeightSource, own_weights


def weights_behind_hooks(model: nn.Module) -> WeightSource:
    """The weights of a model that is in memory, or offloaded by accelerate or by diffusers."""
    layers = dict(model.named_modules())
    read = own_weights(layers)
    groups = _groups_on_disk(model)

    def fetch(name: str) -> tuple[Tensor, Tensor | None]:
        layer = layers[name]
        away = layer in groups or any(parameter.is_meta for parameter in layer.parameters(recurse=False))
        if not away:
            return read(name)
        with _brought_back(layer, groups.get(layer)):
            weight, bias = read(name)
            return weight.clone(), None if bias is None else bias.clone()

    return fetch


def is_offloaded_to_disk(model: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps weights in files: the tensors in the layers then hold anything."""
    return bool(_groups_on_disk(model))


def _groups_on_disk(model: nn.Module) -> dict[nn.Module, Any]:
    """By layer, the group of diffusers' group offloading that keeps its weights in a file."""
    groups: dict[nn.Module, Any] = {}
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        group: Any = getattr(hook, "group", None)
        if group is not None and group.offload_to_disk_path:
            groups.update((layer, group) for part in group.modules for layer in part.modules())
    return groups


@contextmanager
def _brought_back(layer: nn.Module, group: Any) -> Iterator[None]:
    if group is None:
        with align_module_device(layer):
            yield
        return
    group.onload_()
    try:
        yield
    finally:
        group.offload_()


class WeightFiles:
    """Float weights of a denoiser in safetensors files, read one layer at a time."""

    def __init__(self, location: str | Path, component: str, device: torch.device):
        """Find the files; raises QVDError when there are none.

        location: a pipeline's folder or its name on the Hub, a model's folder, or one file.
        """
        self.device = device
        self.files = _find_files(Path(location), component) or _download(str(location), component)
        self.home = {name: path for path in self.files for name in _names_in(path)}

    def __call__(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a layer. Raises QVDError when the files do not have it in floating point."""
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.home else None
        return self.tensor(f"{name}.weight"), bias

    def tensor(self, name: str) -> Tensor:
        if name not in self.home:
            raise QVDError(f"{self.files[0].parent} has no {name}: these are the weights of another model.")
        with safe_open(self.home[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise QVDError(f"{name} in {self.home[name]} is {tensor.dtype}: give the full-precision weights.")
        return tensor.to(self.device, copy=True)

    def check_shapes(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise QVDError unless every layer's weight is there and has the layer's shape; reads no weights."""
        for name, layer in layers.items():
            key = f"{name}.weight"
            if key not in self.home:
                self.tensor(key)
            with safe_open(self.home[key], framework="pt") as file:
                shape = list(file.get_slice(key).get_shape())
            expected = list(layer.weight.shape)  # type: ignore[arg-type]
            if shape != expected:
                raise QVDError(f"{key} is {shape} in {self.home[key]}, the model's is {expected}: another model.")


def float_skeleton(model: nn.Module) -> nn.Module:
    """The full-precision model that a quantized diffusers model was made from, on the meta device."""
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}  # type: ignore[union-attr, operator]
    with init_empty_weights():
        return type(model).from_config(config).eval()  # type: ignore[attr-defined]


def _find_files(location: Path, component: str) -> list[Path]:
    if location.is_file():
        return [location]
    for folder in (location / component, location):
        indices = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
        if indices:  # the shortest name has no variant
            names = json.loads(indices[0].read_text())["weight_map"].values()
            return sorted({folder / name for name in names})
        single = sorted(folder.glob("*.safetensors"), key=lambda path: len(path.name))
        if single:
            return single[:1]
    if location.exists():
        raise QVDError(f"{location} holds no safetensors weights of {component!r}.")
    return []


def _download(name: str, component: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(name, allow_patterns=[f"{component}/*.json", f"{component}/*.safetensors"])
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise QVDError(
            f"weights={name!r} is neither a folder, a file nor a name on the Hub that can be had."
        ) from error
    files = _find_files(Path(folder), component)
    assert files
    return files


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise QVDError(f"{path} is missing or damaged ({error}): download it again.") from error
