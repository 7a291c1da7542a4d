"""`Scales`: what a calibration found, and its file format.

The file is one safetensors file. Tensors are named `<layer>.<field>`; a JSON description in its metadata says which
model, spec and prompts it belongs to, and how well each layer did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvd_core.errors import QVDError
from qvd_core.files import read_tensors, write_tensors
from qvd_core.fingerprint import probe_agrees, structure_fingerprint
from qvd_core.spec import MOST_BUCKETS, QuantSpec
from qvd_core.temporal import TemporalQuantizer

FORMAT_VERSION = 2
MOST_STEPS = 4096  # static scales of one layer
LARGEST_VALUE = 1e15  # far above any activation, far below what overflows when it is multiplied


@dataclass(frozen=True)
class LayerScales:
    """What one layer needs (float32): K input channels, all in the units of the layer's input.

    input_min, input_max, input_mean [K]: over prompts, all sampler steps, tokens and both guidance branches.
    input_shift, input_scale [K]: SCRI's z and s; x is quantized as (x - z) / s.
    weight_probe [<= 64]: samples of the weight, to recognise the model.
    static_step [1], bucket_steps [G] with bucket_boundaries [G-1] (timesteps, ascending), frame_steps [F]: activation
        steps per layer, range of timesteps and video frame, for the bits of the spec they were searched for. None in
        files of older versions and, frame_steps, for layers that do not know their frames.
    frame_order: how the rows run through the frames, "major" or "minor"; "" where it is not known.
    rotation: channels per Hadamard block behind shift and scale, 0 for none.
    rows_of: the layer under whose name a sample of this layer's input is kept ("" for none).
    """

    input_min: Tensor
    input_max: Tensor
    input_mean: Tensor
    input_shift: Tensor
    input_scale: Tensor
    weight_probe: Tensor
    static_step: Tensor | None = None
    bucket_steps: Tensor | None = None
    bucket_boundaries: Tensor | None = None
    frame_steps: Tensor | None = None
    frame_order: str = ""
    rotation: int = 0
    rows_of: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by field name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def settings(self) -> dict[str, Any]:
        """What is no tensor and not at its default, by field name."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in _SETTINGS}
        return {name: value for name, value in values.items() if value}


_PER_CHANNEL = ("input_min", "input_max", "input_mean", "input_shift", "input_scale")
_STEPS = ("static_step", "bucket_steps", "frame_steps")
_SETTINGS = {"frame_order": str, "rotation": int, "rows_of": str}
_REQUIRED = (*_PER_CHANNEL, "weight_probe")
_OPTIONAL = (*_STEPS, "bucket_boundaries")


