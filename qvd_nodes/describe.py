"""What the nodes tell about a MODEL, scales or a comparison: a few lines of text, and data for the front end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic, is_image_model
from qvd_core.fingerprint import structure_fingerprint
from qvd_core.ops import resolve_backend
from qvd_core.report import Report, collect, kept_layers
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import ModelPatcher, management
from qvd_nodes.calibrate import Calibration
from qvd_nodes.layers import QuantizedOp, quantized_layers, stored_tensors
from qvd_nodes.record import Record, record_of
from qvd_nodes.weights import denoiser

WORST = 10
PROBED_LAYERS = 4
ROWS = 1024  # of a typical call, to say which kernel runs it


def model_summary(patcher: ModelPatcher, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of a quantized MODEL that fit on its node (JSON types)."""
    record = record_of(patcher)
    layers = quantized_layers(denoiser(patcher))
    int8_bytes = management.module_size(denoiser(patcher))
    temporal = sum(layer.weight._params.recipe.plan.kind == "temporal" for layer in layers.values())
    return {
        "kind": "model",
        "bits": f"W{record.spec.weight_bits}A{record.spec.activation_bits}",
        "activation": record.spec.activation,
        "layers": len(layers),
        "temporal": temporal,
        "of_layers": record.layers_in_all,
        "kept": record.layers_in_all - len(layers),
        "float_bytes": record.float_bytes,
        "int8_bytes": int8_bytes,
        "saved": round(1 - int8_bytes / record.float_bytes, 4) if record.float_bytes else 0.0,
        "backend": resolve_backend(record.spec.backend, management.get_torch_device(), ROWS),
        "family": record.family,
        "calibrated": record.calibrated,
        "warnings": list(warnings),
    }


def model_text(summary: Mapping[str, Any]) -> str:
    """The same in words."""
    lines = [
        f"{summary['family']}: {summary['layers']} of {summary['of_layers']} layers in {summary['bits']}, "
        f"{'calibrated' if summary['calibrated'] else 'without calibration'}",
        f"{_megabytes(summary['float_bytes'])} -> {_megabytes(summary['int8_bytes'])} "
        f"({summary['saved']:.0%} less), kernels: {summary['backend']}",
        *summary["warnings"],
    ]
    return "\n".join(lines)


def scales_summary(calibration: Calibration, index: int = 0, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """The facts of one expert's scales (JSON types)."""
    scales = calibration.scales[index]
    figures = {name: values["sqnr_db"] for name, values in scales.report.items() if "sqnr_db" in values}
    worst = sorted(figures.items(), key=lambda item: item[1])[:WORST]
    return {
        "kind": "scales",
        "cache_hit": calibration.from_cache,
        "seconds": round(calibration.seconds, 2),
        "layers": len(scales.layers),
        "file": calibration.files[index],
        "warnings": list(warnings),
        "mean_sqnr_db": round(sum(figures.values()) / len(figures), 2) if figures else None,
        "worst": [[name, round(decibels, 2)] for name, decibels in worst],
    }


def scales_text(summary: Mapping[str, Any]) -> str:
    """The same in words."""
    how = "loaded from the cache" if summary["cache_hit"] else "calibrated"
    lines = [f"{how} in {summary['seconds']:.1f} s: {summary['layers']} layers"]
    if summary["worst"]:
        name, decibels = summary["worst"][0]
        lines.append(f"mean SQNR {summary['mean_sqnr_db']:.1f} dB, lowest {decibels:.1f} dB ({name})")
    return "\n".join([*lines, *summary["warnings"]])


def report_of(patcher: ModelPatcher, scales: Scales | None = None) -> Report:
    """The report of a quantized MODEL; without scales of what it remembers of its calibration."""
    record = record_of(patcher)
    model = denoiser(patcher)
    layers = quantized_layers(model)
    plan = {name: layer.weight._params.recipe.plan for name, layer in layers.items()}
    if scales is not None:
        _check_scales(model, layers, record, scales)
    figures = record.report if scales is None else scales.report
    return collect(
        plan,
        record.spec,
        {name: tuple(layer.weight.shape) for name, layer in layers.items()},
        _remembered(model, record) if scales is None else scales,
        family_name=record.family,
        model_name=type(model).__name__,
        kept=kept_layers(model, family_or_generic(model), record.spec, plan, figures),
        float_bytes=record.float_bytes,
        int8_bytes=management.module_size(model),
        layer_bytes={name: _bytes(layer) for name, layer in layers.items()},
    )


def _check_scales(model: nn.Module, layers: Mapping[str, QuantizedOp], record: Record, scales: Scales) -> None:
    """Raise QVDError for scales of another model, or of its other expert."""
    if structure_fingerprint(model) != scales.fingerprint:
        raise QVDError(f"these scales were calibrated on another model (a {scales.model_class}): connect this one's.")
    if record.spec.portable:  # its layers hold parts of others' weights
        return
    for name in [name for name in layers if name in scales.layers][:PROBED_LAYERS]:
        scales.check_weight(name, layers[name].weight.dequantize())


def _remembered(model: nn.Module, record: Record) -> Scales | None:
    """Scales that hold the figures of a calibration and nothing else; None for a MODEL without one."""
    if not record.report:
        return None
    report = {name: dict(figures) for name, figures in record.report.items()}
    return Scales(type(model).__name__, "", record.spec, report=report, calibrated_on=dict(record.calibrated_on))


def _bytes(layer: QuantizedOp) -> int:
    return sum(tensor.nbytes for name, tensor in stored_tensors(layer).items() if name != "comfy_quant")


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB" if count >= 2**20 else f"{count / 2**10:,.0f} kB"


def image_model_note(patcher: ModelPatcher, spec: QuantSpec) -> list[str]:
    """What to say of a MODEL that makes images; nothing for one that makes videos."""
    if not is_image_model(denoiser(patcher)):
        return []
    lines = ["An image model: QVD works on it, but is made for and measured on video models."]
    if spec.activation == "static_frame":
        lines.append("It has no frames: the scales per frame become one per layer.")
    return lines


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings that QVD logs meanwhile: they belong on the node, where the user looks."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("qvd_core", "qvd_nodes")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
