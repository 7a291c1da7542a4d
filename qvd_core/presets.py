"""The presets: named starting points, each a few fields of `QuantSpec`; all other fields keep their defaults."""

from __future__ import annotations

from typing import Any, Literal, get_args

from qvd_core.spec import QuantSpec

PresetName = Literal["fast", "best", "paper"]

PRESETS: dict[PresetName, dict[str, Any]] = {
    # The least work while sampling: one dynamic scale per token, no shift or scale per channel; needs no data.
    "fast": {"activation": "token", "shift": False, "scale": "none"},
    # The most accurate choice, at the price of some time while calibrating, loading and sampling: dynamic scales on top
    # of a calibrated shift, scale and rotation, and error-compensating rounding. Needs calibrated scales.
    "best": {"activation": "token", "rotate": True, "rounding": "gptq"},
    # QVD as we reconstruct it: static activations per video frame, shift and one integrated range, power-of-two
    # temporal codes, plain rounding. Needs calibrated scales. `log2` codes do not get finer with more bits.
    "paper": {
        "activation": "static_frame",
        "shift": True,
        "scale": "threshold",
        "range": "minmax",
        "rounding": "nearest",
        "temporal_quantizer": "log2",
        "bias_correction": False,
    },
}


def preset(name: PresetName, **overrides: Any) -> QuantSpec:
    """The settings of a preset, with some of them changed. Raises ValueError for an unknown name or value."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(get_args(PresetName))}.")
    return QuantSpec(**{**PRESETS[name], **overrides})
