"""`Scales`: what a calibration found, and its file format.

The file is one safetensors file. Tensors are named `<layer>.<field>`; a JSON description in its metadata says which
model, spec and prompts it belongs to, and how well each layer did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.fingerprint import probe_agrees, structure_fingerprint
from qvd_core.spec import QuantSpec
from qvd_core.temporal import TemporalQuantizer

FORMAT_VERSION = 1
LARGEST_VALUE = 1e15  # far above any activation, far below what overflows when it is multiplied


@dataclass(frozen=True)
class LayerScales:
    """What one layer needs (float32): K input channels, all in the units of the layer's input.

    input_min, input_max, input_mean [K]: over prompts, all sampler steps, tokens and both guidance branches.
    input_shift, input_scale [K]: SCRI's z and s; x is quantized as (x - z) / s.
    weight_probe [<= 64]: samples of the weight, to recognise the model.
    """

    input_min: Tensor
    input_max: Tensor
    input_mean: Tensor
    input_shift: Tensor
    input_scale: Tensor
    weight_probe: Tensor


_PER_CHANNEL = ("input_min", "input_max", "input_mean", "input_shift", "input_scale")


@dataclass
class Scales:
    """Calibration result of one model.

    model_class, fingerprint: the model it was calibrated on (`structure_fingerprint`).
    spec: the settings it was searched for.
    layers: scales of every GEMM layer that ran. temporal: HTDQ codebooks of the temporal projections.
    report: layer -> figures (output SQNR in dB, coverage before and after, ...).
    calibrated_on: prompts, steps and whatever else the caller wants remembered.
    """

    model_class: str
    fingerprint: str
    spec: QuantSpec
    layers: dict[str, LayerScales] = field(default_factory=dict)
    temporal: dict[str, TemporalQuantizer] = field(default_factory=dict)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    calibrated_on: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, atomically. Raises QVDError when the file cannot be written."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors.update({f"{name}.{item.name}": getattr(layer, item.name) for item in fields(layer)})
        for name, quantizer in self.temporal.items():
            tensors.update({f"{name}.{key}": value for key, value in quantizer.to_tensors().items()})
        description = {
            "kind": "scales",
            "version": FORMAT_VERSION,
            "model_class": self.model_class,
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_dict(),
            "layers": sorted(self.layers),
            "temporal": {name: [quantizer.name, quantizer.bits] for name, quantizer in self.temporal.items()},
            "report": self.report,
            "calibrated_on": self.calibrated_on,
        }
        return write_tensors(path, tensors, description)

    @classmethod
    def load(cls, path: str | Path) -> Scales:
        """Read and validate a file of `save`. Raises QVDError when anything in it is wrong."""
        tensors, description = read_tensors(path, "scales")
        version = description.get("version")
        if description.get("kind") != "scales" or not isinstance(version, int):
            raise QVDError(f"{path} is not a scales file of QVD.")
        if version > FORMAT_VERSION:
            raise QVDError(f"{path} has scales format {version}, this QVD reads up to {FORMAT_VERSION}: update QVD.")
        try:
            temporal = {
                name: TemporalQuantizer.from_tensors(kind, bits, _below(tensors, name))
                for name, (kind, bits) in description["temporal"].items()
            }
            layers = {name: _layer_from_tensors(name, _below(tensors, name)) for name in description["layers"]}
            return cls(
                model_class=str(description["model_class"]),
                fingerprint=str(description["fingerprint"]),
                spec=QuantSpec.from_dict(description["spec"]),
                layers=layers,
                temporal=temporal,
                report={name: _figures(values) for name, values in description["report"].items()},
                calibrated_on=dict(description["calibrated_on"]),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise QVDError(f"scales file {path} is damaged ({error}): calibrate again.") from error

    def check_structure(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Raise QVDError unless these scales were calibrated on a model built like `model`."""
        if structure_fingerprint(model) != self.fingerprint:
            raise QVDError(
                f"these scales were calibrated on another model (a {self.model_class} with fingerprint "
                f"{self.fingerprint[:8]}; this {type(model).__name__} has {structure_fingerprint(model)[:8]}): "
                "calibrate this model."
            )
        found = {name: scales.input_shift.numel() for name, scales in self.layers.items()}
        found |= {name: size for name, codebook in self.temporal.items() if (size := codebook.offset.numel()) > 1}
        for name, size in found.items():
            module = layers.get(name)
            channels = getattr(module, "in_features", getattr(module, "in_channels", None))
            if channels is not None and size != channels:
                raise QVDError(
                    f"the scales of layer {name} have {size} channels, the layer has {channels}: calibrate this model."
                )

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Raise QVDError unless `weight` is the one layer `name` was calibrated with (up to rounding, small edits)."""
        layer = self.layers.get(name)
        if layer is not None and not probe_agrees(layer.weight_probe, weight):
            raise QVDError(
                f"these scales were calibrated on another {self.model_class}: the weights of layer {name} differ. "
                "Calibrate this model."
            )

    def summary(self) -> dict[str, float]:
        """Means over all layers of the report's figures, and the number of layers."""
        keys = sorted({key for figures in self.report.values() for key in figures})
        means = {}
        for key in keys:
            values = [figures[key] for figures in self.report.values() if key in figures]
            means[key] = sum(values) / len(values)
        return {"layers": float(len(self.layers)), "temporal_layers": float(len(self.temporal)), **means}


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _below(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    prefix = layer + "."
    return {
        name[len(prefix) :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    }


def _layer_from_tensors(name: str, tensors: Mapping[str, Tensor]) -> LayerScales:
    missing = [item.name for item in fields(LayerScales) if item.name not in tensors]
    if missing:
        raise QVDError(f"layer {name} lacks {', '.join(missing)}")
    layer = LayerScales(**{item.name: tensors[item.name] for item in fields(LayerScales)})
    check_layer_scales(name, layer)
    return layer


def check_layer_scales(name: str, layer: LayerScales) -> None:
    """Raise QVDError unless every tensor is float32, finite, of one length per kind, and scales are positive."""
    channels = layer.input_min.shape
    for item in fields(layer):
        tensor: Tensor = getattr(layer, item.name)
        expected = channels if item.name in _PER_CHANNEL else tensor.shape[:1]
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or tensor.shape != expected:
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"float32 {list(expected)}"
            raise QVDError(f"{name}.{item.name} is {found}, expected {wanted}")
        if not (tensor.abs() <= LARGEST_VALUE).all():
            raise QVDError(f"{name}.{item.name} holds NaN or infinity, or values beyond any activation")
    if not (layer.input_scale >= 1 / LARGEST_VALUE).all():
        raise QVDError(f"{name}.input_scale must be positive")
    if not (layer.input_min <= layer.input_max).all():
        raise QVDError(f"{name}.input_min exceeds input_max")
