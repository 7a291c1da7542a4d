"""CogVideoX, ConsisID (CogVideoX with a face) and EasyAnimate."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import ADDED_QKV, DUAL_BLOCK, QKV, below

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

_FACE = "perceiver_cross_attention.*"

CONSISID = replace(
    COGVIDEOX,
    name="ConsisID",
    classes=("ConsisIDTransformer3DModel",),
    keep=("patch_embed.**", "time_embedding.**", "local_facial_extractor.**", "norm_out.linear", "proj_out"),
    other_conditions=(),
    prompt_inputs=(f"{_FACE}.to_kv",),
    folds=(
        *COGVIDEOX.folds,
        Fold("norm", _FACE, ("norm1",), ("to_kv",)),
        Fold("norm", _FACE, ("norm2",), ("to_q",)),
    ),
)

EASYANIMATE = Family(
    name="EasyAnimate",
    classes=("EasyAnimateTransformer3DModel",),
    keep=("proj", "text_proj.**", "text_proj_t5.**", "time_embedding.**", "norm_out.linear", "proj_out"),
    temporal=(f"{DUAL_BLOCK}.norm1.linear", f"{DUAL_BLOCK}.norm2.linear"),
    temporal_features=("time_proj", "time_embedding", "transformer_blocks.0.norm1.silu"),
    shared_inputs=((f"{DUAL_BLOCK}.attn1", QKV), (f"{DUAL_BLOCK}.attn1", ADDED_QKV)),
    frames_dim=2,
    folds=(  # the video's layers read both streams in blocks that have none for the text: only the latter take a fold
        Fold("modulation", DUAL_BLOCK, ("norm1.linear",), below("attn1", ADDED_QKV), sections=((3, 4),)),
        Fold("modulation", DUAL_BLOCK, ("norm2.linear",), ("txt_ff.net.0.proj",), sections=((3, 4),)),
        Fold("value", DUAL_BLOCK, ("attn1.to_v", "attn1.add_v_proj"), ("attn1.to_out.0", "attn1.to_add_out")),
    ),
)

FAMILIES = (COGVIDEOX, CONSISID, EASYANIMATE)
