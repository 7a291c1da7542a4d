"""QVD Quantize Model, and the settings it takes."""

from __future__ import annotations

import re
from typing import Any, get_args

from qvd_core.errors import QVDError
from qvd_core.scales import Scales
from qvd_core.spec import (
    BITS,
    MOST_BUCKETS,
    Activation,
    BackendName,
    QuantSpec,
    RangeMode,
    Rounding,
    ScaleMode,
    TemporalMode,
    TemporalQuantizerName,
)
from qvd_nodes._comfy import ModelPatcher, io, utils
from qvd_nodes.describe import collected_warnings, image_model_note, model_summary, model_text
from qvd_nodes.nodes.types import AUTO, CATEGORY, ScalesType, SettingsType, chosen_spec, preset_input
from qvd_nodes.quantize import quantize_patcher


class QuantizeModel(io.ComfyNode):
    """MODEL -> int8 MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDQuantizeModel",
            display_name="QVD Quantize Model",
            category=CATEGORY,
            description="Makes an int8 MODEL of a loaded one, which stays as it is. Place it right behind the loader; "
            "LoRAs may come before (quantized with the weights) or after (merged when the model is loaded).",
            search_aliases=["int8", "w8a8", "quantization", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="A model in 16 or 32 bits, from any loader."),
                preset_input(AUTO, auto=True),
                ScalesType.Input("scales", optional=True, tooltip="From QVD Calibrate or QVD Load Scales."),
                SettingsType.Input("settings", optional=True, tooltip="Every choice by hand; replaces the preset."),
            ],
            outputs=[io.Model.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, preset: Any, scales: Scales | None = None, settings: QuantSpec | None = None
    ) -> io.NodeOutput:
        spec = chosen_spec(preset, settings, scales)
        bar = utils.ProgressBar(1)
        with collected_warnings() as warnings:
            result = quantize_patcher(model, spec, scales, lambda done, total: bar.update_absolute(done, total))
        notes = [*image_model_note(model, spec), *_uncalibrated_note(spec, scales), *warnings]
        summary = model_summary(result, notes)
        return io.NodeOutput(result, ui={"text": (model_text(summary),), "qvd": (summary,)})


def _uncalibrated_note(spec: QuantSpec, scales: Scales | None) -> list[str]:
    """What settings cannot do without scales."""
    if scales is not None:
        return []
    lines = []
    if min(spec.weight_bits, spec.activation_bits) < 8:
        lines.append("Fewer than 8 bits without calibration lose much: connect QVD Calibrate to `scales`.")
    if spec.rotate:
        lines.append("rotate does nothing without scales: connect QVD Calibrate.")
    return lines


def _choice(name: str, kind: Any, tooltip: str) -> Any:
    default = getattr(QuantSpec(), name)
    return io.Combo.Input(name, options=list(get_args(kind)), default=default, tooltip=tooltip)


def _switch(name: str, tooltip: str) -> Any:
    return io.Boolean.Input(name, default=getattr(QuantSpec(), name), tooltip=tooltip)


class QuantizeSettings(io.ComfyNode):
    """Every field of `QuantSpec` as a widget."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        bits: dict[str, Any] = {"default": 8, "min": BITS[0], "max": BITS[-1]}
        return io.Schema(
            node_id="QVDQuantizeSettings",
            display_name="QVD Quantize Settings",
            category=f"{CATEGORY}/advanced",
            description="Every choice of QVD by hand. Connect it to QVD Calibrate and to QVD Quantize Model alike.",
            inputs=[
                io.Int.Input("weight_bits", **bits, tooltip="4-bit weights are stored two per byte, 5 to 8 in int8."),
                io.Int.Input("activation_bits", **bits, tooltip="Bits of a layer's input while sampling."),
                _choice(
                    "activation",
                    Activation,
                    "token: a scale per token, measured while sampling. static: one calibrated scale per layer; "
                    "static_bucket: one per range of timesteps; static_frame: one per video frame.",
                ),
                io.Int.Input("buckets", default=8, min=1, max=MOST_BUCKETS, tooltip="Most ranges of static_bucket."),
                _switch("shift", "SCRI: centre every channel of a layer's input. Needs scales."),
                _choice(
                    "scale",
                    ScaleMode,
                    "SCRI: bring the channels into one range. threshold: the paper's way, smooth: weighed against the "
                    "weights, search: the better of both. Needs scales.",
                ),
                _choice("range", RangeMode, "What a calibrated scale has to hold: all values seen, or nearly all."),
                _switch("rotate", "SCRI may also rotate blocks of channels, which spreads outliers. Needs scales."),
                _choice("rounding", Rounding, "gptq: later weights make good the rounding of earlier ones."),
                _choice("temporal", TemporalMode, "HTDQ: table remembers the projections of every timestep."),
                _choice("temporal_quantizer", TemporalQuantizerName, "HTDQ: the code of the timestep features."),
                _switch("bias_correction", "Cancel the mean error of the weights' rounding. Needs scales."),
                _switch(
                    "portable", "Only what a file for ComfyUI without QVD can hold. No LoRA can be added after it."
                ),
                io.Float.Input(
                    "auto_keep",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Keep the most sensitive layers in full precision: below 1, a share of the weights; from 1 "
                    "on, every layer that alone brings the output below so many dB. 0: off. Makes calibration longer.",
                ),
                io.String.Input(
                    "modules_to_not_convert",
                    default="",
                    multiline=True,
                    tooltip="Layers to keep in full precision, by name or whole parts of it (blocks.0), one per line.",
                ),
                _choice("backend", BackendName, "The kernels to use; auto takes the fastest exact ones."),
            ],
            outputs=[SettingsType.Output(display_name="settings")],
        )

    @classmethod
    def execute(cls, auto_keep: float, modules_to_not_convert: str, **fields: Any) -> io.NodeOutput:
        names = tuple(name for name in re.split(r"[\s,]+", modules_to_not_convert) if name)
        try:
            spec = QuantSpec(auto_keep=auto_keep or None, modules_to_not_convert=names, **fields)
        except ValueError as error:
            raise QVDError(str(error)) from None
        return io.NodeOutput(spec)
