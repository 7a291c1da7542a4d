"""Video UNets (AnimateDiff, Stable Video Diffusion, ModelScope, I2VGen-XL) and what belongs to them."""

from __future__ import annotations

from dataclasses import replace

from qvd_core.families.family import Family, Fold
from qvd_core.families.names import QKV


def _block_folds(block: str, attentions: tuple[tuple[str, ...], ...], positions: bool = False) -> tuple[Fold, ...]:
    """Folds of a norm1-attn1-norm2-attn2-norm3-ff block.

    attentions: what of attn1, attn2 reads the norm before it. positions: whether embeddings are added after those
    norms. The value projections have no bias that could take a shift.
    """
    folds: list[Fold] = []
    for number, children in enumerate(attentions, start=1):
        readers = tuple(f"attn{number}.{child}" for child in children)
        folds.append(Fold("norm", block, (f"norm{number}",), readers, scale=not positions))
        folds.append(Fold("value", block, (f"attn{number}.to_v",), (f"attn{number}.to_out.0",)))
    folds.append(Fold("norm", block, ("norm3",), ("ff.net.0.proj",)))
    folds.append(Fold("gate", block, ("ff.net.0.proj",), ("ff.net.2",)))
    return tuple(folds)


_MOTION = "**.motion_modules.*"
_SPATIAL = "**.attentions.*"

ANIMATEDIFF = Family(
    name="AnimateDiff",
    classes=("UNetMotionModel",),
    keep=("conv_in", "conv_out", "time_embedding.**", "add_embedding.**", "encoder_hid_proj.**"),
    temporal=("**.time_emb_proj",),
    temporal_features=("time_proj", "time_embedding", "mid_block.resnets.0.nonlinearity"),
    other_conditions=("add_embedding",),
    shared_inputs=(
        (f"{_MOTION}.transformer_blocks.*.attn1", QKV),
        (f"{_MOTION}.transformer_blocks.*.attn2", QKV),
        (f"{_SPATIAL}.transformer_blocks.*.attn1", QKV),
        (f"{_SPATIAL}.transformer_blocks.*.attn2", ("to_k", "to_v")),
    ),
    prompt_inputs=tuple(f"{_SPATIAL}.transformer_blocks.*.attn2.{layer}" for layer in ("to_k", "to_v")),
    sample_argument="sample",
    frames_dim=2,
    frame_order=((f"{_MOTION}.**", "minor"), ("**", "major")),
    folds=(
        Fold("norm", _MOTION, ("norm",), ("proj_in",)),
        Fold("norm", _SPATIAL, ("norm",), ("proj_in",)),
        *_block_folds(f"{_MOTION}.transformer_blocks.*", (QKV, QKV), positions=True),
        *_block_folds(f"{_SPATIAL}.transformer_blocks.*", (QKV, ("to_q",))),
    ),
)

SVD = Family(
    name="Stable Video Diffusion",
    classes=("UNetSpatioTemporalConditionModel",),
    keep=("conv_in", "conv_out", "time_embedding.**", "add_embedding.**", "**.time_pos_embed.**"),
    temporal=("**.time_emb_proj",),
    shared_inputs=tuple(
        (f"{_SPATIAL}.{blocks}.*.{attention}", children)
        for blocks in ("transformer_blocks", "temporal_transformer_blocks")
        for attention, children in (("attn1", QKV), ("attn2", ("to_k", "to_v")))
    ),
    prompt_inputs=tuple(
        f"{_SPATIAL}.{blocks}.*.attn2.{layer}"
        for blocks in ("transformer_blocks", "temporal_transformer_blocks")
        for layer in ("to_k", "to_v", "to_out.0")  # the image is one token: all attend to it alone
    ),
    sample_argument="sample",
    frames_dim=1,
    frame_order=(
        (f"{_SPATIAL}.temporal_transformer_blocks.**", "minor"),
        ("**.temporal_res_block.*", None),  # convolutions over time: a clip is one image
        ("**", "major"),
    ),
    folds=(
        Fold("norm", _SPATIAL, ("norm",), ("proj_in",)),
        Fold("norm", f"{_SPATIAL}.temporal_transformer_blocks.*", ("norm_in",), ("ff_in.net.0.proj",)),
        Fold("gate", f"{_SPATIAL}.temporal_transformer_blocks.*", ("ff_in.net.0.proj",), ("ff_in.net.2",)),
        *_block_folds(f"{_SPATIAL}.transformer_blocks.*", (QKV, ("to_q",))),
        *_block_folds(f"{_SPATIAL}.temporal_transformer_blocks.*", (QKV, ("to_q",))),
    ),
)