@dataclass(repr=False)
class Scales:
    """Calibration result of one model.

    model_class, fingerprint: the model it was calibrated on (`structure_fingerprint`).
    spec: the settings it was searched for.
    layers: scales of every GEMM layer that ran. temporal: HTDQ codebooks of the temporal projections.
    rows: samples of layer inputs, bfloat16 [S, K * taps], by the name of the first layer that reads them; only kept
        for rounding="gptq".
    report: layer -> figures (output SQNR in dB, coverage before and after, ...).
    calibrated_on: prompts, steps and whatever else the caller wants remembered.
    observed: small summaries of what calibration saw, for the pictures of `qvd_core.report`; plain JSON.
    """

    model_class: str
    fingerprint: str
    spec: QuantSpec
    layers: dict[str, LayerScales] = field(default_factory=dict)
    temporal: dict[str, TemporalQuantizer] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    calibrated_on: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write to `path`, atomically. Raises QVDError when the file cannot be written."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors.update({f"{name}.{key}": value.cpu() for key, value in layer.tensors().items()})
        tensors.update({f"{name}.rows": rows for name, rows in self.rows.items()})
        for name, quantizer in self.temporal.items():
            tensors.update({f"{name}.{key}": value for key, value in quantizer.to_tensors().items()})
        description = {
            "kind": "scales",
            "version": FORMAT_VERSION,
            "model_class": self.model_class,
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_dict(),
            "layers": {name: self.layers[name].settings() for name in sorted(self.layers)},
            "temporal": {name: [quantizer.name, quantizer.bits] for name, quantizer in self.temporal.items()},
            "report": self.report,
            "calibrated_on": self.calibrated_on,
            "observed": self.observed,
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
            settings = description["layers"]
            if isinstance(settings, list):  # version 1 had nothing to say of a layer
                settings = {name: {} for name in settings}
            layers = {name: _layer_of(name, _below(tensors, name), own) for name, own in settings.items()}
            return cls(
                model_class=str(description["model_class"]),
                fingerprint=str(description["fingerprint"]),
                spec=QuantSpec.from_dict(description["spec"]),
                layers=layers,
                temporal=temporal,
                rows=_rows(layers, tensors),
                report={name: _figures(values) for name, values in description["report"].items()},
                calibrated_on=dict(description["calibrated_on"]),
                observed=dict(description.get("observed", {})),  # not in files of older versions
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
        self._check_values(layers)
        found = {name: scales.input_shift.numel() for name, scales in self.layers.items()}
        found |= {name: size for name, codebook in self.temporal.items() if (size := codebook.offset.numel()) > 1}
        for name, size in found.items():
            module = layers.get(name)
            channels = getattr(module, "in_features", getattr(module, "in_channels", None))
            if channels is not None and size != channels:
                raise QVDError(
                    f"the scales of layer {name} have {size} channels, the layer has {channels}: calibrate this model."
                )

    def _check_values(self, layers: Mapping[str, nn.Module]) -> None:
        """Raise QVDError for values no calibration finds, and for input samples that are not of the layer's width."""
        try:
            for name, held in self.layers.items():
                check_layer_scales(name, held)
                rows, weight = self.rows.get(held.rows_of), getattr(layers.get(name), "weight", None)
                if rows is not None and isinstance(weight, Tensor) and rows.shape[1] != weight[0].numel():
                    raise QVDError(f"the input sample of layer {name} has {rows.shape[1]} columns")
        except QVDError as error:
            raise QVDError(f"these scales are damaged ({error}): calibrate again.") from None

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Raise QVDError unless `weight` is the one layer `name` was calibrated with (up to rounding, small edits)."""
        layer = self.layers.get(name)
        if layer is not None and not probe_agrees(layer.weight_probe, weight):
            raise QVDError(
                f"these scales were calibrated on another {self.model_class}: the weights of layer {name} differ. "
                "Calibrate this model."
            )

    def __repr__(self) -> str:
        """One line: the tensors themselves would fill pages."""
        differing = {key: value for key, value in self.spec.to_dict().items() if value != QuantSpec().to_dict()[key]}
        settings = ", ".join(f"{key}={value!r}" for key, value in differing.items())
        counts = f"{len(self.layers)} layers, {len(self.temporal)} temporal projections"
        return f"Scales({self.model_class}: {counts}{'; ' if settings else ''}{settings})"

    def summary(self) -> dict[str, float]:
        """Means over all layers of the report's figures, and the number of layers."""
        keys = sorted({key for figures in self.report.values() for key in figures})
        means = {}
        for key in keys:
            values = [figures[key] for figures in self.report.values() if key in figures]
            means[key] = sum(values) / len(values)
        return {"layers": float(len(self.layers)), "temporal_layers": float(len(self.temporal)), **means}


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    figures = {key: float(value) for key, value in values.items()}
    if any(math.isnan(figure) for figure in figures.values()):
        raise QVDError("the report holds NaN")
    return figures


def _below(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    prefix = layer + "."
    return {
        name[len(prefix) :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    }


def _layer_of(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LayerScales:
    missing = [key for key in _REQUIRED if key not in tensors]
    if missing:
        raise QVDError(f"layer {name} lacks {', '.join(missing)}")
    for key, value in settings.items():
        if key not in _SETTINGS or type(value) is not _SETTINGS[key]:
            raise QVDError(f"layer {name} has the unknown setting {key}={value!r}")
    present: dict[str, Any] = {key: tensors[key] for key in (*_REQUIRED, *_OPTIONAL) if key in tensors}
    layer = LayerScales(**present, **settings)
    check_layer_scales(name, layer)
    return layer


def _rows(layers: Mapping[str, LayerScales], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The samples that layers refer to, checked."""
    rows = {}
    for name, layer in layers.items():
        if not layer.rows_of:
            continue
        sample = tensors.get(f"{layer.rows_of}.rows")
        channels = len(layer.input_min)
        if sample is None or sample.dim() != 2 or len(sample) == 0 or sample.shape[1] % channels:
            found = "missing" if sample is None else f"{list(sample.shape)}"
            raise QVDError(f"the input sample of layer {name} is {found}, expected [S, {channels} * taps]")
        if sample.dtype != torch.bfloat16 or not sample.isfinite().all():
            raise QVDError(f"the input sample of layer {name} is {sample.dtype} or holds NaN")
        rows[layer.rows_of] = sample
    return rows


def check_layer_scales(name: str, layer: LayerScales) -> None:
    """Raise QVDError unless every tensor is float32, finite, of one length per kind, and scales are positive."""
    channels = layer.input_min.shape
    for key, tensor in layer.tensors().items():
        expected = channels if key in _PER_CHANNEL else tensor.shape[:1]
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or tensor.shape != expected:
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"float32 {list(expected)}"
            raise QVDError(f"{name}.{key} is {found}, expected {wanted}")
        if not (tensor.abs() <= LARGEST_VALUE).all():
            raise QVDError(f"{name}.{key} holds NaN or infinity, or values beyond any activation")
        if key in _STEPS and not (len(tensor) > 0 and (tensor > 0).all()):
            raise QVDError(f"{name}.{key} must be positive")
    if not (layer.input_scale >= 1 / LARGEST_VALUE).all():
        raise QVDError(f"{name}.input_scale must be positive")
    if not (layer.input_min <= layer.input_max).all():
        raise QVDError(f"{name}.input_min exceeds input_max")
    _check_counts(name, layer)


def _check_counts(name: str, layer: LayerScales) -> None:
    channels = len(layer.input_min)
    if layer.static_step is not None and len(layer.static_step) != 1:
        raise QVDError(f"{name}.static_step has {len(layer.static_step)} values, expected 1")
    if layer.static_step is None and (layer.bucket_steps is not None or layer.frame_steps is not None):
        raise QVDError(f"{name} has bucket_steps or frame_steps, but no static_step")
    for key, most in (("bucket_steps", MOST_BUCKETS), ("frame_steps", MOST_STEPS)):
        steps = getattr(layer, key)
        if steps is not None and len(steps) > most:
            raise QVDError(f"{name}.{key} has {len(steps)} values, at most {most} are possible")
    buckets, boundaries = layer.bucket_steps, layer.bucket_boundaries
    if (buckets is None) != (boundaries is None):
        raise QVDError(f"{name} has bucket_steps or bucket_boundaries without the other")
    if buckets is not None and boundaries is not None and not _separate(boundaries, len(buckets)):
        raise QVDError(f"{name}.bucket_boundaries must ascend, one fewer than the {len(buckets)} bucket_steps")
    if layer.frame_steps is not None and layer.frame_order not in ("major", "minor"):
        raise QVDError(f"{name}.frame_order is {layer.frame_order!r}, expected major or minor")
    if layer.rotation and (layer.rotation < 2 or layer.rotation.bit_count() != 1 or channels % layer.rotation):
        raise QVDError(f"{name}.rotation is {layer.rotation}, not a power of two that divides {channels} channels")


def _separate(boundaries: Tensor, count: int) -> bool:
    return len(boundaries) == count - 1 and bool((boundaries[:-1] <= boundaries[1:]).all())
