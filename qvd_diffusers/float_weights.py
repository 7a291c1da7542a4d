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
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.fingerprint import weight_probe
from qvd_core.weight_source import WeightSource, own_weights
from qvd_diffusers.residence import groups_on_disk


def weights_behind_hooks(model: nn.Module) -> WeightSource:
    """The weights of a model that is in memory, or offloaded by accelerate or by diffusers."""
    layers = dict(model.named_modules())
    read = own_weights(layers)
    groups = groups_on_disk(model)

    def fetch(name: str) -> tuple[Tensor, Tensor | None]:
        layer = layers[name]
        away = layer in groups or any(parameter.is_meta for parameter in layer.parameters(recurse=False))
        if not away:
            return read(name)
        with _brought_back(layer, groups.get(layer)):
            weight, bias = read(name)
            return weight.clone(), None if bias is None else bias.clone()

    return fetch


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
        if not isinstance(location, (str, Path)) or not str(location):
            raise QVDError(f"weights must be a folder, a file or a name on the Hub, got {location!r}.")
        self.device = device
        self.files = _find_files(Path(location), component) or _download(str(location), component)
        self.home: dict[str, Path] = {}
        for path in self.files:
            for name in _names_in(path):
                if name in self.home:
                    raise QVDError(
                        f"{name} is in {self.home[name].name} and in {path.name}: these files are of different models."
                    )
                self.home[name] = path

    def __call__(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a layer. Raises QVDError when the files do not have it in floating point."""
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.home else None
        return self.tensor(f"{name}.weight"), bias

    def _file_of(self, name: str) -> Path:
        if name not in self.home:
            raise QVDError(f"{self.files[0].parent} has no {name}: these are the weights of another model.")
        return self.home[name]

    def probe(self, name: str) -> Tensor:
        """float32 [<= 64] samples of a tensor of any type; of the file, only their pages are read."""
        with _opened(self._file_of(name)) as file:
            return weight_probe(file.get_tensor(name))

    def tensor(self, name: str) -> Tensor:
        with _opened(self._file_of(name)) as file:
            tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise QVDError(f"{name} in {self.home[name]} is {tensor.dtype}: give the full-precision weights.")
        return tensor.to(self.device, copy=True)

    def check_shapes(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise QVDError unless every layer's weight and bias are there in the layer's shape; reads no weights."""
        for name, layer in layers.items():
            expected = {f"{name}.{kind}": list(own.shape) for kind, own in layer.named_parameters(recurse=False)}
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in self.home and key not in expected:
                    raise QVDError(f"{self.files[0].parent} has a {key}, the model has none: another model.")
                if key in expected:
                    self._check_shape(key, expected[key])

    def _check_shape(self, key: str, expected: list[int]) -> None:
        with _opened(self._file_of(key)) as file:
            shape = list(file.get_slice(key).get_shape())
        if shape != expected:
            raise QVDError(f"{key} is {shape} in {self.home[key]}, the model's is {expected}: another model.")


def float_skeleton(model: nn.Module) -> nn.Module:
    """The full-precision model that a quantized diffusers model was made from, on the meta device."""
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}  # type: ignore[union-attr, operator]
    with init_empty_weights():
        return type(model).from_config(config).eval()  # type: ignore[attr-defined]


def _find_files(location: Path, component: str) -> list[Path]:
    if _exists(location) and location.is_file():
        return [location]
    for folder in (location / component, location) if _exists(location) else ():
        # The shortest name has no variant; what diffusers does not write, as an adapter beside the model, comes last.
        indices = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
        if indices:
            return _files_of_index(indices[0])
        single = sorted(folder.glob("*.safetensors"), key=lambda path: (not _is_model(path), len(path.name)))
        if single:
            return single[:1]
    if _exists(location):
        raise QVDError(f"{location} holds no safetensors weights of {component!r}.")
    return []


def _exists(location: Path) -> bool:
    try:
        return location.exists()
    except OSError:  # no name a file can have
        return False


def _is_model(path: Path) -> bool:
    return path.name.startswith(Path(SAFETENSORS_WEIGHTS_NAME).stem)


def _files_of_index(path: Path) -> list[Path]:
    """The files an index names, all of them beside it: an index is no way to other places of the disk."""
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QVDError(f"{path} is no index of a sharded model ({error!r}): download it again.") from error
    strange = [name for name in names if not isinstance(name, str) or not name or Path(name).name != name]
    if strange or not names:
        raise QVDError(f"{path} names the files {strange}, not files beside it: download it again.")
    return sorted(path.with_name(name) for name in names)


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
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises QVDError when it cannot be read, or no longer has what it had."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise QVDError(f"{path} is missing or damaged ({error}): download it again.") from error
