"""LTX-Video and its successors."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import DUAL_BLOCK, QKV, below

LTX_VIDEO = Family(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    keep=("proj_in", "time_embed.emb.**", "caption_projection.**", "proj_out"),
    temporal=("time_embed.linear",),
    temporal_features=("time_embed.emb.time_proj", "time_embed.emb.timestep_embedder", "time_embed.silu"),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn2", ("to_k", "to_v"))),
    prompt_inputs=below(f"{DUAL_BLOCK}.attn2", ("to_k", "to_v")),
    folds=(  # attn2.to_q reads the residual stream itself: it has no producer
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", DUAL_BLOCK, ("scale_shift_table",), ("ff.net.0.proj",), sections=((3, None),)),
        Fold("value", DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        Fold("value", DUAL_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",)),
    ),
)

FAMILIES = (LTX_VIDEO,)
