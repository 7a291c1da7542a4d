"""What would run on this machine for a quantized folder: kernels per kind of layer, attention, threads.

Read from file headers, like `listing`; no model is loaded and nothing is timed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qvd_core.errors import QVDError
from qvd_core.ops import explain_backend
from qvd_core.ops.dispatch import FEW_ROWS, Choice
from qvd_core.plan import LayerPlan, plan_from_dict
from qvd_diffusers.attention import AUTO, automatic_attention, recorded_problem
from qvd_diffusers.config import QVDConfig
from qvd_diffusers.listing import Stored, quantized_folders, read_headers, recorded_config, stored_weight, table

STATIC_MODES = {"layer": "static", "timestep": "static by timestep", "major": "static by frame"}
UNKNOWN = "?"


@dataclass(frozen=True, order=True)
class Product:
    """What decides the kernel of a layer; layers that agree in it share a line.

    inputs, outputs: features or channels. kernel: "3x3", "-" for a linear. Packed 4-bit weights are flat: of a
    convolution the file then tells "9 taps", and without per-channel tensors only channels times taps ("?").
    """

    kind: str
    inputs: int
    outputs: int
    kernel: str
    weight_bits: int
    activations: str


def describe_kernels(path: str | Path, device: str = "cpu") -> str:
    """The table of kernels of a pipeline folder or a model folder, for `device`.

    Raises QVDError for anything else, and for a device that is not there.
    """
    path, target = Path(path), _device(device)
    if path.is_file():
        raise QVDError(f"{path} is a file: kernels are chosen for a quantized pipeline or model folder, give that.")
    return "\n\n".join(_describe_folder(folder, target) for folder in quantized_folders(path))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise QVDError(f"--device {name!r} is no device: give cpu, cuda or cuda:1, for example.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QVDError(f"there is no device {name!r} here: run this on the machine that has it, or use --device cpu.")
    return device


def _describe_folder(folder: Path, device: torch.device) -> str:
    config = recorded_config(folder)
    many, few = explain_backend(config.backend, device)
    products = sorted(_products(folder, config).items())
    rows = [(str(count), *_columns(product), _runs_on(product, many, few)) for product, count in products]
    header = ("layers", "kind", "inputs", "outputs", "kernel", "weights", "activations", "runs on")
    lines = [f"{folder} on {_device_name(device)}:", table(header, rows)]
    lines += _reasons([product for product, _ in products], config, many, few)
    return "\n".join([*lines, _attention(config, device), *_surroundings()])


def _products(folder: Path, config: QVDConfig) -> Counter[Product]:
    tensors = read_headers(folder)
    plan = plan_from_dict(config.layers or {})
    return Counter(_product(name, layer, tensors, config) for name, layer in plan.items())


def _product(name: str, layer: LayerPlan, tensors: Mapping[str, Stored], config: QVDConfig) -> Product:
    stored = stored_weight(name, tensors)
    bits = layer.weight_bits(config.spec)
    if len(stored.shape) < 2:
        raise QVDError(f"{name}.weight has the shape {list(stored.shape)}, a weight has 2 dimensions or more: damaged.")
    outputs, inputs, *kernel = stored.shape
    shown = "x".join(map(str, kernel)) or "-"
    if bits == 4:
        inputs *= 2  # two codes per byte
        channels = next((tensors[key].elements for key in _per_channel(name) if key in tensors), None)
        if layer.kind == "linear":
            inputs = channels or inputs
        else:
            inputs, shown = (channels, f"{inputs // channels} taps") if channels else (inputs, UNKNOWN)
    return Product(layer.kind, inputs, outputs, shown, bits, _activations(layer, config))


def _per_channel(name: str) -> tuple[str, str]:
    return f"{name}.input_shift", f"{name}.input_scale"


def _activations(layer: LayerPlan, config: QVDConfig) -> str:
    bits = f"{config.activation_bits} bit"
    if layer.kind == "temporal":
        return f"{bits} codebook" if "codebook" in layer.tensors else "in floating point"
    if "activation_scale" in layer.tensors:
        return f"{bits} {STATIC_MODES.get(layer.steps_by, 'static by frame')}"
    return f"{bits} per {'token' if layer.kind == 'linear' else 'image'}"


def _columns(product: Product) -> tuple[str, ...]:
    sizes = (str(product.inputs), str(product.outputs), product.kernel)
    return (product.kind, *sizes, f"{product.weight_bits} bit", product.activations)


def _runs_on(product: Product, many: Choice, few: Choice) -> str:
    """The backend; for few rows too, where that is another one. A convolution always counts as many."""
    if product.kind == "temporal":
        return "float32"
    if product.kind != "linear" or few == many:
        return many.backend
    return f"{many.backend}; {few.backend} for {FEW_ROWS} rows or fewer"


def _reasons(products: Sequence[Product], config: QVDConfig, many: Choice, few: Choice) -> list[str]:
    """A line for each backend in the table: why it runs; and for what else the table does not say."""
    kinds = {product.kind for product in products}
    reasons = [many] if kinds - {"temporal"} else []
    if "linear" in kinds and few != many:
        reasons.append(few)
    if "temporal" in kinds:
        kept = "remembered per timestep" if config.temporal == "table" else "computed at every call"
        reasons.append(Choice("float32", f"few rows times a decoded weight, {kept}"))
    lines = [f"{choice.backend}: {choice.reason}." for choice in reasons]
    if any(product.kernel == UNKNOWN for product in products):
        lines.append(f'kernel "{UNKNOWN}": a packed weight does not tell; inputs are channels times taps.')
    return lines


def _attention(config: QVDConfig, device: torch.device) -> str:
    dtype = config.compute_dtype if isinstance(config.compute_dtype, torch.dtype) else None
    if config.attention is not None and config.attention != AUTO:
        problem = recorded_problem(config.attention)
        outcome = "is set when the model is loaded." if problem is None else f"cannot be set here: {problem}"
        return f'Attention: "{config.attention}" is recorded and {outcome}'
    choice = automatic_attention(device, dtype)
    used = choice.backend or "the model's own"
    if config.attention == AUTO:
        return f'Attention: "auto" is recorded and uses {used} here ({choice.reason}).'
    return f'Attention: the model\'s own; attention="auto" would use {used} here ({choice.reason}).'


def _surroundings() -> list[str]:
    forced = os.environ.get("QVD_BACKEND")
    lines = [f"Threads: {torch.get_num_threads()} (torch.get_num_threads)."]
    return [*lines, f"QVD_BACKEND={forced} is set: it decides for every layer."] if forced else lines


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
