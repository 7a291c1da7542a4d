"""HunyuanVideo and the models that share its dual and single stream blocks."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import ADDED_QKV, DUAL_BLOCK, QKV, SINGLE_BLOCK, below

_SINGLE_READERS = (*below("attn", QKV), "proj_mlp")
_TEXT_KV = ("to_k", "to_v")

_DUAL_TEMPORAL = (f"{DUAL_BLOCK}.norm1.linear", f"{DUAL_BLOCK}.norm1_context.linear")
_DUAL_SHARED_INPUTS = ((f"{DUAL_BLOCK}.attn", QKV), (f"{DUAL_BLOCK}.attn", ADDED_QKV))
_VIDEO_FOLDS = (
    Fold("modulation", DUAL_BLOCK, ("norm1.linear",), below("attn", QKV), sections=((0, 1),)),
    Fold("modulation", DUAL_BLOCK, ("norm1.linear",), ("ff.net.0.proj",), sections=((3, 4),)),
    Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), ("ff_context.net.0.proj",), sections=((3, 4),)),
    Fold("value", DUAL_BLOCK, ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")),
)
_DUAL_FOLDS = (
    *_VIDEO_FOLDS,
    Fold("modulation", DUAL_BLOCK, ("norm1_context.linear",), below("attn", ADDED_QKV), sections=((0, 1),)),
)

HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    keep=("x_embedder.proj", "context_embedder.**", "time_text_embed.**", "norm_out.linear", "proj_out"),
    temporal=(*_DUAL_TEMPORAL, f"{SINGLE_BLOCK}.norm.linear"),
    shared_inputs=(*_DUAL_SHARED_INPUTS, (SINGLE_BLOCK, _SINGLE_READERS)),
    frames_dim=2,
    folds=(
        *_DUAL_FOLDS,
        Fold("modulation", SINGLE_BLOCK, ("norm.linear",), _SINGLE_READERS, sections=((0, 1),)),
        Fold("value", SINGLE_BLOCK, ("attn.to_v",), ("proj_out",), leading=True),
    ),
)

FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    name="HunyuanVideo Framepack",
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    keep=(*HUNYUAN_VIDEO.keep, "clean_x_embedder.**", "image_projection.**"),
)

HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo 1.5",
    classes=("HunyuanVideo15Transformer3DModel",),
    keep=(
        "x_embedder.proj",
        "image_embedder.**",
        "context_embedder.**",
        "context_embedder_2.**",
        "time_embed.**",
        "norm_out.linear",
        "proj_out",
    ),
    temporal=_DUAL_TEMPORAL,
    temporal_features=("time_embed.time_proj", "time_embed.timestep_embedder", "transformer_blocks.0.norm1.silu"),
    other_conditions=("time_embed.timestep_embedder_r",),  # where a step ends, in the super-resolution models
    shared_inputs=_DUAL_SHARED_INPUTS,
    frames_dim=2,
    folds=_DUAL_FOLDS,
)

# Attention to the text beside the joint one reads the text's rows of the same normed sequence.
MOTIF_VIDEO = Family(
    name="Motif-Video",
    classes=("MotifVideoTransformer3DModel",),
    keep=(
        "x_embedder.proj",
        "context_embedder.**",
        "image_embedder.**",
        "time_text_embed.**",
        "norm_out.linear",
        "proj_out",
    ),
    temporal=HUNYUAN_VIDEO.temporal,
    temporal_features=(
        "time_text_embed.time_proj",
        "time_text_embed.timestep_embedder",
        "transformer_blocks.0.norm1.silu",
    ),
    shared_inputs=(
        *HUNYUAN_VIDEO.shared_inputs,
        (f"{DUAL_BLOCK}.cross_attn", _TEXT_KV),
        (f"{SINGLE_BLOCK}.cross_attn", _TEXT_KV),
    ),
    frames_dim=2,
    folds=(
        *_VIDEO_FOLDS,
        Fold(
            "modulation",
            DUAL_BLOCK,
            ("norm1_context.linear",),
            (*below("attn", ADDED_QKV), *below("cross_attn", _TEXT_KV)),
            sections=((0, 1),),
        ),
        Fold("value", DUAL_BLOCK, ("cross_attn.to_v",), ("cross_attn.to_out.0",)),
        Fold(
            "modulation",
            SINGLE_BLOCK,
            ("norm.linear",),
            (*_SINGLE_READERS, *below("cross_attn", _TEXT_KV)),
            sections=((0, 1),),
        ),
        # proj_out reads the sum of both attentions, and cross_attn.to_q the first of them: no fold takes both.
        Fold("value", SINGLE_BLOCK, ("cross_attn.to_v",), ("cross_attn.to_out.0",)),
    ),
)

FAMILIES = (HUNYUAN_VIDEO, FRAMEPACK, HUNYUAN_VIDEO_15, MOTIF_VIDEO)
