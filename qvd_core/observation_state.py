"""Observations on disk: a calibration that is interrupted goes on where it was, with the same result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.observation import Observation

FORMAT_VERSION = 1
KIND = "observation"
_TENSOR = "__tensor__"


def save_observations(path: Path, observations: Mapping[str, Observation], done: int) -> None:
    """Write what was seen so far, and that `done` samples are finished, atomically.

    Raises QVDError when the file cannot be written, or when a call of the model is more than JSON and tensors.
    """
    tensors: dict[str, Tensor] = {}
    described = {name: _describe(observation, f"{name}.", tensors) for name, observation in observations.items()}
    write_tensors(path, tensors, {"kind": KIND, "version": FORMAT_VERSION, "done": done, "observations": described})


def load_observations(path: Path, observations: Mapping[str, Observation]) -> int:
    """Go on from a file of `save_observations`; returns how many samples are done.

    observations: fresh ones, of the same models. Raises QVDError, leaving them fresh, when the file is damaged or of
    other models.
    """
    tensors, description = read_tensors(path, KIND)
    known = description.get("observations")
    if description.get("kind") != KIND or description.get("version") != FORMAT_VERSION or not isinstance(known, dict):
        raise QVDError(f"{path} holds no observations this QVD can go on from.")
    for name, observation in observations.items():
        if name not in known or set(known[name]["inputs"]) != set(observation.inputs):
            raise QVDError(f"{path} holds observations of another model.")
    try:
        for name, observation in observations.items():
            _restore(observation, f"{name}.", tensors, known[name])
        return int(description["done"])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise QVDError(f"{path} is damaged: {error!r}.") from error


def _describe(observation: Observation, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The JSON part of one observation; its tensors go into `tensors`."""
    inputs = {}
    for name, observer in observation.inputs.items():
        own, inputs[name] = observer.state()
        tensors.update({f"{prefix}inputs.{name}.{key}": tensor for key, tensor in own.items()})
    times = {}
    for name, feature in observation.features.items():
        times[name] = list(feature.features)
        if feature.features:
            tensors[f"{prefix}features.{name}"] = torch.stack(list(feature.features.values()))
    tensors[f"{prefix}generator"] = observation.generator.get_state()
    version, words, gauss = observation.choice.getstate()
    return {
        "passes": observation.passes,
        "inputs": inputs,
        "features": times,
        "choice": [version, list(words), gauss],
        "calls": _packed(observation.calls, f"{prefix}calls", tensors),
    }


def _restore(observation: Observation, prefix: str, tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    device = next((tensor.device for tensor in observation.running.parameters() if not tensor.is_meta), None)
    for name, observer in observation.inputs.items():
        start = f"{prefix}inputs.{name}."
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        observer.restore(own, known["inputs"][name], device or torch.device("cpu"))
    for name, feature in observation.features.items():
        times = known["features"][name]
        feature.features = dict(zip(times, tensors[f"{prefix}features.{name}"], strict=True)) if times else {}
    observation.generator.set_state(tensors[f"{prefix}generator"])
    version, words, gauss = known["choice"]
    observation.choice.setstate((version, tuple(words), gauss))
    observation.calls = _unpacked(known["calls"], tensors)
    observation.passes = known["passes"]


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` in JSON types, with its tensors in `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name, "device": str(value.device)}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        items = [_packed(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _packed(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    raise QVDError(f"a call of the model holds a {type(value).__name__}, which cannot be written to a file.")


def _unpacked(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if _TENSOR in packed:
        return tensors[packed[_TENSOR]].to(packed["device"])
    if "value" in packed:
        return packed["value"]
    if "dict" in packed:
        return {key: _unpacked(item, tensors) for key, item in packed["dict"].items()}
    kind = tuple if "tuple" in packed else list
    return kind(_unpacked(item, tensors) for item in packed[kind.__name__])
