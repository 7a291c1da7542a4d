"""An int8 file that ComfyUI loads without QVD: its own format, int8_tensorwise with one scale per output channel.

That format knows linear layers, dynamic activations, and neither shift nor scale nor rotation of the input. A MODEL
quantized with portable=True has these in other layers already and loses nothing; from any other, such layers are
quantized once more, without them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qvd_core.files import write_tensors
from qvd_core.weights import quantize_weight, sum_over_inputs
from qvd_nodes._comfy import ModelPatcher
from qvd_nodes.checkpoint import as_saved, is_quantized_op, merged_modules, own_tensors
from qvd_nodes.layers import QuantizedOp, stored_tensors
from qvd_nodes.layout import QVDInt8Layout, dequantized
from qvd_nodes.record import record_of

STOCK_FORMAT = {"format": "int8_tensorwise"}


@dataclass
class Export:
    """What became of the layers: written as they are, quantized again, or in floating point."""

    path: Path
    unchanged: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    in_float: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """What the file has lost, in plain words."""
        lines = []
        if self.again:
            lines.append(
                f"{len(self.again)} layers lost their calibrated shift, scale or 4-bit codes, which this format does "
                "not know: quantize with portable=True (QVD Quantize Settings) to keep them."
            )
        if self.in_float:
            lines.append(
                f"{len(self.in_float)} layers (timestep projections, convolutions) are in floating point: the format "
                "has no int8 for them."
            )
        return lines


@torch.no_grad()
def export_patcher(patcher: ModelPatcher, path: str | Path) -> Export:
    """Write a quantized MODEL, LoRAs merged, as stock ComfyUI's int8. Raises QVDError when it is none, or cannot."""
    record = record_of(patcher)
    export = Export(Path(path))
    tensors: dict[str, Tensor] = {}
    for name, module in merged_modules(patcher):
        entries = _stock_tensors(name, module, export) if is_quantized_op(module) else own_tensors(module)
        tensors.update({f"{name}.{key}" if name else key: value for key, value in entries.items()})
    description = {"kind": "comfyui-export", **record.to_dict()}
    write_tensors(path, as_saved(patcher, tensors), description, record.file_metadata)
    return export


def _stock_tensors(name: str, layer: QuantizedOp, export: Export) -> dict[str, Tensor]:
    params: QVDInt8Layout.Params = layer.weight._params
    recipe = params.recipe
    assert recipe is not None
    entries = stored_tensors(layer)
    transformed = params.input_shift is not None or params.input_scale is not None or recipe.plan.rotation > 0
    if recipe.plan.kind == "linear" and not transformed and recipe.weight_bits > 4:
        export.unchanged.append(name)
        return _int8(entries["weight"], params.scale, entries.get("bias"))
    weight = dequantized(layer.weight._qdata, params)
    bias = entries.get("bias")
    if bias is not None and params.input_shift is not None:
        bias = (bias.double() - sum_over_inputs(weight, params.input_shift)).to(bias.dtype)
    if recipe.plan.kind == "linear":
        export.again.append(name)
        quantized = quantize_weight(weight, 8)
        return _int8(quantized.codes, quantized.scale, bias)
    export.in_float.append(name)
    plain = {"weight": weight.to(params.orig_dtype)}
    return plain if bias is None else {**plain, "bias": bias}


def _int8(codes: Tensor, scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    entry = torch.frombuffer(bytearray(json.dumps(STOCK_FORMAT).encode()), dtype=torch.uint8)
    entries = {"weight": codes, "weight_scale": scale, "comfy_quant": entry}
    return entries if bias is None else {**entries, "bias": bias}
