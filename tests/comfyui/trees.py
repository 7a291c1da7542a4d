"""The module trees of ComfyUI's classes, recorded from tiny models, so that tests need no ComfyUI.

`module_trees/<class>.json` holds, for every tiny model of the class, rows of [module name, kind, inputs, outputs].
Kinds: "linear", "conv2d", "conv3d" and "norm", with what they lack or have besides ("linear without bias", "conv2d
with padding", "grouped conv2d"); "table" for a parameter that belongs to no layer [rows, channels]; else the class of a
module that has no parts, [0, 0].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvd_core.layer_kinds import layer_kind

FOLDER = Path(__file__).parent / "module_trees"

Row = tuple[str, str, int, int]
Tree = list[Row]

_NORMS = ("LayerNorm", "GroupNorm", "RMSNorm", "LayerNorm_")


def tree_of(model: nn.Module) -> Tree:
    """What a model consists of, in its own order."""
    rows: Tree = []
    for name, module in model.named_modules():
        row = _row(name, module)
        if row is not None:
            rows.append(row)
        else:
            parameters = [(key, value) for key, value in module.named_parameters(recurse=False)]
            rows += [(f"{name}.{key}".lstrip("."), "table", *_table(value)) for key, value in parameters]
            if not parameters and name and not list(module.children()):
                rows.append((name, type(module).__name__, 0, 0))
    return rows


def _row(name: str, module: nn.Module) -> Row | None:
    kind = layer_kind(module)
    if isinstance(module, nn.Linear) and kind is not None:
        return name, kind if module.bias is not None else "linear without bias", module.in_features, module.out_features
    if isinstance(module, nn.Conv2d | nn.Conv3d) and kind is not None:
        padded = " with padding" if any(module._reversed_padding_repeated_twice) else ""
        return name, ("grouped " if module.groups > 1 else "") + kind + padded, module.in_channels, module.out_channels
    weight = getattr(module, "weight", None)
    if type(module).__name__ in _NORMS and weight is not None:
        kind_of_norm = "norm" if getattr(module, "bias", None) is not None else "norm without bias"
        return name, kind_of_norm, weight.numel(), weight.numel()
    return None


def _table(value: torch.Tensor) -> tuple[int, int]:
    channels = value.shape[-1] if value.dim() else 1
    return value.numel() // channels, channels


def skeleton(class_name: str, tree: Tree) -> nn.Module:
    """A module of that class name with these parts, on the meta device: enough for every plan, not to be run."""
    root: nn.Module = type(class_name, (nn.Module,), {"__module__": "comfy.recorded"})()
    with torch.device("meta"):
        for name, kind, inputs, outputs in tree:
            *parents, last = name.split(".")
            parent = root
            for part in parents:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if kind == "table":
                parent.register_parameter(last, nn.Parameter(torch.empty(inputs, outputs)))
            else:
                parent.add_module(last, _module(kind, inputs, outputs))
    return root


def _module(kind: str, inputs: int, outputs: int) -> nn.Module:
    has_bias = not kind.endswith("without bias")
    match kind.removeprefix("grouped ").split()[0]:
        case "linear":
            return nn.Linear(inputs, outputs, bias=has_bias)
        case "conv2d" | "conv3d" as name:
            convolution: Any = nn.Conv2d if name == "conv2d" else nn.Conv3d
            groups = inputs if kind.startswith("grouped") else 1
            return convolution(inputs, outputs, 3, padding=int(kind.endswith("with padding")), groups=groups)
        case "norm":
            return nn.LayerNorm(inputs, bias=has_bias)
    return nn.Identity()


def write(class_name: str, trees: dict[str, Tree]) -> None:
    """Record the trees of the tiny models of one class, a row to a line."""
    lines = []
    for number, (name, tree) in enumerate(trees.items(), start=1):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in tree)
        lines.append(f' "{name}": [\n{rows}\n ]' + ("," if number < len(trees) else ""))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{class_name}.json").write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")


def read(class_name: str) -> dict[str, Tree]:
    """The recorded trees of the tiny models of one class, by their names."""
    text = (FOLDER / f"{class_name}.json").read_text(encoding="utf-8")
    return {name: [(row[0], row[1], row[2], row[3]) for row in rows] for name, rows in json.loads(text).items()}


def recorded_classes() -> list[str]:
    """The classes there are trees of."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))
