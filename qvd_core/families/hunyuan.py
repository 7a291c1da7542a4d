"""HunyuanVideo and the models that share its dual and single stream blocks."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import ADDED_QKV, DUAL_BLOCK, QKV, SINGLE_BLOCK, below

_SINGLE_READERS = (*below("attn", QKV), "proj_mlp")

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    keep=("x_embedder.proj", "context_embedder.**", "time_text_embed.**", "norm_out.linear", "proj_out"),
    temporal=(
        f"{DUAL_BLOCK}.norm1.linear",
        f"{DUAL_BLOCK}.norm1_context.linear",
        f"{SINGLE_BLOCK}.norm.linear",
    ),
    shared_inputs=(
        (f"{DUAL_BLOCK}.attn", QKV),
        (f"{DUAL_BLOCK}.attn", ADDED_QKV),
        (SINGLE_BLOCK, _SINGLE_READERS),
    ),
    frames_dim=2,
    folds=(
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), below("attn", QKV), sections=((0, 1),)),
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), ("ff.net.0.proj",), sections=((3, 4),)),
        Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), below("attn", ADDED_QKV), sections=((0, 1),)),
        Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), ("ff_context.net.0.proj",), sections=((3, 4),)),
        Fold("value", DUAL_BLOCK, ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
        Fold("modulation", SINGLE_BLOCK, ("norm.linear",), _SINGLE_READERS, sections=((0, 1),)),
        Fold("value", SINGLE_BLOCK, ("attn.to_v",), ("proj_out",), leading=True),
    ),
)

FAMILIES = (HUNYUAN_VIDEO,)
