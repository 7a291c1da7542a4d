"""What all nodes share: QVD's own socket types, the category, the choice of a preset."""

from __future__ import annotations

from typing import Any, Final, Literal

from qvd_core.errors import QVDError
from qvd_core.presets import PRESETS, preset
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import io

CATEGORY = "QVD"
PREFIX_TOOLTIP = "Folder and beginning of the file's name, below ComfyUI's output folder."
ScalesType: Any = io.Custom("QVD_SCALES")
SettingsType: Any = io.Custom("QVD_SETTINGS")

AUTO: Final = "auto"
PRESET_TOOLTIP = (
    "fast: no calibration needed, the least work while sampling. best: the least loss, needs scales. paper: the QVD "
    "paper's recipe with static scales, needs scales."
)


def preset_input(default: str, auto: bool) -> Any:
    """The choice of a preset; with `auto` it can be left to the scales."""
    options = [AUTO, *PRESETS] if auto else list(PRESETS)
    rule = "auto: what the scales were calibrated for, without scales fast. " if auto else ""
    return io.Combo.Input("preset", options=options, default=default, tooltip=rule + PRESET_TOOLTIP)


def chosen_spec(
    choice: Literal["auto", "fast", "best", "paper"], settings: QuantSpec | None, scales: Scales | None = None
) -> QuantSpec:
    """The settings to quantize with: the connected ones, else the preset's. Raises QVDError for scales that lack."""
    if settings is not None:
        spec = settings
    elif choice == AUTO:
        spec = preset("fast") if scales is None else scales.spec
    else:
        spec = preset(choice)
    if scales is None and (spec.is_static or spec.rounding == "gptq" or spec.auto_keep is not None):
        raise QVDError(
            f"{'these settings need' if settings is not None else f'the preset {choice} needs'} calibrated scales: "
            "connect QVD Calibrate or QVD Load Scales to `scales`, or choose the preset fast."
        )
    return spec


def searched_spec(choice: Literal["fast", "best", "paper"], settings: QuantSpec | None) -> QuantSpec:
    """The settings to calibrate for: the connected ones, else the preset's."""
    return preset(choice) if settings is None else settings
