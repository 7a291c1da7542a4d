"""`qvd report`: the report of a quantized folder, a scales file or both, read from files without loading a model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.families import find_family
from qvd_core.plan import plan_from_dict
from qvd_core.report import Report, collect, write_pictures, write_report
from qvd_core.report.kept import reason
from qvd_core.report.places import natural_order
from qvd_core.scales import Scales
from qvd_diffusers.listing import (
    Stored,
    quantized_folders,
    read_headers,
    read_json,
    recorded_config,
    stored_weight,
)
from qvd_diffusers.streaming import split_name

FLOAT_BYTES = 4  # of an element in full precision: what a quantized folder was made from is not recorded


def add_options(command: argparse.ArgumentParser) -> None:
    """The grammar of `qvd report`."""
    command.add_argument("path", type=Path, help="quantized pipeline or model folder, scales file, or a report's JSON")
    command.add_argument("--scales", type=Path, help="what the folder was calibrated with: adds errors and ranges")
    command.add_argument("--title", default="", help="title of the page; default: the model's class")
    command.add_argument(
        "--png", type=Path, metavar="DIR", help="also write every picture as a PNG file to this folder"
    )
    command.add_argument(
        "--out", required=True, type=Path, help="page to write, e.g. report.html; its JSON goes beside it"
    )


def run_report(options: argparse.Namespace, scales: Path | Mapping[str, Path] | None) -> None:
    """`qvd report`; scales: the file of --scales, or those of several denoisers by component."""
    reports = read_reports(options.path, scales)
    for component, report in reports.items():
        several = component if len(reports) > 1 else ""
        path = options.out.with_name(f"{options.out.stem}.{several}{options.out.suffix}") if several else options.out
        print(write_report(path, report, options.title))
        if options.png is not None:
            for picture in write_pictures(options.png / several, report):
                print(picture)


def read_reports(path: Path, scales: Path | Mapping[str, Path] | None = None) -> dict[str, Report]:
    """The reports of what is at `path`, by component. Raises QVDError for anything that is not QVD's."""
    if path.is_file():
        if scales is not None:
            raise QVDError(f"--scales adds to a quantized folder, and {path} is a file: give one of the two.")
        return {
            "": Report.from_json(path.read_text(encoding="utf-8")) if path.suffix == ".json" else report_of_scales(path)
        }
    found = {}
    for folder in quantized_folders(path):
        own = scales.get(folder.name) if isinstance(scales, Mapping) else scales
        found[folder.name] = report_of_folder(folder, Scales.load(own) if own is not None else None)
    return found


def report_of_scales(path: Path) -> Report:
    """The report of a scales file alone: no weights, so neither kinds nor sizes."""
    scales = Scales.load(path)
    family = find_family(scales.model_class)
    return collect({}, scales.spec, {}, scales, family_name=family.name if family is not None else "")


def report_of_folder(
    folder: Path,
    scales: Scales | None,
    quality: Mapping[str, float] | None = None,
    speed: Mapping[str, float] | None = None,
) -> Report:
    """The report of a quantized model's folder, from its config.json and the headers of its files.

    scales: what it was calibrated with. quality, speed: measured figures by name, see `qvd_core.report.collect`.
    """
    config, tensors = recorded_config(folder), read_headers(folder)
    plan = plan_from_dict(config.layers or {})
    model_class = str(read_json(folder / "config.json").get("_class_name", ""))
    family = find_family(model_class)
    sizes = dict.fromkeys(plan, 0)
    elements = 0
    kept = {}
    for name, stored in tensors.items():
        layer, part = split_name(name)
        if layer in plan:
            sizes[layer] += stored.bytes
        elif part == "weight" and len(stored.shape) > 1:
            kept[layer] = reason(layer, family, config.spec, scales.report if scales is not None else None)
        if layer not in plan or part == "bias":  # the rest came with quantization
            elements += stored.elements
    plan = {name: plan[name] for name in natural_order(plan)}  # the file has them in the order of the alphabet
    shapes = {name: _shape(stored_weight(name, tensors)) for name in plan}
    elements += sum(math.prod(shape) for shape in shapes.values())
    arguments: dict[str, Any] = {
        "family_name": family.name if family is not None else "",
        "model_name": model_class,
        "kept": kept,
        "float_bytes": FLOAT_BYTES * elements,
        "int8_bytes": sum(stored.bytes for stored in tensors.values()),
        "layer_bytes": sizes,
        "quality": quality,
        "speed": speed,
    }
    return collect(plan, config.spec, shapes, scales, **arguments)


def _shape(weight: Stored) -> tuple[int, ...]:
    """Of the float weight: two packed codes share a byte, and packing flattens the taps of a convolution."""
    return (weight.shape[0], 2 * weight.shape[1]) if weight.dtype == "U8" else weight.shape
