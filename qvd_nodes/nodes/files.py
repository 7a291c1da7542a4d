"""Loading and saving: scales, and int8 models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qvd_core.errors import QVDError
from qvd_core.scales import Scales
from qvd_nodes._comfy import ModelPatcher, folder_paths, io
from qvd_nodes.checkpoint import load_patcher, save_patcher
from qvd_nodes.describe import collected_warnings, image_model_note, model_summary, model_text
from qvd_nodes.export import export_patcher
from qvd_nodes.nodes.types import CATEGORY, PREFIX_TOOLTIP, ScalesType
from qvd_nodes.record import record_of
from qvd_nodes.scale_cache import SCALES_FOLDER

MODELS_FOLDER = "diffusion_models"
OWN_FORMAT = "QVD"
STOCK_FORMAT = "ComfyUI int8 (no pack needed)"


def _next_file(prefix: str) -> Path:
    """The next free file of ComfyUI's output folder for a prefix as its save nodes take it."""
    if not prefix.strip() or "\0" in prefix:
        raise QVDError(f"the filename_prefix {prefix!r} names no file: give one like {MODELS_FOLDER}/qvd.")
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    except OSError as error:
        raise QVDError(f"cannot save as {prefix!r} in the output folder: {error}; choose another name.") from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def _shown(path: Path) -> str:
    return os.path.relpath(path, folder_paths.get_output_directory())


def _stamp(folder: str, name: str) -> str:
    """What tells ComfyUI's cache that a file has changed."""
    path = folder_paths.get_full_path(folder, name)
    if path is None or not os.path.isfile(path):
        return "missing"
    state = os.stat(path)
    return f"{state.st_mtime_ns}:{state.st_size}"


class LoadScales(io.ComfyNode):
    """A file -> QVD_SCALES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDLoadScales",
            display_name="QVD Load Scales",
            category=CATEGORY,
            description="Scales of an earlier calibration, from models/qvd_scales or output/qvd_scales.",
            inputs=[
                io.Combo.Input(
                    "scales_name",
                    options=folder_paths.get_filename_list(SCALES_FOLDER),
                    tooltip="Written by QVD Save Scales.",
                )
            ],
            outputs=[ScalesType.Output(display_name="scales")],
        )

    @classmethod
    def fingerprint_inputs(cls, scales_name: str) -> str:
        return _stamp(SCALES_FOLDER, scales_name)

    @classmethod
    def execute(cls, scales_name: str) -> io.NodeOutput:
        return io.NodeOutput(Scales.load(folder_paths.get_full_path_or_raise(SCALES_FOLDER, scales_name)))


class SaveScales(io.ComfyNode):
    """QVD_SCALES -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDSaveScales",
            display_name="QVD Save Scales",
            category=CATEGORY,
            description="Writes scales below output/qvd_scales, where QVD Load Scales finds them.",
            inputs=[
                ScalesType.Input("scales", tooltip="From QVD Calibrate."),
                io.String.Input("filename_prefix", default=f"{SCALES_FOLDER}/scales", tooltip=PREFIX_TOOLTIP),
            ],
            outputs=[ScalesType.Output(display_name="scales")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, scales: Scales, filename_prefix: str) -> io.NodeOutput:
        path = scales.save(_next_file(filename_prefix))
        return io.NodeOutput(scales, ui={"text": (f"saved {_shown(path)}",)})


class SaveCheckpoint(io.ComfyNode):
    """An int8 MODEL -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDSaveCheckpoint",
            display_name="QVD Save Checkpoint",
            category=CATEGORY,
            description="Writes an int8 MODEL, LoRAs merged, below output/diffusion_models. QVD's own format keeps "
            "everything; the other one loads in ComfyUI without QVD.",
            search_aliases=["save int8", "export"],
            inputs=[
                io.Model.Input("model", tooltip="The output of QVD Quantize Model, with or without LoRAs behind it."),
                io.String.Input("filename_prefix", default=f"{MODELS_FOLDER}/qvd", tooltip=PREFIX_TOOLTIP),
                io.Combo.Input(
                    "format",
                    options=[OWN_FORMAT, STOCK_FORMAT],
                    default=OWN_FORMAT,
                    tooltip="QVD: load it with QVD Load Diffusion Model. ComfyUI int8: load it with the stock loader; "
                    "quantize with portable=True to lose nothing.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str, format: str) -> io.NodeOutput:
        path = _next_file(filename_prefix)
        lines: list[str] = []
        if format == STOCK_FORMAT:
            lines = export_patcher(model, path).warnings()
        else:
            save_patcher(model, path)
        text = "\n".join([f"saved {_shown(path)} ({path.stat().st_size / 2**20:,.1f} MB)", *lines])
        return io.NodeOutput(ui={"text": (text,)})


class LoadDiffusionModel(io.ComfyNode):
    """A file of QVD -> an int8 MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDLoadDiffusionModel",
            display_name="QVD Load Diffusion Model",
            category=CATEGORY,
            description="Loads a file of QVD Save Checkpoint: int8 straight from the disk, no float copy in memory.",
            search_aliases=["load int8"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list(MODELS_FOLDER),
                    tooltip="From models/diffusion_models or output/diffusion_models.",
                )
            ],
            outputs=[io.Model.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str) -> str:
        return _stamp(MODELS_FOLDER, unet_name)

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        with collected_warnings() as warnings:
            model = load_patcher(folder_paths.get_full_path_or_raise(MODELS_FOLDER, unet_name))
        notes: list[Any] = [*image_model_note(model, record_of(model).spec), *warnings]
        summary = model_summary(model, notes)
        return io.NodeOutput(model, ui={"text": (model_text(summary),), "qvd": (summary,)})
