"""Tables of what is inside a quantized model folder or a scales file, read from headers, without loading a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qvd_core.errors import QVDError
from qvd_core.plan import LayerPlan, plan_from_dict, plan_to_list
from qvd_core.scales import Scales
from qvd_diffusers.config import DENOISERS, QVDConfig
from qvd_diffusers.streaming import split_name

BYTES = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its shape and the type's name as safetensors writes it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        return self.elements * BYTES.get(self.dtype, 4)


def describe(path: str | Path) -> str:
    """The listing of a pipeline folder, a model folder or a scales file. Raises QVDError for anything else."""
    path = Path(path)
    if path.is_file():
        return describe_scales(Scales.load(path))
    return "\n\n".join(describe_model(folder) for folder in quantized_folders(path))


def recorded_method(folder: Path) -> str | None:
    """The quantization method in a model folder's config.json; None when there is none."""
    entry = read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").is_file() else None
    return str(entry.get("quant_method")) if isinstance(entry, Mapping) else None


def quantized_folders(path: Path) -> list[Path]:
    """The folder itself, or the denoisers below it, as far as QVD quantized them. Raises QVDError for none."""
    if not path.is_dir():
        raise QVDError(f"{path} does not exist: give a pipeline folder, a model folder or a scales file.")
    folders = [folder for folder in (path, *(path / name for name in DENOISERS)) if recorded_method(folder) == "qvd"]
    if not folders:
        raise QVDError(f"{path} holds no model quantized by QVD (no config.json with quant_method 'qvd').")
    return folders


def recorded_config(folder: Path) -> QVDConfig:
    """The quantization settings and the plan that a quantized model's folder records."""
    return QVDConfig.from_dict(read_json(folder / "config.json")["quantization_config"])


def describe_model(folder: Path) -> str:
    """One line per quantized layer, and the sums."""
    config = recorded_config(folder)
    plan = plan_from_dict(config.layers or {})
    tensors = read_headers(folder)
    per_layer: dict[str, list[Stored]] = {name: [] for name in plan}
    for name, stored in tensors.items():
        per_layer.get(split_name(name)[0], []).append(stored)
    rows = [_layer_row(name, layer, tensors, per_layer[name]) for name, layer in plan.items()]
    quantized = sum(stored.bytes for group in per_layer.values() for stored in group)
    total = sum(stored.bytes for stored in tensors.values())
    # What the same model takes in full precision: the weights of the plan in float32, without the added tensors.
    added = {name for name in tensors if split_name(name)[0] in plan and split_name(name)[1] not in ("weight", "bias")}
    full = sum(4 * _float_elements(name, stored, plan) for name, stored in tensors.items() if name not in added)
    kinds = Counter(layer.kind for layer in plan.values())
    summary = (
        f"{folder}: {config!r}\n"
        f"{len(plan)} quantized layers ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}), "
        f"{megabytes(quantized)}; the rest {megabytes(total - quantized)}; together {megabytes(total)}, "
        f"{total / full:.2f} of float32."
    )
    kept = [name for name, stored in tensors.items() if split_name(name)[0] not in plan and len(stored.shape) > 1]
    rest = f"Kept in floating point: {', '.join(sorted(kept)) or 'nothing'}."
    if config.attention is not None:
        rest += f"\nAttention: {config.attention!r} is recorded; what it means here: qvd inspect --kernels."
    return f"{table(('layer', 'kind', 'weight', 'beside it', 'bytes'), rows)}\n{summary}\n{rest}"


def _float_elements(name: str, stored: Stored, plan: Mapping[str, LayerPlan]) -> int:
    """Elements of the float tensor behind a stored one: a packed weight holds two codes per byte."""
    packed = stored.dtype == "U8" and split_name(name)[1] == "weight" and split_name(name)[0] in plan
    return stored.elements * (2 if packed else 1)


def _layer_row(name: str, layer: LayerPlan, tensors: Mapping[str, Stored], own: Sequence[Stored]) -> tuple[str, ...]:
    weight = stored_weight(name, tensors)
    shape = "x".join(map(str, weight.shape))
    size = sum(stored.bytes for stored in own)
    return (name, layer.kind, f"{weight.dtype} {shape}", ", ".join(plan_to_list(layer)[1:]) or "-", str(size))


def stored_weight(name: str, tensors: Mapping[str, Stored]) -> Stored:
    """The weight of a planned layer. Raises QVDError when the file lacks it."""
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        raise QVDError(f"config.json plans layer {name}, the weights file has no {name}.weight: it is incomplete.")
    return weight


def describe_scales(scales: Scales) -> str:
    """One line per calibrated layer with its figures, and where the scales come from."""
    columns = sorted({key for figures in scales.report.values() for key in figures})
    rows = [
        (name, *(f"{figures[key]:.4g}" if key in figures else "-" for key in columns))
        for name, figures in scales.report.items()
    ]
    origin = ", ".join(f"{key}: {value}" for key, value in scales.calibrated_on.items())
    summary = ", ".join(f"{key} {value:.4g}" for key, value in scales.summary().items())
    return f"{table(('layer', *columns), rows)}\nmeans: {summary}\n{scales.model_class}, calibrated on {origin}"


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor in a model folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise QVDError(f"{folder} has no .safetensors file.")
    tensors: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    stored = file.get_slice(name)
                    tensors[name] = Stored(tuple(stored.get_shape()), stored.get_dtype())
        except (OSError, SafetensorError) as error:
            raise QVDError(f"{path} is damaged ({error}): save or download it again.") from error
    return tensors


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises QVDError when it is missing, broken or something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise QVDError(f"cannot read {path}: {error.strerror or error}.") from None
    except ValueError as error:
        raise QVDError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise QVDError(f'{path} must hold a JSON object, such as {{"height": 32}}.')
    return content


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first to the left, numbers to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def align(text: str, column: int) -> str:
        number = all(line[column][:1].isdigit() or line[column][:1] in "-+" for line in lines[1:])
        return text.rjust(widths[column]) if number and column else text.ljust(widths[column])

    return "\n".join("  ".join(align(text, column) for column, text in enumerate(line)).rstrip() for line in lines)


def megabytes(count: int) -> str:
    """Bytes in words: decimal megabytes."""
    return f"{count / 1e6:.2f} MB"
