"""A plan, shapes and scales that look like a calibrated model's, without a model."""

from __future__ import annotations

import torch

from qvd_core import QuantSpec, Scales
from qvd_core.plan import LayerPlan
from qvd_core.scales import LayerScales
from qvd_core.temporal import uniform_quantizer

HOSTILE = 'blocks.0.<script>alert("x")</script>'
SPEC = QuantSpec()
PLAN = {
    "blocks.0.to_q": LayerPlan("linear", ("bias",)),
    "blocks.0.conv": LayerPlan("conv2d", ("bias", "input_shift", "input_scale")),
    "blocks.1.to_q": LayerPlan("linear", ("bias",)),
    HOSTILE: LayerPlan("linear"),
    "time_proj": LayerPlan("temporal", ("bias", "codebook")),
}
SHAPES = {
    "blocks.0.to_q": (8, 4),
    "blocks.0.conv": (6, 4, 3, 3),
    "blocks.1.to_q": (8, 4),
    HOSTILE: (2, 4),
    "time_proj": (24, 4),
}
FIGURES = {
    "blocks.0.to_q": {"sqnr_db_before": 30.0, "sqnr_db": 41.5, "coverage_before": 0.4, "coverage": 0.8},
    "blocks.0.conv": {"sqnr_db_before": 22.0, "sqnr_db": 33.0, "coverage_before": 0.5, "coverage": 0.6},
    "blocks.1.to_q": {"sqnr_db_before": 20.0, "sqnr_db": 25.25, "coverage_before": 0.5, "coverage": 0.6},
    HOSTILE: {"sqnr_db_before": 50.0, "sqnr_db": 52.0, "coverage_before": 0.9, "coverage": 0.9},
    "time_proj": {"td_score": 0.8, "tdr": 0.995, "tdc": 0.999, "col": 0.01, "projected_error": 1e-6},
}


def layer_scales() -> LayerScales:
    """Channel 1 is the widest and one-sided; its transform brings it to [-1, 1]."""
    return LayerScales(
        input_min=torch.tensor([-1.0, 0.0, -0.5, -2.0]),
        input_max=torch.tensor([1.0, 8.0, 0.5, 2.0]),
        input_mean=torch.zeros(4),
        input_shift=torch.tensor([0.0, 4.0, 0.0, 0.0]),
        input_scale=torch.tensor([1.0, 4.0, 1.0, 2.0]),
        weight_probe=torch.zeros(3),
        static_step=torch.ones(1),
        bucket_steps=torch.tensor([0.5, 1.0]),
        bucket_boundaries=torch.tensor([400.0]),
    )


def scales() -> Scales:
    features = torch.linspace(-1, 1, 12).reshape(3, 4)
    return Scales(
        "ToyTransformer",
        "f" * 16,
        SPEC,
        layers={name: layer_scales() for name in PLAN if name != "time_proj"},
        temporal={"time_proj": uniform_quantizer(features, 8)},
        report=FIGURES,
        calibrated_on={"samples": 3, "prompts": ["a <b>cat</b>"], "call": {"guidance_scale": float("inf")}},
    )
