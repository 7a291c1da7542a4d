"""Records the module trees of ComfyUI's classes, and writes the table of docs/comfyui-families.md from them.

COMFYUI_PATH=<checkout> python -m tests.comfyui.snapshot_trees   (records, then writes the table)
python -m tests.comfyui.snapshot_trees --table                   (only the table: no ComfyUI needed)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from qvd_core import QuantSpec
from qvd_core.families import COMFYUI_FAMILIES, Family, family_or_generic
from qvd_core.folds import fold_sites
from qvd_core.layer_kinds import layer_kind
from qvd_core.plan import quantizable_layers
from tests.comfyui import trees
from tests.comfyui.tiny import BUILDERS, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comfyui-families.md"

_INTRODUCTION = """# Models of ComfyUI

What QVD does with the diffusion models of ComfyUI's core, by the class of `BaseModel.diffusion_model`. The numbers are
those of tiny models of each class, with random weights; a real model has more blocks of the same layers.

- **int8**: linear and convolution layers that compute with int8 weights and int8 activations.
- **temporal**: projections of the timestep embedding: int8 weights, HTDQ features.
- **kept**: layers in full precision: embedders, the last projection, what ComfyUI hands the weight of to a function.
- **HTDQ without data**: whether the input of the temporal layers follows from the timestep alone; otherwise their
  features come from calibration.
- **folds**: whether shift and scale can move into producers, which exports for a stock ComfyUI need.

A class that is not in this table goes through a generic rule, with one line in the log: linear and convolution layers
with at least 64 inputs and outputs, the first and the last one kept. So do image models without an entry (Flux, Stable
Diffusion 3, Qwen-Image and Lumina 2 were tried); QVD is made for and measured on videos, and the log says so.

Written by `python -m tests.comfyui.snapshot_trees`.
"""

MODELS = {
    "WanModel": "Wan 2.1 and 2.2: text and image to video, TI2V-5B, Fun control, FLF2V, Bernini, FlowRVS",
    "CausalWanModel": "Wan 2.1, frame by frame (causal forcing)",
    "CameraWanModel": "Wan 2.1 and 2.2 Fun Camera",
    "VaceWanModel": "Wan 2.1 VACE",
    "WanModel_S2V": "Wan 2.2 S2V",
    "HumoWanModel": "HuMo",
    "AnimateWanModel": "Wan 2.2 Animate",
    "WanAnimate2Model": "Wan Animate 2",
    "SCAILWanModel": "SCAIL preview",
    "SCAIL2WanModel": "SCAIL 2",
    "WanDancerModel": "WanDancer",
    "HunyuanVideo": "HunyuanVideo, its image to video, SkyReels, 1.5 and its super-resolution, HunyuanImage 2.1",
    "LTXVModel": "LTX-Video",
    "LTXAVModel": "LTX-2 and 2.3",
    "CogVideoXTransformer3DModel": "CogVideoX 1 and 1.5: text and image to video, inpainting",
    "AsymmDiTJoint": "Mochi 1 preview",
    "GeneralDIT": "Cosmos 1: text and video to world",
    "MiniTrainDIT": "Cosmos Predict 2: images and videos",
    "Anima": "Anima (images)",
    "Kandinsky5": "Kandinsky 5: videos and images",
    "MiniMaxH3Model": "MiniMax-H3",
    "NaDiT": "SeedVR2",
    "JoyImageTransformer3DModel": "JoyImage-Edit (images)",
    "UNetModel": "Stable Video Diffusion, SV3D; Stable Diffusion 1, 2 and XL (images), which AnimateDiff packs animate",
}
"""What ComfyUI loads as each class."""


def record() -> None:
    """Build every tiny model and write the trees of each class."""
    by_class: dict[str, dict[str, trees.Tree]] = {}
    for name in BUILDERS:
        model = tiny_model(name).model
        by_class.setdefault(type(model).__name__, {})[name] = trees.tree_of(model)
    for class_name, variants in by_class.items():
        trees.write(class_name, variants)


def layer_counts(model: nn.Module, family: Family) -> tuple[int, int, int]:
    """int8 layers, temporal layers and kept layers."""
    layers = quantizable_layers(model, family, QuantSpec())
    temporal = sum(family.is_temporal(name) for name in layers)
    total = sum(layer_kind(module) is not None for module in model.modules())
    return len(layers) - temporal, temporal, total - len(layers)


def table() -> str:
    """The whole page, as Markdown, from the recorded trees."""
    heads = ("class", "models", "entry", "tiny model", "int8", "temporal", "kept", "HTDQ without data", "folds")
    lines = [_INTRODUCTION, f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for class_name in dict.fromkeys(name for family in COMFYUI_FAMILIES for name in family.classes):
        for name, tree in trees.read(class_name).items():
            model = trees.skeleton(class_name, tree)
            family = family_or_generic(model)
            cells = (
                f"`{class_name}`",
                MODELS[class_name],
                family.name,
                name,
                *map(str, layer_counts(model, family)),
                ("yes" if family.temporal_features else "no") if family.temporal else "nothing temporal",
                "yes" if fold_sites(model, family) else "no",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Record the trees, unless only the table is wanted, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="only write the page, from the trees as they are")
    if not parser.parse_args(arguments).table:
        record()
    PAGE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
