"""Mochi in ComfyUI."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold

_BLOCK = "blocks.*"

MOCHI = Family(
    name="Mochi",
    classes=("AsymmDiTJoint",),
    keep=("x_embedder.proj", "t_embedder.**", "t5_y_embedder.*", "t5_yproj", "final_layer.*"),
    temporal=(f"{_BLOCK}.mod_x", f"{_BLOCK}.mod_y"),  # their input holds the pooled text besides
    timestep_range=(0.0, 1.0),
    sample_argument="x",
    frames_dim=2,
    folds=(  # q, k and v are one linear, and the gate of an FFN comes first: only the modulation, by a scale, folds
        Fold("modulation", _BLOCK, ("mod_x",), ("attn.qkv_x",), sections=((None, 0),)),
        Fold("modulation", _BLOCK, ("mod_x",), ("mlp_x.w1",), sections=((None, 2),)),
        Fold("modulation", _BLOCK, ("mod_y",), ("attn.qkv_y",), sections=((None, 0),)),
        Fold("modulation", _BLOCK, ("mod_y",), ("mlp_y.w1",), sections=((None, 2),)),
    ),
)

FAMILIES = (MOCHI,)
