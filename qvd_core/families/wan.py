"""Wan and the models that share its blocks."""

from __future__ import annotations

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import QKV, below

_WAN_BLOCK = "blocks.*"

WAN = Family(
    name="Wan",
    classes=("WanTransformer3DModel",),
    keep=(
        "patch_embedding",
        "condition_embedder.time_embedder.**",
        "condition_embedder.text_embedder.**",
        "condition_embedder.image_embedder.**",
        "proj_out",
    ),
    temporal=("condition_embedder.time_proj",),
    temporal_features=(
        "condition_embedder.timesteps_proj",
        "condition_embedder.time_embedder",
        "condition_embedder.act_fn",
    ),
    shared_inputs=(
        (f"{_WAN_BLOCK}.attn1", QKV),
        (f"{_WAN_BLOCK}.attn2", ("to_k", "to_v")),
        (f"{_WAN_BLOCK}.attn2", ("add_k_proj", "add_v_proj")),
    ),
    prompt_inputs=below(f"{_WAN_BLOCK}.attn2", ("to_k", "to_v", "add_k_proj", "add_v_proj")),
    frames_dim=2,
    frame_order=(  # latents are patched in space only, so tokens keep the frames apart
        (f"{_WAN_BLOCK}.attn1.**", "major"),
        (f"{_WAN_BLOCK}.attn2.to_q", "major"),
        (f"{_WAN_BLOCK}.attn2.to_out.0", "major"),
        (f"{_WAN_BLOCK}.ffn.**", "major"),
    ),
    folds=(
        # The rest of the modulation, time_proj, is shared by all blocks: only a shift can move into a block's row.
        Fold("table", _WAN_BLOCK, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", _WAN_BLOCK, ("scale_shift_table",), ("ffn.net.0.proj",), sections=((3, None),)),
        Fold("norm", _WAN_BLOCK, ("norm2",), ("attn2.to_q",)),
        Fold("value", _WAN_BLOCK, ("attn1.to_v",), ("attn1.to_out.0",)),
        # Image-to-video: to_out reads the sum of two attentions, over the text and over the image.
        Fold("value", _WAN_BLOCK, ("attn2.to_v",), ("attn2.to_out.0",), addends=("attn2.add_v_proj",)),
    ),
)

FAMILIES = (WAN,)
