"""CogVideoX and its successors."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import DUAL_BLOCK, QKV, below

_VIDEO_AND_TEXT = ((0, 1), (3, 4))  # one linear modulates both streams, which one layer then reads

COGVIDEOX = Family(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    keep=("patch_embed.**", "time_embedding.**", "ofs_embedding.**", "norm_out.linear", "proj_out"),
    temporal=(f"{DUAL_BLOCK}.norm1.linear", f"{DUAL_BLOCK}.norm2.linear"),
    temporal_features=("time_proj", "time_embedding", "transformer_blocks.0.norm1.silu"),
    other_conditions=("ofs_embedding",),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV),),
    frames_dim=1,
    folds=(
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), below("attn1", QKV), sections=_VIDEO_AND_TEXT),
        Fold("modulation", DUAL_BLOCK, ("norm2.linear",), ("ff.net.0.proj",), sections=_VIDEO_AND_TEXT),
        Fold("value", DUAL_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
    ),
)

FAMILIES = (COGVIDEOX,)
