"""Wan and the models that share its blocks."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold, FrameOrder
from qvd_core.families.names import QKV, below

_BLOCK = "blocks.*"
_VACE_BLOCK = "vace_blocks.*"
_TEXT_KV = ("to_k", "to_v")
_IMAGE_KV = ("add_k_proj", "add_v_proj")


def _shared_inputs(block: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"{block}.attn1", QKV), (f"{block}.attn2", _TEXT_KV), (f"{block}.attn2", _IMAGE_KV))


def _frame_order(block: str) -> tuple[tuple[str, FrameOrder], ...]:
    """Latents are patched in space only, so tokens keep the frames apart."""
    return (
        (f"{block}.attn1.**", "major"),
        (f"{block}.attn2.to_q", "major"),
        (f"{block}.attn2.to_out.0", "major"),
        (f"{block}.ffn.**", "major"),
    )


def _folds(block: str) -> tuple[Fold, ...]:
    """The rest of the modulation, time_proj, is shared by all blocks: only a shift can move into a block's row."""
    return (
        Fold("table", block, ("scale_shift_table",), below("attn1", QKV), sections=((0, None),)),
        Fold("table", block, ("scale_shift_table",), ("ffn.net.0.proj",), sections=((3, None),)),
        Fold("norm", block, ("norm2",), ("attn2.to_q",)),
        Fold("value", block, ("attn1.to_v",), ("attn1.to_out.0",)),
        # Image-to-video: to_out reads the sum of two attentions, over the text and over the image.
        Fold("value", block, ("attn2.to_v",), ("attn2.to_out.0",), addends=("attn2.add_v_proj",)),
    )


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
    shared_inputs=_shared_inputs(_BLOCK),
    prompt_inputs=below(f"{_BLOCK}.attn2", (*_TEXT_KV, *_IMAGE_KV)),
    frames_dim=2,
    frame_order=_frame_order(_BLOCK),
    folds=_folds(_BLOCK),
)

CHRONO_EDIT = replace(WAN, name="ChronoEdit", classes=("ChronoEditTransformer3DModel",))

SKYREELS = replace(
    WAN,
    name="SkyReels-V2",
    classes=("SkyReelsV2Transformer3DModel",),
    keep=(*WAN.keep, "fps_projection.**"),  # added after time_proj, whose input stays the timestep's alone
)

# The hints: what a control block reads of the video is the main branch's own first hidden state.
WAN_VACE = replace(
    WAN,
    name="Wan VACE",
    classes=("WanVACETransformer3DModel",),
    keep=(*WAN.keep, "vace_patch_embedding", f"{_VACE_BLOCK}.proj_in", f"{_VACE_BLOCK}.proj_out"),
    shared_inputs=(*WAN.shared_inputs, *_shared_inputs(_VACE_BLOCK)),
    prompt_inputs=(*WAN.prompt_inputs, *below(f"{_VACE_BLOCK}.attn2", (*_TEXT_KV, *_IMAGE_KV))),
    frame_order=(*WAN.frame_order, *_frame_order(_VACE_BLOCK)),
    folds=(*WAN.folds, *_folds(_VACE_BLOCK)),
)

_FACE = "face_adapter.*"

WAN_ANIMATE = replace(
    WAN,
    name="Wan Animate",
    classes=("WanAnimateTransformer3DModel",),
    keep=(*WAN.keep, "pose_patch_embedding", "face_encoder.**"),
    shared_inputs=(*WAN.shared_inputs, (_FACE, _TEXT_KV)),
    prompt_inputs=(*WAN.prompt_inputs, *below(_FACE, _TEXT_KV)),  # the face is a condition too
    frame_order=(*WAN.frame_order, (f"{_FACE}.to_q", "major"), (f"{_FACE}.to_out", "major")),
    folds=(*WAN.folds, Fold("value", _FACE, ("to_v",), ("to_out",))),
)

# The same blocks under the names of the original code; reference frames go through them in a pass of their own.
WAN_ANIMATE_2 = Family(
    name="Wan Animate 2",
    classes=("WanAnimate2Transformer3DModel",),
    keep=("patch_embedding", "time_embedding.**", "text_embedding.**", "img_emb.**", "head.head"),
    temporal=("time_projection.1",),
    temporal_features=("timesteps_proj", "time_embedding", "time_projection.0"),
    shared_inputs=(
        (f"{_BLOCK}.self_attn", QKV),
        (f"{_BLOCK}.cross_attn", _TEXT_KV),
        (f"{_BLOCK}.cross_attn", _IMAGE_KV),
    ),
    prompt_inputs=below(f"{_BLOCK}.cross_attn", (*_TEXT_KV, *_IMAGE_KV)),
    folds=(
        Fold("table", _BLOCK, ("modulation",), below("self_attn", QKV), sections=((0, None),)),
        Fold("table", _BLOCK, ("modulation",), ("ffn.0",), sections=((3, None),)),
        Fold("norm", _BLOCK, ("norm3",), ("cross_attn.to_q",)),
        Fold("value", _BLOCK, ("self_attn.to_v",), ("self_attn.to_out.0",)),
        Fold("value", _BLOCK, ("cross_attn.to_v",), ("cross_attn.to_out.0",), addends=("cross_attn.add_v_proj",)),
    ),
)

# No attention to an image beside the text: image tokens go into the text's sequence.
_TEXT_ONLY = replace(
    WAN,
    shared_inputs=((f"{_BLOCK}.attn1", QKV), (f"{_BLOCK}.attn2", _TEXT_KV)),
    prompt_inputs=below(f"{_BLOCK}.attn2", _TEXT_KV),
    folds=tuple(replace(fold, addends=()) for fold in WAN.folds),
)

ANYFLOW = replace(
    _TEXT_ONLY,
    name="AnyFlow",
    classes=("AnyFlowTransformer3DModel",),
    keep=(*WAN.keep, "condition_embedder.delta_embedder.**"),
    temporal_features=(),  # two timesteps: where the step begins and where it ends
    frames_dim=1,
)

# Packs its chunks with clean context into one sequence, at two resolutions: rows do not belong to the latents' frames.
ANYFLOW_FAR = replace(
    ANYFLOW,
    name="AnyFlow FAR",
    classes=("AnyFlowFARTransformer3DModel",),
    keep=(*ANYFLOW.keep, "far_patch_embedding"),
    frame_order=(),
)

# The history comes before the video in the sequence, patched two and four times as coarse.
HELIOS = replace(
    _TEXT_ONLY,
    name="Helios",
    classes=("HeliosTransformer3DModel",),
    keep=(
        *(pattern for pattern in WAN.keep if "image_embedder" not in pattern),
        *("patch_short", "patch_mid", "patch_long"),
    ),
    frame_order=(),
)

FAMILIES = (
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    WAN_ANIMATE_2,
    SKYREELS,
    CHRONO_EDIT,
    ANYFLOW,
    ANYFLOW_FAR,
    HELIOS,
)