_OVER_TIME = "**.temp_attentions.*"

MODELSCOPE = Family(
    name="ModelScope",
    classes=("UNet3DConditionModel",),
    keep=("conv_in", "conv_out", "transformer_in.**", "time_embedding.**"),
    temporal=("**.time_emb_proj",),
    temporal_features=("time_proj", "time_embedding", "mid_block.resnets.0.nonlinearity"),
    shared_inputs=(
        (f"{_OVER_TIME}.transformer_blocks.*.attn1", QKV),
        (f"{_OVER_TIME}.transformer_blocks.*.attn2", QKV),
        (f"{_SPATIAL}.transformer_blocks.*.attn1", QKV),
        (f"{_SPATIAL}.transformer_blocks.*.attn2", ("to_k", "to_v")),
    ),
    prompt_inputs=ANIMATEDIFF.prompt_inputs,
    sample_argument="sample",
    frames_dim=2,
    frame_order=(
        (f"{_OVER_TIME}.**", "minor"),
        ("**.temp_convs.**", None),  # convolutions over time: a clip is one image
        ("**", "major"),
    ),
    folds=(
        Fold("norm", _OVER_TIME, ("norm",), ("proj_in",)),
        Fold("norm", _SPATIAL, ("norm",), ("proj_in",)),
        *_block_folds(f"{_OVER_TIME}.transformer_blocks.*", (QKV, QKV)),
        *_block_folds(f"{_SPATIAL}.transformer_blocks.*", (QKV, ("to_q",))),
    ),
)

I2VGEN_XL = replace(
    MODELSCOPE,
    name="I2VGen-XL",
    classes=("I2VGenXLUNet",),
    keep=(
        *MODELSCOPE.keep,
        "fps_embedding.**",
        "context_embedding.**",
        "image_latents_proj_in.**",
        "image_latents_temporal_encoder.**",
        "image_latents_context_embedding.**",
    ),
    temporal_features=(),  # the embedding holds the frame rate besides
)

MOTION_ADAPTER = Family(
    name="Motion adapter",
    classes=("MotionAdapter",),
    keep=(),
    shared_inputs=ANIMATEDIFF.shared_inputs[:2],
    timestep_argument="",  # its modules run inside a UNet
    sample_argument="sample",
    folds=(
        Fold("norm", _MOTION, ("norm",), ("proj_in",)),
        *_block_folds(f"{_MOTION}.transformer_blocks.*", (QKV, QKV), positions=True),
    ),
)

SPARSE_CONTROL = Family(
    name="SparseCtrl",
    classes=("SparseControlNetModel",),
    keep=(
        "conv_in",
        "controlnet_cond_embedding.**",
        "time_embedding.**",
        # The ways out of the control branch start at zero and add to the denoiser's own stream.
        "controlnet_down_blocks.*",
        "controlnet_mid_block",
    ),
    temporal=("**.time_emb_proj",),
    temporal_features=ANIMATEDIFF.temporal_features,
    shared_inputs=(ANIMATEDIFF.shared_inputs[0], *ANIMATEDIFF.shared_inputs[2:]),  # its motion modules have no attn2
    prompt_inputs=ANIMATEDIFF.prompt_inputs,
    sample_argument="sample",
    frames_dim=2,
    frame_order=ANIMATEDIFF.frame_order,
    folds=(
        Fold("norm", _MOTION, ("norm",), ("proj_in",)),
        Fold("norm", _SPATIAL, ("norm",), ("proj_in",)),
        *_block_folds(f"{_MOTION}.transformer_blocks.*", (QKV,), positions=True),
        *_block_folds(f"{_SPATIAL}.transformer_blocks.*", (QKV, ("to_q",))),
    ),
)

TEMPORAL_TRANSFORMER = Family(
    name="Temporal transformer",
    classes=("TransformerTemporalModel",),
    keep=("proj_in", "proj_out"),
    shared_inputs=tuple((f"transformer_blocks.*.{attention}", QKV) for attention in ("attn1", "attn2")),
    folds=_block_folds("transformer_blocks.*", (QKV, QKV)),
)

FAMILIES = (ANIMATEDIFF, SVD, MODELSCOPE, I2VGEN_XL, MOTION_ADAPTER, SPARSE_CONTROL, TEMPORAL_TRANSFORMER)
