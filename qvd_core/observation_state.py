"""Observations on disk: a calibration that is interrupted goes on where it was, with the same result."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.observation import CALLS_KEPT, Observation
from qvd_core.observe import ROWS_KEPT, InputObserver

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


def load_observations(path: Path, observations: Mapping[str, Observation], samples: int | None = None) -> int:
    """Go on from a file of `save_observations`; returns how many samples are done.

    observations: fresh ones, of the same models. samples: how many there are in all, where that is known.
    Raises QVDError, leaving them fresh, when the file is damaged or of other models.
    """
    tensors, description = read_tensors(path, KIND)
    known = description.get("observations")
    if description.get("kind") != KIND or description.get("version") != FORMAT_VERSION or not isinstance(known, dict):
        raise QVDError(f"{path} holds no observations this QVD can go on from.")
    try:
        if any(not _names_agree(observation, known.get(name)) for name, observation in observations.items()):
            raise QVDError("it holds observations of another model")
        done = _counted(description["done"], 1, math.inf if samples is None else samples - 1)
        # Everything is read before anything is changed: what is half restored would be counted twice.
        states = {
            name: _State.read(observation, f"{name}.", tensors, known[name])
            for name, observation in observations.items()
        }
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, RuntimeError, TypeError) as error:
        raise QVDError(f"{path} is damaged: {error!r}.") from error
    except ValueError as error:
        raise QVDError(f"{path} cannot be gone on from: {error}.") from error
    for name, state in states.items():
        state.restore(observations[name])
    return done


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


@dataclass(frozen=True)
class _State:
    """One observation as its file has it, checked. inputs: tensors and values by layer."""

    inputs: dict[str, tuple[dict[str, Tensor], dict[str, Any]]]
    features: dict[str, dict[float, Tensor]]
    generator: Tensor
    choice: Any
    calls: list[Any]
    passes: int

    @classmethod
    def read(
        cls, observation: Observation, prefix: str, tensors: Mapping[str, Tensor], known: Mapping[str, Any]
    ) -> _State:
        """Raises one of the errors that `load_observations` translates when anything is not as it was written."""
        inputs = {}
        for name, observer in observation.inputs.items():
            start = f"{prefix}inputs.{name}."
            own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
            inputs[name] = own, known["inputs"][name]
            _check_input(name, observer, *inputs[name])
        features = {}
        for name in observation.features:
            times, key = known["features"][name], f"{prefix}features.{name}"
            if times:
                _check_tensor(key, tensors[key], len(times), _columns(observation.layers[name])[0])
            features[name] = dict(zip(map(_finite, times), tensors[key], strict=True)) if times else {}
        version, words, gauss = known["choice"]
        choice = (version, tuple(words), gauss)
        random.Random().setstate(choice)
        torch.Generator().set_state(tensors[f"{prefix}generator"])
        passes = _counted(known["passes"], 0, math.inf)
        calls = _unpacked(known["calls"], tensors)
        if len(calls) != min(passes, CALLS_KEPT) or not all(map(_is_call, calls)):
            raise ValueError(f"its {len(calls)} calls are not those of {passes} forward passes")
        return cls(inputs, features, tensors[f"{prefix}generator"], choice, calls, passes)

    def restore(self, observation: Observation) -> None:
        """Make an observation go on from here."""
        device = next((tensor.device for tensor in observation.running.parameters() if not tensor.is_meta), None)
        for name, (tensors, values) in self.inputs.items():
            observation.inputs[name].restore(tensors, values, device or torch.device("cpu"))
        for name, features in self.features.items():
            observation.features[name].features = features
        observation.generator.set_state(self.generator)
        observation.choice.setstate(self.choice)
        observation.calls, observation.passes = self.calls, self.passes


def _names_agree(observation: Observation, known: Any) -> bool:
    if not isinstance(known, dict):
        return False
    return set(known["inputs"]) == set(observation.inputs) and set(known["features"]) == set(observation.features)


def _check_input(name: str, observer: InputObserver, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are what an observer of this layer keeps, with sound values."""
    count, times = _counted(values["count"], 0, math.inf), values["bucket_times"]
    if values["frame_order"] not in (None, observer.frame_order):
        raise ValueError(f"layer {name} has the frame order {values['frame_order']!r}")
    if bool(count) != bool(times) or (not count and tensors):
        raise ValueError(f"layer {name} has {count} rows at {len(times)} timesteps")
    if not count:
        return
    if any(_finite(first) > _finite(last) for first, last in times):
        raise ValueError(f"the timesteps of layer {name} do not ascend")
    channels, columns = _columns(observer.module)
    rows, frames = len(tensors["_keys"]), len(tensors.get("frame_minimum", ()))
    if not 0 < rows <= ROWS_KEPT:
        raise ValueError(f"layer {name} has a sample of {rows} rows")
    shapes = {
        "bucket_minimum": (len(times), channels),
        "bucket_maximum": (len(times), channels),
        "total": (channels,),
        "_rows": (rows, columns),
        "_origins": (rows, 2),
        "_keys": (rows,),
        **({"frame_minimum": (frames, channels), "frame_maximum": (frames, channels)} if frames else {}),
    }
    if values["frame_order"] is not None and not frames:
        raise ValueError(f"layer {name} has no ranges per frame")
    for key, shape in shapes.items():
        _check_tensor(f"{name}.{key}", tensors[key], *shape)


def _check_tensor(name: str, tensor: Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected float32 {list(shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")


def _columns(module: nn.Module) -> tuple[int, int]:
    """Input channels of a layer, and elements of a row it multiplies."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.in_channels * math.prod(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return module.in_features, module.in_features


def _counted(value: Any, least: float, most: float) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"it counts {value!r}, expected a number from {least} to {most}")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no timestep")
    return float(value)


def _is_call(call: Any) -> bool:
    return type(call) is tuple and len(call) == 2 and type(call[0]) is tuple and type(call[1]) is dict


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
        device = torch.device(packed["device"])
        if device.type == "meta":
            raise ValueError(f"{packed[_TENSOR]} is said to be on the device {device}")
        return tensors[packed[_TENSOR]].to(device)
    if "value" in packed:
        return packed["value"]
    if "dict" in packed:
        return {key: _unpacked(item, tensors) for key, item in packed["dict"].items()}
    kind = tuple if "tuple" in packed else list
    return kind(_unpacked(item, tensors) for item in packed[kind.__name__])
