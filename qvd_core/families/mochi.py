"""Mochi."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import ADDED_QKV, DUAL_BLOCK, QKV, below

MOCHI = Family(
    name="Mochi",
    classes=("MochiTransformer3DModel",),
    keep=("patch_embed.**", "time_embed.**", "norm_out.linear", "proj_out"),
    temporal=(
        f"{DUAL_BLOCK}.norm1.linear",
        f"{DUAL_BLOCK}.norm1_context.linear",
        f"{DUAL_BLOCK}.norm1_context.linear_1",
    ),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn1", ADDED_QKV)),
    frames_dim=2,
    folds=(  # the norms are modulated by a scale alone, and no linear but to_out has a bias: nothing takes a shift
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), below("attn1", QKV), sections=((None, 0),)),
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), ("ff.net.0.proj",), sections=((None, 2),)),
        Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), below("attn1", ADDED_QKV), sections=((None, 0),)),
        Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), ("ff_context.net.0.proj",), sections=((None, 2),)),
        Fold("modulation", DUAL_BLOCK, ("norm1_context.linear_1",), below("attn1", ADDED_QKV), sections=((None, 0),)),
        Fold("value", DUAL_BLOCK, ("attn1.to_v", "attn1.add_v_proj"), ("attn1.to_out.0", "attn1.to_add_out")),
        Fold("gate", DUAL_BLOCK, ("ff.net.0.proj",), ("ff.net.2",)),
        Fold("gate", DUAL_BLOCK, ("ff_context.net.0.proj",), ("ff_context.net.2",)),
    ),
)

FAMILIES = (MOCHI,)
